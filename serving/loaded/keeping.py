"""What a rollback needs, on this replica's own disk: the files of the versions in traffic and of the living rollback points."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from registry.errors import ArtifactError, ModelkeepError, StorageError
from registry.points import Step, stack
from registry.store import ArtifactStore, DirectoryStore, StoredFile
from serving.loaded.laststate import Wanted
from serving.process import documents

log = logging.getLogger("modelkeep.keeping")

GRACE_SECONDS = 600.0
"""What came to the disk more recently is not cleaned up: a load may be about to need it."""
FREE_SHARE = 0.1
"""Of the disk, that copies leave free. Links take no room."""
_FORMAT = 1
_HEX = frozenset("0123456789abcdef")


class NearStore:
    """A store whose files may lie on this replica's disk too; those come first, and are verified like the others."""

    def __init__(self, far: ArtifactStore, folder: Path) -> None:
        self.far, self.near, self.folder = far, DirectoryStore(folder), folder

    def put(self, path: Path) -> StoredFile:
        return self.far.put(path)

    def remove(self, digest: str) -> int | None:
        return self.far.remove(digest)

    def intake(self) -> AbstractContextManager[Path]:
        return self.far.intake()

    def has(self, digest: str) -> bool:
        return self.near.has(digest) or self.far.has(digest)

    def path(self, digest: str) -> Path:
        if self.near.has(digest):
            try:
                return self.near.path(digest)
            except ModelkeepError as error:
                log.error("the file that was kept here cannot be used, going to the store: %s", error)
        return self.far.path(digest)

    def keep(self, digest: str) -> None:
        """Have a verified file here: a link where the store is on the same file system, else a copy.

        A link shares its bytes with the store's file: it outlives the file's removal, not its corruption. Raises ArtifactError,
        StorageError.
        """
        place = self.folder / digest[:2] / digest
        if place.exists():
            return
        source = self.far.path(digest)
        fresh = place.with_name(f".{digest}.{secrets.token_hex(4)}.new")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                fresh.hardlink_to(source)
            except OSError:  # another file system
                usage, size = shutil.disk_usage(place.parent), source.stat().st_size
                if usage.free - size < FREE_SHARE * usage.total:
                    raise StorageError(
                        f"artifact {digest} ({size} bytes) is not kept in {self.folder}: less than {FREE_SHARE:.0%} of the disk would "
                        "stay free; free some space, or let rollback points go"
                    ) from None
                shutil.copyfile(source, fresh)
            fresh.replace(place)
        except OSError as error:
            raise StorageError(
                f"artifact {digest} cannot be kept in {self.folder}: {error.strerror or error}"
            ) from error
        finally:
            fresh.unlink(missing_ok=True)


class Kept:
    """The rollback points as this replica knows them, with their files. `bring` and `clean` run on one thread."""

    def __init__(self, far: ArtifactStore, cache: Path, path: Path) -> None:
        self.cache, self.path = cache, path
        self.store = NearStore(far, cache / "files")
        self.steps: dict[str, list[Step]] = {}
        self.versions: dict[tuple[str, str], Wanted] = {}
        self.errors: dict[tuple[str, str], str] = {}

    def recall(self) -> None:
        """What a process before this one knew. Without it a rollback needs the registry, or a version's name."""
        try:
            document = json.loads(self.path.read_text())
            if document.get("format") != _FORMAT:
                raise ValueError(f"{self.path} is of format {document.get('format')!r}")
            steps = {model: [Step(**step) for step in found] for model, found in document["points"].items()}
            versions = [Wanted(**{**value, "files": tuple(value["files"])}) for value in document["versions"]]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.error("the rollback points on the disk cannot be read: %s", error)
            return
        self.steps, self.versions = steps, {(wanted.model, wanted.version): wanted for wanted in versions}

    def version(self, model: str, version: str) -> Wanted | None:
        return self.versions.get((model, version))

    def names(self, model: str) -> list[str]:
        """Versions of a model that this server can go back to by itself."""
        return sorted(version for name, version in self.versions if name == model)

    def below(self, model: str, stable: str | None) -> str | None:
        """The stable version before `stable`, by the points; None where there is none."""
        found = stack(self.steps.get(model, []))
        if stable in found:
            found = found[: len(found) - found[::-1].index(stable)]
            return found[-2] if len(found) > 1 else None
        return found[-1] if found else None

    def bring(self, steps: dict[str, list[Step]], versions: Iterable[Wanted]) -> None:
        """Have the files of these versions here, then remember the points. What cannot be had is an error of its version."""
        errors: dict[tuple[str, str], str] = {}
        here: dict[tuple[str, str], Wanted] = {}
        for wanted in versions:
            key = (wanted.model, wanted.version)
            try:
                for file in wanted.files:
                    self.store.keep(str(file["digest"]))
            except (ArtifactError, StorageError) as error:
                errors[key] = str(error)
                if self.errors.get(key) != str(error):
                    log.error("%s %s is not kept for a rollback: %s", *key, error)
            else:
                here[key] = wanted
        if (steps, here) != (self.steps, self.versions):
            document = {
                "format": _FORMAT,
                "points": {model: [asdict(step) for step in found] for model, found in steps.items()},
                "versions": [asdict(wanted) for wanted in here.values()],
            }
            try:
                documents.replace(self.path, document)
            except OSError as error:
                log.error("the rollback points could not be kept in %s: %s", self.path, error)
        self.steps, self.versions, self.errors = steps, here, errors

    def clean(self, artifacts: set[str], files: set[str], *, grace_seconds: float = GRACE_SECONDS) -> list[str]:
        """Drop what neither a route nor a point needs. A file that is mapped goes on in memory until it is let go of.

        `artifacts` are the digests of versions that stay (folders of several files), `files` those of files.
        """
        dropped, limit = [], time.time() - grace_seconds
        try:
            folders = [path for path in self.cache.iterdir() if _is_digest(path.name)] if self.cache.exists() else []
            for path in folders:
                if path.name not in artifacts and path.stat().st_ctime < limit:
                    shutil.rmtree(path)
                    dropped.append(path.name)
            for path in self.store.folder.glob("??/*"):
                left = path.name.startswith(".")  # by a process that was killed
                if (left or path.name not in files) and path.stat().st_ctime < limit:
                    path.unlink(missing_ok=True)
                    dropped.append(path.name)
        except OSError as error:
            log.error("%s could not be cleaned up: %s", self.cache, error)
        return dropped


def _is_digest(name: str) -> bool:
    return len(name) == 64 and set(name) <= _HEX
