"""Where backups are kept: named bytes in a directory (here) or in an S3 bucket (s3.py). Knows nothing of what the bytes mean."""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import errno
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from registry import clock
from registry.errors import ConflictError, NotFoundError, SettingsError, StorageError, UsageError
from tasks.backup.heap import return_large_blocks

if TYPE_CHECKING:
    from registry.settings import Settings

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:+=@-]*(/[A-Za-z0-9_][A-Za-z0-9._:+=@-]*)*", re.ASCII)
INCOMING = ".incoming"
LEFTOVER_SECONDS = 24 * 3600.0
"""A temporary file that nobody has written to for so long is a killed writer's."""
OBJECT_BYTES = (16 << 20) + 64
"""Most that an object can have: a chunk that does not compress, with what encryption adds."""
FILE_BYTES = 2 << 30
"""Of anything else: a log of a database server has 1 GiB at most."""
SYNCED_AT_ONCE = 1 << 20
"""Bytes: what is smaller waits for `flush`, because a hundred thousand small files would wait for the disk one by one."""


@dataclass(frozen=True, slots=True)
class Stat:
    """One name of a place. `modified` is by the clock of the place: compare it only with times of the same place."""

    name: str
    size_bytes: int
    modified: dt.datetime


class Place(Protocol):
    """What a place must do. A name is parts of letters, digits and ._:+=@- with "/" between; none begins with a dot."""

    shown: str
    """For messages: the path or URL, without secrets."""

    def put(self, name: str, data: bytes, *, only_new: bool = False, keep_until: dt.datetime | None = None) -> None:
        """All of it or nothing, in place of what was there. With `only_new`, ConflictError where other bytes have the name.

        `keep_until`: until then nobody can delete it, where the place can promise that. Raises StorageError.
        """

    def get(self, name: str) -> bytes:
        """Raises NotFoundError, StorageError."""

    def stat(self, name: str) -> Stat | None:
        """None where it is not there. Raises StorageError."""

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """Every name that begins so, sorted. Raises StorageError."""

    def delete(self, name: str) -> bool:
        """Whether it was there. Raises StorageError."""

    def flush(self) -> None:
        """All that was put before survives a loss of power once this returns. Raises StorageError."""


def check_name(name: str) -> str:
    """Raises UsageError for a name that could lead out of the place or that not every place can hold."""
    if not is_name(name):
        raise UsageError(
            f"{name!r} is no name in a backup location: parts of letters, digits and ._:+=@- with '/' between"
        )
    return name


def is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and ".." not in name.split("/") and len(name) <= 700


def check_size(name: str, size_bytes: int, shown: str) -> None:
    """Raises StorageError before more is read into memory than there can be."""
    limit = OBJECT_BYTES if name.startswith("objects/") else FILE_BYTES
    if size_bytes > limit:
        raise StorageError(
            f"{name} in {shown} has {size_bytes} bytes, and {limit} is the most that it can have: it is damaged"
        )


