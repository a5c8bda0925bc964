"""Shipped logs that no kept backup can use any more: shown with their rule, deleted oldest first where that is asked for."""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import ArtifactError, ConflictError, LockedError, NotFoundError, StorageError
from tasks.backup import garbage, ledger, logs, point, states
from tasks.backup.log_lock import shipping
from tasks.backup.log_retention import Decision, Mark, Need, decide
from tasks.backup.logs import BASE, Shelf
from tasks.backup.manifest import COMPLETE, FAILED, Component, Manifest, ManifestError

if TYPE_CHECKING:
    from tasks.backup.places import Place
    from tasks.backup.repository import Repository

_NAME = re.compile(r"logs/([^/]+)/(\d{6})/([^/]+?)(\.json|\.pieces/[^/]+)")
SECONDS = 240.0
"""One run deletes for so long: meanwhile nothing is shipped, and no backup begins. The next one goes on."""
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
    waits: str | None = None
    """Why the rest was left to the next run."""

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
    """`waits`: why nothing was deleted of any database."""

    databases: tuple[OfDatabase, ...] = ()
    waits: str | None = None

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
        return {f"logs of {one.database}": one.unreadable for one in self.databases if one.unreadable is not None}

    def lines(self, *, applied: bool) -> list[str]:
        said = [one.text(applied=applied) for one in self.databases]
        return said + ([f"no log is deleted: {self.waits}"] if self.waits else [])


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
    wait_seconds: float = WAIT_SECONDS,
) -> Logs:
    """Delete what no backup needs that is there now or was `grace` ago. Killed at any moment, another call goes on.

    Nothing is deleted while a manifest cannot be read, a place does not answer, or a backup or a shipment is under way.
    """
    done: list[OfDatabase] = []
    try:
        kept, why = _kept(repository)
        found = preview(repository, kept, now - grace)
        if (why := why or found.waits) is not None or not any(one.goes for one in found.databases):
            return replace(found, waits=why)
        with (
            shipping(home, wait_seconds=wait_seconds, monotonic=monotonic),
            garbage.deleting(repository, monotonic) as ours,
        ):
            kept, why = _kept(repository)  # with all others shut out, decided anew
            found = preview(repository, kept, now - grace)
            if ours.running is not None:
                why = f"backup {ours.running} is under way"
            if (why := why or found.waits) is not None:
                return replace(found, waits=why)
            until = monotonic() + SECONDS
            for one in found.databases:
                done.append(_deleted(repository, one, ours, lambda: monotonic() < until))
                if done[-1].removed:
                    say(done[-1].text(applied=True))
        for one in done:
            if one.removed and one.first is not None:
                ledger.note_logs_begin(home, one.database, one.first[0])
    except (ConflictError, LockedError, StorageError) as error:
        return Logs(tuple(done), waits=str(error))
    return Logs(tuple(done))


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
        for note in repository.states(backup_id):
            if note.state == states.DAMAGED:
                return (
                    [],
                    f"a note of backup {backup_id}, which was pruned lately, cannot be read: {note.facts.get('why')}",
                )
            for one in note.facts.get("logs", ()) if note.state == states.PRUNED else ():
                part = Component(
                    one["name"], one["kind"], COMPLETE, one["began_at"], one["began_at"], snapshot=one["snapshot"]
                )
                found.append((backup_id, part))
    return found, "; ".join(repository.down.values()) or None


def unread(broken: Mapping[str, str]) -> str:
    """Why nothing is deleted while these manifests cannot be read."""
    return "; ".join(f"backup {one} cannot be read: {why}" for one, why in sorted(broken.items()))


