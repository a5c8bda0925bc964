"""A home with everything that a backup takes, of any size, for the benchmarks of backup and recovery: written past the registry's own functions."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
from sqlalchemy import update

from benchmarks.registry_scale import fill
from registry.connect import open_database
from registry.schema import Version
from registry.settings import Settings, build_settings
from registry.store import DirectoryStore, StoredFile
from tasks.backup import run

MODEL = "m0000"
"""As `fill` names the first model."""
PIECE = 1 << 20
WORDS = 40
"""Of a row in the SQLite database: about 600 bytes."""


class NotMeasuredError(Exception):
    """A part of the benchmark that cannot be had on this machine, and why."""


def room(folder: Path, bytes_needed: int) -> None:
    """Raises NotMeasuredError where the disk has not that much room."""
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise NotMeasuredError(f"it needs {bytes_needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f}")


def random_file(path: Path, size: int) -> None:
    """Bytes that nothing compresses, in constant memory; on the disk when this returns, so that nobody else pays for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, size, PIECE):
            file.write(os.urandom(min(PIECE, size - start)))
        file.flush()
        os.fsync(file.fileno())


def weights_file(path: Path, size: int, seed: int) -> None:
    """What the weights of a model look like: float32 around zero, of which zstd saves less than a tenth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, size, PIECE):
            file.write(made.standard_normal(PIECE // 4, dtype=np.float32).tobytes()[: size - start])
        file.flush()
        os.fsync(file.fileno())


def sqlite_file(path: Path, size: int) -> None:
    """A database of rows of text, about so large."""
    made = np.random.default_rng(7)
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE requests (id INTEGER PRIMARY KEY, body TEXT, cost REAL)")
        count = max(1, size // 600)
        for start in range(0, count, 1000):
            rows = made.integers(0, 1 << 62, (min(1000, count - start), WORDS))
            database.executemany(
                "INSERT INTO requests VALUES (?, ?, ?)",
                [(start + n, " ".join(f"{one:x}"[:14] for one in row), n / 7) for n, row in enumerate(rows.tolist())],
            )
        database.commit()


class Home:
    """A registry with ten versions of one model, and, where they are asked for, databases and a folder of files."""

    def __init__(self, folder: Path, *, mariadb_url: str | None = None, files: bool = False) -> None:
        """`mariadb_url`: of the database that is backed up. `files`: also a SQLite database and a folder."""
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self._text = ""
        if mariadb_url is not None:
            self._text += f'[[databases]]\nname = "mariadb"\nurl = "{mariadb_url}"\n'
        if files:
            self._text += f'[[databases]]\nname = "sqlite"\nurl = "sqlite:///{self.database}"\n'
            self._text += f'[[files]]\nname = "uploads"\npath = "{self.uploads}"\n'
        (self.home / "modelkeep.toml").write_text(self._text)

    @property
    def database(self) -> Path:
        return self.folder / "app.db"

    @property
    def uploads(self) -> Path:
        return self.folder / "uploads"

    def settings(self, location: Path) -> Settings:
        environ = {
            "MODELKEEP_HOME": str(self.home), "MODELKEEP_PROFILE": "cpu", "MODELKEEP_BACKUPS": f'["{location}"]',
        }  # fmt: skip
        return build_settings(self.home / "modelkeep.toml", self._text, environ=environ, cwd=self.folder)

    def registry(self, location: Path, versions: list[StoredFile], events: int) -> None:
        """One version for each of the files, which are in the store already."""
        database = open_database(self.settings(location))
        try:
            database.prepare()
            fill(database, models=1, versions=len(versions), events=events)
        finally:
            database.dispose()
        for number, stored in enumerate(versions):
            self.change(location, number, stored)

    def change(self, location: Path, number: int, stored: StoredFile) -> None:
        """From now on this file is what the version consists of."""
        database = open_database(self.settings(location))
        try:
            with database.engine.begin() as connection:
                connection.execute(
                    update(Version)
                    .where(Version.model == MODEL, Version.version == str(number + 1))
                    .values(files=[stored.as_dict()], digest=stored.digest, size_bytes=stored.size_bytes)
                )
        finally:
            database.dispose()

    def store(self) -> DirectoryStore:
        return DirectoryStore(self.home / "artifacts")

    def back_up(self, location: Path, *names: str) -> run.Outcome:
        """Raises RuntimeError where it is not complete: then there is nothing to measure."""
        found = run.back_up(self.settings(location), run.Request(names), tell=lambda _: None)
        if found.state != "complete":
            raise RuntimeError(f"the backup is {found.state}: {[one.error for one in found.components if one.error]}")
        return found
