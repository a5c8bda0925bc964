"""Vector stores in a backup (Chroma): each collection by its ids, and of a store on the disk a cold copy beside it.

A copy of the live folder is corrupt half of the time, and one of its SQLite file alone loses the vectors, which lie in other files.
So writers are held up for the moment of the copy, and the copy is opened by a fresh process before it counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import clock, untracked
from registry.errors import (
    ArtifactError,
    ConflictError,
    ModelkeepError,
    NotFoundError,
    RefusedError,
    StorageError,
    UnavailableError,
    UsageError,
)
from registry.redaction import redact
from registry.settings import Settings
from tasks.backup import chain
from tasks.backup.components import Captured, Compared, Part, Sink, Source, Target
from tasks.backup.manifest import Entry
from tasks.backup.untree import safe
from tasks.backup.vector_compare import compare_neighbours, near
from tasks.backup.vector_copy import COPIES, DATABASE, cold_copy, names_of, opened_by

COLLECTION, COPY = "collection", "copy"
SILENT_SECONDS = 600.0
_NAMED = 10
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class VectorsPart:
    where: str
    """A path or a URL."""
    collections: tuple[str, ...] = ()
    scratch: Path | None = None
    name: str = "vectors"
    kind: str = "vectors"

    def capture(self, sink: Sink) -> Captured:
        """Raises NotFoundError, LockedError (a writer does not let go), StorageError, ArtifactError, UnavailableError."""
        if "://" in self.where:
            facts, entries = _export(sink, self.where, self.collections)
            for entry in entries:
                sink.add(entry)
            why = (
                "a Chroma server has no lock against writers: each record is of one moment between the backup's begin and its end; for "
                "one moment of all, stop the server and give the path of its folder"
            )
            return _captured(facts, {"consistent": False, "why": why, "at": clock.text(clock.now())})
        path = Path(self.where)
        if not (path / DATABASE).is_file():
            raise NotFoundError(f"there is no Chroma store in {path}: correct the setting chroma, or [vectors] url")
        if others := opened_by(path):
            sink.warn(
                f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} {path} open: what they wrote is in the backup as far as it "
                "had reached the disk, and their writers waited while it was copied"
            )
        with _private(self.scratch) as folder:
            last: ModelkeepError | None = None
            for number in range(COPIES):
                copy = folder / str(number)
                moment = cold_copy(path, copy)
                try:
                    facts, entries = self._of_copy(sink, copy, folder / "look")
                except (ArtifactError, chain.ProgramError) as error:
                    last = error  # the index was between two of its files: another moment is another chance
                    shutil.rmtree(copy)
                    continue
                for entry in entries:
                    sink.add(entry)
                how = (
                    "a cold copy, while a lock on its SQLite file held writers up, that a fresh process opened and read"
                )
                return _captured(facts, {"consistent": True, "how": how, "at": moment})
        raise ArtifactError(f"no copy of {path} holds all of its vectors, {COPIES} were taken: {last}")

    def _of_copy(self, sink: Sink, copy: Path, look: Path) -> tuple[dict[str, Any], list[Entry]]:
        shutil.rmtree(look, ignore_errors=True)
        shutil.copytree(copy, look)  # whoever opens a store writes in it
        facts, entries = _export(sink, str(look), self.collections)
        if not self.collections and (others := sorted(set(names_of(copy)) - set(facts["collections"]))):
            sink.warn(f"{', '.join(others[:_NAMED])}: of another tenant or database, so only the cold copy has it")
        for path in sorted(one for one in copy.rglob("*") if one.is_file()):
            stream = sink.store(_pieces(path))
            entries.append(Entry(f"{COPY}/{path.relative_to(copy).as_posix()}", COPY, stream))
        return {**facts, "copy": True}, entries


def parts(settings: Settings) -> list[Part]:
    where = settings.vectors.url or settings.chroma
    return [VectorsPart(where, tuple(settings.vectors.collections), settings.home)] if where else []


def occupied(target: Target) -> str | None:
    """The collections that stand there, in words. Raises UnavailableError."""
    where = _where(target)
    if "://" not in where:
        path = Path(where)
        if not path.exists() or not any(path.iterdir()):
            return None
        if not (path / DATABASE).is_file():
            return f"files that are no Chroma store in {path}"
        names = names_of(path)
    else:
        names = [one["name"] for one in _collections(where)]
    standing = [name for name in names if not target.only or name in target.only]
    return f"{len(standing)} collections ({', '.join(standing[:_NAMED])})" if standing else None


def restore(source: Source, target: Target) -> dict[str, Any]:
    """Bring the collections back into a folder or a server; `only` takes their names.

    A whole store on the disk is made beside its place, compared, and takes its name at the end; a collection in a store that is there
    is made under another name, and takes its own at the end. So nothing half done is ever found under its name. A store that stands
    there is put aside with `force`, a collection is replaced.

    Raises ConflictError, NotFoundError, ArtifactError (what arrived is not what the manifest says), UnavailableError.
    """
    where, facts = _where(target), source.record.facts
    names = _chosen(facts, target.only)
    if "://" not in where and not target.only:
        return _whole_store(source, Path(where), names, target)
    standing = occupied(Target(url=where, only=tuple(names)))
    if standing and not target.force:
        raise ConflictError(f"{standing} stand in {redact(where)}: nothing was restored; replace them with --force")
    lost = _load(source, where, names, target)
    differences = _compare(source, where, names)
    if differences:
        raise ArtifactError(f"what arrived in {redact(where)} is not what was backed up: {'; '.join(differences[:3])}")
    return {"where": redact(where), "collections": names, "records": _records(facts, names), "by": "ids", "lost": lost}


def _whole_store(source: Source, path: Path, names: list[str], target: Target) -> dict[str, Any]:
    standing = occupied(target)
    if standing and not target.force:
        raise ConflictError(
            f"{standing} stand in {path}: nothing was restored; name another folder, or put it aside with --force"
        )
    if others := (opened_by(path) if path.exists() else []):
        raise ConflictError(
            f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} {path} open and would go on in the store of before: stop that first"
        )
    fresh = path.with_name(f".{path.name}.restoring")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)  # what an interrupted call left
        lost: list[str] = []
        if source.record.facts.get("copy"):
            _write_copy(source, fresh)
            by = "the cold copy"
        else:
            fresh.mkdir()
            lost, by = _load(source, str(fresh), names, target), "ids"
        differences = _compare(source, str(fresh), names)
        if differences:
            raise ArtifactError(f"what came back is not what was backed up: {'; '.join(differences[:3])}")
        kept = None
        if path.exists():
            if standing or any(path.iterdir()):
                kept = path.with_name(f"{path.name}.before-restore-{clock.now():%Y%m%dT%H%M%S%fZ}")
                path.rename(kept)
            else:
                path.rmdir()
        fresh.rename(path)
    except OSError as error:
        raise StorageError(f"the vector store could not be restored to {path}: {error}; repeat the command") from error
    return {
        "where": str(path), "collections": names, "records": _records(source.record.facts, names), "by": by, "lost": lost,
        "kept": None if kept is None else str(kept),
    }  # fmt: skip


def verify(source: Source, folder: Path) -> Compared:
    """The cold copy, opened by a fresh process, and a store made anew from the records: both must hold every record, each vector
    within 5e-7 of what it was, and find neighbours as near as those that were found when the backup was taken."""
    facts = source.record.facts
    names = _chosen(facts, ())
    differences: list[str] = []
    try:
        ways = ["ids"]
        if facts.get("copy"):
            _write_copy(source, folder / "copy")
            differences += [f"cold copy: {one}" for one in _compare(source, str(folder / "copy"), names)]
            ways.append("cold copy")
        (folder / "anew").mkdir()
        _load(source, str(folder / "anew"), names, Target())
        differences += [f"made anew: {one}" for one in _compare(source, str(folder / "anew"), names)]
    except (ArtifactError, RefusedError, ConflictError, NotFoundError, chain.ProgramError) as error:
        # A store of our own making that Chroma cannot open, or that kills it, is damaged; nobody else can be at fault.
        return Compared((*differences, str(error)))
    except OSError as error:
        raise StorageError(f"the vectors could not be restored to {folder}: {error}") from error
    return Compared(
        tuple(differences), {"collections": len(names), "records": _records(facts, names), "restored_by": ways}
    )


# --- reading a store ---------------------------------------------------------------------------------------------------


def _collections(where: str) -> list[dict[str, Any]]:
    """What a server says of its collections that hold something."""
    found = []
    for line in _lines({"action": "export", "where": where, "headers": True}):
        document = json.loads(line)
        if "collection" in document and document["collection"]["count"]:
            found.append(document["collection"])
    return found


def _export(sink: Sink, where: str, collections: Iterable[str]) -> tuple[dict[str, Any], list[Entry]]:
    """Every collection as a stream of lines. Raises NotFoundError, ArtifactError, UnavailableError."""
    facts: dict[str, Any] = {}
    entries: list[Entry] = []
    done = 0
    lines = _lines({"action": "export", "where": where, "collections": list(collections)})
    for line in lines:
        document = json.loads(line)
        if "collection" not in document:
            continue
        end: dict[str, Any] = {}

        def records(first: bytes = line, end: dict[str, Any] = end) -> Iterator[bytes]:
            nonlocal done
            yield first + b"\n"
            for one in lines:
                if one.startswith(b'{"end"'):
                    end.update(json.loads(one)["end"])
                    return
                done += len(one)
                sink.progress(done)
                yield one + b"\n"

        header = document["collection"]
        stream = sink.store(records())
        name = str(header["name"])
        if not end:
            raise ArtifactError(f"the records of {name} ended before their time")
        if end["gone"]:
            sink.warn(f"{name}: {end['gone']} records were deleted while they were read, and are not in the backup")
        facts[name] = {
            "metadata": header["metadata"],
            "configuration": header["configuration"],
            "dimension": header["dimension"],
            **end,
        }
        entries.append(Entry(f"collections/{name}", COLLECTION, stream, {"collection": name, "count": end["count"]}))
    return {"collections": facts}, entries


def _captured(facts: dict[str, Any], snapshot: dict[str, Any]) -> Captured:
    from importlib import metadata

    return Captured(facts, snapshot, {"chromadb": metadata.version("chromadb")})


# --- writing and comparing ---------------------------------------------------------------------------------------------


def _write_copy(source: Source, folder: Path) -> None:
    for entry in source.entries():
        if entry.kind != COPY or entry.stream is None:
            continue
        path = folder.joinpath(*safe(entry.name)[1:])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for piece in source.open(entry.stream):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())


def _load(source: Source, where: str, names: list[str], target: Target) -> list[str]:
    """Make the collections anew, each by its records. Returns what could not be had here."""
    lost: list[str] = []
    done = 0

    def records() -> Iterator[bytes]:
        nonlocal done
        for name in names:
            stream = _entry(source, name).stream
            assert stream is not None
            for piece in source.open(stream):
                yield piece
                done += len(piece)
                target.progress(done, None)

    for line in _lines({"action": "load", "where": where, "force": target.force}, records()):
        lost += json.loads(line).get("lost") or []
    return lost


def _compare(source: Source, where: str, names: list[str]) -> list[str]:
    """What a store has other than the backup: record by record, then the neighbours of those that were looked up."""
    facts = source.record.facts["collections"]
    queries = {name: [one["of"] for one in facts[name]["queries"]] for name in names}
    lines = _lines({"action": "export", "where": where, "collections": names, "queries": queries})
    differences: list[str] = []
    seen = set()
    for line in lines:
        document = json.loads(line)
        if "collection" not in document:
            continue
        header = document["collection"]
        name = str(header["name"])
        seen.add(name)
        due = facts[name]
        for what in ("metadata", "dimension"):
            if header[what] != due[what]:
                differences.append(f"{name} has {what} {header[what]}, the manifest says {due[what]}")
        if (header["configuration"] or {}).get("hnsw") != (due["configuration"] or {}).get("hnsw"):
            differences.append(
                f"{name} has another index: {header['configuration']}, the manifest says {due['configuration']}"
            )
        differences += _compare_records(name, _stored(source, name), lines, due)
    differences += [f"{name} is not there" for name in sorted(set(names) - seen)]
    return differences


def _compare_records(
    name: str, stored: Iterator[dict[str, Any]], lines: Iterator[bytes], due: Mapping[str, Any]
) -> list[str]:
    differences: list[str] = []
    end: dict[str, Any] = {}
    for line in lines:
        found = json.loads(line)
        if "end" in found:
            end = found["end"]
            break
        if len(differences) >= _NAMED:
            continue
        record = next(stored, None)
        if record is None or record["id"] != found["id"]:
            differences.append(
                f"{name} has record {found['id']!r}, the backup {None if record is None else record['id']!r}"
            )
            break
        for what in ("document", "metadata", "uri"):
            if record[what] != found[what]:
                differences.append(f"{name} {found['id']!r} has another {what}")
        if not near(record["embedding"], found["embedding"]):
            differences.append(f"{name} {found['id']!r} has another vector")
    else:
        return [*differences, f"{name} could not be read to its end"]
    for _ in lines if not end else ():
        pass
    if end and (end["count"], end["ids_sha256"]) != (due["count"], due["ids_sha256"]):
        differences.append(f"{name} has {end['count']} records, the manifest says {due['count']}, or other ids")
    if end and next(stored, None) is not None:
        differences.append(f"{name} has fewer records than the backup")
    if end and not differences:
        differences += compare_neighbours(name, end["queries"], due["queries"])
    return differences


def _stored(source: Source, name: str) -> Iterator[dict[str, Any]]:
    """The records of a collection in the backup. Raises ArtifactError."""
    entry = _entry(source, name)
    assert entry.stream is not None
    rest = b""
    for piece in source.open(entry.stream):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            try:
                document = json.loads(line)
            except ValueError as error:
                raise ArtifactError(f"a record of {name} cannot be read: {error}") from error
            if "id" in document:
                yield document
    if rest:
        raise ArtifactError(f"the records of {name} end in the middle of one")


def _entry(source: Source, name: str) -> Entry:
    for entry in source.entries():
        if entry.kind == COLLECTION and entry.facts.get("collection") == name and entry.stream is not None:
            return entry
    raise ArtifactError(f"collection {name} is in the manifest and not in the backup")


def _chosen(facts: Mapping[str, Any], only: tuple[str, ...]) -> list[str]:
    known = sorted(facts["collections"])
    if absent := sorted(set(only) - set(known)):
        raise NotFoundError(
            f"{', '.join(absent)} is not in this backup of the vectors; it has {', '.join(known) or 'none'}"
        )
    return sorted(only) or known


def _records(facts: Mapping[str, Any], names: list[str]) -> int:
    return sum(int(facts["collections"][name]["count"]) for name in names)


# --- the worker --------------------------------------------------------------------------------------------------------


def _lines(job: dict[str, Any], more: Iterable[bytes] = ()) -> Iterator[bytes]:
    """What the worker says, line by line. Raises ConflictError, NotFoundError, ArtifactError, UnavailableError."""
    with tempfile.TemporaryDirectory(prefix="modelkeep-vectors-", ignore_cleanup_errors=True) as name:
        root = Path(__file__).resolve().parents[2]
        program = chain.Program(
            [sys.executable, "-P", "-B", "-m", "tasks.backup.vector_worker"],
            environment={
                "PYTHONPATH": str(root),
                "HOME": name,
                **untracked.told(os.environ),
                "OMP_NUM_THREADS": "1",
            },
            silent_seconds=SILENT_SECONDS,
            folder=Path(name),
        )
        rest, done = b"", False

        def feed() -> Iterator[bytes]:
            yield json.dumps(job).encode() + b"\n"
            yield from more

        for piece in chain.output(program, feed()):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b'{"error"'):
                    document = json.loads(line)
                    kinds = {"missing": NotFoundError, "conflict": ConflictError}
                    raise kinds.get(document["kind"], ArtifactError)(document["error"])
                done = done or b'"done": true' in line
                yield line
        if rest or not done:
            raise UnavailableError("the process that reads the vectors ended without an end")


@contextlib.contextmanager
def _private(folder: Path | None) -> Iterator[Path]:
    folder = None if tempfile.tempdir is not None else folder  # a backup has set where its temporary files go
    try:
        with tempfile.TemporaryDirectory(prefix=".backup-vectors-", dir=folder, ignore_cleanup_errors=True) as name:
            yield Path(name)
    except OSError as error:
        raise StorageError(f"there is no room for a copy of the vectors in {folder}: {error}") from error


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _where(target: Target) -> str:
    if target.url is not None:
        return target.url
    if target.path is not None:
        return str(target.path)
    raise UsageError("vectors are restored into a Chroma store: its path or URL is missing")
