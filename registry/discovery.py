"""Models found in a folder and registered by themselves. What a path means:

    NAME.onnx                 the next version of NAME
    NAME/VERSION.onnx         that version of NAME
    NAME/VERSION/             that version of NAME: a folder with a model
    NAME/                     the next version of NAME, where it holds an MLflow model, an export of ours, or model.toml and a file model.*

Golden cases lie beside as VERSION.golden.npz (NAME.golden.npz), else golden.npz in the folder. What begins with a dot, ends like a
download under way, or is no model by its extension is left out. A file that is still being written is left alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select

from registry import formats, intake, mlflow_models, names, packages, versions
from registry.database import Database
from registry.errors import ConflictError, ModelkeepError, StorageError, UnavailableError, UsageError
from registry.schema import Version
from registry.store import ArtifactStore

UNDER_WAY = (".tmp", ".part", ".partial", ".crdownload", ".download", ".filepart", ".swp", "~")
_GOLDEN = "golden.npz"

State = tuple[tuple[str, int, int, int], ...]
"""Of every file that a find consists of: name, size in bytes, time of change in nanoseconds, inode."""


@dataclass(frozen=True, slots=True)
class Find:
    """A path that should be a model. `version` None is the next number; `problem` says why it cannot be one."""

    path: Path
    name: str
    version: str | None
    golden: Path | None = None
    problem: str | None = None


@dataclass(slots=True)
class Look:
    """What one look at the folder brought. Paths are from the folder."""

    registered: list[dict[str, Any]] = field(default_factory=list)
    known: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[dict[str, Any]] = field(default_factory=list)
    """Left alone for now, with the reason."""
    failure: UnavailableError | StorageError | None = None
    """The registry or the store did not do their part: the look ended there, and the next one goes on."""

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("registered", "known", "wrong", "waiting")}


def scan(folder: Path) -> Iterator[Find]:
    """Every path in a folder that should be a model, in the order of their names. Raises UsageError for what is no folder."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    for path in _entries(folder):
        if _is_model(path):
            yield _find(path, path.stem, None, [f"{path.stem}.{_GOLDEN}"])
        elif path.is_dir() and _is_model_folder(path):
            yield _find(path, path.name, None, [f"{path.name}.{_GOLDEN}", f"{path.name}/{_GOLDEN}"])
        elif path.is_dir():
            for inner in _entries(path):
                if _is_model(inner):
                    yield _find(inner, path.name, inner.stem, [f"{inner.stem}.{_GOLDEN}", _GOLDEN])
                elif inner.is_dir():
                    beside = [f"{inner.name}.{_GOLDEN}", f"{inner.name}/{_GOLDEN}", _GOLDEN]
                    yield _find(inner, path.name, inner.name, beside)


def _entries(folder: Path) -> list[Path]:
    try:
        found = sorted(folder.iterdir())
    except OSError:  # gone, or not ours to read: the next look tells
        return []
    return [path for path in found if not path.name.startswith(".") and not path.name.lower().endswith(UNDER_WAY)]


