"""A folder that is one model: the file to load and what belongs to it. Listed without following links, within limits."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from registry.errors import RefusedError

MAX_FILES = 10_000
MAX_DEPTH = 16
MAX_NAME_BYTES = 512


def regular(path: Path, what: str = "a model file") -> Path:
    """The path without links. Raises RefusedError for a link that leaves its folder and for all but plain files."""
    folder, target = path.parent.resolve(), path.resolve()
    if path.is_symlink() and not target.is_relative_to(folder):
        raise RefusedError(f"{path} is a symbolic link to {target}, outside its folder: copy the file itself (cp -L)")
    mode = target.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise RefusedError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'no plain file')}: give the path of {what}")
    return target


def files_in(folder: Path) -> list[Path]:
    """Every plain file of a folder and the folders in it, sorted; those whose names begin with a dot are left out.

    Raises RefusedError for links, pipes, devices, names that not every system can have, and more than MAX_FILES.
    """
    found = []
    for path in _walk(folder, 0):
        name = path.relative_to(folder).as_posix()
        check_inside(name, str(folder))
        found.append(path)
        if len(found) > MAX_FILES:
            raise RefusedError(f"{folder} has more than {MAX_FILES} files: give the folder of one model")
    return sorted(found)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    if depth > MAX_DEPTH:
        raise RefusedError(f"{folder} is nested more than {MAX_DEPTH} folders deep")
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise RefusedError(f"{folder} cannot be read: {error.strerror or error}") from error
    for entry in listed:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            raise RefusedError(f"{path} is a symbolic link to {path.readlink()}: copy the file itself (cp -L)")
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, depth + 1)
        else:
            yield regular(path)


def check_inside(name: str, where: str) -> PurePosixPath:
    """A name of a file as a path inside its folder. Raises RefusedError where it leaves it, or is none."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or name[1:2] == ":":
        raise RefusedError(f"{where}: {name!r} is not a path inside the folder")
    if not name.isprintable() or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise RefusedError(f"{where}: the name {name[:120]!r} has characters that cannot be printed, or is too long")
    return path


def inside(folder: Path, name: str, where: str) -> Path:
    """The plain file that a name means inside a folder. Raises RefusedError where it leaves it, by a link too, or is not there."""
    here = folder
    for part in check_inside(name, where).parts:
        here = here / part
        if here.is_symlink():
            raise RefusedError(f"{where}: {name!r} goes through the symbolic link {here}: copy the file itself (cp -L)")
    if not here.exists():
        raise RefusedError(f"{where}: {name!r} is not there")
    return here if here.is_dir() else regular(here)
