"""A home with a model, a database of the application and a folder, with its backups elsewhere: to be lost and brought back."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from registry import audit, routes, versions
from registry.connect import open_database
from registry.schema import Environment
from registry.settings import Settings, build_settings
from registry.store import DirectoryStore
from tasks.backup import recover, recovery, run
from tests.unit.registry import kit

ROWS = 200
TOML = """
[[databases]]
name = "app"
url = "sqlite:///{folder}/app.db"
[[files]]
name = "uploads"
path = "{folder}/uploads"
"""
PARTS = ("registry", "models", "database", "files")


class Machine:
    """A home with a model, a database of the application, a folder, and its backups elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        (self.home / "modelkeep.toml").write_text(TOML.format(folder=folder))
        with closing(sqlite3.connect(folder / "app.db")) as app:
            app.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, text TEXT)")
            app.execute("CREATE TABLE users (id INTEGER PRIMARY KEY)")
            app.executemany("INSERT INTO orders VALUES (?, ?)", [(n, f"order {n}") for n in range(ROWS)])
            app.commit()
        (folder / "uploads/2026").mkdir(parents=True)
        (folder / "uploads/2026/a.txt").write_text("alpha")
        (folder / "uploads/b.bin").write_bytes(bytes(range(256)) * 40)
        self.settings = self.load()
        database = open_database(self.settings)
        database.prepare()
        store = DirectoryStore(self.home / "artifacts")
        for number in (1, 2):
            path = folder / f"model-{number}.onnx"
            kit.onnx_file(path, float(number))
            versions.register(database, store, path, name="digits", version=str(number), max_bytes=1 << 20)
            path.unlink()
        with database.write(actor="test") as transaction:
            for row in transaction.session.query(versions.Version):
                row.state = "validated"
        kit.stable_by(database, "1", "2")
        database.dispose()

    def load(self, home: Path | None = None) -> Settings:
        home = home or self.home
        environ = {
            "MODELKEEP_HOME": str(home), "MODELKEEP_PROFILE": "cpu", "MODELKEEP_BACKUPS": f'["{self.folder}/backups"]',
        }  # fmt: skip
        toml = self.home / "modelkeep.toml"
        text = toml.read_text() if toml.exists() else TOML.format(folder=self.folder)
        return build_settings(home / "modelkeep.toml", text, environ=environ, cwd=self.folder)

    def back_up(self, *names: str) -> str:
        found = run.back_up(self.settings, run.Request(names or PARTS))
        assert found.state == "complete", found
        return found.backup_id

    def lose(self) -> None:
        for name in ("registry.db", "registry.db-wal", "registry.db-shm", "audit.anchors"):
            (self.home / name).unlink(missing_ok=True)
        shutil.rmtree(self.home / "artifacts")
        shutil.rmtree(self.folder / "uploads")
        (self.folder / "app.db").unlink()

    def recover(self, **asked: Any) -> recover.Outcome:
        request = recovery.Request(**asked)
        return recovery.carry_out(recovery.prepare(self.settings, request), request)

    def orders(self) -> int:
        with closing(sqlite3.connect(self.folder / "app.db")) as app:
            return int(app.execute("SELECT count(*) FROM orders").fetchone()[0])

    def head(self) -> tuple[int, list[str]]:
        """(events of the audit chain, its faults)."""
        database = open_database(self.settings)
        try:
            with database.read() as session:
                verdict = audit.verify(session, self.home / "audit.anchors")
            return verdict.head.seq, list(verdict.faults)
        finally:
            database.dispose()

    def epoch_and_stable(self) -> tuple[str, str | None]:
        database = open_database(self.settings)
        try:
            with database.read() as session:
                route = routes.read(session, "production", "digits")
                return session.get_one(Environment, "production").epoch, None if route is None else route.stable
        finally:
            database.dispose()
