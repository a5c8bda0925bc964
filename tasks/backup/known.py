"""What is stored already: the lists of the places and the chunk tables of earlier backups, in a temporary SQLite file."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from registry.errors import StorageError
from tasks.backup.manifest import Chunk

_SCHEMA = """
CREATE TABLE chunk (object TEXT PRIMARY KEY, size_bytes INTEGER, sha256 TEXT, stored_bytes INTEGER, stored_sha256 TEXT,
                    codec TEXT) WITHOUT ROWID;
CREATE TABLE listed (object TEXT, place INTEGER, stored_bytes INTEGER, PRIMARY KEY (object, place)) WITHOUT ROWID;
CREATE TABLE marked (object TEXT, place INTEGER, PRIMARY KEY (object, place)) WITHOUT ROWID;
CREATE TABLE used (component TEXT, object TEXT, stored_bytes INTEGER, PRIMARY KEY (component, object)) WITHOUT ROWID;
"""


_CHUNK = "INSERT OR REPLACE INTO chunk VALUES (?, ?, ?, ?, ?, ?)"
AT_ONCE = 1000


class Known:
    """For the time of one backup. A file, because a hundred thousand objects are no reason for a hundred megabytes."""

    def __init__(self, folder: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._new: dict[str, tuple[Chunk, set[int]]] = {}
        self._used: list[tuple[object, ...]] = []
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.NamedTemporaryFile(prefix="known-", suffix=".db", dir=folder)  # noqa: SIM115
        except OSError as error:
            raise StorageError(f"no temporary file in {folder}: {error.strerror or error}; free some space") from error
        self._database = sqlite3.connect(self._file.name, check_same_thread=False, isolation_level=None)
        for pragma in (
            "journal_mode=OFF",
            "synchronous=OFF",
            "locking_mode=EXCLUSIVE",
            "cache_size=-8000",
            "temp_store=FILE",
        ):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.executescript(_SCHEMA)
        # One transaction for all of its life: nobody else reads it, and a commit for each chunk costs more than the chunk.
        self._database.execute("BEGIN")

    def __enter__(self) -> Known:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()
        self._file.close()

    def learn(self, chunks: Iterable[Chunk]) -> None:
        """What a manifest, or this backup, says of objects."""
        self._many(_CHUNK, map(_row, chunks))

    def listed(self, place: int, objects: Iterable[tuple[str, int]]) -> None:
        """(object, size) as a place lists them."""
        self._many("INSERT OR REPLACE INTO listed VALUES (?, ?, ?)", ((name, place, size) for name, size in objects))

    def marked(self, place: int, objects: Iterable[str]) -> None:
        """Objects that garbage collection may take at any moment."""
        self._many("INSERT OR REPLACE INTO marked VALUES (?, ?)", ((name, place) for name in objects))

    def chunk(self, object_id: str) -> Chunk | None:
        with self._lock:
            if (new := self._new.get(object_id)) is not None:
                return new[0]
        row = self._one(
            "SELECT object, size_bytes, sha256, stored_bytes, stored_sha256, codec FROM chunk WHERE object = ?",
            object_id,
        )
        return None if row is None else Chunk(*row)

    def at(self, object_id: str) -> dict[int, int]:
        """Place -> size, as listed, also where the object is marked."""
        with self._lock:
            rows = self._database.execute("SELECT place, stored_bytes FROM listed WHERE object = ?", (object_id,))
            found = {int(place): int(size) for place, size in rows}
            if (new := self._new.get(object_id)) is not None:
                found.update(dict.fromkeys(new[1], new[0].stored_bytes))
            return found

    def marked_at(self, object_id: str) -> set[int]:
        with self._lock:
            rows = self._database.execute("SELECT place FROM marked WHERE object = ?", (object_id,))
            found = {int(row[0]) for row in rows}
            if (new := self._new.get(object_id)) is not None:
                found -= new[1]
            return found

    def stored(self, chunk: Chunk, places: Iterable[int]) -> None:
        """This backup has written the object to these places: it is there, and its mark means nothing any more."""
        with self._lock:
            before = self._new.get(chunk.object)
            self._new[chunk.object] = (chunk, {*places, *(before[1] if before else ())})
            full = len(self._new) >= AT_ONCE
        if full:
            self._settle()

    def _settle(self) -> None:
        """Bring what was kept in memory to the tables: a statement for each object would cost more than the object."""
        with self._lock:
            new = list(self._new.values())
            pairs = [(chunk.object, place, chunk.stored_bytes) for chunk, places in new for place in places]
            self._execute(_CHUNK, [_row(chunk) for chunk, _ in new])
            self._execute("INSERT OR REPLACE INTO listed VALUES (?, ?, ?)", pairs)
            self._execute("DELETE FROM marked WHERE object = ? AND place = ?", [pair[:2] for pair in pairs])
            self._execute("INSERT OR REPLACE INTO used VALUES (?, ?, ?)", self._used)
            self._new, self._used = {}, []

    def use(self, component: str, chunks: Iterable[Chunk]) -> None:
        with self._lock:
            self._used += [(component, one.object, one.stored_bytes) for one in chunks]
            full = len(self._used) >= AT_ONCE
        if full:
            self._settle()

    def first_use(self, label: str, chunk: Chunk) -> bool:
        """Note that `label` uses it; False where that was noted before."""
        with self._lock:
            done = self._database.execute(
                "INSERT OR IGNORE INTO used VALUES (?, ?, ?)", (label, chunk.object, chunk.stored_bytes)
            )
            return done.rowcount == 1

    def used_bytes(self, component: str) -> int:
        self._settle()
        row = self._one("SELECT COALESCE(SUM(stored_bytes), 0) FROM used WHERE component = ?", component)
        return 0 if row is None else int(row[0])

    def _one(self, sql: str, value: str) -> tuple[Any, ...] | None:
        with self._lock:
            found: tuple[Any, ...] | None = self._database.execute(sql, (value,)).fetchone()
            return found

    def _many(self, sql: str, rows: Iterable[tuple[object, ...]]) -> None:
        """A thousand rows at once; `rows` may be read from a place while the lock is not held."""
        batch: list[tuple[object, ...]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == AT_ONCE:
                self._write(sql, batch)
                batch = []
        self._write(sql, batch)

    def _write(self, sql: str, batch: list[tuple[object, ...]]) -> None:
        with self._lock:
            self._execute(sql, batch)

    def _execute(self, sql: str, rows: Sequence[tuple[object, ...]]) -> None:
        """With the lock held."""
        try:
            if rows:
                self._database.executemany(sql, rows)
        except sqlite3.Error as error:
            raise StorageError(
                f"the table of what is stored cannot be written ({error}): free some space in {self._file.name}"
            ) from error


def _row(chunk: Chunk) -> tuple[object, ...]:
    return (chunk.object, chunk.size_bytes, chunk.sha256, chunk.stored_bytes, chunk.stored_sha256, chunk.codec)