def _kept(repository: Repository) -> tuple[Sequence[Manifest], str | None]:
    """(the backups that are there, why that is not known)."""
    scan = repository.scan()
    if scan.unread:
        return (), "; ".join(f"{place} does not answer: {why}" for place, why in sorted(scan.unread.items()))
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

    def needs(stands: Iterable[Stand]) -> list[Need]:
        shelf, name = Shelf(repository, database), f"database:{database}"
        return [Need(backup_id, _first(shelf, names, part)) for backup_id, part in stands if part.name == name]

    of_kept = needs(kept)
    decision: Decision = decide(there, of_kept)
    if decision.first is not None:  # one that is gone can move the cut back, and is no reason for one
        decision = decide(there, [*of_kept, *needs(pruned)])
    goes = tuple(one for one in items if decision.goes(one.mark))
    size = sum(one.size_bytes for one in items)
    return OfDatabase(database, decision.rule, len(items), size, goes, first=decision.first)


def _first(shelf: Shelf, names: Sequence[tuple[int, str]], component: Component) -> Mark | None:
    """The first log that a recovery of the component to any moment after it reads: as `point.plan` chooses it."""
    if component.kind == "postgresql":
        return _base_before(shelf, names, component)
    start = dict(component.snapshot.get("binlog") or {})
    if not start:
        return None
    held = point.holding(shelf, start, names)
    if held is not None:
        return held.series, held.number
    # A longer copy of the log may be still to come, or the document was deleted and can be put back: what would follow it stays.
    file = str(start["file"])
    least = logs.number(file)
    later = [
        (series, logs.number(log))
        for series, log in names
        if logs.base(log) == logs.base(file) and logs.number(log) >= least
    ]
    return min(later, default=None)


def _base_before(shelf: Shelf, names: Sequence[tuple[int, str]], component: Component) -> Mark | None:
    moments = [component.began_at, str(component.snapshot.get("began_at") or component.began_at)]
    moment = min(map(dt.datetime.fromisoformat, moments))
    for series, log in reversed(names):
        if log.endswith(BASE) and dt.datetime.fromisoformat(shelf.read(series, log).covers_until) <= moment:
            return series, logs.number(log)
    return min(((series, logs.number(log)) for series, log in names), default=None)


def _deleted(
    repository: Repository, one: OfDatabase, flags: garbage.Deletion, in_time: Callable[[], bool]
) -> OfDatabase:
    removed: list[str] = []
    refused: dict[str, str] = {}
    size = row = 0
    waits = None
    for item in one.goes:
        if not in_time():
            waits = f"{SECONDS:g} s are over"
        elif not flags.still_ours():
            waits = "the flag was taken away: a backup began"
        elif row == REFUSALS:
            waits = f"{REFUSALS} in a row were not let go"
        if waits is not None:
            break
        try:
            _remove(repository, item)
        except StorageError as error:
            refused[item.shown] = str(error)
            row += 1
            continue
        removed.append(item.shown)
        size, row = size + item.size_bytes, 0
    return replace(one, removed=tuple(removed), removed_bytes=size, refused=refused, waits=waits)


def _remove(repository: Repository, item: Item) -> None:
    """Its documents first, at every place: what has none is no log, and a piece that is missing harms nobody. Where a place may refuse, it
    is asked first, so that no other copy is gone that the next shipment would bring back from there. Raises StorageError.
    """
    places = list(enumerate(repository.all_places()))
    places.sort(key=lambda one: not _may_refuse(one[1]))
    for number, place in places:
        if (name := item.documents.get(number)) is not None:
            place.delete(name)
    for number, place in places:
        for name in item.pieces.get(number, ()):
            place.delete(name)
        _tidy(place, item)


def _may_refuse(place: Place) -> bool:
    can_lock: Callable[[], bool] | None = getattr(place, "can_lock", None)
    return can_lock is not None and can_lock()


def _tidy(place: Place, item: Item) -> None:
    """Folders that are empty now, where a place has folders."""
    remove_empty: Callable[[str], None] | None = getattr(place, "remove_empty", None)
    if remove_empty is not None:
        for name in item.pieces.values():
            remove_empty(name[0].rpartition("/")[0])
