"""Shipped logs that no kept backup can use any more: shown with their rule, deleted oldest first where that is asked for."""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import ArtifactError, ConflictError, LockedError, ModelkeepError, NotFoundError, StorageError
from tasks.backup import garbage, ledger, logs, point, states
from tasks.backup.log_lock import DELETING, shipping
from tasks.backup.log_retention import Decision, Mark, Need, decide
from tasks.backup.logs import BASE, Shelf
from tasks.backup.manifest import COMPLETE, FAILED, Component, Manifest, ManifestError

if TYPE_CHECKING:
    from tasks.backup.places import Place
    from tasks.backup.repository import Repository

_NAME = re.compile(r"logs/([^/]+)/(\d{6})/([^/]+?)(\.json|\.pieces/[^/]+)")
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


@dataclass(frozen=True, slots=True)
class Item:
    """A log as it lies in the places: {number of a place: names}. `size_bytes`: what one copy takes there."""

    series: int
    log: str
    documents: dict[int, str] = field(default_factory=dict)
    pieces: dict[int, list[str]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    written: list[dt.datetime] = field(default_factory=list)
    """When the newest of it was, alone in a list."""

    @property
    def mark(self) -> Mark:
        return self.series, logs.number(self.log)

    @property
    def size_bytes(self) -> int:
        return max(self.sizes.values(), default=0)

    @property
    def shown(self) -> str:
        return f"{self.series:06d}/{self.log}"


@dataclass(frozen=True, slots=True)
class OfDatabase:
    """The decision on the logs of one database, and what became of it. Sizes are of one copy, as it is stored."""

    database: str
    rule: str
    count: int = 0
    size_bytes: int = 0
    goes: tuple[Item, ...] = ()
    unreadable: str | None = None
    """Why nothing is decided: what a backup needs cannot be told."""
    first: Mark | None = None
    removed: tuple[str, ...] = ()
    removed_bytes: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    """Logs that a place did not let go (an object lock), with its words: the next run asks again."""
    unlocked: str | None = None
    """The words of a refusal that no object lock explains."""
    waits: str | None = None
    """Why the rest was left to the next run."""

    @property
    def trouble(self) -> str | None:
        """What somebody must look at: it will not be better by itself."""
        if self.unreadable is not None:
            return f"all stay: {self.unreadable}"
        return None if self.unlocked is None else f"could not be deleted, and are not locked: {self.unlocked}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "database": self.database,
            "rule": self.rule,
            "count": self.count,
            "size_bytes": self.size_bytes,
            "goes": [{"log": one.shown, "size_bytes": one.size_bytes} for one in self.goes],
            "unreadable": self.unreadable,
            "removed": list(self.removed),
            "removed_bytes": self.removed_bytes,
            "refused": self.refused,
            "waits": self.waits,
        }

    def text(self, *, applied: bool) -> str:
        """A line for people, without sizes."""
        if self.unreadable is not None:
            return f"logs of {self.database}: all stay, because {self.unreadable}"
        if not self.goes:
            return f"logs of {self.database}: {self.count} stay" + (f": {self.rule}" if self.first is None else "")
        span = self.goes[0].shown + (f" to {self.goes[-1].shown}" if len(self.goes) > 1 else "")
        if not applied:
            return f"logs of {self.database}: {len(self.goes)} of {self.count} go ({span}), {self.rule}"
        said = f"logs of {self.database}: {len(self.removed)} of {self.count} deleted, {self.rule}"
        if self.refused:
            name, why = next(iter(self.refused.items()))
            said += f"; {len(self.refused)} were not let go: {name}: {why}"
        return said + (f"; the rest waits: {self.waits}" if self.waits else "")


@dataclass(frozen=True, slots=True)
class Logs:
    """`waits`: why nothing, or no more, was deleted of any database. `failed`: that is a place's fault, and nothing to wait for."""

    databases: tuple[OfDatabase, ...] = ()
    waits: str | None = None
    failed: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {"databases": [one.as_dict() for one in self.databases], "waits": self.waits}

    @property
    def removed(self) -> dict[str, dict[str, Any]]:
        """For the record: by database the first and the last one that went, and how many."""
        return {
            one.database: {"count": len(one.removed), "first": one.removed[0], "last": one.removed[-1]}
            for one in self.databases
            if one.removed
        }

    @property
    def troubles(self) -> dict[str, str]:
        found = {f"logs of {one.database}": why for one in self.databases if (why := one.trouble) is not None}
        return {**found, "shipped logs": self.waits} if self.failed and self.waits else found

    @property
    def waiting(self) -> str | None:
        if self.waits is None:
            return None
        return f"{'no more logs are' if self.removed else 'no log is'} deleted: {self.waits}"

    def lines(self, *, applied: bool) -> list[str]:
        said = [one.text(applied=applied) for one in self.databases]
        return said + ([self.waiting] if self.waiting else [])


