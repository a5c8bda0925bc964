"""Folders as they are read: in order of their names, by handles, so that a link that somebody puts in the way is never followed."""

from __future__ import annotations

import base64
import errno
import fnmatch
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOLE_BYTES = 64 << 10
"""Holes that are shorter are read through."""
_MOST_EXTENTS = 10_000
_PIECE = 1 << 20

Extent = tuple[int, int]
"""Offset and length of a part of a file that has data."""


@dataclass(frozen=True, slots=True)
class Found:
    """Something in the tree. `parent` is a handle of its folder, open until the next one is asked for."""

    name: str
    """From the root, with "/"; bytes that are no UTF-8 are surrogate escapes."""
    base: str
    parent: int
    status: os.stat_result


def walk(root: Path, excluded: Callable[[str], bool], problem: Callable[[str, OSError], None]) -> Iterator[Found]:
    """All below `root`, folders before what is in them, the names of each folder sorted as bytes. `root` itself may be a link.

    What cannot be looked at is told to `problem` (also what vanished: ENOENT) and left out. Raises OSError for the root.
    """
    stack = [_listed(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), "")]
    try:
        while stack:
            handle, prefix, names = stack[-1]
            base = next(names, None)
            if base is None:
                os.close(handle)
                stack.pop()
                continue
            name = prefix + base
            if excluded(name):
                continue
            try:
                status = os.stat(base, dir_fd=handle, follow_symlinks=False)
                yield Found(name, base, handle, status)
                if stat.S_ISDIR(status.st_mode):
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                    stack.append(_listed(os.open(base, flags, dir_fd=handle), name + "/"))
            except OSError as error:
                problem(name, error)
    finally:
        for handle, _, _ in stack:
            os.close(handle)


def _listed(handle: int, prefix: str) -> tuple[int, str, Iterator[str]]:
    try:
        return handle, prefix, iter(sorted(os.listdir(handle), key=os.fsencode))
    except OSError:
        os.close(handle)
        raise


def pattern(patterns: list[str]) -> Callable[[str], bool]:
    """Whether a name, or the whole way to it, fits one of the patterns of a shell. What is below a folder that fits is gone with it."""

    def fits(name: str) -> bool:
        base = name.rpartition("/")[2]
        return any(fnmatch.fnmatchcase(base, one) or fnmatch.fnmatchcase(name, one.strip("/")) for one in patterns)

    return fits


def extents_of(handle: int, size: int, blocks: int) -> list[Extent]:
    """Where a file has data. A file with holes costs nothing for them."""
    if blocks * 512 >= size:
        return [(0, size)] if size else []
    found: list[Extent] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(handle, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here on
                break
            return [(0, size)]  # a file system that does not know
        if start >= size:
            break
        end = min(os.lseek(handle, start, os.SEEK_HOLE), size)
        if found and start - (found[-1][0] + found[-1][1]) < HOLE_BYTES:
            found[-1] = (found[-1][0], end - found[-1][0])
        else:
            found.append((start, end - start))
        at = end
        if len(found) > _MOST_EXTENTS:
            return [(0, size)]
    return found


class Reading:
    """The data of an open file, part by part; afterwards how much there was, and its hash."""

    def __init__(self, handle: int, extents: list[Extent], told: Callable[[int], None]) -> None:
        self.handle, self.extents, self.told = handle, extents, told
        self.got, self.digest, self.short = 0, hashlib.sha256(), False

    def __iter__(self) -> Iterator[bytes]:
        for start, length in self.extents:
            at, end = start, start + length
            while at < end:
                piece = os.pread(self.handle, min(_PIECE, end - at), at)
                if not piece:
                    self.short = True
                    return
                at += len(piece)
                self.got += len(piece)
                self.digest.update(piece)
                self.told(len(piece))
                yield piece

    def read_extents(self) -> list[Extent]:
        """Those that were read, the last one cut where the file ended before its time."""
        left, kept = self.got, []
        for start, length in self.extents:
            if left <= 0:
                break
            kept.append((start, min(length, left)))
            left -= length
        return kept


def metadata(status: os.stat_result) -> dict[str, Any]:
    return {
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime_ns": status.st_mtime_ns,
    }


def attributes(handle: int) -> dict[str, str]:
    """Extended attributes by name, their bytes as base64. None where the file system has none."""
    try:
        return {name: base64.b64encode(os.getxattr(handle, name)).decode() for name in os.listxattr(handle)}
    except OSError:
        return {}


def line(name: str, kind: str, facts: dict[str, Any]) -> bytes:
    """What the hash of a whole tree is made of. Owners are left out: they come back only where root restores."""
    kept = {key: facts[key] for key in ("mode", "mtime_ns", "size", "sha256", "to", "extents") if key in facts}
    return json.dumps([name, kind, kept], sort_keys=True).encode() + b"\n"


def changed(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )
