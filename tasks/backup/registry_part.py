"""The registry in a backup: one SQLite file of one moment, whatever database it lives in, so that it restores into every kind."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select

from registry import audit, clock, copying, restoring
from registry.connect import open_database
from registry.database import Database
from registry.errors import ArtifactError, StorageError, UsageError
from registry.schema import REVISION, AuditHead, Environment, RollbackPoint, Route, Version
from registry.settings import Settings
from tasks.backup.components import Captured, Compared, Part, Sink, Source, Target
from tasks.backup.manifest import Entry

FILE = "registry.sqlite3"
_PIECE = 1 << 20
_PREFIX = ".backup-registry-"


@dataclass(frozen=True, slots=True)
class Needed:
    """A version whose bytes must be there, as the registry's snapshot has it. `serves`: "production: stable" and the like."""

    model: str
    version: str
    files: tuple[dict[str, Any], ...]
    golden: str | None
    format: str
    signature: dict[str, Any] | None
    accuracy: float | None
    """Share of golden cases that its validation found right."""
    serves: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model}@{self.version}"

    @property
    def digests(self) -> set[str]:
        return {str(file["digest"]) for file in self.files} | ({self.golden} if self.golden else set())


@dataclass(frozen=True, slots=True)
class Needs:
    """Which bytes belong to a registry: those of versions that are not deleted, and of rollback points that are not gone."""

    versions: tuple[Needed, ...] = ()
    points: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Digest -> the rollback points that need it."""

    @property
    def digests(self) -> dict[str, list[str]]:
        """Digest -> who needs it, for people."""
        found: dict[str, list[str]] = {}
        for version in self.versions:
            for digest in version.digests:
                found.setdefault(digest, []).append(version.name)
        for digest, points in self.points.items():
            found.setdefault(digest, []).extend(points)
        return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class CapturedRegistry(Captured):
    """With what the part "models" has to bring, which is too much for a manifest."""

    needs: Needs = field(default_factory=Needs)


@dataclass(frozen=True, slots=True)
class RegistryPart:
    settings: Settings
    name: str = "registry"
    kind: str = "registry"

    def capture(self, sink: Sink) -> Captured:
        """Raises UsageError, UnavailableError, StorageError, AuditError."""
        database = open_database(self.settings, statement_seconds=3600.0)
        try:
            with _private(self.settings.home) as folder:
                path, at = folder / FILE, clock.text(clock.now())
                how = restoring.snapshot(database, path)
                with opened(path) as copy:
                    facts, needs = facts_of(copy), needs_of(copy)
                restoring.alone(path)
                size = path.stat().st_size
                stream = sink.store(_read(path, size, sink))
                sink.add(Entry(FILE, "sqlite", stream, {"revision": facts["registry"]["revision"]}))
                for fault in facts["audit_faults"]:
                    sink.warn(f"the audit chain does not verify, here as in the live registry: {fault}")
        finally:
            database.dispose()
        return CapturedRegistry(
            facts=facts,
            snapshot={"consistent": True, "how": how, "at": at},
            programs={"sqlite": sqlite3.sqlite_version, "registry": database.url.get_backend_name()},
            needs=needs,
        )


def parts(settings: Settings) -> list[Part]:
    return [RegistryPart(settings)]


def occupied(target: Target) -> str | None:
    """What stands at the target, in words. Raises UnavailableError, StorageError."""
    database = _target(target)
    try:
        if database.sqlite and not Path(str(database.url.database)).exists():
            return None
        return ", ".join(copying.held(database)) or None
    finally:
        database.dispose()


def restore(source: Source, target: Target) -> dict[str, Any]:
    """Bring the registry back, with a new epoch and the event `registry.restored`; see registry.restoring.

    `target.url` is the registry's database, `target.path` the home with its anchors; `options["backup_id"]` names the backup,
    `options["actor"]` who does it. Raises ConflictError where something stands there and `target.force` is not given.
    """
    if target.only:
        raise UsageError(f"the registry comes back whole: {', '.join(target.only)} cannot be had alone")
    database = _target(target)
    origin = str(target.options.get("backup_id") or f"a backup of {source.record.began_at}")
    for left in target.path.glob(f"{_PREFIX}*") if target.path is not None else ():
        shutil.rmtree(left, ignore_errors=True)  # of a call that was killed
    try:
        with _private(target.path) as folder, _fetched(source, folder, target) as copy:
            if differences := _differences(copy, source.record.facts):
                raise ArtifactError(
                    f"the backed up registry is not what its manifest says: {'; '.join(differences[:3])}"
                )
            done = restoring.bring_back(
                copy, database, origin=origin, force=target.force, actor=target.options.get("actor")
            )
        with database.read() as session:
            verdict = audit.verify(session, database.anchors)
        # A chain that did not verify when the backup was taken does not now either: that is said, and no reason to have no registry.
        if verdict.faults and not source.record.facts["audit_faults"]:
            raise ArtifactError(
                f"the restored registry {database.shown} has an audit chain that does not verify: {verdict.faults[0]}"
            )
        return {
            **done.as_dict(),
            "events": verdict.events,
            "revision": database.revision(),
            "audit_faults": verdict.faults[:20],
        }
    finally:
        database.dispose()


def verify(source: Source, folder: Path) -> Compared:
    """Bring it back into a private file, and compare: rows by table, revision, the audit chain from its first event, routes, bytes
    that are needed; then a restore of it, after which the chain must hold and be longer."""
    differences: list[str] = []
    facts = source.record.facts
    target = Database(f"sqlite:///{folder / 'restored.sqlite3'}", anchors=folder / "audit.anchors")
    try:
        with _fetched(source, folder, Target()) as copy:
            differences += _differences(copy, facts)
            if differences:
                return Compared(tuple(differences))
            done = restoring.bring_back(copy, target, origin="a verification")
        with target.read() as session:
            verdict = audit.verify(session, target.anchors)
        if not facts["audit_faults"]:
            differences += [f"audit chain after a restore: {one}" for one in verdict.faults[:20]]
        if verdict.events <= done.head.seq and not facts["audit_faults"]:
            differences.append(
                f"the restored chain has {verdict.events} events, no more than the {done.head.seq} before"
            )
        if target.revision() != REVISION:
            differences.append(f"the restored registry has revision {target.revision()}, not {REVISION}")
    except ArtifactError as error:
        return Compared((str(error),))
    finally:
        target.dispose()
    rows = sum(facts["tables"].values())
    return Compared(
        tuple(differences),
        {"tables": len(facts["tables"]), "rows": rows, "events": verdict.events, "versions": facts["versions"]},
    )


def facts_of(copy: Database) -> dict[str, Any]:
    """All that a restored copy is compared with, read from a private file."""
    needs = needs_of(copy)
    with copy.read() as session:
        verdict = audit.verify(session)
    with copy.read() as session:
        environments = {
            row.name: {"epoch": row.epoch, "generation": row.generation} for row in session.scalars(select(Environment))
        }
        head = session.execute(select(AuditHead.seq, AuditHead.hash)).one_or_none()
        serving: dict[str, dict[str, Any]] = {}
        for row in session.scalars(select(Route).order_by(Route.environment, Route.model)):
            serving.setdefault(row.environment, {})[row.model] = {
                "stable": row.stable, "candidate": row.candidate, "weight": row.weight, "generation": row.generation,
            }  # fmt: skip
    digests = list(needs.digests)
    return {
        "registry": {
            "revision": copy.revision(),
            "audit_head": None if head is None else {"seq": head.seq, "hash": head.hash},
            "environments": dict(sorted(environments.items())),
        },
        "tables": restoring.row_counts(copy),
        "routes": serving,
        "versions": len(needs.versions),
        "artifacts": {"count": len(digests), "sha256": hashlib.sha256("\n".join(digests).encode()).hexdigest()},
        "audit_faults": verdict.faults[:20],
    }


def needs_of(database: Database) -> Needs:
    """Which versions have bytes, by one snapshot of any registry."""
    versions: list[Needed] = []
    points: dict[str, set[str]] = {}
    with database.read() as session:
        serves: dict[tuple[str, str], list[str]] = {}
        for route in session.scalars(select(Route).order_by(Route.environment, Route.model)):
            for role in ("stable", "candidate"):
                if (version := getattr(route, role)) is not None:
                    serves.setdefault((route.model, version), []).append(f"{route.environment}: {role}")
        query = select(Version).where(Version.deleted_at.is_(None)).order_by(Version.model, Version.ordinal)
        for row in session.scalars(query.execution_options(yield_per=500)):
            versions.append(
                Needed(
                    row.model,
                    row.version,
                    tuple(row.files),
                    row.golden_digest,
                    row.format,
                    row.signature,
                    _accuracy(row),
                    tuple(serves.get((row.model, row.version), ())),
                )
            )
        for point in session.scalars(select(RollbackPoint).where(RollbackPoint.gone_at.is_(None))):
            named = f"rollback point {point.id} ({point.model}@{point.version})"
            for digest in {point.digests.get("golden"), *(file["digest"] for file in point.digests.get("files", ()))}:
                if digest:
                    points.setdefault(str(digest), set()).add(named)
    return Needs(tuple(versions), {digest: tuple(sorted(names)) for digest, names in points.items()})


def _accuracy(row: Version) -> float | None:
    golden = (((row.validation or {}).get("candidate") or {}).get("golden") or {}) if row.validation else {}
    found = golden.get("accuracy")
    return None if found is None else float(found)


def _differences(copy: Database, facts: Mapping[str, Any]) -> list[str]:
    """What the file has other than the manifest says. Of one that an earlier release made: without what this code cannot read."""
    due = facts["registry"]
    if copy.revision() != due["revision"]:
        return [f"its schema has revision {copy.revision()}, the manifest says {due['revision']}"]
    tables = restoring.row_counts(copy)
    if tables != facts["tables"]:
        names = sorted(
            name for name in tables.keys() | facts["tables"].keys() if tables.get(name) != facts["tables"].get(name)
        )
        return [f"{name} has {tables.get(name)} rows, the manifest says {facts['tables'].get(name)}" for name in names]
    if due["revision"] != REVISION:
        return []
    return [
        f"{name}: {_short(found)}, the manifest says {_short(facts.get(name))}"
        for name, found in facts_of(copy).items()
        if found != facts.get(name)
    ]


def _target(target: Target) -> Database:
    if target.url is None:
        raise UsageError("the registry is restored into a database: its URL is missing")
    anchors = None if target.path is None else target.path / "audit.anchors"
    return Database(target.url, anchors=anchors, statement_seconds=3600.0)


@contextmanager
def opened(path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{path}")
    try:
        yield database
    finally:
        database.dispose()


@contextmanager
def _fetched(source: Source, folder: Path, target: Target) -> Iterator[Database]:
    """The file of the backup, in a private folder. Raises ArtifactError, StorageError."""
    entry = next((one for one in source.entries() if one.name == FILE), None)
    if entry is None or entry.stream is None:
        raise ArtifactError(f"the component {source.record.name} holds no {FILE}")
    path, done = folder / FILE, 0
    try:
        with path.open("wb") as file:
            for piece in source.open(entry.stream):
                file.write(piece)
                done += len(piece)
                target.progress(done, entry.stream.size_bytes)
    except OSError as error:
        raise StorageError(f"the registry's file could not be written to {path}: {error}") from error
    try:
        restoring.alone(path)
    except StorageError as error:
        raise ArtifactError(f"the backed up registry cannot be opened: {error}") from error
    with opened(path) as database:
        yield database


def _read(path: Path, size: int, sink: Sink) -> Iterable[bytes]:
    done = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece
            done += len(piece)
            sink.progress(done, size)


@contextmanager
def _private(home: Path | None) -> Iterator[Path]:
    """A folder that nobody else can read: where temporary files go in this process, else on the disk of `home`, for /tmp may be small.

    Raises StorageError.
    """
    home = None if tempfile.tempdir is not None else home
    try:
        if home is not None:
            home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=home, ignore_cleanup_errors=True) as name:
            yield Path(name)
    except OSError as error:
        raise StorageError(
            f"there is no room for a copy of the registry in {home or tempfile.gettempdir()}: {error}"
        ) from error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "…"
