"""The runbook about a dropped table, run in the order of the page on private servers whose logs are shipped, with what it prints compared.

Rows are written, each at a moment that its writer notes, and the table is dropped at a known moment. Everything else happens by the
commands of the page: the moment is read off what the server's own programs print, as somebody who was woken would read it. How a
page writes commands and results: tests/printed.py. What the page writes for an address, a moment or a folder is replaced (`Night.put_in`).
"""

from __future__ import annotations

import datetime as dt
import re
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy import text as sql
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool

from registry.settings import build_settings
from tasks.backup import run, ship, verify
from tasks.backup.keyring import new_key
from tests import printed
from tests.e2e.harness import ROOT, Box, box, wait_for
from tests.printed import Call
from tests.registry_servers import PASSWORD, USER, Server, starter

RUNBOOKS = ROOT / "docs/RUNBOOKS.md"
SECTIONS = ("Someone dropped a table",)
ON_POSTGRESQL = "A table of a PostgreSQL"
"""The part of the section that another test runs."""

MARIADB = ("--log-bin=binlog", "--server-id=7", "--binlog-format=ROW", "--sync-binlog=0")
POSTGRESQL = ("-c", "wal_level=replica", "-c", "max_wal_senders=5", "-c", "max_replication_slots=20")
ORDERS = {
    "mariadb": "CREATE TABLE orders (id INT PRIMARY KEY AUTO_INCREMENT, writer VARCHAR(20), created_at TIMESTAMP(6) NOT NULL)",
    "postgresql": "CREATE TABLE orders (id SERIAL PRIMARY KEY, writer TEXT, created_at TIMESTAMPTZ NOT NULL)",
}
WRITERS, EACH = 2, 15
MOMENT = "2026-11-21T14:03:07Z"
"""As the page writes it; on a PostgreSQL with microseconds."""
EXACT = "2026-11-21T14:03:07.898702Z"

TOML = """profile = "cpu"
backups = ["{folder}/backups"]
backup_key_file = "{folder}/backup.key"

[[databases]]
name = "app"
url = "{url}"

[backup]
logs = ["app"]
"""


