"""Which backup a recovery takes where nobody has named one."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING

from registry import clock
from registry.errors import NotFoundError, UsageError
from tasks.backup import ledger, selection, states
from tasks.backup.manifest import FAILED, Manifest

if TYPE_CHECKING:
    from tasks.backup.repository import Repository

SAFETY_COPY = "before a recovery"
"""The reason of a backup that a recovery takes of what it is about to replace."""


def newest_before(
    repository: Repository, moment: dt.datetime | None, asked: Sequence[str] = (), installation: str | None = None
) -> Manifest:
    """The newest verified backup whose content is from before `moment` (None: of all), and that holds what is `asked` for; where
    none is verified, the newest complete one. Raises NotFoundError.

    Where nothing is asked for by name, one of everything goes before one of some components (a daily one, say): a machine does not
    come back by it. Such a one holds the configuration. Without a moment a safety copy is not taken: it holds what somebody threw away.
    Where several installations share the location, one of `installation` is taken.
    """
    best: tuple[bool, bool, int, str] | None = None
    found: Manifest | None = None
    refused: UsageError | None = None
    for manifest in ledger.of_installation(repository.manifests(), installation):
        if moment is None and manifest.reason == SAFETY_COPY:
            continue
        try:
            chosen = selection.choose(manifest, asked)
        except UsageError as error:  # it was taken of something else
            refused = error
            continue
        if moment is not None and dt.datetime.fromisoformat(_taken(manifest, chosen)) > moment:
            continue
        standing = states.derive(manifest, repository.states(manifest.backup_id))
        if standing.state == FAILED:
            continue
        whole = bool(asked) or manifest.component("config") is not None
        # Of what is asked for by name the rest may be damaged or missing.
        verified = standing.state == states.VERIFIED or (
            bool(asked) and standing.verified >= {one.component.name for one in chosen}
        )
        rank = (whole, verified, manifest.sequence, manifest.backup_id)
        if best is None or rank > best:
            best, found = rank, manifest
    if found is None and refused is not None:
        raise refused
    if found is None:
        when = "" if moment is None else f" that was taken before {clock.text(moment)}"
        raise NotFoundError(f"there is no backup{when} in {', '.join(repository.shown)}: see modelkeep backups list")
    return found


def newer(repository: Repository, taken: Manifest, moment: dt.datetime | None) -> str | None:
    """What a later backup of some of the components holds, in words with the command; None where there is none."""
    later = [
        one
        for one in repository.manifests()
        if one.sequence > taken.sequence and one.installation == taken.installation and one.reason != SAFETY_COPY
        if moment is None or dt.datetime.fromisoformat(_taken(one, selection.choose(one, ()))) <= moment
        if states.derive(one, repository.states(one.backup_id)).state != FAILED
    ]
    if not later:
        return None
    last = max(later, key=lambda one: (one.sequence, one.backup_id))
    names = ", ".join(one.name for one in last.components if one.state != FAILED)
    return f"a newer backup holds {names} as of {last.began_at}; to bring these back after this: modelkeep recover --from {last.backup_id} --force"


def _taken(manifest: Manifest, chosen: Sequence[selection.Chosen]) -> str:
    """The latest moment that is in it: that of a snapshot, or the end where there is none."""
    ends = (one.component.snapshot.get("began_at") or one.component.ended_at for one in chosen)
    return max((str(one) for one in ends), default=manifest.began_at)
