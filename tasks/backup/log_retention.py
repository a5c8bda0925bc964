"""Which shipped logs stay: all from the first on that a kept backup needs. A pure function; deleting is tasks.backup.prune_logs'.

There is one cut and no more: what lies behind it stays, needed or not, so that nothing that stays has a hole in it. In doubt all stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

Mark = tuple[int, int]
"""(series, number): the place of a log among those of its database."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a kept backup needs of the shipped logs: `first` and all that come after it; None: it cannot be rolled forward by any."""

    backup_id: str
    first: Mark | None


@dataclass(frozen=True, slots=True)
class Decision:
    """Logs before `first` go; None: none goes."""

    first: Mark | None
    rule: str

    def goes(self, mark: Mark) -> bool:
        return self.first is not None and mark < self.first


def decide(there: Collection[Mark], needs: Iterable[Need]) -> Decision:
    """The last log of all stays in any case: shipping goes on from it."""
    known = list(needs)
    if not there:
        return Decision(None, "no log of it is there")
    if not known:
        return Decision(None, "no backup of it is kept, so all of its logs stay")
    standing = sorted((one.first, one.backup_id) for one in known if one.first is not None)
    if not standing:
        return Decision(None, "no backup that is kept stands in its logs, so all of them stay")
    first, backup_id = standing[0]
    return Decision(min(first, max(there)), f"before all that a kept backup needs; the first is of {backup_id}")
