"""The artifact store: bytes under their SHA-256, written once, verified whenever they are read. A directory for now."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from registry.errors import ArtifactError, SettingsError, StorageError

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of an artifact: its path from the model's folder, with "/", and where its bytes are."""

    name: str
    digest: str
    size_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "digest": self.digest, "size_bytes": self.size_bytes}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> StoredFile:
        return cls(str(value["name"]), str(value["digest"]), int(value["size_bytes"]))


class ArtifactStore(Protocol):
    """What a store must do. Digests are 64 hexadecimal digits."""

    def put(self, path: Path) -> StoredFile:
        """Store a file. What is there already is left alone. Raises StorageError; nothing is left half written."""

    def path(self, digest: str) -> Path:
        """A local path to verified bytes. Raises ArtifactError where they are missing or not those of the digest."""

    def has(self, digest: str) -> bool: ...

    def remove(self, digest: str) -> int | None:
        """Remove bytes that nothing refers to. Returns their size, None where there were none. Raises StorageError."""

    def intake(self) -> AbstractContextManager[Path]:
        """A private folder for files that are looked at before they are stored. It is gone when the block ends."""


def artifact_digest(files: Iterable[StoredFile]) -> str:
    """The digest of an artifact: of its file where there is one, else of the sorted list of names and digests."""
    listed = list(files)
    if len(listed) == 1:
        return listed[0].digest
    text = "".join(f"{file.digest}  {file.name}\n" for file in sorted(listed, key=lambda file: file.name))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> tuple[str, int]:
    """SHA-256 and size in bytes."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


class DirectoryStore:
    """A folder with `ab/abcdef…` files. Safe under concurrent writers of the same bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, path: Path) -> StoredFile:
        try:
            with path.open("rb") as source:
                digest, size = self._write(iter(lambda: source.read(_CHUNK), b""), None)
        except OSError as error:
            raise _storage_error(error, path, self.folder) from error
        return StoredFile(path.name, digest, size)

    def receive(self, digest: str, pieces: Iterable[bytes]) -> int:
        """Store bytes whose digest is known already. Returns their size.

        Raises ArtifactError where they hash to another one, StorageError; an exception of `pieces` passes through. Nothing is
        left half written.
        """
        self.place(digest)
        try:
            return self._write(pieces, digest)[1]
        except OSError as error:
            raise _storage_error(error, Path(digest), self.folder) from error

    def _write(self, pieces: Iterable[bytes], due: str | None) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        temporary: Path | None = None
        try:
            incoming = self.folder / "incoming"
            incoming.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=incoming)
            temporary = Path(name)
            with os.fdopen(descriptor, "wb") as target:
                for chunk in pieces:
                    digest.update(chunk)
                    size += len(chunk)
                    target.write(chunk)
                if due is not None and digest.hexdigest() != due:
                    raise ArtifactError(
                        f"what should be artifact {due} hashes to {digest.hexdigest()}: it was not stored"
                    )
                target.flush()
                os.fsync(target.fileno())
            final = self.place(digest.hexdigest())
            if not self._intact(final, digest.hexdigest()):
                final.parent.mkdir(exist_ok=True)
                temporary.chmod(0o444)
                temporary.replace(final)
                _fsync_folder(final.parent)
                _fsync_folder(self.folder)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        return digest.hexdigest(), size

    def path(self, digest: str) -> Path:
        place = self.place(digest)
        try:
            found, _ = file_digest(place)
        except FileNotFoundError as error:
            raise ArtifactError(
                f"artifact {digest} is not in {self.folder}: restore it from a backup, or register the file again"
            ) from error
        except OSError as error:
            raise StorageError(
                f"artifact {digest} in {self.folder} cannot be read: {error.strerror or error}"
            ) from error
        if found != digest:
            raise ArtifactError(
                f"artifact {digest} in {self.folder} is corrupt: its bytes hash to {found}; "
                "restore it from a backup, or register the file again"
            )
        return place

    def has(self, digest: str) -> bool:
        return self.place(digest).exists()

    def remove(self, digest: str) -> int | None:
        place = self.place(digest)
        try:
            size = place.stat().st_size
            place.unlink()
            _fsync_folder(place.parent)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(
                f"artifact {digest} could not be removed from {self.folder}: {error.strerror or error}; repeat the command"
            ) from error
        return size

    @contextlib.contextmanager
    def intake(self) -> Iterator[Path]:
        incoming = self.folder / "incoming"
        try:
            incoming.mkdir(parents=True, exist_ok=True)
            private = Path(tempfile.mkdtemp(dir=incoming))
        except OSError as error:
            raise _storage_error(error, Path("the model"), self.folder) from error
        try:
            yield private
        finally:
            shutil.rmtree(private, ignore_errors=True)

    def clean_incoming(self) -> int:
        """Remove what a killed writer left. Returns how many. Only safe while nobody writes."""
        left = list((self.folder / "incoming").glob("*"))
        for path in left:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return len(left)

    def _intact(self, place: Path, digest: str) -> bool:
        """False as well where the stored bytes have rotted or cannot be read: then the new ones take their place."""
        try:
            return place.exists() and file_digest(place)[0] == digest
        except OSError:
            return False

    def place(self, digest: str) -> Path:
        """Where the bytes are or would be. They are not looked at: for who hashes them while he reads."""
        if len(digest) != 64 or any(c not in "0123456789abcdef" for c in digest):
            raise ArtifactError(f"{digest!r} is no artifact digest: 64 hexadecimal digits are")
        return self.folder / digest[:2] / digest


def open_store(location: str) -> DirectoryStore:
    """The store at a directory. Raises SettingsError for a location that this release has no store for."""
    if "://" in location and not location.startswith("file://"):
        raise SettingsError(
            f"artifacts = {location!r}: this release keeps artifacts in a directory only; give a path (MODELKEEP_ARTIFACTS)"
        )
    return DirectoryStore(Path(location.removeprefix("file://")).expanduser())


def materialise(store: ArtifactStore, files: list[StoredFile], cache: Path) -> Path:
    """A path that a runtime can load: the stored file itself, or a folder of links with the names that the files refer to.

    Every file is verified. Raises ArtifactError, StorageError.
    """
    if len(files) == 1:
        return store.path(files[0].digest)
    folder = cache / artifact_digest(files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            source, target = store.path(file.digest), folder / _inside(file.name)
            if target.exists() and target.samefile(source):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own: a server and a flow may be at the same artifact at once.
            fresh = target.parent / f".{target.name}.{secrets.token_hex(4)}.new"
            try:
                try:
                    fresh.hardlink_to(source)
                except OSError:  # another file system: a copy serves
                    shutil.copyfile(source, fresh)
                fresh.replace(target)
            finally:
                fresh.unlink(missing_ok=True)
    except OSError as error:
        raise _storage_error(error, folder, cache) from error
    return folder / files[0].name


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ArtifactError(f"{name!r} leads out of the folder of its artifact: it is not loaded")
    return path


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(error: OSError, path: Path, folder: Path) -> StorageError:
    remedy = {
        errno.ENOSPC: "free some space there",
        errno.EDQUOT: "the quota is used up: free some space there",
        errno.EROFS: "it is mounted read-only",
        errno.EACCES: "check the permissions",
        errno.EPERM: "check the permissions",
    }.get(error.errno or 0, "check the disk")
    return StorageError(
        f"{path} could not be stored in {folder}: {error.strerror or error}; {remedy}. Nothing was left behind."
    )