def _is_model(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix == formats.PACKAGE if path.is_dir() else suffix in formats.EXTENSIONS


def _is_model_folder(folder: Path) -> bool:
    inside = _entries(folder)
    if any(path.name in (mlflow_models.MLMODEL, packages.MANIFEST) for path in inside):
        return True
    models = [path for path in inside if _is_model(path)]
    return bool(models) and (folder / formats.MODEL_TOML).is_file() and all(path.stem == "model" for path in models)


def _find(path: Path, name: str, version: str | None, beside: list[str]) -> Find:
    golden = next((cases for one in beside if (cases := path.parent / one).is_file()), None)
    try:
        names.check_model_name(name)
        if version is not None:
            names.check_version(version)
    except UsageError as error:
        return Find(path, name, version, golden, str(error))
    return Find(path, name, version, golden)


def state_of(find: Find) -> State:
    """How the files of a find look now. Raises OSError where one vanishes."""
    files = [find.path]
    if find.path.is_dir():
        files = sorted(path for path in find.path.rglob("*") if not path.is_dir())
    else:
        beside = find.path.parent / formats.MODEL_TOML
        # Weights beside a graph may still be on their way when the graph is there.
        files += sorted(path for path in find.path.parent.glob(f"{find.path.stem}[._-]*") if path.is_file())
        files += [beside] if beside.is_file() else []
    files += [find.golden] if find.golden is not None else []
    found = []
    for path in dict.fromkeys(files):
        seen = path.stat()
        found.append((str(path), seen.st_size, seen.st_mtime_ns, seen.st_ino))
    return tuple(found)


def _beside(find: Find) -> State:
    """The files beside a find that are no models themselves."""
    found = []
    for path in _entries(find.path.parent):
        try:
            seen = path.stat()
        except OSError:  # gone meanwhile
            continue
        if stat.S_ISREG(seen.st_mode) and not _is_model(path):
            found.append((path.name, seen.st_size, seen.st_mtime_ns, seen.st_ino))
    return tuple(found)


def writer_of(state: State) -> int | None:
    """The process that has one of the files open for writing, where the system lets us see it (Linux, our own processes)."""
    wanted = set()
    for name, *_ in state:
        seen = Path(name).stat()
        wanted.add((seen.st_dev, seen.st_ino))
    processes = Path("/proc")
    if not (processes / "self" / "fdinfo").is_dir():
        return None
    for process in processes.iterdir():
        if not process.name.isdecimal():
            continue
        try:
            for descriptor in (process / "fd").iterdir():
                seen = descriptor.stat()
                if (
                    stat.S_ISREG(seen.st_mode)
                    and (seen.st_dev, seen.st_ino) in wanted
                    and _writes(process, descriptor.name)
                ):
                    return int(process.name)
        except OSError:  # another user's, or gone meanwhile
            continue
    return None


def _writes(process: Path, descriptor: str) -> bool:
    for line in (process / "fdinfo" / descriptor).read_text().splitlines():
        if line.startswith("flags:"):
            return bool(int(line.split()[1], 8) & (os.O_WRONLY | os.O_RDWR))
    return False


class Discovery:
    """Looks at one folder again and again. A path is tried once in each state that it is seen in twice."""

    def __init__(
        self,
        database: Database,
        store: ArtifactStore,
        folder: Path,
        *,
        max_bytes: int,
        actor: str | None = None,
        writer: Callable[[State], int | None] = writer_of,
    ) -> None:
        self.database, self.store, self.folder = database, store, folder
        self.max_bytes, self.actor = max_bytes, actor
        self._writer = writer
        self._seen: dict[Path, State] = {}
        self._done: dict[Path, State] = {}
        self._wrong: dict[Path, State] = {}  # what lay beside a wrong one: weights that were missing may have come

    def look(self) -> Look:
        """One look: register what is new and has not changed since the look before."""
        found, paths = Look(), set()
        for find in scan(self.folder):
            paths.add(find.path)
            try:
                state = state_of(find)
                if self._done.get(find.path) == state and self._wrong.get(find.path) in (None, _beside(find)):
                    continue
                why = self._unsettled(find, state)
            except OSError as error:
                why = f"it cannot be read now: {error.strerror or error}"
            if why is not None:
                found.waiting.append(self._named(find, reason=why))
                continue
            try:
                self._take(find, found)
            except (UnavailableError, StorageError) as error:
                found.failure = error
                return found
            self._done[find.path] = state
        for known in (self._seen, self._done, self._wrong):
            for path in known.keys() - paths:
                del known[path]
        return found

    def _unsettled(self, find: Find, state: State) -> str | None:
        if self._seen.get(find.path) != state:
            fresh = find.path not in self._seen
            self._seen[find.path] = state
            return "seen for the first time" if fresh else "it has changed since the last look"
        if not state or not any(size for _, size, _, _ in state):
            return "it is empty so far"
        process = self._writer(state)
        return None if process is None else f"process {process} has it open for writing"

    def _take(self, find: Find, found: Look) -> None:
        """Register a find, and note in `found` what came of it. Raises UnavailableError, StorageError."""
        self._wrong.pop(find.path, None)
        if find.problem is not None:
            found.wrong.append(self._named(find, reason=find.problem))
            return
        try:
            archived = self._archived(find)
            if archived is not None:
                found.known.append(self._named(find, version=archived, state="archived"))
                return
            result = self._register(find)
        except (UnavailableError, StorageError):
            raise
        except ModelkeepError as error:
            found.wrong.append(self._named(find, reason=str(error)))
            self._wrong[find.path] = _beside(find)
            return
        into = found.registered if result.created else found.known
        into.append(self._named(find, version=result.version, state=result.state, digest=result.digest))

    def _register(self, find: Find) -> versions.Registered:
        for last in (False, True):
            try:
                return versions.register(
                    self.database,
                    self.store,
                    find.path,
                    name=find.name,
                    version=find.version,
                    golden=find.golden,
                    max_bytes=self.max_bytes,
                    actor=self.actor,
                )
            except ConflictError:  # perhaps another process that registers at the same time: it is done by then
                if last:
                    raise
        raise AssertionError("unreachable")

    def _archived(self, find: Find) -> str | None:
        """The archived version with these bytes: what a person took out of use does not come back by itself."""
        with self.database.read() as session:
            query = select(Version.version, Version.digest).where(
                Version.model == find.name, Version.state == "archived"
            )
            known = {row.digest: row.version for row in session.execute(query)}
        if not known:
            return None
        inside = formats.inspect(find.path, max_bytes=self.max_bytes)
        if find.golden is not None:
            inside = intake.without(inside, find.golden)
        return known.get(intake.digest_of(inside))

    def _named(self, find: Find, **more: Any) -> dict[str, Any]:
        path = find.path.relative_to(self.folder).as_posix()
        return {"path": path, "model": find.name, "version": find.version, **more}
