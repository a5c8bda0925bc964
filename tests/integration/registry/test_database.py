"""SQLite's file with real processes and disks: killed, full, read-only, gone. Never half written. What holds on every database: test_at_once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import func, inspect, select, text

from registry import audit, clock, migrate
from registry.database import Database
from registry.errors import StorageError, UnavailableError
from registry.schema import REVISION, AuditEvent, Model
from registry.store import DirectoryStore

pytestmark = pytest.mark.sqlite
ROOT = Path(__file__).resolve().parents[3]


def opened(folder: Path, **changes: float) -> Database:
    return Database(f"sqlite:///{folder / 'registry.db'}", anchors=folder / "audit.anchors", **changes)  # type: ignore[arg-type]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    found = opened(tmp_path)
    found.prepare()
    yield found
    found.dispose()


def whole(database: Database) -> audit.Verdict:
    """The file is sound, and the audit chain verifies."""
    with database.engine.connect() as connection:
        assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
    with database.read() as session:
        verdict = audit.verify(session, database.anchors)
    assert verdict.faults == []
    return verdict


def models(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(Model)) or 0


def add_models(database: Database, *names: str, padding: str = "") -> None:
    with database.write(actor="test") as transaction:
        for name in names:
            transaction.session.add(Model(name=name, description=padding, created_at=clock.now()))
            transaction.record("model.created", f"model:{name}")


# At once


def test_connections_that_open_a_new_file_at_once_are_not_turned_away(tmp_path: Path) -> None:
    """Two that switch a new file to its write-ahead log meet in a lock that SQLite does not wait for. Rare, so often tried."""
    for number in range(30):
        start = threading.Barrier(6)

        def connect(_: int, number: int = number, start: threading.Barrier = start) -> str | None:
            database = Database(f"sqlite:///{tmp_path / f'{number}.db'}")
            start.wait()
            revision = database.revision()
            database.dispose()
            return revision

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(connect, range(6))) == [None] * 6


def test_a_writer_has_the_lock_from_its_first_statement_on(database: Database, tmp_path: Path) -> None:
    """Otherwise two that read first and write then would both begin, and one would fail whatever the timeout."""
    other, order = opened(tmp_path), list[str]()
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with other.write() as transaction:
            found = transaction.session.get(Model, "a")
            order.append("second begins")
            assert found is not None, "it sees what the first committed"

    thread = threading.Thread(target=second)
    thread.start()
    with database.write() as transaction:
        transaction.session.scalar(select(func.count()).select_from(Model))
        with sqlite3.connect(tmp_path / "registry.db", timeout=0) as raw, pytest.raises(sqlite3.OperationalError):
            raw.execute("BEGIN IMMEDIATE")
        raw.close()
        inside.set()
        time.sleep(0.2)
        with other.read() as session:
            assert session.get(Model, "a") is None, "readers are not held up"
        transaction.session.add(Model(name="a", created_at=clock.now()))
        order.append("first ends")
    thread.join()
    assert order == ["first ends", "second begins"]
    other.dispose()


def test_a_lock_that_is_never_given_back_is_an_error_and_not_a_wait_for_ever(
    database: Database, tmp_path: Path
) -> None:
    impatient = opened(tmp_path, answer_seconds=0.2)
    with database.write() as transaction:
        transaction.session.get(Model, "a")
        with pytest.raises(UnavailableError, match="another process has its lock for writing") as caught:
            add_models(impatient, "a")
        assert f"fuser {tmp_path / 'registry.db'} names those" in str(caught.value)
    add_models(impatient, "a")
    impatient.dispose()
    assert models(database) == 1


# Killed

WRITER = """
import sys, time
from pathlib import Path
from tests.integration.registry.test_database import add_models, opened
from registry import audit, clock
from registry.schema import Model

database, what = opened(Path(sys.argv[1])), sys.argv[2]
if what == "inside":
    with database.write(actor="doomed") as transaction:
        session = transaction.session
        for number in range(2000):  # more than SQLite's cache holds: pages go to the log before the commit
            session.add(Model(name=f"doomed{number}", description="x" * 2000, created_at=clock.now()))
            transaction.record("model.created", f"model:doomed{number}")
        session.flush()
        audit.append(session, transaction.events)
        print("ready", flush=True)
        time.sleep(600)
