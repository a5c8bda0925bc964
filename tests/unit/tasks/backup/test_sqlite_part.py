"""SQLite's own backup: one moment of a database under writers, and back into the live file, whatever lies beside it."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.errors import ArtifactError, NotFoundError, RefusedError, UnavailableError
from tasks.backup import sqlite as kind
from tasks.backup.components import Target
from tests.unit.tasks.backup.memory import taken

SCHEMA = """
PRAGMA journal_mode=WAL;
PRAGMA user_version=7;
CREATE TABLE authors (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, best INTEGER REFERENCES books (id));
CREATE TABLE books (id INTEGER PRIMARY KEY, author INTEGER REFERENCES authors (id), title TEXT, size INT AS (length(title)) STORED);
CREATE TABLE "tä""ble 🐘 (1" ("wért ""x" INT, body BLOB);
CREATE TABLE empty_one (x);
CREATE VIEW a_view AS SELECT name FROM authors;
CREATE INDEX titles ON books (lower(title));
CREATE TABLE alembic_version (version_num TEXT);
INSERT INTO alembic_version VALUES ('5f1c');
CREATE TABLE log_lines (line TEXT);
CREATE TRIGGER logged AFTER INSERT ON books BEGIN INSERT INTO log_lines VALUES (new.title); END;
INSERT INTO authors (name, best) VALUES ('Ünïcode 🐘', NULL), ('b', NULL);
INSERT INTO books (author, title) VALUES (1, 'a'), (2, NULL), (1, 'c');
UPDATE authors SET best = 2 WHERE id = 1;
INSERT INTO "tä""ble 🐘 (1" VALUES (1, zeroblob(500000)), (1, NULL);
"""
ROWS = {
    "authors": 2,
    "books": 3,
    'tä"ble 🐘 (1': 2,
    "empty_one": 0,
    "alembic_version": 1,
    "log_lines": 3,
}


@pytest.fixture
def app(tmp_path: Path) -> Path:
    path = tmp_path / "app dir" / "app.db"
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA)
    return path


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def part(path: Path) -> kind.Part:
    return kind.Part("database:app", url(path))


def ask(path: Path, statement: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = connection.execute(statement).fetchall()
        connection.commit()
        return found


def test_everything_comes_back_and_is_verified(app: Path, tmp_path: Path) -> None:
    memory, captured = taken(part(app))
    assert captured.facts["tables"] == ROWS and captured.facts["revision"] == {"alembic_version": "5f1c"}
    assert captured.snapshot["method"] == "sqlite-backup-api"
    found = kind.restore(memory, Target(path=tmp_path / "new" / "app.db"))
    assert found["tables"] == ROWS and found["user_version"] == 7
    assert ask(tmp_path / "new" / "app.db", "PRAGMA journal_mode") == [("wal",)]
    folder = tmp_path / "verify"
    folder.mkdir()
    compared = kind.verify(memory, folder)
    assert compared.differences == () and compared.checked["rows"] == sum(ROWS.values())
    assert list(folder.iterdir()) == []


def test_a_file_put_in_place_beside_a_wal_is_undone_and_ours_is_not(app: Path, tmp_path: Path) -> None:
    """The naive way, then ours: the -wal of the live database stays, since its program was killed or runs on."""
    copy = tmp_path / "copy.db"
    kind.snapshot_to(url(app), copy)
    with contextlib.closing(sqlite3.connect(app)) as runs_on:
        runs_on.execute("PRAGMA wal_autocheckpoint=0")
        runs_on.execute("DELETE FROM books")
        runs_on.commit()
        naive = tmp_path / "naive.db"
        shutil.copy(copy, naive)
        shutil.copy(f"{app}-wal", f"{naive}-wal")
        with contextlib.suppress(sqlite3.DatabaseError):  # undone, or damaged
            assert ask(naive, "SELECT count(*) FROM books") == [(0,)]
        facts = kind.restore_into(copy, url(app), force=True)
        assert facts["tables"] == ROWS
        assert runs_on.execute("SELECT count(*) FROM books").fetchall() == [(3,)]
    assert ask(app, "SELECT count(*) FROM books") == [(3,)]


def test_tables_that_writers_keep_in_step_are_in_step_in_every_copy(app: Path, tmp_path: Path) -> None:
    ask(app, "CREATE TABLE a (id INT)")
    ask(app, "CREATE TABLE z (id INT)")
    stop, wrote = threading.Event(), threading.Event()

    def write() -> None:
        with contextlib.closing(sqlite3.connect(app, timeout=60, isolation_level=None)) as connection:
            while not stop.is_set():
                connection.executescript("BEGIN IMMEDIATE; INSERT INTO a VALUES (1); INSERT INTO z VALUES (1); COMMIT;")
                wrote.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(10):
            wrote.clear()
            assert wrote.wait(60)
            counts = kind.snapshot_to(url(app), tmp_path / f"{number}.db")["tables"]
            assert counts["a"] == counts["z"] > 0
    finally:
        stop.set()
        writer.join(60)


def test_what_is_there_is_not_overwritten_unless_it_is_forced(app: Path, tmp_path: Path) -> None:
    memory, _ = taken(part(app))
    other = tmp_path / "other.db"
    ask(other, "CREATE TABLE mine (id INT)")
    assert kind.occupied(Target(path=other)) == f"1 tables in {other}"
    with pytest.raises(RefusedError, match="1 tables already"):
        kind.restore(memory, Target(path=other))
    assert kind.occupied(Target(path=other)) == f"1 tables in {other}"
    assert kind.restore(memory, Target(path=other, force=True))["tables"] == ROWS
    assert kind.occupied(Target(path=tmp_path / "nowhere.db")) is None
    assert kind.occupied(Target(path=other, only=("mine",))) is None, "a table that is gone stands in nobody's way"


def test_single_tables_come_back_beside_what_is_there(app: Path) -> None:
    memory, _ = taken(part(app))
    ask(app, "DELETE FROM books")
    ask(app, "INSERT INTO empty_one VALUES (5)")
    with pytest.raises(RefusedError, match="'books' already"):
        kind.restore(memory, Target(path=app, only=("books",)))
    assert kind.restore(memory, Target(path=app, only=("books",), force=True)) == {"tables": {"books": 3}}
    assert ask(app, "SELECT count(*) FROM empty_one") == [(1,)]
    assert ask(app, "SELECT size FROM books WHERE id = 1") == [(1,)]
    ask(app, "INSERT INTO books (title) VALUES ('new')")
    assert ask(app, "SELECT line FROM log_lines WHERE line = 'new'") == [("new",)]
    with pytest.raises(NotFoundError, match="no table 'nope'"):
        kind.restore(memory, Target(path=app, only=("nope",)))


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_database_of_another_page_size_takes_the_copy(app: Path, tmp_path: Path, mode: str) -> None:
    copy = tmp_path / "copy.db"
    kind.snapshot_to(url(app), copy)
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.executescript(f"PRAGMA page_size=16384; PRAGMA journal_mode={mode}; CREATE TABLE t (x);")
    assert kind.restore_into(copy, url(other), force=True)["tables"] == ROWS
    assert ask(other, "PRAGMA journal_mode") == [(mode.lower(),)]


def test_a_database_that_somebody_holds_is_told_and_not_changed(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.db"
    kind.snapshot_to(url(app), copy)
    monkeypatch.setattr(kind, "LOCK_SECONDS", 0.2)
    with contextlib.closing(sqlite3.connect(app, isolation_level=None)) as holder:
        holder.execute("DELETE FROM books")
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError, match=r"held|holds"):
            kind.restore_into(copy, url(app), force=True)
        holder.execute("COMMIT")
    assert ask(app, "SELECT count(*) FROM books") == [(0,)]


def _flipped(path: Path, place: int, count: int = 64) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + count] = bytes(255 - byte for byte in data[place : place + count])
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 4096 + 8, 3 * 4096 + 8, None], ids=["header", "schema", "table", "index"])
def test_a_damaged_database_is_no_backup(app: Path, place: int | None) -> None:
    ask(app, "PRAGMA wal_checkpoint(TRUNCATE)")
    if place is None:
        # A letter of a key: every row is still read and counted, and only SQLite's own check sees it.
        [(page,)] = ask(app, "SELECT rootpage * 4096 FROM sqlite_master WHERE name = 'titles'")
        _flipped(app, int(str(page)) - 1, 1)
    else:
        _flipped(app, place)
    with pytest.raises(ArtifactError, match="damaged"):
        part(app).capture(taken_sink := _sink())
    assert taken_sink.index == []


def _sink():  # type: ignore[no-untyped-def]
    from tests.unit.tasks.backup.memory import Memory

    return Memory()


def test_a_copy_that_was_changed_is_not_restored(app: Path, tmp_path: Path) -> None:
    memory, _ = taken(part(app))
    [entry] = memory.index
    assert entry.stream is not None
    kept = tmp_path / "kept.db"
    kept.write_bytes(memory.kept[entry.stream.sha256])
    ask(kept, "DELETE FROM books WHERE id = 1")
    memory.kept[entry.stream.sha256] = kept.read_bytes()
    target = tmp_path / "target.db"
    with pytest.raises(ArtifactError, match="books: 2 rows, not 3"):
        kind.restore(memory, Target(path=target))
    assert not target.exists()
    assert kind.verify(memory, tmp_path).differences


def test_a_database_that_is_not_there_is_told_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"gone\.db"):
        part(tmp_path / "gone.db").capture(_sink())
    assert not (tmp_path / "gone.db").exists()


@pytest.fixture(autouse=True)
def _no_private_copy_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import tempfile

    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert list(place.iterdir()) == []