class Night:
    """A database whose logs are shipped, and the person who was woken because its table is gone."""

    def __init__(self, one: Box, server: Server, programs: Path) -> None:
        self.one, self.server, self.programs = one, server, programs
        server.execute("CREATE DATABASE app")
        self.engine: Engine = create_engine(server.url("app"), poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self.noted: list[tuple[str, dt.datetime]] = []
        self.moment: str | None = None
        """What `--at` gets, as the logs showed it."""
        self.dropped: tuple[dt.datetime, dt.datetime]
        self.said: list[str] = []

    # what the application does

    def sql(self, statement: str, **values: Any) -> list[Any]:
        with self.engine.connect() as connection:
            found = connection.execute(sql(statement), values)
            return list(found) if found.returns_rows else []

    def now(self) -> dt.datetime:
        """The server's clock, with microseconds, in UTC."""
        asked = {"mariadb": "SELECT UTC_TIMESTAMP(6)", "postgresql": "SELECT clock_timestamp() AT TIME ZONE 'UTC'"}
        [(now,)] = self.sql(asked[self.server.kind])
        assert isinstance(now, dt.datetime)
        return now.replace(tzinfo=dt.UTC)

    def order(self, writer: str) -> None:
        now = self.now()
        self.sql(
            "INSERT INTO orders (writer, created_at) VALUES (:writer, :now)", writer=writer, now=now.isoformat(" ")[:26]
        )
        self.noted.append((writer, now))

    def keep_ordering(self, writer: str) -> None:
        for _ in range(EACH):
            self.order(writer)

    def written(self, database: str = "app") -> list[tuple[str, dt.datetime]]:
        with closing(create_engine(self.server.url(database), poolclass=NullPool).connect()) as connection:
            if self.server.kind == "mariadb":
                connection.execute(sql("SET time_zone = '+00:00'"))
            found = connection.execute(sql("SELECT writer, created_at FROM orders ORDER BY id"))
            return [
                (writer, at.replace(tzinfo=dt.UTC) if at.tzinfo is None else at.astimezone(dt.UTC))
                for writer, at in found
            ]

    # the evening before, and the misfortune

    def make(self) -> None:
        """A backup that is verified; logs are shipped while two writers write; the table is dropped, and the application goes on."""
        home, folder = self.one.home, self.one.folder
        toml = TOML.format(folder=folder, url=self.server.url("app"))
        (home / "modelkeep.toml").write_text(toml)
        new_key(folder / "backup.key")
        settings = build_settings(home / "modelkeep.toml", toml, environ=self.one.environment, cwd=folder)
        self.sql(
            "SET GLOBAL time_zone = '+00:00'"
            if self.server.kind == "mariadb"
            else "ALTER DATABASE app SET timezone = 'UTC'"
        )
        self.sql(ORDERS[self.server.kind])
        self.sql("CREATE TABLE visits (id INT PRIMARY KEY)")
        self.order("yesterday")
        taken = run.back_up(settings, run.Request(("database",)))
        assert taken.state == "complete", taken
        assert verify.verify(settings, taken.backup_id).state == "verified"
        writers = [threading.Thread(target=self.keep_ordering, args=(f"writer {one}",)) for one in range(WRITERS)]
        for writer in writers:
            writer.start()
        [shipped] = ship.ship(settings)
        for writer in writers:
            writer.join()
        assert shipped.failed is None and shipped.gap is None, shipped
        self.order("the last before")
        last = self.now().replace(microsecond=0)
        wait_for("the next second of the server", lambda: self.now() >= last + dt.timedelta(seconds=1))
        before = self.now()
        self.sql("DROP TABLE orders")
        self.dropped = before, self.now()
        self.sql("INSERT INTO visits VALUES (1)")

    # the commands of the page

    def put_in(self, command: str) -> str:
        """A command of the page, with what is true here in place of what the page writes."""
        port = {"mariadb": "127.0.0.1:3306", "postgresql": "127.0.0.1:5432"}[self.server.kind]
        data = self.server.folder / "data"
        command = command.replace(port, f"127.0.0.1:{self.server.port}").replace(
            "/var/lib/postgresql/15/main", str(data)
        )
        for written in (EXACT, MOMENT):
            if written in command:
                assert self.moment is not None, "the page asks for a moment that it has not shown yet"
                command = command.replace(written, self.moment)
        return command

    def run(self, call: Call) -> list[str]:
        """Run a command of the page, and what it printed."""
        command = self.put_in(call.command)
        if command.startswith("modelkeep "):
            done = self.one.modelkeep(*shlex.split(command)[1:], timeout=120)
        else:
            path = f"{self.programs}:{self.one.environment['PATH']}"
            done = subprocess.run(
                ["bash", "-c", command], cwd=self.one.folder, env={**self.one.environment, "PATH": path}, text=True,
                stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
            )  # fmt: skip
        assert done.returncode == 0, done
        said = printed.lines(done.stdout, done.stderr, done.returncode)
        self.moment = self.moment or shown_moment(said)
        return [line.replace(str(self.one.folder), "/srv") for line in said]


def shown_moment(lines: list[str]) -> str | None:
    """The moment of a DROP in what `mariadb-binlog` or `pg_waldump` printed, as `--at` takes it."""
    for line in lines:
        if found := re.match(r"#(\d{6}) +(\d{1,2}:\d\d:\d\d) server id", line):
            at = dt.datetime.strptime(f"{found[1]} {found[2]}", "%y%m%d %H:%M:%S")
            return f"{at.isoformat()}Z"
        if found := re.match(r"COMMIT (\S+) (\S+) UTC; rels:", line):
            return f"{found[1]}T{found[2]}Z"
    return None


@contextmanager
def woken(folder: Path, server: Server, programs: Path) -> Iterator[Night]:
    """The programs of the databases find the server and the password as the page says: in files of the person's home."""
    (folder / ".my.cnf").write_text(
        f"[client]\nhost = 127.0.0.1\nport = {server.port}\nuser = {USER}\npassword = {PASSWORD}\n"
    )
    (folder / ".pgpass").write_text(f"127.0.0.1:{server.port}:*:{USER}:{PASSWORD}\n")
    for name in (".my.cnf", ".pgpass"):
        (folder / name).chmod(0o600)
    extra = {"HOME": str(folder), "PGHOST": "127.0.0.1", "PGPORT": str(server.port), "PGUSER": USER}
    with box(folder, extra=extra) as one:
        made = Night(one, server, programs)
        made.make()
        yield made


def page() -> str:
    """The section of this test, with the numbers of its lines as in the whole page."""
    text = RUNBOOKS.read_text(encoding="utf-8")
    begin = text.index(f"## {SECTIONS[0]}\n")
    return "\n" * text.count("\n", 0, begin) + text[begin : text.index("\n## ", begin)]


def walk(night: Night, calls: list[Call]) -> list[str]:
    """What the page says otherwise than its commands."""
    faults = []
    for call in calls:
        said = night.run(call)
        faults += printed.differences(call, said, earlier=night.said)
        night.said += said
    return faults


@pytest.fixture
def server(request: pytest.FixtureRequest, program: Callable[[str], Path]) -> Iterator[Server]:
    made = starter(request.param, program, *{"mariadb": MARIADB, "postgresql": POSTGRESQL}[request.param])
    yield made
    made.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("server", ["mariadb", "postgresql"], indirect=True)
def test_a_dropped_table_comes_back_by_the_commands_of_the_page_which_print_what_it_says(
    server: Server, tmp_path: Path, program: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", str(server.port))  # the private servers of a verification are not asked there
    programs = program({"mariadb": "mariadb-binlog", "postgresql": "postgres"}[server.kind]).resolve().parent
    own = [call for call in printed.calls(page()) if (call.section == ON_POSTGRESQL) == (server.kind == "postgresql")]
    with woken(tmp_path, server, programs) as night:
        faults = walk(night, own)
        assert not faults, "\n".join(faults)

        assert night.moment is not None
        shown = dt.datetime.fromisoformat(night.moment)
        before, after = night.dropped
        assert (before.replace(microsecond=0) if server.kind == "mariadb" else before) <= shown <= after
        expected = sorted(one for one in night.noted if one[1] < shown)
        assert len(expected) == WRITERS * EACH + 2
        assert sorted(night.written()) == expected, "the table is back as it was before it was dropped"
        if server.kind == "mariadb":
            assert sorted(night.written("app_then")) == expected, "and beside it, to be looked at"
        assert night.sql("SELECT id FROM visits") == [(1,)], "what was written into another table since is there"


def test_every_block_of_the_section_is_run_and_shows_what_it_prints() -> None:
    calls = printed.calls(page())
    assert {call.section for call in calls} == {*SECTIONS, ON_POSTGRESQL}
    assert all(call.printed for call in calls)
    assert printed.others(page()) == [], "a block that nothing runs"
    assert "mariadb-binlog" in "".join(call.command for call in calls if call.section in SECTIONS)
    assert "pg_waldump" in "".join(call.command for call in calls if call.section == ON_POSTGRESQL)
