"""Deletes the shipped logs that no kept backup can use any more, oldest first, in rounds between which shipments and backups have their turn."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import ConflictError, LockedError, StorageError
from tasks.backup import garbage, ledger, log_plan
from tasks.backup.log_lock import DELETING, shipping
from tasks.backup.log_plan import Item, Logs, OfDatabase

if TYPE_CHECKING:
    from tasks.backup.manifest import Manifest
    from tasks.backup.places import Place
    from tasks.backup.repository import Repository

SECONDS = 240.0
"""A round deletes for so long: meanwhile nothing is shipped, and no backup begins. Between two rounds both have their turn."""
ROUNDS = 30
"""Of one run. The next run goes on."""
PAUSE_SECONDS = 2.0
"""Between two rounds: longer than those who wait take to look again."""
OVER = f"{SECONDS:g} s are over"
WAIT_SECONDS = 120.0
"""For a shipment that is under way."""
REFUSALS = 3
"""So many in a row, and the rest of that database waits: it was locked later still."""

Record = Callable[[str, Sequence[str]], None]
"""Puts on record which logs of a database went."""


def carry_out(
    repository: Repository,
    home: Path,
    *,
    now: dt.datetime,
    grace: dt.timedelta,
    say: Callable[[str], None] = lambda _: None,
    record: Record = lambda _database, _removed: None,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    wait_seconds: float = WAIT_SECONDS,
    locked_for: dt.timedelta | None = None,
) -> Logs:
    """Delete what no backup needs that is there now or was `grace` ago. Killed at any moment, another call goes on.

    Nothing is deleted while a manifest cannot be read, a place does not answer, or a backup or a shipment is under way. No database
    waits for the logs of another: in each round each has its share of the time. `locked_for`: how long a place that locks does so; one
    that keeps a log for longer is a trouble. `record` gets what went of a database as soon as its share of a round ends, however it ends.
    """
    locked_since = None if locked_for is None else now - locked_for
    found = Logs()
    for number in range(ROUNDS):
        if number:
            sleep(PAUSE_SECONDS)
        latest = _round(repository, home, now - grace, locked_since, say, record, monotonic, wait_seconds)
        found = _joined(found, latest)
        if latest.waits is not None or not any(one.waits == OVER for one in latest.databases):
            break
    return found


def _round(
    repository: Repository,
    home: Path,
    since: dt.datetime,
    locked_since: dt.datetime | None,
    say: Callable[[str], None],
    record: Record,
    monotonic: Callable[[], float],
    wait_seconds: float,
) -> Logs:
    done: list[OfDatabase] = []
    try:
        kept, why = _kept(repository)
        found = log_plan.preview(repository, kept, since)
        if (why := why or found.waits) is not None or not any(one.goes for one in found.databases):
            return replace(found, waits=why)
        with (
            shipping(home, doing=DELETING, wait_seconds=wait_seconds, monotonic=monotonic),
            garbage.deleting(repository, monotonic, doing=garbage.LOGS) as ours,
        ):
            kept, why = _kept(repository)  # with all others shut out, decided anew
            found = log_plan.preview(repository, kept, since)
            if (why := ours.waits or why or found.waits) is not None:
                return replace(found, waits=why)
            began, due = monotonic(), sum(bool(one.goes) for one in found.databases)
            for one in found.databases:
                share = sum(bool(each.goes) for each in (*done, one)) / max(due, 1)
                going = _Going(ours, monotonic, began + share * SECONDS)
                done.append(_deleted(repository, one, going, locked_since, record))
                if removed := done[-1].removed:
                    say(f"logs of {one.database}: {len(removed)} deleted, up to {removed[-1]}")
        for one in done:
            if one.removed and one.first is not None:
                ledger.note_logs_begin(home, one.database, one.first[0])
    except (ConflictError, LockedError) as error:
        return Logs(tuple(done), waits=str(error))
    except StorageError as error:
        return Logs(tuple(done), waits=str(error), failed=True)
    return Logs(tuple(done))


def _joined(before: Logs, latest: Logs) -> Logs:
    """What two rounds did, as one."""
    found = {one.database: one for one in before.databases}
    for one in latest.databases:
        first = found.get(one.database)
        if first is not None and first.goes:
            asked = {*one.removed, *one.refused}  # again: the latest answer counts
            one = replace(
                one,
                rule=first.rule, count=first.count, size_bytes=first.size_bytes, goes=first.goes, first=first.first,
                removed=(*first.removed, *one.removed), removed_bytes=first.removed_bytes + one.removed_bytes,
                refused={**{log: why for log, why in first.refused.items() if log not in asked}, **one.refused},
                unlocked={**{log: why for log, why in first.unlocked.items() if log not in asked}, **one.unlocked},
            )  # fmt: skip
        found[one.database] = one
    return replace(latest, databases=tuple(found.values()))


@dataclass(frozen=True, slots=True)
class _Going:
    """A deletion that is under way, until its time is over or its flag is gone."""

    flags: garbage.Deletion
    monotonic: Callable[[], float]
    until: float

    def stops(self) -> str | None:
        """Why it must, and None where it goes on."""
        if self.monotonic() >= self.until:
            return OVER
        try:
            return None if self.flags.still_ours() else "the flag was taken away: a backup began"
        except StorageError as error:
            return str(error)


def _kept(repository: Repository) -> tuple[Sequence[Manifest], str | None]:
    """(the backups that are there, why that is not known). Raises StorageError."""
    scan = repository.scan()
    if scan.unanswered is not None:
        raise StorageError(scan.unanswered)
    return scan.manifests, scan.unbelieved


def _deleted(
    repository: Repository, one: OfDatabase, going: _Going, locked_since: dt.datetime | None, record: Record
) -> OfDatabase:
    removed: list[str] = []
    refused: dict[str, str] = {}
    unlocked: dict[str, str] = {}
    size = row = 0
    waits: str | None = None
    locks = False
    try:
        for item in one.goes:
            waits = f"{REFUSALS} in a row were not let go" if row == REFUSALS else going.stops()
            if waits is not None:
                break
            try:
                locks = any(map(_may_refuse, repository.all_places()))
                locks = locks and (locked_since is None or max(item.written) > locked_since)
                waits = _remove(repository, item, going)
            except StorageError as error:
                refused[item.shown] = str(error)
                if not locks:
                    unlocked[item.shown] = str(error)
                row += 1
                continue
            if waits is not None:
                break
            removed.append(item.shown)
            size, row = size + item.size_bytes, 0
    finally:
        if removed:
            record(one.database, removed)
    return replace(one, removed=tuple(removed), removed_bytes=size, refused=refused, unlocked=unlocked, waits=waits)


def _remove(repository: Repository, item: Item, going: _Going) -> str | None:
    """Its documents first, at every place: what has none is no log, and a piece that is missing harms nobody. Where a place may refuse, it
    is asked first, so that no other copy is gone that the next shipment would bring back from there. Raises StorageError.

    Returns why it stopped in the middle, which can be long: a base backup has thousands of pieces. The next run finds those that are left.
    """
    places = list(enumerate(repository.all_places()))
    places.sort(key=lambda one: not _may_refuse(one[1]))
    for number, place in places:
        if (name := item.documents.get(number)) is not None:
            place.delete(name)
    for number, place in places:
        for name in item.pieces.get(number, ()):
            if (why := going.stops()) is not None:
                return why
            place.delete(name)
        _tidy(place, item)
    return None


def _may_refuse(place: Place) -> bool:
    can_lock: Callable[[], bool] | None = getattr(place, "can_lock", None)
    return can_lock is not None and can_lock()


def _tidy(place: Place, item: Item) -> None:
    """Folders that are empty now, where a place has folders."""
    remove_empty: Callable[[str], None] | None = getattr(place, "remove_empty", None)
    if remove_empty is not None:
        for name in item.pieces.values():
            with contextlib.suppress(StorageError):  # an empty folder harms nobody
                remove_empty(name[0].rpartition("/")[0])
