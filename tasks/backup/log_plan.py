"""Which shipped logs no kept backup can use any more, by which rule, and what became of them. Reads only; deleting is tasks.backup.prune_logs'."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from registry.errors import ArtifactError, ModelkeepError, NotFoundError, StorageError
from tasks.backup import logs, point, states
from tasks.backup.log_retention import Decision, Mark, Need, decide
from tasks.backup.logs import BASE, Shelf
from tasks.backup.manifest import COMPLETE, FAILED, Component, Manifest, ManifestError

if TYPE_CHECKING:
    from tasks.backup.repository import Repository

_NAME = re.compile(r"logs/([^/]+)/(\d{6})/([^/]+?)(\.json|\.pieces/[^/]+)")


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
    unlocked: dict[str, str] = field(default_factory=dict)
    """Those of the refused that no object lock keeps, with the words of the place."""
    waits: str | None = None
    """Why the rest was left to the next run."""

    @property
    def trouble(self) -> str | None:
        """What somebody must look at: it will not be better by itself."""
        if self.unreadable is not None:
            return f"all stay: {self.unreadable}"
        if not self.unlocked:
            return None
        name, why = next(iter(self.unlocked.items()))
        return f"{len(self.unlocked)} could not be deleted, and are not locked: {name}: {why}"

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
        if self.unlocked:
            said += f"; {self.trouble}"
        if kept := {log: why for log, why in self.refused.items() if log not in self.unlocked}:
            name, why = next(iter(kept.items()))
            said += f"; {len(kept)} were not let go: {name}: {why}"
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
        """By database the first and the last one that went, and how many."""
        return {one.database: span(one.removed) for one in self.databases if one.removed}

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


def span(removed: Sequence[str]) -> dict[str, Any]:
    """Logs that went, for the record: the first, the last, and how many."""
    return {"count": len(removed), "first": removed[0], "last": removed[-1]}


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
