"""Each way in which a dump, its server or a restore fails: it is told, nothing counts as a backup, and the live data stays."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import pytest

from registry.errors import ArtifactError, ModelkeepError, RefusedError, StorageError, UnavailableError
from tasks.backup import mariadb as mariadb_kind
from tasks.backup import mariadb_snapshot, postgresql_access, postgresql_facts, throwaway
from tasks.backup import postgresql as postgresql_kind
from tasks.backup.chain import until
from tasks.backup.components import Target
from tasks.backup.manifest import Stream
from tasks.backup.mariadb_access import access as mariadb_access
from tests.registry_servers import PASSWORD, Server
from tests.unit.tasks.backup.memory import Memory, taken

ROWS = 1500
MANY_ROWS = 8000
"""So many that a dump is still under way when its first table is stored."""
LONG = pytest.mark.long


@dataclass(frozen=True)
class Case:
    """A server with a small database that nobody changes."""

    name: str
    module: ModuleType
    server: Server
    url: str
    dumper: str

    def part(self, url: str | None = None) -> Any:
        return self.module.Part("database:app", url or self.url)

    def fresh(self) -> str:
        return self.server.create()

    def execute(self, url: str, *statements: str) -> list[tuple[Any, ...]]:
        module = mariadb_access if self.name == "mariadb" else postgresql_access.access
        found: list[tuple[Any, ...]] = []
        with contextlib.closing(module(url).connect()) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
                found = list(cursor.fetchall()) if cursor.description else []
        return found


def fill(case: Case, url: str, rows: int = ROWS) -> None:
    series = {
        "mariadb": f"SELECT seq, repeat('word ', 40) FROM seq_1_to_{rows}",
        "postgresql": f"SELECT n, repeat('word ', 40) FROM generate_series(1, {rows}) n",
    }[case.name]
    case.execute(
        url, "CREATE TABLE first (id INT PRIMARY KEY, t TEXT)", f"INSERT INTO first {series}",
        "CREATE TABLE second (id INT PRIMARY KEY, t TEXT)", f"INSERT INTO second {series}", "CREATE VIEW both_of AS SELECT id FROM first",
    )  # fmt: skip


@pytest.fixture(scope="module")
def cases(mariadb: Server, postgresql: Server) -> dict[str, Case]:
    made = {
        "mariadb": Case("mariadb", mariadb_kind, mariadb, mariadb.create(), "mariadb-dump"),
        "postgresql": Case("postgresql", postgresql_kind, postgresql, postgresql.create(), "pg_dump"),
    }
    for one in made.values():
        fill(one, one.url)
    return made


@pytest.fixture(params=["mariadb", "postgresql"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Case, str], None]:
    """`instead(case, code)`: the case's dump program is one that has the true text in `text` and runs `code`."""

    def put(case: Case, code: str) -> None:
        folder = tmp_path / "programs"
        folder.mkdir()
        real = mariadb_kind.dumper("mariadb") if case.name == "mariadb" else postgresql_access.program(case.dumper)
        program = folder / case.dumper
        program.write_text(
            f"#!{sys.executable} -IS\n"
            "import os, signal, subprocess, sys\n"
            f"done = subprocess.run([{str(real)!r}, *sys.argv[1:]], stdout=subprocess.PIPE)\n"
            "text = done.stdout\n"
            "def give(part):\n    sys.stdout.buffer.write(part); sys.stdout.flush()\n"
            "if '--version' in sys.argv: give(text); sys.exit(done.returncode)\n"
            f"{code}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setattr(postgresql_access, "_FOLDERS", [folder, *postgresql_access._FOLDERS])

    return put


def refused(case: Case, memory: Memory | None = None, url: str | None = None) -> ModelkeepError:
    """The error of a capture, which leaves no line in the component's index."""
    memory = memory or Memory()
    with pytest.raises(ModelkeepError) as caught:
        case.part(url).capture(memory)
    assert memory.index == []
    assert PASSWORD not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "tenth", [pytest.param(one, id=f"{one}0-percent", marks=() if one in (1, 6) else LONG) for one in range(1, 10)]
)
def test_a_dump_that_is_killed_at_each_tenth_of_its_output(
    case: Case, instead: Callable[[Case, str], None], tenth: int
) -> None:
    instead(case, f"give(text[: len(text) * {tenth} // 10]); os.kill(os.getpid(), signal.SIGKILL)")
    assert "SIGKILL" in str(refused(case))


