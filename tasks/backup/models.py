"""The models in a backup: every artifact that the registry's snapshot names, by its digest, so that a backup costs what is new."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry import clock, references
from registry.connect import open_database
from registry.database import Database
from registry.errors import ArtifactError, NotFoundError, UnavailableError, UsageError
from registry.schema import REVISION, Version
from registry.settings import Settings
from registry.signature import Signature
from registry.store import DirectoryStore, StoredFile, file_digest, materialise, open_store
from tasks import probe
from tasks.backup.components import Captured, Compared, Part, Sink, Source, Target
from tasks.backup.manifest import Entry
from tasks.backup.registry_part import CapturedRegistry, Needed, Needs, needs_of

ARTIFACT, VERSION = "artifact", "version"
PROBE_SECONDS = 300.0
PROBE_MEMORY_MB = 4096
_PIECE = 1 << 20
_NAMED = 20


@dataclass(slots=True)
class ModelsPart:
    settings: Settings
    needs: Needs | None = None
    """What the registry's own snapshot in this backup names; None: the live registry is asked."""
    name: str = "models"
    kind: str = "models"

    def follow(self, earlier: Mapping[str, Captured]) -> None:
        """The registry was captured first, and fixes which artifacts must be there."""
        found = earlier.get("registry")
        if isinstance(found, CapturedRegistry):
            self.needs = found.needs

    def capture(self, sink: Sink) -> Captured:
        """Raises ArtifactError, which names the versions whose bytes are missing or corrupt; SettingsError, UnavailableError."""
        store = open_store(self.settings.artifacts)
        database = open_database(self.settings)
        try:
            needs, fixed = self.needs, self.needs is not None
            if needs is None:
                needs = needs_of(database)
            kept = _Kept(store, database, sink, needs)
            for digest, names in needs.digests.items():
                kept.take(digest, names)
            kept.finish()
        finally:
            database.dispose()
        served = {one.name: list(one.serves) for one in needs.versions if one.serves}
        return Captured(
            facts={
                "versions": len(needs.versions),
                "artifacts": len(kept.taken),
                "bytes": kept.done_bytes,
                "sha256": _list_digest(kept.taken),
                "serves": served,
                "deleted_since": kept.deleted,
            },
            snapshot={
                "consistent": True,
                "how": "artifacts never change; which ones is said by "
                + ("the registry's snapshot in this backup" if fixed else "one look at the live registry"),
            },
        )


