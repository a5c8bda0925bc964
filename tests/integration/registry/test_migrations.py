"""The schema goes up and down on every database, alone or in a crowd, and an upgrade that was killed is finished by the next."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, event, func, inspect, select, text

from registry import audit, clock, ddl, migrate
from registry.database import Database
from registry.errors import UsageError
from registry.schema import REVISION, AuditHead, Base, Model, Route, Version
from tests.unit.registry import kit

SPAWN = multiprocessing.get_context("spawn")
Blank = Callable[[], Database]


def tables(database: Database) -> set[str]:
    with database.engine.connect() as connection:
        return set(inspect(connection).get_table_names())


def differences(database: Database) -> list[Any]:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, Base.metadata))


def test_the_migrations_make_the_tables_that_the_code_has(database: Database) -> None:
    assert database.revision() == REVISION == migrate.known()[0]
    assert differences(database) == []


def test_every_migration_goes_up_and_down_and_up_again(blank: Blank) -> None:
    database = blank()
    revisions = list(reversed(migrate.known()))
    seen = []
    for revision in revisions:
        migrate.upgrade(database, revision)
        assert database.revision() == revision
        seen.append(tables(database))
    for revision, there in zip(reversed(revisions), reversed(seen), strict=True):
        migrate.downgrade(database, revision)
        assert tables(database) == there
    migrate.downgrade(database, "base")
    assert (tables(database), database.revision()) == ({"alembic_version"}, None)
    database.prepare()
    assert (database.revision(), differences(database)) == (REVISION, [])
    with database.read() as session:
        assert session.get_one(AuditHead, 1).hash == audit.GENESIS


def test_what_was_on_record_before_an_upgrade_is_there_after_it_and_after_the_way_back(blank: Blank) -> None:
    database = blank()
    migrate.upgrade(database, "0001")
    with database.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO models (name, description, created_at) VALUES ('digits', 'of 1998', '2026-01-02 03:04:05')"
            )
        )
    database.prepare()
    with database.read() as session:
        found = session.get_one(Model, "digits")
        assert (found.description, clock.text(found.created_at)) == ("of 1998", "2026-01-02T03:04:05.000000Z")
    migrate.downgrade(database, "0001")
    with database.engine.connect() as connection:
        assert connection.execute(text("SELECT description FROM models")).scalars().all() == ["of 1998"]


def test_the_code_of_the_release_before_goes_on_beside_the_new_schema(blank: Blank) -> None:
    """Expand only: every table that revision 0001 had takes rows with the columns that it had."""
    database, before = blank(), blank()
    migrate.upgrade(before, "0001")
    database.prepare()
    old = tables(before) - {"alembic_version"}
    kept: dict[str, set[str]] = {}
    with before.engine.connect() as connection:
        for table in old:
            kept[table] = {column["name"] for column in inspect(connection).get_columns(table)}
    with database.engine.connect() as connection:
        for table in sorted(old):
            columns = {column["name"]: column for column in inspect(connection).get_columns(table)}
            assert kept[table] <= set(columns), "nothing that it reads was taken away"
            for name in set(columns) - kept[table]:
                assert columns[name]["nullable"] or columns[name]["default"] is not None, f"{table}.{name}"
    with database.engine.begin() as connection:
        for table in sorted(old - {"audit_head"}):
            types = {
                column.name: column.type for column in Base.metadata.tables[table].columns if column.name in kept[table]
            }
            values = {name: _value(str(kind)) for name, kind in types.items()}
            connection.execute(Base.metadata.tables[table].insert().values(values))
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Version)) == 1


def _value(kind: str) -> Any:
    if kind.startswith(("VARCHAR", "TEXT", "LONGTEXT")):
        return "x"
    return {"JSON": {}, "BOOLEAN": True, "DATETIME": clock.now(), "FLOAT": 0.5}.get(kind, 1)


def test_preparing_again_changes_nothing(database: Database) -> None:
    kit.add_version(database, "1")
    database.prepare()
    migrate.upgrade(database)
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Model)) == 1


def test_a_database_that_is_newer_than_this_code_is_refused_and_left_alone(blank: Blank) -> None:
    database = blank()
    migrate.upgrade(database, "0001")
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = tables(database)
    with pytest.raises(UsageError, match=r"schema revision 9999, .*does not know: upgrade modelkeep") as error:
        database.prepare()
    assert str(database.url.database) in str(error.value)
    assert (database.revision(), tables(database)) == ("9999", before)


class Cut(Exception):
    """The process died here, as far as the database can tell."""


@pytest.fixture
def cut_after() -> Iterator[Callable[[int], list[str]]]:
    """`cut_after(n)`: the statement after the n-th that changes the schema is never sent. Returns those that were."""
    sent: list[str] = []
    listeners: list[Callable[..., None]] = []

    def arm(count: int) -> list[str]:
        sent.clear()

        def listen(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            if statement.split()[0] in ("CREATE", "ALTER", "DROP", "INSERT", "UPDATE"):
                if len(sent) == count:
                    raise Cut
                sent.append(statement)

        for before in listeners:
            event.remove(Engine, "before_cursor_execute", before)
        listeners[:] = [listen]
        event.listen(Engine, "before_cursor_execute", listen)
        return sent

    yield arm
    for before in listeners:
        event.remove(Engine, "before_cursor_execute", before)


def test_an_upgrade_that_dies_between_any_two_steps_is_finished_by_the_next(
    blank: Blank, cut_after: Callable[[int], list[str]]
) -> None:
    database = blank()
    steps = cut_after(1000)
    database.prepare()
    total = len(steps)
    assert total > 30
    database = blank()
    for count in range(0, total, 5):  # each try gets further, on what the one before it left
        cut_after(count)
        try:
            database.prepare()
        except Cut:
            continue
        break
    cut_after(1000)
    database.prepare()
    assert (database.revision(), differences(database)) == (REVISION, [])
    kit.add_version(database, "1")
    with database.read() as session:
        assert session.scalars(select(AuditHead.id)).all() == [1]
        assert audit.verify(session).faults == []


def prepare(url: str, start: Any) -> None:
    start.wait()
    database = Database(url)
    database.prepare()
    assert database.revision() == REVISION
    database.dispose()


def test_processes_that_upgrade_at_once_do_it_once(blank: Blank) -> None:
    database = blank()
    start = SPAWN.Barrier(2)
    url = database.url.render_as_string(hide_password=False)
    processes = [SPAWN.Process(target=prepare, args=(url, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    with database.read() as session:
        assert session.scalars(select(AuditHead.seq)).all() == [0]
        assert session.execute(text("SELECT count(*) FROM alembic_version")).scalar() == 1
    assert differences(database) == []


def test_who_upgrades_next_sees_what_the_one_before_did(blank: Blank) -> None:
    """On MariaDB the lock was free before the revision was on record: both did the last step, and the second failed."""
    database = blank()
    database.prepare()
    writer = database.engine.execution_options(modelkeep_write=True)
    seen: list[Any] = []

    def follow() -> None:
        with writer.connect() as connection, connection.begin(), ddl.alone(connection):
            seen.append(connection.execute(text("SELECT version_num FROM alembic_version")).scalar())

    follower = threading.Thread(target=follow)
    with writer.connect() as connection, connection.begin():
        with ddl.alone(connection):
            connection.execute(text("UPDATE alembic_version SET version_num = 'next'"))
        follower.start()
        follower.join(timeout=1)  # until the first has ended it may well wait
    follower.join()
    assert seen == ["next"]


@pytest.mark.server
def test_tables_that_an_early_release_made_get_names_by_bytes_and_floats_with_all_digits(blank: Blank) -> None:
    database = blank()
    migrate.upgrade(database, "0001")
    mysql = database.engine.dialect.name == "mysql"
    with database.engine.begin() as connection:
        if mysql:  # as the server's own default would have made them
            for table in ("models", "versions", "routes", "leases", "route_changes"):
                connection.execute(
                    text(f"ALTER TABLE {table} CONVERT TO CHARACTER SET latin1 COLLATE latin1_swedish_ci")
                )
            connection.execute(text("ALTER TABLE routes MODIFY weight FLOAT NOT NULL"))
        else:
            connection.execute(text('ALTER TABLE models ALTER COLUMN name TYPE VARCHAR(128) COLLATE "und-x-icu"'))
            connection.execute(text('ALTER TABLE versions ALTER COLUMN version TYPE VARCHAR(128) COLLATE "und-x-icu"'))
    kit_names = ["B", "a", "ab", "Ä", "é"]
    database.prepare()
    with database.write(actor="test") as transaction:
        for name in [*kit_names, "b", "A", "e"]:
            transaction.session.add(Model(name=name, created_at=clock.now()))
        transaction.session.add(
            Route(environment="e", model="m", weight=0.123456789012, shadow=False, watch=False, generation=1)
        )
    with database.read() as session:
        ordered = session.scalars(select(Model.name).order_by(Model.name)).all()
        assert ordered == sorted([*kit_names, "b", "A", "e"])
        assert session.get(Model, "E") is None
        assert session.get_one(Route, ("e", "m")).weight == 0.123456789012
