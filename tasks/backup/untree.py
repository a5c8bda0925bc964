"""Folders as they are written: by handles from one root, never through a link, each file taking its name when it is whole."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import fnmatch
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from registry.errors import ArtifactError, ConflictError, RefusedError, StorageError
from tasks.backup import tree
from tasks.backup.components import Source, Target
from tasks.backup.manifest import Component, Entry

MARK = ".modelkeep-restore"
"""A file in the root while a restore is under way: which one. It makes an interrupted one go on, and no other."""
_NEW = ".modelkeep-new"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAMED = 5

Fits = Callable[[str], bool]


def selected(only: tuple[str, ...]) -> Fits:
    """Whether a name is asked for: itself, by a pattern, or by a folder above it. Nothing asked for is all."""
    wanted = [one.strip("/") for one in only]

    def fits(name: str) -> bool:
        return not wanted or any(
            name == one or name.startswith(f"{one}/") or fnmatch.fnmatchcase(name, one) for one in wanted
        )

    return fits


def safe(name: str) -> tuple[str, ...]:
    """The parts of a name in an index. Raises RefusedError where it could lead out of the folder."""
    parts = tuple(name.split("/"))
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise RefusedError(f"the index names {name!r}, which could lead out of the folder: nothing of it is restored")
    return parts


class Untree:
    """One restore into a folder."""

    def __init__(self, root: Path, record: Component, target: Target) -> None:
        self.root, self.record, self.target = root, record, target
        index = "" if record.index is None else record.index.sha256
        self._mark = json.dumps({"index": index, "only": list(target.only)})
        self._handles: list[tuple[str, int]] = []
        self._own = os.geteuid() == 0
        self._lost: Counter[str] = Counter()

    def begun_before(self) -> bool:
        """Whether an earlier call for the same was interrupted here. Raises ConflictError for another one, without force."""
        try:
            found = (self.root / MARK).read_text()
            if found != self._mark and not self.target.force:
                raise ConflictError(
                    f"{self.root} holds what an interrupted restore of another backup left: finish that one, or restore over it with "
                    "--force"
                )
            return found == self._mark
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageError(f"{self.root / MARK} cannot be read: {error.strerror or error}") from error

    def refuse_what_stands(self, source: Source, fits: Fits) -> None:
        """Raises ConflictError where a name is taken already."""
        if not self.root.exists() or not any(self.root.iterdir()):
            return
        taken: list[str] = []
        for entry in source.entries():
            if entry.kind in ("pack", "folder") or not fits(entry.name):
                continue
            safe(entry.name)
            if os.path.lexists(self.root / entry.name):
                taken.append(entry.name)
                if len(taken) == _NAMED:
                    break
        if taken:
            raise ConflictError(
                f"{', '.join(map(repr, taken))} stand{'s' if len(taken) == 1 else ''} in {self.root} already, so nothing was "
                "restored; restore into another folder, or replace what is there with --force"
            )

    def run(self, source: Source, fits: Fits) -> dict[str, Any]:
        """Raises ArtifactError, RefusedError, ConflictError, StorageError, OSError."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / MARK).write_text(self._mark)
        counts: Counter[str] = Counter()
        folders: list[tuple[str, dict[str, Any]]] = []
        digest, done, total = hashlib.sha256(), 0, self.record.facts.get("bytes")
        moved = self._links_without_their_file(source, fits) if self.target.only else {}
        packs = _Packs(source)
        self._handles = [("", os.open(self.root, _FOLDER & ~os.O_NOFOLLOW))]
        try:
            for entry in source.entries():
                if entry.kind == "pack":
                    packs.next(entry)
                    continue
                safe(entry.name)
                digest.update(tree.line(entry.name, entry.kind, entry.facts))
                wanted = fits(entry.name)
                if not wanted and entry.name not in moved:
                    continue
                if entry.kind == "folder":
                    self._folder(entry.name, 0o700)
                    folders.append((entry.name, entry.facts))
                elif entry.kind == "link":
                    self._link(entry)
                elif entry.kind == "hardlink":
                    to = str(entry.facts["to"])
                    self._hardlink(moved[to][0] if to in moved else to, entry.name)
                elif entry.kind == "file":
                    for name in [entry.name] if wanted else moved[entry.name][:1]:
                        self._file(name, entry, packs)
                    done += int(entry.facts["size"])
                    self.target.progress(done, total)
                else:
                    raise ArtifactError(f"{entry.name!r} is of kind {entry.kind!r}, which this release does not know")
                counts[entry.kind] += wanted
            packs.close()
            for name, facts in reversed(folders):  # what is in them is there by now, and their times stay
                self._dress_folder(name, facts)
            _sync(self._handles[0][1])
            self._handle("")  # closes what lies below
            os.unlink(MARK, dir_fd=self._handles[0][1])
            if not self.target.only and "root" in self.record.facts:
                self._dress(self._handles[0][1], self.record.facts["root"])
        finally:
            packs.close()
            for _, handle in self._handles:
                os.close(handle)
            self._handles = []
        return {
            "folder": str(self.root),
            "names": sum(counts.values()),
            "counts": dict(sorted(counts.items())),
            "tree_sha256": digest.hexdigest(),
            "bytes": done,
            **({"not_restored": dict(self._lost)} if self._lost else {}),
        }

    def _links_without_their_file(self, source: Source, fits: Fits) -> dict[str, list[str]]:
        """Hard links that are asked for, by the name that has the content where that is not asked for."""
        moved: dict[str, list[str]] = {}
        for entry in source.entries():
            if entry.kind == "hardlink" and fits(entry.name) and not fits(str(entry.facts["to"])):
                moved.setdefault(str(entry.facts["to"]), []).append(entry.name)
        return moved

    # --- one thing each ----------------------------------------------------------------------------------------------

    def _folder(self, name: str, mode: int) -> None:
        parent, base = self._parent(name)
        try:
            os.mkdir(base, mode, dir_fd=parent)
        except FileExistsError:
            status = os.stat(base, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                if not self.target.force:
                    raise ConflictError(f"{name!r} in {self.root} is no folder: nothing is put in its place") from None
                os.unlink(base, dir_fd=parent)
                os.mkdir(base, mode, dir_fd=parent)

    def _dress_folder(self, name: str, facts: dict[str, Any]) -> None:
        parent, base = self._parent(name)
        handle = os.open(base, _FOLDER, dir_fd=parent)
        try:
            self._dress(handle, facts)
        finally:
            os.close(handle)

    def _file(self, name: str, entry: Entry, packs: _Packs) -> None:
        facts = entry.facts
        parent, base = self._parent(name)
        if self._stands(parent, base, facts):
            packs.skip(entry)
            return
        fresh = _fresh(base)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(fresh, flags, 0o600, dir_fd=parent)
        try:
            self._fill(handle, entry, packs)
            self._dress(handle, facts)
        except BaseException:
            os.close(handle)
            with contextlib.suppress(OSError):
                os.unlink(fresh, dir_fd=parent)
            raise
        os.close(handle)
        self._name(fresh, base, parent, name)

    def _stands(self, parent: int, base: str, facts: dict[str, Any]) -> bool:
        """Whether an interrupted restore has brought this very file. Then its times and its bytes are the backup's."""
        try:
            status = os.stat(base, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if (
            not stat.S_ISREG(status.st_mode)
            or status.st_size != facts["size"]
            or status.st_mtime_ns != facts["mtime_ns"]
        ):
            return False
        handle = os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            reading = tree.Reading(handle, _extents(facts), lambda size: None)
            for _ in reading:
                pass
            if reading.short or reading.digest.hexdigest() != facts["sha256"]:
                return False
            self._dress(handle, facts)
        finally:
            os.close(handle)
        return True

    def _fill(self, handle: int, entry: Entry, packs: _Packs) -> None:
        facts, digest = entry.facts, hashlib.sha256()
        pieces = packs.pieces(entry)
        places = iter(_extents(facts))
        at, left = 0, 0
        for piece in pieces:
            digest.update(piece)
            view = memoryview(piece)
            while len(view):
                while not left:
                    try:
                        at, left = next(places)
                    except StopIteration:
                        raise ArtifactError(f"{entry.name!r} has more bytes than its index says") from None
                written = os.pwrite(handle, view[:left], at)
                at, left, view = at + written, left - written, view[written:]
        if digest.hexdigest() != facts["sha256"]:
            raise ArtifactError(f"{entry.name!r} came out with other bytes than its index says: it was not restored")
        os.ftruncate(handle, int(facts["size"]))

    def _link(self, entry: Entry) -> None:
        parent, base = self._parent(entry.name)
        fresh, facts = _fresh(base), entry.facts
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=parent)
        os.symlink(facts["to"], fresh, dir_fd=parent)
        if self._own:
            os.chown(fresh, facts["uid"], facts["gid"], dir_fd=parent, follow_symlinks=False)
        os.utime(fresh, ns=(facts["mtime_ns"], facts["mtime_ns"]), dir_fd=parent, follow_symlinks=False)
        self._name(fresh, base, parent, entry.name)

    def _hardlink(self, to: str, name: str) -> None:
        if to == name:
            return
        safe(to)
        first, first_base = self._open_parent(to)
        try:
            parent, base = self._parent(name)
            fresh = _fresh(base)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=parent)
            try:
                os.link(first_base, fresh, src_dir_fd=first, dst_dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError as error:
                raise ArtifactError(f"{name!r} is a hard link to {to!r}, which was not restored") from error
            self._name(fresh, base, parent, name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=parent)  # a rename of two names of one file does nothing
        finally:
            os.close(first)

    def _name(self, fresh: str, base: str, parent: int, name: str) -> None:
        try:
            os.replace(fresh, base, src_dir_fd=parent, dst_dir_fd=parent)
        except (IsADirectoryError, NotADirectoryError) as error:
            os.unlink(fresh, dir_fd=parent)
            raise ConflictError(
                f"{name!r} in {self.root} is a folder: nothing is put in its place, move it away"
            ) from error

    def _dress(self, handle: int, facts: dict[str, Any]) -> None:
        if self._own:
            os.fchown(handle, facts["uid"], facts["gid"])
        os.fchmod(handle, facts["mode"])  # after the owner, whose change takes set-user-id away
        for name, value in facts.get("xattrs", {}).items():
            try:
                os.setxattr(handle, name, base64.b64decode(value))
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.EACCES):
                    raise
                self._lost[f"attribute {name}"] += 1
        os.utime(handle, ns=(facts["mtime_ns"], facts["mtime_ns"]))

    # --- the way to a name -------------------------------------------------------------------------------------------

    def _parent(self, name: str) -> tuple[int, str]:
        """A handle of the folder of a name, and its last part. Folders that are not there are made."""
        prefix, _, base = name.rpartition("/")
        return self._handle(prefix), base

    def _open_parent(self, name: str) -> tuple[int, str]:
        """The same, with a handle of one's own."""
        handle, base = self._parent(name)
        return os.dup(handle), base

    def _handle(self, prefix: str) -> int:
        while (
            self._handles[-1][0]
            and prefix != self._handles[-1][0]
            and not prefix.startswith(self._handles[-1][0] + "/")
        ):
            os.close(self._handles.pop()[1])
        at, handle = self._handles[-1]
        for part in filter(None, prefix[len(at) :].split("/")):
            at = f"{at}/{part}" if at else part
            try:
                handle = self._enter(handle, part)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise RefusedError(
                        f"{at!r} in {self.root} is no folder but stands in the way to what is restored: nothing is written through it"
                    ) from error
                raise
            self._handles.append((at, handle))
        return handle

    @staticmethod
    def _enter(parent: int, part: str) -> int:
        try:
            return os.open(part, _FOLDER, dir_fd=parent)
        except FileNotFoundError:
            os.mkdir(part, 0o755, dir_fd=parent)
            return os.open(part, _FOLDER, dir_fd=parent)