@dataclass(slots=True)
class _Kept:
    """The artifacts as they are taken, one after the other, and what went wrong with them."""

    store: DirectoryStore
    database: Database
    sink: Sink
    needs: Needs
    done_bytes: int = 0
    taken: list[str] = field(default_factory=list)
    deleted: dict[str, list[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    total_bytes: int = 0

    def __post_init__(self) -> None:
        sizes = {str(file["digest"]): int(file["size_bytes"]) for one in self.needs.versions for file in one.files}
        self.total_bytes = sum(sizes.values())

    def take(self, digest: str, names: list[str]) -> None:
        # Read once: what is stored is hashed on the way, and is the artifact or is not.
        try:
            stream = self.sink.store(self._pieces(self.store.place(digest)))
        except FileNotFoundError:
            self._missing(digest, names)
            return
        except OSError as error:
            self.faults.append(f"{_listed(names)}: {digest[:12]}… cannot be read: {error.strerror or error}")
            return
        if stream.sha256 != digest:
            self.faults.append(f"{_listed(names)}: {digest[:12]}… is corrupt, its bytes hash to {stream.sha256[:12]}…")
            return
        self.taken.append(digest)
        self.sink.add(Entry(f"artifacts/{digest}", ARTIFACT, stream, {"digest": digest, "needed_by": names[:_NAMED]}))

    def _pieces(self, path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
                self.done_bytes += len(piece)
                self.sink.progress(self.done_bytes, max(self.total_bytes, self.done_bytes))

    def _missing(self, digest: str, names: list[str]) -> None:
        """Deleted since the registry was read is no fault: nobody wants it any more. The live registry says so."""
        try:
            with self.database.read() as session:
                wanted = bool(references.needed_digests(session, {digest}))
        except UnavailableError as error:
            self.faults.append(
                f"{_listed(names)}: {digest[:12]}… is missing, and the live registry cannot be asked: {error}"
            )
            return
        if wanted:
            self.faults.append(f"{_listed(names)}: {digest[:12]}… is missing")
            return
        self.deleted[digest] = names
        self.sink.warn(f"{_listed(names)}: {digest[:12]}… was deleted while the backup was taken, and is not in it")

    def finish(self) -> None:
        for one in self.needs.versions:
            self.sink.add(Entry(f"versions/{one.name}", VERSION, None, _record(one)))
        if self.faults:
            more = f"; and {len(self.faults) - _NAMED} more" if len(self.faults) > _NAMED else ""
            raise ArtifactError(
                f"{len(self.faults)} artifacts in {self.store.folder} could not be backed up: {'; '.join(self.faults[:_NAMED])}{more}. "
                "Restore them from an earlier backup, or register the files again"
            )


def parts(settings: Settings) -> list[Part]:
    return [ModelsPart(settings)]


def occupied(target: Target) -> str | None:
    """Always None: artifacts lie under the hash of their bytes, so that nothing which stands there can be overwritten."""
    return None


def restore(source: Source, target: Target) -> dict[str, Any]:
    """Put the artifacts into the store at `target.path` (a folder); `only` takes NAME or NAME@VERSION.

    What is there and whole is left alone, what is there and corrupt is healed. With `only` the registry at `options["registry_url"]`,
    where there is one, is told that versions which were deleted are back (see `revive`).

    Raises NotFoundError for a version that the backup does not have, ArtifactError where what arrives is not the artifact,
    StorageError, UnavailableError (the artifacts are back, and the registry could not be told).
    """
    store = _store(target)
    versions, artifacts = _index(source)
    chosen = _chosen(versions, target.only, source)
    wanted = {digest for one in chosen for digest in one.digests} if target.only else set(artifacts)
    gone = {
        digest: names
        for digest, names in source.record.facts.get("deleted_since", {}).items()
        if not target.only or digest in wanted
    }
    if target.only and gone:
        raise ArtifactError(
            f"{_listed(sorted(one.name for one in chosen))} was deleted while this backup was taken: take an earlier one"
        )
    put = kept = done = 0
    sizes = {digest: entry.stream.size_bytes for digest, entry in artifacts.items() if entry.stream is not None}
    total = sum(sizes.get(digest, 0) for digest in wanted)
    for digest in sorted(wanted - set(gone)):
        entry = artifacts.get(digest)
        if entry is None or entry.stream is None:
            raise ArtifactError(f"artifact {digest} is in the list of {source.record.name} and not in the backup")
        if _whole(store, digest):
            kept += 1
        else:
            store.receive(digest, source.open(entry.stream))
            put += 1
        done += entry.stream.size_bytes
        target.progress(done, total)
    return {
        "folder": str(store.folder),
        "versions": [one.name for one in chosen],
        "artifacts": put,
        "already_there": kept,
        "bytes": done,
        "deleted_since": sorted({name for names in gone.values() for name in names}),
        **(_tell(source, target) if target.only else {}),
    }


def _tell(source: Source, target: Target) -> dict[str, list[str]]:
    url, home = target.options.get("registry_url"), target.options.get("home")
    if url is None:
        return {}
    database = Database(str(url), anchors=None if home is None else Path(home) / "audit.anchors")
    try:
        if database.sqlite and not Path(str(database.url.database)).exists():
            return {}  # it comes back later, with its own word on these versions
        if database.revision() != REVISION:
            return {}
        origin = str(target.options.get("backup_id") or f"a backup of {source.record.began_at}")
        return revive(source, database, target.only, backup_id=origin, actor=target.options.get("actor"))
    except UnavailableError as error:
        raise UnavailableError(
            f"the artifacts are back, and the registry could not be told: {error}; repeat it then"
        ) from error
    finally:
        database.dispose()


def revive(
    source: Source, database: Database, only: Iterable[str], *, backup_id: str, actor: str | None = None
) -> dict[str, list[str]]:
    """Tell the live registry that bytes of deleted versions are back: for who restores single versions. One transaction.

    Returns {"revived": versions that are no longer deleted, "there": those that were not, "unknown": those that this registry has not,
    or has with other bytes (they come back with the registry, or are registered anew)}.
    """
    versions, _ = _index(source)
    found: dict[str, list[str]] = {"revived": [], "there": [], "unknown": []}
    with database.write(actor=actor) as transaction:
        for one in _chosen(versions, tuple(only), source):
            row = transaction.session.get(Version, (one.model, one.version))
            if row is None or {str(file["digest"]) for file in row.files} != {str(f["digest"]) for f in one.files}:
                found["unknown"].append(one.name)
            elif row.deleted_at is None:
                found["there"].append(one.name)
            else:
                before, row.deleted_at = clock.text(row.deleted_at), None
                found["revived"].append(one.name)
                transaction.record(
                    "version.restored",
                    f"version:{one.model}/{one.version}",
                    before={"deleted_at": before},
                    after={"deleted_at": None, "digest": row.digest, "from": backup_id},
                    reason=f"its bytes came back from {backup_id}",
                )
    return found


def verify(source: Source, folder: Path) -> Compared:
    """Every artifact by its digest, in a private store; then the stable version of each route, loaded by a fresh process on the
    CPU, answers its golden cases as it did when it was validated."""
    store, facts = DirectoryStore(folder / "artifacts"), source.record.facts
    versions, artifacts = _index(source)
    differences: list[str] = []
    if _list_digest(artifacts) != facts["sha256"] or len(artifacts) != facts["artifacts"]:
        differences.append(
            f"the backup has {len(artifacts)} artifacts, the manifest says {facts['artifacts']}, or other ones"
        )
    for digest, entry in artifacts.items():
        try:
            if entry.stream is None:
                raise ArtifactError(f"artifact {digest} has no bytes")
            store.receive(digest, source.open(entry.stream))
        except ArtifactError as error:
            differences.append(str(error))
    if len(versions) != facts["versions"]:
        differences.append(f"the backup lists {len(versions)} versions, the manifest says {facts['versions']}")
    gone = set(facts["deleted_since"])
    for one in versions.values():
        if missing := sorted(one.digests - set(artifacts) - gone):
            differences.append(f"{one.name} needs {missing[0][:12]}…, which is not in the backup")
    checked: dict[str, Any] = {"artifacts": len(artifacts), "bytes": facts["bytes"], "inferred": [], "golden_cases": 0}
    if not differences:
        for one in versions.values():
            if any(role.endswith(": stable") for role in one.serves):
                differences += _infer(one, store, folder / "cache", checked)
    return Compared(tuple(differences), checked)


def _infer(one: Needed, store: DirectoryStore, cache: Path, checked: dict[str, Any]) -> list[str]:
    try:
        path = materialise(store, [StoredFile.from_dict(file) for file in one.files], cache)
        signature = None if one.signature is None else Signature.from_dict(one.signature)
        golden = None if one.golden is None else store.path(one.golden)
        job = probe.ProbeJob(candidate=probe.ProbeModel(path, one.format, signature), golden=golden)
        result = probe.run_probe(job, timeout_seconds=PROBE_SECONDS, memory_mb=PROBE_MEMORY_MB)
    except ArtifactError as error:
        return [f"{one.name}: {error}"]
    found = result.candidate
    if result.outcome != "done" or found is None:
        return [f"{one.name} was not measured: {result.problem or result.outcome}"]
    if not found.loaded:
        return [f"{one.name} does not load: {found.error}"]
    checked["inferred"].append(one.name)
    if found.golden is None:
        return []
    checked["golden_cases"] += found.golden.cases
    wrong = []
    if found.golden.failures:
        wrong.append(f"{one.name} fails {found.golden.failures} golden cases: {found.golden.first_failure}")
    # Another processor may tip one case that stands on the edge.
    edge = 1.5 / max(found.golden.cases, 1)
    accuracy = found.golden.accuracy
    if one.accuracy is not None and accuracy is not None and accuracy < one.accuracy - edge:
        wrong.append(
            f"{one.name} answers {found.golden.accuracy:.4f} of its golden cases right, {one.accuracy:.4f} when it was validated"
        )
    return wrong


def _store(target: Target) -> DirectoryStore:
    if target.path is not None:
        return DirectoryStore(target.path)
    if target.url is not None:
        return open_store(target.url)
    raise UsageError("models are restored into an artifact store: its folder is missing")


def _whole(store: DirectoryStore, digest: str) -> bool:
    """Whether these bytes are there. What cannot be read counts as absent: the restore then says what is wrong with the disk."""
    place = store.place(digest)
    try:
        return place.exists() and file_digest(place)[0] == digest
    except OSError:
        return False


def _index(source: Source) -> tuple[dict[str, Needed], dict[str, Entry]]:
    versions: dict[str, Needed] = {}
    artifacts: dict[str, Entry] = {}
    for entry in source.entries():
        if entry.kind == ARTIFACT:
            artifacts[str(entry.facts["digest"])] = entry
        elif entry.kind == VERSION:
            one = _needed(entry.facts)
            versions[one.name] = one
    return versions, artifacts


def _chosen(versions: Mapping[str, Needed], only: tuple[str, ...], source: Source) -> list[Needed]:
    if not only:
        return list(versions.values())
    chosen: dict[str, Needed] = {}
    for name in only:
        found = {key: one for key, one in versions.items() if name in (key, one.model)}
        if not found:
            known = ", ".join(sorted(versions)[:_NAMED]) or "none"
            raise NotFoundError(
                f"{name} is not in the models of this backup ({source.record.began_at}); it has {known}"
            )
        chosen.update(found)
    return list(chosen.values())


def _record(one: Needed) -> dict[str, Any]:
    return {name: getattr(one, name) for name in Needed.__slots__} | {
        "files": list(one.files),
        "serves": list(one.serves),
    }


def _needed(facts: Mapping[str, Any]) -> Needed:
    known: dict[str, Any] = {name: facts.get(name) for name in Needed.__slots__}
    known.update(files=tuple(facts["files"]), serves=tuple(facts["serves"]))
    return Needed(**known)


def _list_digest(digests: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