Stand = tuple[str, Component]
"""(backup, one of its databases)."""


def preview(repository: Repository, manifests: Iterable[Manifest], since: dt.datetime) -> Logs:
    """What goes while these backups are there, and those that were pruned after `since` may be in the middle of a recovery still.
    Changes nothing. Raises StorageError where a place does not answer.
    """
    kept = [(one.backup_id, part) for one in manifests for part in one.components if part.state != FAILED]
    pruned, waits = _pruned(repository, since)
    found = []
    for database, items in sorted(_listed(repository).items()):
        try:
            found.append(_decided(repository, database, items, kept, pruned))
        except (ArtifactError, ManifestError, NotFoundError, StorageError, KeyError, TypeError, ValueError) as error:
            why = f"what the backups need of them cannot be told: {error}"
            size = sum(one.size_bytes for one in items)
            found.append(OfDatabase(database, "", len(items), size, unreadable=why))
    return Logs(tuple(found), waits)


def carry_out(
    repository: Repository,
    home: Path,
    *,
    now: dt.datetime,
    grace: dt.timedelta,
    say: Callable[[str], None] = lambda _: None,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    wait_seconds: float = WAIT_SECONDS,
    locked_for: dt.timedelta | None = None,
) -> Logs:
    """Delete what no backup needs that is there now or was `grace` ago. Killed at any moment, another call goes on.

    Nothing is deleted while a manifest cannot be read, a place does not answer, or a backup or a shipment is under way. No database
    waits for the logs of another: in each round each has its share of the time. `locked_for`: how long a place that locks does so; one
    that keeps a log for longer is a trouble.
    """
    locked_since = None if locked_for is None else now - locked_for
    found = Logs()
    for number in range(ROUNDS):
        if number:
            sleep(PAUSE_SECONDS)
        latest = _round(repository, home, now - grace, locked_since, say, monotonic, wait_seconds)
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
    monotonic: Callable[[], float],
    wait_seconds: float,
) -> Logs:
    done: list[OfDatabase] = []
    try:
        kept, why = _kept(repository)
        found = preview(repository, kept, since)
        if (why := why or found.waits) is not None or not any(one.goes for one in found.databases):
            return replace(found, waits=why)
        with (
            shipping(home, doing=DELETING, wait_seconds=wait_seconds, monotonic=monotonic),
            garbage.deleting(repository, monotonic) as ours,
        ):
            kept, why = _kept(repository)  # with all others shut out, decided anew
            found = preview(repository, kept, since)
            if ours.running is not None:
                why = f"backup {ours.running} is under way"
            if (why := why or found.waits) is not None:
                return replace(found, waits=why)
            began, due = monotonic(), sum(bool(one.goes) for one in found.databases)
            for one in found.databases:
                share = sum(bool(each.goes) for each in (*done, one)) / max(due, 1)
                done.append(_deleted(repository, one, _Going(ours, monotonic, began + share * SECONDS), locked_since))
                if done[-1].removed:
                    say(done[-1].text(applied=True))
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
            one = replace(
                one,
                rule=first.rule, count=first.count, size_bytes=first.size_bytes, goes=first.goes, first=first.first,
                removed=(*first.removed, *one.removed), removed_bytes=first.removed_bytes + one.removed_bytes,
                refused={**{log: why for log, why in first.refused.items() if log not in one.removed}, **one.refused},
                unlocked=one.unlocked or first.unlocked,
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


def stands(manifest: Manifest) -> list[dict[str, Any]]:
    """Where a backup that is pruned stood in the logs, for the note of that: its manifest will be gone."""
    return [
        {"name": one.name, "kind": one.kind, "began_at": one.began_at, "snapshot": dict(one.snapshot)}
        for one in manifest.components
        if one.state != FAILED and one.kind in point.KINDS and one.name.startswith("database:")
    ]


def _pruned(repository: Repository, since: dt.datetime) -> tuple[list[Stand], str | None]:
    """(backups that were pruned after that moment, why that is not known). Raises StorageError."""
    late = {
        one.name.split("/")[1]
        for place in repository.all_places()
        for one in place.list("states/")
        if one.name.endswith(f"-{states.PRUNED}.json") and states.noted_at(one.name) > since
    }
    found = []
    for backup_id in sorted(late):
        try:
            for note in repository.states(backup_id):
                if note.state == states.DAMAGED:
                    raise ArtifactError(str(note.facts.get("why")))
                for one in note.facts.get("logs", ()) if note.state == states.PRUNED else ():
                    part = Component(
                        one["name"], one["kind"], COMPLETE, one["began_at"], one["began_at"], snapshot=one["snapshot"]
                    )
                    found.append((backup_id, part))
        except (ModelkeepError, KeyError, TypeError) as error:
            return [], f"a note of backup {backup_id}, which was pruned lately, cannot be read: {error}"
    if repository.down:
        raise StorageError("; ".join(repository.down.values()))
    return found, None


def unread(broken: Mapping[str, str]) -> str:
    """Why nothing is deleted while these manifests cannot be read."""
    return "; ".join(f"backup {one} cannot be read: {why}" for one, why in sorted(broken.items()))


def _kept(repository: Repository) -> tuple[Sequence[Manifest], str | None]:
    """(the backups that are there, why that is not known). Raises StorageError."""
    scan = repository.scan()
    if scan.unread:
        raise StorageError("; ".join(f"{place} does not answer: {why}" for place, why in sorted(scan.unread.items())))
    return scan.manifests, unread(scan.broken) or None


def _listed(repository: Repository) -> dict[str, list[Item]]:
    """By database all that lies there, oldest first; what cannot be ordered comes last, and stops the decision. Raises StorageError."""
    found: dict[str, dict[tuple[int, str], Item]] = {}
    for number, place in enumerate(repository.all_places()):
        for stat in place.list(f"{logs.ROOT}/"):
            match = _NAME.fullmatch(stat.name)
            if match is None:
                continue
            series, log = int(match[2]), match[3]
            item = found.setdefault(match[1], {}).setdefault((series, log), Item(series, log))
            if match[4] == ".json":
                item.documents[number] = stat.name
            else:
                item.pieces.setdefault(number, []).append(stat.name)
            item.sizes[number] = item.sizes.get(number, 0) + stat.size_bytes
            item.written[:] = [max(*item.written, stat.modified)] if item.written else [stat.modified]
    return {database: sorted(items.values(), key=_order) for database, items in found.items()}


def _order(item: Item) -> tuple[int, int]:
    try:
        return item.mark
    except ArtifactError:
        return item.series, 1 << 128


def _decided(
    repository: Repository, database: str, items: Sequence[Item], kept: Iterable[Stand], pruned: Iterable[Stand]
) -> OfDatabase:
    names = [(one.series, one.log) for one in items if one.documents]
    there = [(series, logs.number(log)) for series, log in names]
    shelf, name = Shelf(repository, database), f"database:{database}"

    @cache
    def covers(series: int, log: str) -> dt.datetime:
        return dt.datetime.fromisoformat(shelf.read(series, log).covers_until)

    def needs(stands: Iterable[Stand]) -> list[Need]:
        return [
            Need(
                backup_id,
                _base_before(names, covers, part) if part.kind == "postgresql" else _first(shelf, names, part),
            )
            for backup_id, part in stands
            if part.name == name
        ]

    of_kept = needs(kept)
    decision: Decision = decide(there, of_kept)
    if decision.first is not None:  # one that is gone can move the cut back, and is no reason for one
        decision = decide(there, [*of_kept, *needs(pruned)])
    goes = tuple(one for one in items if decision.goes(one.mark))
    size = sum(one.size_bytes for one in items)
    return OfDatabase(database, decision.rule, len(items), size, goes, first=decision.first)


def _first(shelf: Shelf, names: Sequence[tuple[int, str]], component: Component) -> Mark | None:
    """The first log that a recovery of a MariaDB to any moment after the backup reads: one of those that `point.plan` chooses from. Where
    several may be it, the oldest, since only the replay tells.
    """
    start = dict(component.snapshot.get("binlog") or {})
    if not start:
        return None
    held = [(one.series, one.number) for one in point.holders(shelf, start, names)]
    if held:
        return min(held)
    # A longer copy of the log may be still to come, or the document was deleted and can be put back: what would follow it stays.
    file = str(start["file"])
    least = logs.number(file)
    later = [
        (series, logs.number(log))
        for series, log in names
        if logs.base(log) == logs.base(file) and logs.number(log) >= least
    ]
    return min(later, default=None)


def _base_before(
    names: Sequence[tuple[int, str]], covers: Callable[[int, str], dt.datetime], component: Component
) -> Mark | None:
    """As `_first`, of a PostgreSQL: the base backup that `point_postgresql.plan` chooses for the moment of the backup."""
    moments = [component.began_at, str(component.snapshot.get("began_at") or component.began_at)]
    moment = min(map(dt.datetime.fromisoformat, moments))
    for series, log in reversed(names):
        if log.endswith(BASE) and covers(series, log) <= moment:
            return series, logs.number(log)
    return min(((series, logs.number(log)) for series, log in names), default=None)


def _deleted(repository: Repository, one: OfDatabase, going: _Going, locked_since: dt.datetime | None) -> OfDatabase:
    removed: list[str] = []
    refused: dict[str, str] = {}
    size = row = 0
    waits = unlocked = None
    locks = False
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
            unlocked = unlocked or (None if locks else f"{item.shown}: {error}")
            row += 1
            continue
        if waits is not None:
            break
        removed.append(item.shown)
        size, row = size + item.size_bytes, 0
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