@pytest.mark.parametrize(
    "tenth", [pytest.param(one, id=f"{one}0-percent", marks=() if one == 5 else LONG) for one in range(1, 9)]
)
def test_a_dump_that_is_cut_at_a_statement_and_ends_with_exit_code_0(
    case: Case, instead: Callable[[Case, str], None], tenth: int
) -> None:
    instead(case, f"give(text[: text.rindex(b';\\n', 0, len(text) * {tenth} // 10 + 2000) + 2])")
    assert "cut short" in str(refused(case))


def test_the_servers_own_client_takes_a_cut_dump_without_a_word(cases: dict[str, Case]) -> None:
    """Why exit codes are not enough."""
    case = cases["mariadb"]
    memory, _ = taken(case.part())
    text = b"".join(memory.text(entry.name) for entry in memory.index if entry.kind == "sql")
    url = case.fresh()
    with mariadb_access(url).option_file() as options:
        command = [mariadb_kind.client("mariadb"), f"--defaults-file={options}", mariadb_access(url).database]
        cut = text[: text.index(b"CREATE TABLE `second`")]
        assert subprocess.run(command, input=cut, timeout=60, check=False).returncode == 0
    assert case.execute(url, "SELECT count(*) FROM first") == [(ROWS,)]


DROPPED = {
    "mariadb": "lines = text.split(b'\\n'); at = [n for n, line in enumerate(lines) if line.startswith(b'(17,')][0]; del lines[at]",
    "postgresql": "lines = text.split(b'\\n'); at = [n for n, line in enumerate(lines) if line.startswith(b'17\\t')][0]; del lines[at]",
}


def test_a_dump_that_lacks_one_row_and_is_whole_otherwise(case: Case, instead: Callable[[Case, str], None]) -> None:
    instead(case, f"{DROPPED[case.name]}; give(b'\\n'.join(lines))")
    error = refused(case)
    assert isinstance(error, ArtifactError) and f"{ROWS - 1} rows" in str(error)


def test_a_dump_that_ends_with_an_exit_code_after_its_last_line(
    case: Case, instead: Callable[[Case, str], None]
) -> None:
    instead(case, "give(text); sys.stderr.write('Error 2013: Lost connection'); sys.exit(2)")
    assert "Lost connection" in str(refused(case))


