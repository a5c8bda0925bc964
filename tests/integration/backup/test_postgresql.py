"""A PostgreSQL database is dumped in a snapshot that we count in, brought back in one transaction and compared."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from registry.errors import NotFoundError, RefusedError, UnavailableError
from tasks.backup import postgresql as kind
from tasks.backup.components import Target
from tasks.backup.postgresql_access import access
from tests.integration.backup.database_content import HARD_POSTGRESQL, HARD_POSTGRESQL_ROWS
from tests.registry_servers import PASSWORD, Server
from tests.unit.tasks.backup.memory import Memory, taken


def execute(url: str, *statements: str) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    with contextlib.closing(access(url).connect()) as connection:
        for statement in statements:
            cursor = connection.execute(statement.encode())
            found = cursor.fetchall() if cursor.description else []
    return found


@pytest.fixture(scope="module")
def hard(postgresql: Server) -> str:
    """A database with everything that is hard, and a role of its own. Nobody changes it."""
    url = postgresql.create()
    execute(
        url, *HARD_POSTGRESQL, "CREATE ROLE \"lése\" LOGIN PASSWORD 'marked-secret'", "CREATE ROLE readers", 'GRANT readers TO "lése"',
        "GRANT SELECT ON books TO readers",
    )  # fmt: skip
    return url


@pytest.fixture(scope="module")
def backup(hard: str) -> Memory:
    return taken(part(hard))[0]


@pytest.fixture
def fresh(postgresql: Server) -> str:
    return postgresql.create()


def part(url: str) -> kind.Part:
    return kind.Part("database:app", url)


def test_everything_that_is_hard_comes_back_and_is_verified(
    hard: str, backup: Memory, fresh: str, tmp_path: Path
) -> None:
    facts = backup.record.facts
    assert {name: one["rows"] for name, one in facts["tables"].items()} == HARD_POSTGRESQL_ROWS
    assert backup.record.snapshot["method"] == "exported-snapshot" and backup.record.snapshot["lsn"]

    found = kind.restore(backup, Target(url=fresh))
    assert found["rows"] == sum(HARD_POSTGRESQL_ROWS.values())
    assert execute(fresh, "SELECT o::text FROM odd o") == execute(hard, "SELECT o::text FROM odd o")
    assert execute(fresh, "SELECT nextval('numbers')") == [(101,)]
    assert execute(fresh, "SELECT has_table_privilege('readers', 'books', 'SELECT')") == [(True,)]

    compared = kind.verify(backup, tmp_path)
    assert compared.differences == () and compared.unverifiable is None
    assert compared.checked["revision"] == {"alembic_version": "5f1c"}
    # Roles are the cluster's, and other tests have made theirs in it; the two of this content are among them.
    made = {str(name) for (name,) in execute(hard, "SELECT rolname FROM pg_roles WHERE rolname !~ '^pg_'")}
    assert 2 <= compared.checked["roles"] <= len(made) and "readers" in made
    assert compared.checked["digests"] == len(HARD_POSTGRESQL_ROWS)
    assert PASSWORD.encode() not in backup.everything() and b"marked-secret" not in backup.everything()


def test_single_tables_come_back_with_their_indexes_and_triggers(backup: Memory, fresh: str) -> None:
    execute(fresh, "CREATE TABLE mine (id INT)", "INSERT INTO mine VALUES (7)")
    found = kind.restore(backup, Target(url=fresh, only=("no_columns", "alembic_version", "odd")))
    assert found == {"tables": 3, "rows": 3}
    assert execute(fresh, "SELECT id FROM mine") == [(7,)]
    assert execute(fresh, "SELECT count(*) FROM pg_indexes WHERE tablename = 'alembic_version'") == [(1,)]
    with pytest.raises(RefusedError, match="already"):
        kind.restore(backup, Target(url=fresh, only=("odd",)))
    execute(fresh, "DELETE FROM odd")
    assert kind.restore(backup, Target(url=fresh, only=("odd",), force=True)) == {"tables": 1, "rows": 1}
    with pytest.raises(NotFoundError, match="nope"):
        kind.restore(backup, Target(url=fresh, only=("nope",)))


def test_a_restore_that_fails_leaves_what_was_there_and_tells_no_row(backup: Memory, fresh: str) -> None:
    execute(fresh, "CREATE TABLE mine (id INT)", "INSERT INTO mine VALUES (7)")
    entry = next(one for one in backup.index if one.facts.get("table") == '"public"."alembic_version"')
    assert entry.stream is not None
    spoiled = Memory(kept=dict(backup.kept), index=backup.index, record=backup.record)
    spoiled.kept[entry.stream.sha256] = backup.kept[entry.stream.sha256].replace(b"5f1c", b"5f1c\tmarked-row")
    with pytest.raises(UnavailableError) as caught:
        kind.restore(spoiled, Target(url=fresh, force=True))
    assert "marked-row" not in str(caught.value)
    assert execute(fresh, "SELECT id FROM mine") == [(7,)]


def test_a_role_that_is_no_superuser_keeps_roles_without_their_passwords(postgresql: Server, fresh: str) -> None:
    execute(fresh, "CREATE TABLE a (id INT)", "INSERT INTO a VALUES (1)")
    database = access(fresh).database
    execute(fresh, "CREATE ROLE plain LOGIN PASSWORD 'marked-secret'", f'ALTER DATABASE "{database}" OWNER TO plain')
    execute(fresh, "ALTER TABLE a OWNER TO plain")
    memory, captured = taken(part(fresh.replace(f"keeper:{PASSWORD}", "plain:marked-secret")))
    assert captured.facts["role_passwords"] is False
    assert any("without their passwords" in warning for warning in memory.warnings)
    assert b"PASSWORD" not in memory.text("roles.sql")


def test_rows_that_a_policy_hides_are_no_backup(postgresql: Server, fresh: str) -> None:
    """pg_dump would fail as well; counting must not see fewer rows without a word."""
    execute(
        fresh, "CREATE TABLE a (id INT)", "INSERT INTO a VALUES (1), (2)", "ALTER TABLE a ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY p ON a USING (id = 1)", "CREATE ROLE limited LOGIN PASSWORD 'marked-secret'", "GRANT SELECT ON a TO limited",
    )  # fmt: skip
    with pytest.raises(UnavailableError) as caught:
        taken(part(fresh.replace(f"keeper:{PASSWORD}", "limited:marked-secret")))
    assert "marked-secret" not in str(caught.value)


def test_a_server_that_is_older_or_lacks_an_extension_verifies_nothing(backup: Memory, tmp_path: Path) -> None:
    later = Memory(kept=backup.kept, index=backup.index, record=backup.record)
    kept = dict(backup.record.facts)
    try:
        backup.record.facts.update(server="99.1", server_number=990001)
        compared = kind.verify(later, tmp_path)
        assert compared.unverifiable is not None and "older" in compared.unverifiable
        backup.record.facts.update(kept, extensions={"no_such_extension": "1"})
        compared = kind.verify(later, tmp_path)
        assert compared.unverifiable is not None and "no_such_extension" in compared.unverifiable
    finally:
        backup.record.facts.update(kept)


def test_what_the_environment_names_is_not_asked_where_the_url_names_a_server(
    postgresql: Server, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.77")  # nobody listens there
    monkeypatch.setenv("PGPORT", "1")
    with contextlib.closing(access(fresh).connect()) as connection:
        assert connection.info.port == postgresql.port
    assert part(fresh).capture(Memory()).facts["tables"] == {}