class DirectoryPlace:
    """A directory. It is made when the first thing is put."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shown = str(folder)
        self._lock = threading.Lock()
        self._unsynced: set[Path] = set()

    def put(self, name: str, data: bytes, *, only_new: bool = False, keep_until: dt.datetime | None = None) -> None:
        final = self._path(name)
        temporary: Path | None = None
        try:
            incoming = self._folder(INCOMING)
            self._make(final.parent)
            temporary = incoming / f"{secrets.token_hex(12)}.tmp"
            # What takes the place of something must not be less certain than that was.
            small = len(data) < SYNCED_AT_ONCE and name.startswith("objects/") and not final.exists()
            at_once = not small or _syncfs is None
            with temporary.open("xb") as target:
                target.write(data)
                target.flush()
                if at_once:
                    os.fsync(target.fileno())
            temporary.chmod(0o400 if name.startswith("objects/") else 0o600)  # dumps are nobody else's to read
            if only_new:
                try:
                    final.hardlink_to(temporary)  # unlike a rename it fails where the name is taken
                except FileExistsError:
                    if final.read_bytes() != data:
                        raise ConflictError(f"{name} is in {self.shown} already, with other content") from None
            else:
                temporary.replace(final)
                temporary = None
            if at_once:
                _fsync_folder(final.parent)
            else:
                with self._lock:
                    self._unsynced.add(final.parent)
        except OSError as error:
            raise self._error(error, name, "written") from error
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):  # the sweep by age finds what cannot be removed now
                    temporary.unlink(missing_ok=True)

    def get(self, name: str) -> bytes:
        try:
            with self._path(name).open("rb") as file:
                check_size(name, os.fstat(file.fileno()).st_size, self.shown)
                return file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise NotFoundError(f"{name} is not in {self.shown}") from error
        except OSError as error:
            raise self._error(error, name, "read") from error

    def stat(self, name: str) -> Stat | None:
        try:
            found = self._path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._error(error, name, "looked at") from error
        return Stat(name, found.st_size, dt.datetime.fromtimestamp(found.st_mtime, dt.UTC))

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """Folder by folder: memory is that of the largest one. A name that vanishes meanwhile is left out."""
        top, _, start = prefix.rpartition("/")
        folder = self._path(top) if top else self.folder
        try:
            yield from self._walk(folder, f"{top}/" if top else "", start)
        except OSError as error:
            raise self._error(error, prefix or "its content", "listed") from error

    def _walk(self, folder: Path, above: str, start: str) -> Iterator[Stat]:
        try:
            with os.scandir(folder) as found:
                # "a/b" comes after "a-b" in the order of whole names, so a folder sorts with its slash
                entries = sorted((entry.name + ("/" if entry.is_dir() else ""), entry) for entry in found)
        except (FileNotFoundError, NotADirectoryError):
            return
        for key, entry in entries:
            if not entry.name.startswith(start) or not is_name(entry.name):
                continue  # whatever else lies there is not ours
            if key.endswith("/"):
                yield from self._walk(Path(entry.path), above + key, "")
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            yield Stat(above + entry.name, status.st_size, dt.datetime.fromtimestamp(status.st_mtime, dt.UTC))

    def delete(self, name: str) -> bool:
        path = self._path(name)
        try:
            path.unlink()
            _fsync_folder(path.parent)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._error(error, name, "deleted") from error
        return True

    def remove_empty(self, name: str) -> None:
        """The folder of names that are all deleted; one that holds something stays. Raises StorageError."""
        try:
            self._path(name).rmdir()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise self._error(error, name, "removed") from error

    def flush(self) -> None:
        with self._lock:
            folders, self._unsynced = self._unsynced, set()
        if not folders:
            return
        try:
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _syncfs is None or _syncfs(descriptor) != 0:
                    raise OSError(ctypes.get_errno() or errno.EIO, "the file system could not be synced")
            finally:
                os.close(descriptor)
            for folder in folders:
                _fsync_folder(folder)
        except OSError as error:
            raise self._error(error, "what was written last", "brought to the disk") from error

    def sweep(self, *, older_than_seconds: float = LEFTOVER_SECONDS) -> int:
        """Remove what killed writers left. Returns how many files. A writer at work touches its file all the time."""
        swept, limit = 0, time.time() - older_than_seconds
        try:
            for path in (self.folder / INCOMING).glob("*.tmp"):
                with contextlib.suppress(FileNotFoundError):  # its writer was not dead, and has finished
                    if path.stat().st_mtime < limit:
                        path.unlink()
                        swept += 1
        except OSError as error:
            raise self._error(error, INCOMING, "swept") from error
        return swept

    def _path(self, name: str) -> Path:
        return self.folder / check_name(name)

    def _folder(self, name: str) -> Path:
        self._make(folder := self.folder / name)
        return folder

    def _make(self, folder: Path) -> None:
        """With its parents, each of them on the disk before it is used."""
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(mode=0o700, exist_ok=True)
            _fsync_folder(path.parent)

    def _error(self, error: OSError, name: str, verb: str) -> StorageError:
        remedy = {
            errno.ENOSPC: "the disk is full: free some space there, or name another location in `backups`",
            errno.EDQUOT: "the quota is used up: free some space there, or name another location in `backups`",
            errno.EROFS: "it is mounted read-only: mount it for writing, or name another location in `backups`",
            errno.EACCES: "check the permissions of the folder",
            errno.EPERM: "check the permissions of the folder",
            errno.EIO: "the disk has errors: look at the system's log, and name another location in `backups`",
            errno.ENOTDIR: "a file stands where a folder should be: name another location in `backups`",
        }.get(error.errno or 0, "check the disk")
        return StorageError(f"{name} could not be {verb} in {self.shown}: {error.strerror or error}; {remedy}")


def open_place(location: str, *, endpoint_url: str | None = None, lock_mode: str | None = None) -> Place:
    """The place at a directory or at s3://bucket/prefix. Nothing is read or made yet. Raises SettingsError."""
    return_large_blocks()  # whoever opens a place moves chunks
    if location.startswith("s3://"):
        from tasks.backup.s3 import S3Place

        return S3Place(location, endpoint_url=endpoint_url, lock_mode=lock_mode)
    if "://" in location and not location.startswith("file://"):
        raise SettingsError(f"backups = {location!r}: a directory or s3://bucket/prefix is meant")
    return DirectoryPlace(Path(location.removeprefix("file://")).expanduser().absolute())


def open_places(settings: Settings) -> list[Place]:
    """The places of the setting `backups`, in its order. Raises SettingsError."""
    mode = settings.backup.object_lock
    return [
        open_place(location, endpoint_url=settings.s3_endpoint_url, lock_mode=mode) for location in settings.backups
    ]


def keep_until(settings: Settings) -> dt.datetime | None:
    """Until when a bucket with object lock keeps what it is given now, whoever has its credentials."""
    if settings.backup.object_lock is None:
        return None
    return clock.now() + dt.timedelta(days=settings.backup.object_lock_days)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find_syncfs() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None, use_errno=True).syncfs
    except (AttributeError, OSError):  # not Linux: then every file is synced when it is written
        return None


_syncfs = _find_syncfs()