else:
    print("ready", flush=True)
    for number in range(1_000_000):
        add_models(database, f"{sys.argv[3]}-{number}-a", f"{sys.argv[3]}-{number}-b")
"""


@contextlib.contextmanager
def writer(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), *arguments], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_kill_in_the_middle_of_a_transaction_leaves_nothing_of_it(database: Database, tmp_path: Path) -> None:
    add_models(database, "before")
    with writer(tmp_path, "inside") as process:
        assert (tmp_path / "registry.db-wal").stat().st_size > 1_000_000, "much of it is on disk already"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert models(database) == 1
    assert whole(database).events == 1
    add_models(database, "after")
    assert (models(database), whole(database).events) == (2, 2)


def test_one_that_stands_still_within_a_write_holds_up_the_writers_until_it_is_ended(
    database: Database, tmp_path: Path
) -> None:
    """SQLite has nobody who would take its lock away from it, as a server does after a minute: the message says who to end."""
    add_models(database, "before")
    impatient = opened(tmp_path, answer_seconds=0.2)
    with writer(tmp_path, "inside") as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(UnavailableError, match="one stands still within a write"):
            add_models(impatient, "refused")
        assert models(impatient) == 1, "readers are not held up"
        process.send_signal(signal.SIGKILL)
        process.wait()
        add_models(impatient, "after")
    impatient.dispose()
    with database.read() as session:
        assert set(session.scalars(select(Model.name))) == {"before", "after"}
    assert whole(database).events == 2


def test_kills_at_any_moment_leave_whole_transactions_only(database: Database, tmp_path: Path) -> None:
    for number in range(4):
        with writer(tmp_path, "loop", str(number)) as process:
            time.sleep(0.03 + 0.05 * number)
            process.send_signal(signal.SIGKILL)
            process.wait()
        with database.read() as session:
            names = set(session.scalars(select(Model.name)))
            assert session.scalar(select(func.count()).select_from(AuditEvent)) == len(names)
        assert {name[:-1] + "a" for name in names} | {name[:-1] + "b" for name in names} == names, "pairs, never a half"
        whole(database)
    assert models(database) > 0


def test_a_kill_in_the_middle_of_a_migration_leaves_an_empty_database(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from tests.integration.registry.test_database import opened

database = opened(Path(sys.argv[1]))
def die(connection, cursor, statement, *rest):
    if "CREATE TABLE leases" in statement:
        os.kill(os.getpid(), signal.SIGKILL)
event.listen(database.engine, "before_cursor_execute", die)
database.prepare()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    database = opened(tmp_path)
    with database.engine.connect() as connection:
        assert inspect(connection).get_table_names() == []
    database.prepare()
    add_models(database, "a")
    assert whole(database).events == 1
    database.dispose()


# Migrations


def test_a_folder_with_a_percent_sign_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "100% ours"
    odd.symlink_to(migrate.FOLDER)
    monkeypatch.setattr(migrate, "FOLDER", odd)
    database = opened(tmp_path / "50%")
    database.prepare()
    assert database.revision() == REVISION
    database.dispose()


# Full and read-only


def test_a_full_disk_refuses_a_write_and_keeps_what_was_there(mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=1m")
    database = opened(disk)
    database.prepare()
    add_models(database, "before")
    with pytest.raises(StorageError, match=r"could not be written: .* free some space and repeat") as error:
        for number in range(100):
            add_models(database, f"m{number}", padding="x" * 50_000)
    assert str(disk / "registry.db") in str(error.value)
    kept = models(database)
    assert whole(database).events == kept < 100
    with pytest.raises(StorageError):
        add_models(database, "again", padding="x" * 500_000)
    assert models(database) == kept
    database.dispose()


def test_a_disk_that_fills_up_and_is_cleared_takes_writes_again(mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=2m")
    database = opened(disk)
    database.prepare()
    (disk / "ballast").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    with pytest.raises(StorageError, match="free some space"):
        add_models(database, "a", padding="x" * 50_000)
    (disk / "ballast").unlink()
    add_models(database, "a", padding="x" * 50_000)
    assert (models(database), whole(database).events) == (1, 1)
    database.dispose()


def test_a_disk_too_small_for_the_schema_is_a_clear_error(mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=100k")
    database = opened(disk)
    with pytest.raises(StorageError, match="free some space") as error:
        database.prepare()
    assert str(disk / "registry.db") in str(error.value)
    database.dispose()


def test_a_disk_without_any_room_is_called_full_and_not_forbidden(mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=100k")
    (disk / "ballast").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    database = opened(disk)
    with pytest.raises(StorageError, match="free some space"):
        database.prepare()
    database.dispose()


def test_a_full_disk_refuses_an_artifact_and_keeps_nothing_of_it(
    mounted: Callable[[str], Path], tmp_path: Path
) -> None:
    disk = mounted("size=1m")
    store = DirectoryStore(disk / "artifacts")
    small, big = tmp_path / "small", tmp_path / "big"
    small.write_bytes(b"s" * 100_000)
    big.write_bytes(b"b" * 2_000_000)
    kept = store.put(small)
    with pytest.raises(
        StorageError, match=f"{big} could not be stored in {store.folder}: No space left .* free some space"
    ):
        store.put(big)
    assert [path for path in store.folder.rglob("*") if path.is_file()] == [store.path(kept.digest)]
    store.put(small)


@pytest.mark.parametrize("there", [True, False])
def test_a_read_only_home_is_a_clear_error_and_nothing_is_written(
    mounted: Callable[[str], Path], read_only: Callable[[Path], None], there: bool
) -> None:
    disk = mounted("size=4m")
    database = opened(disk / "home")
    if there:
        database.prepare()
        add_models(database, "a")
        database.dispose()
    read_only(disk)
    before = sorted(disk.rglob("*"))
    with pytest.raises(StorageError) as error:
        if there:
            add_models(database, "b")
        else:
            database.prepare()
    assert str(disk / "home") in str(error.value)
    assert "MODELKEEP_HOME" in str(error.value)
    assert sorted(disk.rglob("*")) == before
    database.dispose()


def test_a_read_only_store_is_a_clear_error_and_can_still_be_read(
    mounted: Callable[[str], Path], read_only: Callable[[Path], None], tmp_path: Path
) -> None:
    disk = mounted("size=1m")
    store = DirectoryStore(disk / "artifacts")
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    kept = store.put(first)
    read_only(disk)
    with pytest.raises(
        StorageError, match=f"{second} could not be stored in {store.folder}: .*it is mounted read-only"
    ):
        store.put(second)
    with pytest.raises(StorageError, match="it is mounted read-only"), store.intake():
        pass
    assert store.path(kept.digest).read_bytes() == b"1"


def test_a_home_below_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot be created: .* set MODELKEEP_HOME to another folder"):
        opened(tmp_path / "file" / "home").prepare()


def test_a_file_that_is_no_database_is_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"This is no database. " * 500)
    with pytest.raises(StorageError, match="is damaged: file is not a database; restore it from a backup"):
        opened(tmp_path).prepare()


# Gone

SERVERS = [
    "mysql+pymysql://keeper:hunter2@127.0.0.1:{}/registry",
    "postgresql+psycopg://keeper:hunter2@127.0.0.1:{}/registry",
]


@pytest.mark.parametrize("url", SERVERS)
def test_a_server_that_is_not_there_is_named_without_its_password(url: str, free_port: Callable[[], int]) -> None:
    gone = Database(url.format(free_port()), answer_seconds=2)
    for attempt in (gone.revision, gone.prepare, lambda: add_models(gone, "a"), lambda: models(gone)):
        with pytest.raises(UnavailableError) as error:
            attempt()
        assert f"the registry {url.format(gone.url.port).replace('hunter2', '***')} does not answer" in str(error.value)
        assert "hunter2" not in str(error.value)
    gone.dispose()


@pytest.mark.parametrize("url", SERVERS)
def test_a_server_that_says_nothing_is_not_waited_for_for_ever(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = Database(url.format(silent.getsockname()[1]), answer_seconds=0.5)
        with pytest.raises(UnavailableError, match="does not answer"):
            mute.revision()
        mute.dispose()
