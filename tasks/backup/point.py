"""A point in time: which shipped logs lead from a backup of a database to a moment, and the database as it was then."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import clock
from registry.errors import NotFoundError
from tasks.backup import binlog
from tasks.backup.components import Source
from tasks.backup.logs import Shelf, Shipped
from tasks.backup.manifest import Component
from tasks.backup.repository import Repository

KINDS = ("mariadb", "postgresql")
"""The kinds of components whose logs this release can apply."""


@dataclass(frozen=True, slots=True)
class Point:
    """The way from a backup to a moment. `reaches`: the content is that of then, `moment` or, where the logs end before, their end."""

    component: str
    moment: dt.datetime
    reaches: str
    start: dict[str, Any]
    logs: tuple[Shipped, ...]
    short: str | None = None
    """Why it does not reach the moment."""

    @property
    def text(self) -> str:
        names = (
            f"{self.logs[0].log} to {self.logs[-1].log}"
            if len(self.logs) > 1
            else self.logs[0].log
            if self.logs
            else "no log"
        )
        return f"{names}, up to {self.reaches}"

    @property
    def size_bytes(self) -> int:
        return sum(one.size_bytes for one in self.logs)

    def as_dict(self) -> dict[str, Any]:
        return {
            "at": clock.text(self.moment),
            "reaches": self.reaches,
            "from": self.start,
            "logs": [one.log for one in self.logs],
            "log_bytes": self.size_bytes,
            "short": self.short,
        }


def holding(shelf: Shelf, start: dict[str, Any]) -> Shipped | None:
    """The shipped log in which a backup's position lies. That its GTIDs are those at that very place is seen at the replay."""
    return next(holders(shelf, start, shelf.names()), None)


def holders(shelf: Shelf, start: dict[str, Any], names: Sequence[tuple[int, str]]) -> Iterator[Shipped]:
    """All in which it may lie, newest first: after a RESET MASTER another may have that name, and GTIDs that include its own."""
    at = binlog.state(str(start.get("gtid", "")))
    for series, log in reversed(names):
        if log != start.get("file"):
            continue
        found = shelf.read(series, log)
        before, after = binlog.state(found.begins_with), binlog.state(found.ends_with)
        if (
            found.server == start.get("server")
            and int(start["position"]) <= found.size_bytes
            and _reaches(at, before)
            and _reaches(after, at)
        ):
            yield found


def _reaches(there: binlog.State, wanted: binlog.State) -> bool:
    """Whether in every domain it is as far as that."""
    return all(domain in there and _sequence(there[domain]) >= _sequence(one) for domain, one in wanted.items())


def _sequence(gtid: str) -> int:
    return int(gtid.rpartition("-")[2])


def plan(repository: Repository, component: Component, moment: dt.datetime) -> Point:
    """Raises NotFoundError, in words that fit behind "only the backup comes back: ", where no logs lead there; ManifestError,
    StorageError.
    """
    if component.kind == "postgresql":
        from tasks.backup import point_postgresql

        return point_postgresql.plan(repository, component, moment)
    name = component.name.partition(":")[2]
    shelf = Shelf(repository, name)
    start = dict(component.snapshot.get("binlog") or {})
    if not start:
        why = component.snapshot.get("why")
        raise NotFoundError(
            "the backup does not know where the server's log stood"
            + (f" ({why})" if why else " (log_bin was off, or its user may not see it)")
        )
    began = str(component.snapshot.get("began_at") or component.ended_at)
    if dt.datetime.fromisoformat(began) > moment:
        raise NotFoundError(f"its dump is of {began}, which is later")
    short: str | None
    head = shelf.head()
    if head is None:
        raise NotFoundError(f"no logs of {name} were ever shipped ([backup] logs)")
    first = holding(shelf, start)
    if first is None:
        if start.get("server") == head.server and start.get("file") == head.position.get("file"):
            same = binlog.state(str(head.position.get("gtid", ""))) == binlog.state(str(start.get("gtid", "")))
            reaches = min(clock.text(moment), max(began, head.covers_until)) if same else began
            short = None if reaches == clock.text(moment) else f"nothing was shipped since {head.covers_until}"
            return Point(component.name, moment, reaches, start, (), short)
        raise NotFoundError(
            f"the log {start.get('file')}, in which the backup stands, was not shipped or is of another server"
        )
    chain = [first]
    short = None
    until = _second(moment)
    names = [log for series, log in shelf.names() if series == first.series]
    for log in names[names.index(first.log) + 1 :]:
        if _stops(chain[-1], until):
            break
        following = shelf.read(first.series, log)
        if following.begins_with != chain[-1].ends_with:
            short = f"a log between {chain[-1].log} and {log} is missing in {', '.join(repository.shown)}"
            break
        chain.append(following)
    reaches = clock.text(moment)
    if not _stops(chain[-1], until):
        ends = chain[-1].covers_until
        if short is None and head.series == first.series and head.log == chain[-1].log:
            ends = max(ends, head.covers_until)
        if dt.datetime.fromisoformat(ends) < moment:
            reaches = max(ends, began)
            after = [series for series, _ in shelf.names() if series > first.series]
            if short is None and after:
                short = str(shelf.begins(after[0]).get("why", "the logs after it do not follow"))
            elif short is None and head.series == first.series and head.log not in names:
                short = f"the shipped log {head.log} is missing in {', '.join(repository.shown)}"
            elif short is None:
                short = f"nothing was shipped since {ends}"
    return Point(component.name, moment, reaches, start, tuple(chain), short)


def _second(moment: dt.datetime) -> int:
    """The log knows seconds only: what was committed in the second of the moment, or later, does not come back."""
    return int(moment.timestamp())


def _stops(one: Shipped, until: int) -> bool:
    return one.last_at is not None and dt.datetime.fromisoformat(one.last_at).timestamp() >= until


def until(point: Point) -> int:
    """The first second, since 1970, whose commits do not come back."""
    return _second(point.moment)


@contextlib.contextmanager
def source(
    repository: Repository, backup: Source, where: Point, folder: Path, *, say: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[Source, dict[str, Any]]]:
    """(the component at the moment, what was applied): made in a private server below `folder`, which is gone afterwards."""
    from tasks.backup import point_mariadb, point_postgresql

    of_kind = point_postgresql.source if backup.record.kind == "postgresql" else point_mariadb.source
    with of_kind(repository, backup, where, folder, say=say) as found:
        yield found
