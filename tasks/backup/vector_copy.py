"""A Chroma store on the disk, copied while no writer can commit; who has it open; what it holds, without opening it as a store."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from pathlib import Path

from registry import clock
from registry.errors import LockedError, StorageError

DATABASE = "chroma.sqlite3"
LOCK_SECONDS = 30.0
COPIES = 5
SETTLED_NS = 2 * 10**9

Signature = dict[Path, tuple[int, int, int]]
"""Inode, size and time of change of each index file."""


def cold_copy(path: Path, copy: Path) -> str:
    """Copy a store while no writer can commit. Returns the moment. Raises LockedError, StorageError.

    The index files are copied before as well, without the lock, so that writers wait for those only that have changed since.
    """
    try:
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        known = _copy_index(path, copy, {}, _signature(path))
        lock = sqlite3.connect(path / DATABASE, timeout=LOCK_SECONDS, isolation_level=None)
        try:
            lock.execute("BEGIN IMMEDIATE")
            moment = clock.text(clock.now())
            for _ in range(COPIES):
                before = _signature(path)
                known = _copy_index(path, copy, known, before)
                (copy / DATABASE).unlink(missing_ok=True)
                _copy_database(path / DATABASE, copy / DATABASE)
                if _signature(path) == before:
                    _remove_others(copy, {copy / one.relative_to(path) for one in before})
                    return moment
        finally:
            lock.close()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise LockedError(f"a writer of {path} did not let go for {LOCK_SECONDS:g} s: repeat the backup") from error
        raise StorageError(f"the vector store {path} cannot be read: {error}") from error
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"the vector store {path} could not be copied: {error}") from error
    raise LockedError(f"the index files in {path} change all the time, {COPIES} copies were taken: repeat the backup")


def _copy_index(path: Path, copy: Path, known: Signature, wanted: Signature) -> Signature:
    """Copy what is not `known` to be copied as it is now. Returns what is known then: a file that was written a moment before counts
    as unknown, since the clock of a file system may not tell the next write from that one."""
    found: Signature = {}
    for one, mark in wanted.items():
        if known.get(one) != mark:
            target = copy / one.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # gone by now: the next look says so
                shutil.copyfile(one, target)
        if time.time_ns() - mark[2] > SETTLED_NS:
            found[one] = mark
    return found


def _remove_others(copy: Path, kept: set[Path]) -> None:
    """Index files that went away while they were copied."""
    for one in sorted(copy.rglob("*")):
        if one.is_file() and one not in kept and one != copy / DATABASE:
            one.unlink()


def _copy_database(path: Path, copy: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as live,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        live.backup(target, pages=-1)


def _signature(path: Path) -> Signature:
    """Every file but those of SQLite, which the lock holds still, by what changes when it is written."""
    found = {}
    for one in sorted(path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            if not one.is_file() or one.name.startswith(DATABASE):
                continue
            status = one.stat()
            found[one] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def opened_by(path: Path) -> list[str]:
    """Other processes that have the store open, where we may see that: "process 12 (python)"."""
    try:
        store = (path / DATABASE).stat()
    except OSError:
        return []
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            for one in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.path.samestat(one.stat(), store):
                        found.append(f"process {process.name} ({(process / 'comm').read_text().strip()})")
                        break
        except OSError:
            continue  # gone, or another user's
    return found


def names_of(path: Path) -> list[str]:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path / DATABASE}?mode=ro", uri=True)) as connection:
            return [str(row[0]) for row in connection.execute("SELECT name FROM collections ORDER BY name")]
    except sqlite3.Error as error:
        raise StorageError(f"the vector store {path} cannot be read: {error}") from error