def test_a_dump_that_never_gives_a_byte(
    case: Case, instead: Callable[[Case, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mariadb_kind, "DUMP_SILENT_SECONDS", 0.5)
    monkeypatch.setattr(postgresql_access, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(mariadb_snapshot, "HOLD_SECONDS", 0.2)
    instead(case, "signal.pause()")
    assert "stood still" in str(refused(case))
    case.execute(case.url, "CREATE TABLE writes_go_on (id INT)", "DROP TABLE writes_go_on")


class Meddled(Memory):
    """A sink at whose n-th stream something happens to the database."""

    def __init__(self, meddle: Callable[[int], object]) -> None:
        super().__init__()
        self.meddle, self.stored = meddle, 0

    def store(self, pieces: Iterable[bytes], *, compress: bool = True) -> Stream:
        self.meddle(self.stored)
        self.stored += 1
        return super().store(pieces, compress=compress)


DDL = {
    "column-added-to-a-table-that-was-dumped": "ALTER TABLE aaa ADD COLUMN x{n} INT",
    "column-added-to-a-table-that-comes": "ALTER TABLE zzz ADD COLUMN x{n} INT",
    "table-appears": "CREATE TABLE appears{n} (id INT)",
    "table-disappears": "DROP TABLE zzz{n}",
    "view-changed": "CREATE OR REPLACE VIEW both_of AS SELECT id, id + {n} AS more FROM first",
    "index-added": "CREATE INDEX i{n} ON aaa (id)",
    "truncated": "TRUNCATE TABLE zzz",
}
QUICK = ("column-added-to-a-table-that-comes", "table-disappears")


@pytest.fixture
def moving(cases: dict[str, Case]) -> tuple[Case, str]:
    """A MariaDB whose dump takes longer than a pipe holds, with small tables before and after the large ones."""
    case = cases["mariadb"]
    url = case.fresh()
    fill(case, url, MANY_ROWS)
    case.execute(
        url,
        *(f"CREATE TABLE {name} (id INT)" for name in ("aaa", "zzz", "zzz1", "zzz2", "zzz3")),
        "INSERT INTO zzz VALUES (1)",
    )
    return case, url


@pytest.mark.parametrize("fault", [pytest.param(one, marks=() if one in QUICK else LONG) for one in DDL])
def test_a_schema_that_changes_while_a_mariadb_is_dumped_is_dumped_again(moving: tuple[Case, str], fault: str) -> None:
    case, url = moving
    memory = Meddled(lambda count: case.execute(url, DDL[fault].format(n=1)) if count == 1 else None)
    captured = case.part(url).capture(memory)
    assert fault == "truncated" or memory.stored > len(memory.index) > 0
    memory.record = taken(case.part(url))[0].record
    assert case.module.restore(memory, Target(url=case.fresh()))["tables"] == len(captured.facts["tables"])


@pytest.mark.parametrize(
    "fault", [pytest.param(one, marks=() if one == QUICK[0] else LONG) for one in DDL if one != "truncated"]
)
def test_a_schema_that_keeps_changing_is_no_backup_of_a_mariadb(moving: tuple[Case, str], fault: str) -> None:
    case, url = moving
    numbers = iter(range(1, 4))

    class EachTry(Memory):
        """At the second section of each try. A try begins with the dump's own first line."""

        second = False

        def store(self, pieces: Iterable[bytes], *, compress: bool = True) -> Stream:
            if self.second:
                case.execute(url, DDL[fault].format(n=next(numbers)))
            found = super().store(pieces, compress=compress)
            self.second = self.kept[found.sha256].startswith(b"-- MariaDB dump")
            return found

    said = str(refused(case, EachTry(), url))
    assert "was changed while it was dumped" in said or "they went while" in said or "1412" in said or "1146" in said
    assert next(numbers, None) is None


def test_a_schema_that_changes_while_a_postgresql_is_dumped_is_not_in_its_snapshot(
    cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases["postgresql"]
    url = case.fresh()
    fill(case, url)
    real = postgresql_facts.tables

    def late(connection: Any) -> Any:
        """After our snapshot was taken, and before the dump begins."""
        found = real(connection)
        monkeypatch.undo()
        case.execute(url, "CREATE TABLE appears_first (id INT)", "INSERT INTO first VALUES (0, 'late')")
        return found

    monkeypatch.setattr(postgresql_facts, "tables", late)
    memory = Meddled(lambda count: case.execute(url, "CREATE TABLE appears (id INT)") if count == 1 else None)
    captured = case.part(url).capture(memory)
    assert {name: one["rows"] for name, one in captured.facts["tables"].items()} == {
        '"public"."first"': ROWS,
        '"public"."second"': ROWS,
    }
    assert b"appears" not in memory.everything()
    assert case.execute(url, "SELECT count(*) FROM first") == [(ROWS + 1,)]


def test_connections_that_are_lost_while_they_are_dumped(case: Case) -> None:
    url = case.fresh()
    fill(case, url)
    body = {"mariadb": "repeat('x', 5000000)", "postgresql": "repeat(md5(n::text), 150000)"}[case.name]
    series = {"mariadb": "seq_1_to_4 s", "postgresql": "generate_series(1, 4) n"}[case.name]
    case.execute(url, f"CREATE TABLE a_large_one AS SELECT {body} AS b FROM {series}")

    def cut(count: int) -> None:
        if count != 0:
            return
        if case.name == "mariadb":
            name = mariadb_access(url).database
            rows = case.execute(
                url, f"SELECT id FROM information_schema.processlist WHERE db = '{name}' AND id <> connection_id()"
            )
            for (number,) in rows:
                with contextlib.suppress(Exception):  # it may be over by itself
                    case.execute(url, f"KILL {number}")
        else:
            case.execute(
                url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )

    assert isinstance(refused(case, Meddled(cut), url), UnavailableError)


def test_a_wrong_password_and_a_server_that_is_not_there(case: Case) -> None:
    assert isinstance(refused(case, url=case.url.replace(PASSWORD, "marked-wrong-word")), UnavailableError)
    nobody = case.url.replace(f":{case.server.port}/", ":1/")
    assert "cannot be reached" in str(refused(case, url=nobody))


def test_a_disk_that_is_full_at_the_temporary_folder(case: Case, mounted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = mounted("size=64k")
    (place / "filler").write_bytes(b"")
    with contextlib.suppress(OSError), (place / "filler").open("wb") as file:
        while True:
            file.write(b"x" * 1024)
            file.flush()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    error = refused(case)
    assert isinstance(error, StorageError) and "TMPDIR" in str(error)


def test_what_is_there_is_not_overwritten_unless_it_is_forced(case: Case) -> None:
    memory, captured = taken(case.part())
    url = case.fresh()
    case.execute(url, "CREATE TABLE mine (id INT)", "INSERT INTO mine VALUES (7)")
    assert case.module.occupied(Target(url=url)) is not None
    with pytest.raises(RefusedError, match="already"):
        case.module.restore(memory, Target(url=url))
    assert case.execute(url, "SELECT id FROM mine") == [(7,)]
    case.module.restore(memory, Target(url=url, force=True))
    assert case.execute(url, "SELECT count(*) FROM second") == [(ROWS,)]
    with pytest.raises(Exception, match="mine"):
        case.execute(url, "SELECT id FROM mine")
    assert len(captured.facts["tables"]) == 2


def test_a_database_that_does_not_exist_yet_is_made(case: Case) -> None:
    memory, _ = taken(case.part())
    url = case.fresh() + "_new"
    assert case.module.occupied(Target(url=url)) is None
    assert case.module.restore(memory, Target(url=url))["rows"] == 2 * ROWS


def test_a_restore_that_is_killed_is_begun_again_and_never_taken_for_whole(case: Case) -> None:
    memory, _ = taken(case.part())
    url = case.fresh()
    case.execute(url, "CREATE TABLE mine (id INT)", "INSERT INTO mine VALUES (7)")

    def die(done: int, total: int | None) -> None:
        if total is not None and done > total * 3 // 4:  # the first table was fed, the second was not
            if (
                case.name == "mariadb"
            ):  # whose client may be behind: without a table there would be nothing to take for whole
                until(lambda: case.module.occupied(Target(url=url)) is not None, 60)
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(
        target=lambda: case.module.restore(memory, Target(url=url, force=True, progress=die))
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    if case.name == "postgresql":  # one transaction: what was there is there
        assert case.execute(url, "SELECT id FROM mine") == [(7,)]
    else:
        assert case.module.occupied(Target(url=url)) is not None
    found = case.module.restore(memory, Target(url=url, force=case.name == "postgresql"))
    assert found["rows"] == 2 * ROWS
    assert case.execute(url, "SELECT count(*) FROM both_of") == [(ROWS,)]


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_a_server_that_goes_away_in_a_restore(cases: dict[str, Case], kind: str, tmp_path: Path) -> None:
    case = cases[kind]
    memory, _ = taken(case.part())
    with getattr(throwaway, kind)(tmp_path) as running:

        def gone(_done: int, _total: int | None) -> None:
            if running.process.poll() is None:
                running.process.kill()
                running.process.wait(30)

        with pytest.raises(UnavailableError) as caught:
            case.module.restore(memory, Target(url=running.database_url("app"), progress=gone))
        assert "word word" not in str(caught.value)


def test_a_backup_that_was_changed_does_not_verify(case: Case, tmp_path: Path) -> None:
    memory, _ = taken(case.part())
    name = next(one for one in memory.index if "second" in str(one.facts.get("table")))
    assert name.stream is not None
    memory.kept[name.stream.sha256] = memory.kept[name.stream.sha256].replace(b"word word", b"ward word", 1)
    compared = case.module.verify(memory, tmp_path)
    assert compared.differences and "second" in compared.differences[0]


def test_two_tables_that_writers_keep_in_step_are_in_step_in_the_backup(case: Case) -> None:
    url = case.fresh()
    case.execute(url, "CREATE TABLE a (id INT)", "CREATE TABLE z (id INT)")
    fill(case, url)
    stop, wrote = threading.Event(), threading.Event()

    def write() -> None:
        module = mariadb_access if case.name == "mariadb" else postgresql_access.access
        with contextlib.closing(module(url).connect()) as connection, connection.cursor() as cursor:
            number = 0
            while not stop.is_set():
                number += 1
                cursor.execute("BEGIN")
                cursor.execute(f"INSERT INTO a VALUES ({number})")
                cursor.execute(f"INSERT INTO z VALUES ({number})")
                cursor.execute("COMMIT")
                wrote.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert wrote.wait(60)
        for _ in range(2):
            wrote.clear()
            memory, captured = taken(case.part(url))
            counts = {name.split(".")[-1].strip('"'): one for name, one in captured.facts["tables"].items()}
            assert counts["a"]["rows"] == counts["z"]["rows"] > 0
            assert wrote.wait(60)
    finally:
        stop.set()
        writer.join(60)
    assert case.module.restore(memory, Target(url=case.fresh()))["rows"] == 2 * ROWS + 2 * counts["a"]["rows"]


def test_the_password_is_in_no_argument_and_in_a_file_that_only_we_read(
    case: Case, instead: Callable[[Case, str], None], tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    look = (
        "path = next((one.split('=', 1)[1] for one in sys.argv if one.startswith('--defaults')), None) or os.environ['PGPASSFILE']; "
        f"open({str(seen)!r}, 'w').write(repr((sys.argv, dict(os.environ), oct(os.stat(path).st_mode), oct(os.stat(os.path.dirname(path)).st_mode)))); "
        "give(text); sys.exit(done.returncode)"
    )
    instead(case, look)
    memory, _ = taken(case.part())
    said = seen.read_text()
    assert PASSWORD not in said and oct(stat.S_IFREG | 0o600) in said and oct(stat.S_IFDIR | 0o700) in said
    assert PASSWORD.encode() not in memory.everything()


ODD_WORDS = ("a\"b'c\\d#e;f=g h", "%40@:/?&ü🐘", '"', "\\n")


@pytest.mark.parametrize("word", ODD_WORDS)
def test_a_password_of_odd_letters_reaches_the_programs(case: Case, word: str) -> None:
    url = case.fresh()
    if case.name == "mariadb":
        case.execute(
            url,
            "CREATE OR REPLACE USER odd IDENTIFIED BY '" + word.replace("\\", "\\\\").replace("'", "''") + "'",
            "GRANT ALL ON *.* TO odd",
        )
    else:
        case.execute(
            url, "DROP ROLE IF EXISTS odd", "CREATE ROLE odd SUPERUSER LOGIN PASSWORD '" + word.replace("'", "''") + "'"
        )
    memory, _ = taken(case.part(url.replace(f"keeper:{PASSWORD}", f"odd:{quote(word, safe='')}")))
    assert memory.index


@pytest.fixture(autouse=True)
def _nothing_of_the_live_data_changes(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for case in request.getfixturevalue("cases").values():
        assert case.execute(case.url, "SELECT count(*) FROM second") == [(ROWS,)]
