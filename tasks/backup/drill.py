"""The drill: the newest backup as if the machine were lost. Everything is restored into a private place, served, and compared with
what is live; how long that took and how old it is are measured; and a copy damaged in a known way must be found out.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry import clock, ledger
from registry.errors import ModelkeepError, NotFoundError, StorageError, UsageError
from registry.redaction import redact
from registry.settings import Settings
from tasks.backup import damage, drill_server, kinds, notifying, sweeping, targets
from tasks.backup import ledger as backup_ledger
from tasks.backup.components import Target
from tasks.backup.damage import Told
from tasks.backup.manifest import COMPLETE, Component, Manifest
from tasks.backup.progress import duration
from tasks.backup.recover import ORDER
from tasks.backup.repository import Repository, open_repository
from tasks.backup.selection import Chosen

HISTORY = "drills.json"
KEPT = 260
"""Drills of five years, one a week."""
FULL_WITHIN = dt.timedelta(days=1)
ROOM = 1.3
"""Free space that a drill wants, as a share of what it restores."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Restored:
    """One component. `rto_seconds`: how long it took to be restored and compared; `rpo_seconds`: how old its content is."""

    component: str
    kind: str
    size_bytes: int
    rpo_seconds: float
    rto_seconds: float | None = None
    failed: str | None = None
    unverifiable: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Drill:
    """What a drill found. It passed where everything came back and the damage was told of."""

    drill_id: str
    backup_id: str
    began_at: str
    components: tuple[Restored, ...]
    served: drill_server.Served
    negative: Told
    seconds: float
    failed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def rto_seconds(self) -> float:
        """One component after the other, and the server."""
        return sum(one.rto_seconds or 0.0 for one in self.components) + (self.served.seconds or 0.0)

    @property
    def rpo_seconds(self) -> float:
        return max((one.rpo_seconds for one in self.components), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "drill_id": self.drill_id,
            "backup_id": self.backup_id,
            "began_at": self.began_at,
            "state": "passed" if self.passed else "failed",
            "failed": list(self.failed),
            "rto_seconds": round(self.rto_seconds, 3),
            "rpo_seconds": round(self.rpo_seconds, 3),
            "components": [one.as_dict() for one in self.components],
            "served": self.served.as_dict(),
            "negative": self.negative.as_dict(),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class _Room:
    """Where a drill restores to."""

    folder: Path
    manifest: Manifest
    repository: Repository
    now: dt.datetime
    say: Say = field(repr=False)


def run(
    settings: Settings, *, say: Say = lambda _: None, way: str | None = None, now: dt.datetime | None = None
) -> Drill:
    """Hold a drill and write it down. Nothing live is changed. `way`: how a copy is damaged; None: the next one in turn.

    Raises NotFoundError where there is no backup at all, StorageError where none can be read or there is no room: a drill that
    could not begin is a failure too, and the caller tells it.
    """
    if way is not None and way not in damage.WAYS:
        raise UsageError(f"{way!r} is no way of damage: there are {', '.join(damage.WAYS)}")
    now, began = now or clock.now(), time.monotonic()
    repository = open_repository(settings)
    manifest = _newest(repository, backup_ledger.installation(settings.home))
    before = history(settings.home)
    drill_id = f"{now.astimezone(dt.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    with _room(settings.home, drill_id, manifest) as folder:
        repository.scratch = folder
        room = _Room(folder, manifest, repository, now, say)
        components = tuple(_restored(room, one, settings) for one in sorted(manifest.components, key=_order))
        served = _serve(room, settings, components)
        way = way or list(damage.WAYS)[len(before) % len(damage.WAYS)]
        say(f"negative drill: {damage.WAYS[way]}")
        negative = damage.look(repository, manifest, way)
    drill = Drill(
        drill_id,
        manifest.backup_id,
        clock.text(now),
        components,
        served,
        negative,
        time.monotonic() - began,
        tuple(redact(why) for why in _failures(components, served, negative)),
    )
    _remember(settings.home, before, drill)
    for why in drill.failed:
        say(f"FAILED: {why}")
    return drill


def held(settings: Settings, *, say: Say = lambda _: None, way: str | None = None) -> Drill:
    """`run`, and somebody is told where it failed or could not even begin. Raises what `run` does."""
    try:
        found = run(settings, say=say, way=way)
    except Exception as error:  # also one of our own: a drill that nobody hears of is none
        why = str(error) if isinstance(error, ModelkeepError) else f"{type(error).__name__}: {error}"
        notifying.notify(settings, "the recovery drill could not be held", redact(why))
        raise
    if not found.passed:
        notifying.notify(settings, "the recovery drill failed", f"backup {found.backup_id}: {'; '.join(found.failed)}")
    return found


def history(home: Path) -> list[dict[str, Any]]:
    """The drills of this home, oldest first. Raises StorageError for a file that cannot be read."""
    try:
        found = json.loads((home / HISTORY).read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{home / HISTORY}, the history of the drills, cannot be read ({error}): move it away"
        ) from error
    return list(found["drills"])


def as_markdown(found: Drill) -> str:
    """For Prefect."""
    lines = [
        f"Backup {found.backup_id}: **{'passed' if found.passed else 'FAILED'}**",
        "",
        "| component | bytes | RPO | RTO | result |",
        "|---|---|---|---|---|",
    ]
    for one in found.components:
        took = "" if one.rto_seconds is None else f"{one.rto_seconds:.1f} s"
        result = (one.failed or one.unverifiable or "restored and compared").replace("|", "¦")
        lines.append(f"| {one.component} | {one.size_bytes:,} | {duration(one.rpo_seconds)} | {took} | {result} |")
    lines += ["", *(f"- {one.model} {one.version}: {one.outcome} {one.why}" for one in found.served.models)]
    lines.append(f"- negative drill: {found.negative.what}: {'told' if found.negative.told else 'NOT told'}")
    lines += [f"- **failed**: {why}" for why in found.failed]
    return "\n".join(lines)


def _newest(repository: Repository, installation: str | None) -> Manifest:
    """The newest there is, verified or not: that is what would be left. One that was damaged is none."""
    scan = repository.scan()
    if not scan.manifests:
        broken = "; ".join(f"{one}: {why}" for one, why in scan.broken.items())
        raise NotFoundError(
            f"there is no backup to hold a drill with in {', '.join(repository.shown)}" + (f" ({broken})" if broken else "")
            + ": modelkeep backup"
        )  # fmt: skip
    return chosen(backup_ledger.of_installation(scan.manifests, installation))


def chosen(manifests: Sequence[Manifest]) -> Manifest:
    """The newest that has registry and models, if any has. One of everything goes before one of a part that is newer by a day at most:
    else what only the weekly backup has were never tried, since the daily one follows it.
    """
    whole = [
        one
        for one in manifests
        if {"registry", "models"} <= {part.name for part in one.components if part.state == COMPLETE}
    ]
    newest = max(whole or manifests, key=_age)
    lately = dt.datetime.fromisoformat(newest.began_at) - FULL_WITHIN
    full = [one for one in whole if kinds.ALL in one.requested and dt.datetime.fromisoformat(one.began_at) >= lately]
    return max(full, key=_age, default=newest)


def _age(one: Manifest) -> tuple[int, str]:
    return one.sequence, one.backup_id


def _order(one: Component) -> tuple[int, str]:
    return ORDER.index(one.name.partition(":")[0]), one.name


@contextlib.contextmanager
def _room(home: Path, drill_id: str, manifest: Manifest) -> Iterator[Path]:
    """A private folder with enough space. Those of drills that were killed are removed first."""
    top = home / "drills"
    try:
        top.mkdir(parents=True, exist_ok=True)
        for left in sweeping.dead_folders(top):
            shutil.rmtree(left, ignore_errors=True)
        needed = int(sum(one.size_bytes for one in manifest.components) * ROOM)
        free = shutil.disk_usage(top).free
        if free < needed:
            raise StorageError(
                f"a drill with {manifest.backup_id} needs {needed:,} bytes below {top}, and {free:,} are free"
            )
    except OSError as error:
        raise StorageError(f"{top} cannot be used for a drill: {error.strerror or error}") from error
    with sweeping.private_folder(top / drill_id) as folder:
        yield folder


def _restored(room: _Room, component: Component, settings: Settings) -> Restored:
    age = (room.now - dt.datetime.fromisoformat(component.began_at)).total_seconds()
    found = Restored(component.name, component.kind, component.size_bytes, round(age, 3))
    if component.state != COMPLETE:
        return _with(found, failed=f"it is not in the backup: {component.error}")
    room.say(f"{component.name}: {component.size_bytes:,} bytes")
    source = room.repository.source(room.manifest, component.name)
    target = targets.into(
        Chosen(component), str(room.folder), backup_id=room.manifest.backup_id, environment=settings.environment
    )
    began = time.monotonic()
    try:
        if target is not None:
            kinds.kind(component.kind).restore(source, target)
        else:
            found = _apart(found, source, room.folder / "servers")
    except ModelkeepError as error:
        return _with(found, failed=str(error))
    if found.unverifiable is not None:  # nothing was restored: there is no time to tell
        return found
    return _with(found, rto_seconds=round(time.monotonic() - began, 3))


def _apart(found: Restored, source: Any, folder: Path) -> Restored:
    """What needs a server of its own: restored into one that is thrown away, and compared."""
    folder.mkdir(exist_ok=True)
    compared = kinds.kind(found.kind).verify(source, folder)
    if compared.differences:
        return _with(found, failed="; ".join(compared.differences[:5]))
    return _with(found, unverifiable=compared.unverifiable)


def _with(found: Restored, **changes: Any) -> Restored:
    return Restored(**{**found.as_dict(), **changes})


def _serve(room: _Room, settings: Settings, components: Sequence[Restored]) -> drill_server.Served:
    back = {one.component for one in components if one.failed is None}
    if not {"registry", "models"} <= back:
        return drill_server.Served(why="registry or models did not come back, so nothing could be served")
    room.say("serving what came back")
    home = Target(f"sqlite:///{room.folder / 'registry.db'}", room.folder)
    return drill_server.serve_and_compare(settings, home, room.folder / targets.FOLDERS["models"])


def _failures(components: Sequence[Restored], served: drill_server.Served, negative: Told) -> list[str]:
    found = [f"{one.component}: {one.failed}" for one in components if one.failed is not None]
    if served.why is not None:
        found.append(f"serving: {served.why}")
    found += [f"{one.model} {one.version}: {one.why}" for one in served.models if one.outcome == drill_server.DIFFERS]
    if not negative.told:
        found.append(f"negative drill: {negative.what}, and nobody noticed: {negative.words}")
    return found


def _remember(home: Path, before: Sequence[Mapping[str, Any]], drill: Drill) -> None:
    document = {"format": 1, "drills": [*before, drill.as_dict()][-KEPT:]}
    try:
        fresh = home / f"{HISTORY}.new"
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(home / HISTORY)
    except OSError as error:
        raise StorageError(f"{home / HISTORY} cannot be written: {error.strerror or error}") from error

    def alter(known: dict[str, Any]) -> None:
        known["drill"] = {
            "drill_id": drill.drill_id, "at": drill.began_at, "state": "passed" if drill.passed else "failed", "passed": drill.passed,
            "backup_id": drill.backup_id, "failed": list(drill.failed), "rto_seconds": round(drill.rto_seconds, 3),
            "rpo_seconds": round(drill.rpo_seconds, 3),
            "components": {
                one.component: {"rto_seconds": one.rto_seconds, "rpo_seconds": one.rpo_seconds} for one in drill.components
            },
        }  # fmt: skip

    ledger.change(home, alter)