class _Packs:
    """The small files of a pack, which follow it in the index in their order, from one reading of its stream."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._name: str | None = None
        self._entry: Entry | None = None
        self._reading: Iterator[bytes] | None = None
        self._at, self._rest = 0, memoryview(b"")

    def next(self, entry: Entry) -> None:
        """A pack that nothing is wanted of is not read."""
        self.close()
        self._name, self._entry, self._at, self._rest = entry.name, entry, 0, memoryview(b"")

    def close(self) -> None:
        closing = getattr(self._reading, "close", None)
        self._reading = None
        if closing is not None:
            closing()

    def skip(self, entry: Entry) -> None:
        """Nothing of it is wanted; the next one finds its place by itself."""

    def pieces(self, entry: Entry) -> Iterator[bytes]:
        if entry.stream is not None:
            yield from self._source.open(entry.stream)
            return
        facts = entry.facts
        size = sum(length for _, length in _extents(facts))
        if not size:
            return
        if self._entry is None or self._entry.stream is None or facts.get("pack") != self._name:
            raise ArtifactError(
                f"{entry.name!r} lies in {facts.get('pack')!r}, which does not stand before it in the index"
            )
        if self._reading is None:
            self._reading = iter(self._source.open(self._entry.stream))
        self._forward(int(facts["offset"]) - self._at, entry)
        left = size
        while left:
            piece = self._take(left, entry)
            left -= len(piece)
            yield piece

    def _forward(self, count: int, entry: Entry) -> None:
        if count < 0:
            raise ArtifactError(f"{entry.name!r} does not stand at its place in the index")
        while count:
            count -= len(self._take(count, entry))

    def _take(self, most: int, entry: Entry) -> bytes:
        assert self._reading is not None
        if not self._rest:
            self._rest = memoryview(next(self._reading, b""))
            if not self._rest:
                raise ArtifactError(f"the pack of {entry.name!r} ends before it")
        piece, self._rest = self._rest[:most], self._rest[most:]
        self._at += len(piece)
        return bytes(piece)


def _sync(handle: int) -> None:
    """Bring the file system of a handle to its disk: once for all files, since once for each takes minutes. Raises OSError."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
    elif syncfs(handle) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _extents(facts: dict[str, Any]) -> list[tree.Extent]:
    given = facts.get("extents")
    if given is None:
        return [(0, int(facts["size"]))] if facts["size"] else []
    return [(int(start), int(length)) for start, length in given]


def _fresh(base: str) -> str:
    """The name of a file until it is whole: of its own for each, the same after a kill, and short enough for any file system."""
    return f".{hashlib.sha256(base.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}{_NEW}"
