"""A MariaDB is dumped, brought back and compared; and each way in which a dump lies is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymysql
import pytest

from registry.errors import NotFoundError, RefusedError
from tasks.backup import mariadb as kind
from tasks.backup import mariadb_access, mariadb_facts, mariadb_snapshot, throwaway
from tasks.backup.components import Target
from tasks.backup.mariadb_access import access
from tasks.backup.mariadb_facts import MARKER
from tests.integration.backup.database_content import HARD_MARIADB, HARD_ROWS
from tests.registry_servers import PASSWORD, Server
from tests.unit.tasks.backup.memory import Memory, taken


def connected(url: str) -> pymysql.connections.Connection[Any]:
    return access(url).connect()


def execute(url: str, *statements: str) -> list[tuple[Any, ...]]:
    connection = connected(url)
    try:
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            return list(cursor.fetchall())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def hard(mariadb: Server) -> Iterator[str]:
    """A database with everything that is hard. Nobody changes it."""
    url = mariadb.create(options="CHARACTER SET utf8mb4")
    execute(url, *HARD_MARIADB)
    yield url


@pytest.fixture
def fresh(mariadb: Server) -> str:
    return mariadb.create(options="CHARACTER SET utf8mb4")


def part(url: str) -> kind.Part:
    return kind.Part("database:app", url)


def test_everything_that_is_hard_comes_back_and_is_verified(hard: str, fresh: str, tmp_path: Path) -> None:
    memory, captured = taken(part(hard))
    assert {name: one["rows"] for name, one in captured.facts["tables"].items() if "rows" in one} == HARD_ROWS
    assert captured.snapshot["method"] == "read-lock"
    assert captured.facts["revision"] == {"alembic_version": "5f1c"}
    assert any("log_lines" in warning for warning in memory.warnings)

    found = kind.restore(memory, Target(url=fresh))
    assert found["tables"] == len(captured.facts["tables"])
    assert execute(fresh, "SELECT name FROM z_view ORDER BY 1") == execute(hard, "SELECT name FROM z_view ORDER BY 1")
    assert (
        execute(fresh, "CHECKSUM TABLE books, blobs, zero, dates")[0][1] == execute(hard, "CHECKSUM TABLE books")[0][1]
    )
    [(body,)] = execute(
        fresh,
        f"SELECT routine_definition FROM information_schema.routines WHERE routine_name = 'count_books' AND routine_schema = '{access(fresh).database}'",
    )
    assert "a comment that must stay" in body and "\r\n" in body
    assert execute(fresh, "SELECT nextval(numbers)") == [(100,)]

    compared = kind.verify(memory, tmp_path)
    assert compared.differences == () and compared.unverifiable is None
    assert compared.checked["rows"] == sum(HARD_ROWS.values())
    assert compared.checked["triggers"] == 1 and compared.checked["events"] == 1
    assert PASSWORD.encode() not in memory.everything()


def test_a_label_that_the_servers_own_text_cannot_hold_is_found_by_the_checksum(
    mariadb: Server, fresh: str, tmp_path: Path
) -> None:
    """MariaDB writes CREATE TABLE in three bytes a letter at most: rows and counts come back, and the value is gone."""
    execute(fresh, "CREATE TABLE moods (m ENUM('🐘', 'b'))", "INSERT INTO moods VALUES ('🐘')")
    memory, captured = taken(part(fresh))
    assert captured.facts["tables"]["moods"]["rows"] == 1
    compared = kind.verify(memory, tmp_path)
    assert compared.differences and "moods: checksum" in compared.differences[0]


def user(mariadb: Server, url: str, name: str, *grants: str) -> str:
    """The URL for a user who has these grants and no others."""
    database = access(url).database
    execute(
        url,
        f"CREATE OR REPLACE USER {name} IDENTIFIED BY 'marked-secret'",
        *(
            f"GRANT {words} ON {place.format(database=database)} TO {name}"
            for words, place in (one.split(" ON ") for one in grants)
        ),
    )
    return url.replace(f"keeper:{PASSWORD}", f"{name}:marked-secret")


READER = "SELECT, SHOW VIEW, TRIGGER, EVENT, LOCK TABLES ON {database}.*"


def test_without_the_right_to_lock_the_rows_are_counted_in_the_dumps_own_text(mariadb: Server, fresh: str) -> None:
    execute(fresh, "CREATE TABLE a (id INT)", "INSERT INTO a VALUES (1), (2)", "CREATE VIEW v AS SELECT * FROM a")
    url = user(mariadb, fresh, "reader", READER)
    memory, captured = taken(part(url))
    assert captured.snapshot["method"] == "counted-in-stream" and captured.snapshot["why"] == "the user lacks RELOAD"
    assert captured.facts["tables"]["a"]["rows"] == 2
    assert any("users and their grants are not in it" in warning for warning in memory.warnings)
    assert b"marked-secret" not in memory.everything()


def test_limits_of_the_server_on_statements_are_not_those_of_a_backup(mariadb: Server, fresh: str) -> None:
    execute(fresh, "CREATE TABLE a (id INT)", "SET GLOBAL max_statement_time = 0.5")
    try:
        assert execute(fresh, "SELECT @@max_statement_time, sleep(0.7)") == [(0.0, 0)]
    finally:
        execute(fresh, "SET GLOBAL max_statement_time = 0")


@pytest.mark.parametrize("missing", ["TRIGGER", "EVENT", "SHOW VIEW"])
def test_a_user_who_cannot_see_everything_makes_no_backup(mariadb: Server, fresh: str, missing: str) -> None:
    """Its dump ends with exit code 0 and lacks what it cannot see."""
    execute(fresh, "CREATE TABLE a (id INT)")
    url = user(mariadb, fresh, "blind", READER.replace(f", {missing}", ""))
    with pytest.raises(RefusedError, match=f"lacks {missing}"):
        taken(part(url))


def test_a_routine_whose_body_is_hidden_makes_no_backup(mariadb: Server, fresh: str) -> None:
    execute(fresh, "CREATE PROCEDURE p() SELECT 1")
    url = user(mariadb, fresh, "blind", READER, "EXECUTE ON {database}.*")
    with pytest.raises(RefusedError, match="body of 1 routines"):
        taken(part(url))


def test_a_table_that_somebody_holds_for_long_is_dumped_when_it_is_free(
    mariadb: Server, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(fresh, "CREATE TABLE a (id INT)", "INSERT INTO a VALUES (1)")
    monkeypatch.setattr(mariadb_access, "LOCK_SECONDS", 1)
    monkeypatch.setattr(mariadb_snapshot, "LOCK_SECONDS", 1)
    holder = connected(fresh)
    with holder.cursor() as cursor:
        cursor.execute("LOCK TABLES a WRITE")
    # It lets go once we were told that the lock is not to be had, and the dump stands before the table.
    warned = []

    class Told(Memory):
        def warn(self, text: str) -> None:
            super().warn(text)
            warned.append(text)
            holder.close()

    memory = Told()
    captured = part(fresh).capture(memory)
    assert captured.snapshot["method"] == "counted-in-stream"
    assert "held tables for long" in warned[0] and captured.facts["tables"]["a"]["rows"] == 1


def test_single_tables_come_back_beside_what_is_there(hard: str, fresh: str) -> None:
    memory, _ = taken(part(hard))
    execute(fresh, "CREATE TABLE mine (id INT)", "INSERT INTO mine VALUES (7)")
    assert kind.occupied(Target(url=fresh, only=("dates",))) is None
    found = kind.restore(memory, Target(url=fresh, only=("dates", "tä`ble 日本 (1")))
    assert found == {"tables": 2, "rows": 4}
    assert execute(fresh, "SELECT id FROM mine") == [(7,)]
    with pytest.raises(RefusedError, match="the tables dates already"):
        kind.restore(memory, Target(url=fresh, only=("dates",)))
    execute(fresh, "DELETE FROM dates")
    assert kind.restore(memory, Target(url=fresh, only=("dates",), force=True)) == {"tables": 1, "rows": 1}
    with pytest.raises(NotFoundError, match="nope"):
        kind.restore(memory, Target(url=fresh, only=("nope",)))
    names = execute(fresh, "SHOW TABLES")
    assert sorted(name for (name,) in names) == ["dates", "mine", "tä`ble 日本 (1"]


def test_a_backup_of_another_kind_of_server_is_refused_and_never_verified(
    hard: str, fresh: str, tmp_path: Path
) -> None:
    memory, _ = taken(part(hard))
    memory.record.facts["flavour"] = "mysql"
    with pytest.raises(RefusedError, match="is a mariadb, and the backup is of a mysql"):
        kind.restore(memory, Target(url=fresh))
    compared = kind.verify(memory, tmp_path)
    assert compared.unverifiable is not None and "MySQL's own server" in compared.unverifiable


def test_users_roles_grants_and_the_place_in_the_servers_log_are_kept(hard: str, tmp_path: Path) -> None:
    with throwaway.mariadb(tmp_path / "a", options=["--log-bin=changes", "--server-id=1"]) as one:
        url = one.database_url("app")
        control = access(url).connect(database=False)
        with control.cursor() as cursor:
            for statement in (
                "CREATE DATABASE app",
                "CREATE TABLE app.t (id INT)",
                "CREATE PROCEDURE app.p() SELECT 1",
                "CREATE ROLE readers",
                "GRANT SELECT ON app.t TO readers",
                "CREATE USER `ann o'x`@`10.%` IDENTIFIED BY 'marked-secret'",
                "GRANT readers TO `ann o'x`@`10.%`",
                "GRANT EXECUTE ON PROCEDURE app.p TO `ann o'x`@`10.%`",
            ):
                cursor.execute(statement)
            cursor.execute("SHOW GRANTS FOR `ann o'x`@`10.%`")
            grants = sorted(cursor.fetchall())
            cursor.execute("SHOW MASTER STATUS")
            place = cursor.fetchall()[0]
        control.close()
        memory, captured = taken(part(url))
        assert (captured.snapshot["binlog"]["file"], captured.snapshot["binlog"]["position"]) == place[:2]
        assert captured.snapshot["binlog"]["gtid"].startswith("0-1-")
        assert b"marked-secret" not in memory.everything()
        with throwaway.mariadb(tmp_path / "b") as other:
            found = kind.restore(memory, Target(url=other.database_url("app")))
            assert found["accounts"] == 2 and found["accounts_failed"] == {}
            assert sorted(execute(other.database_url("app"), "SHOW GRANTS FOR `ann o'x`@`10.%`")) == grants
            assert kind.restore(memory, Target(url=other.database_url("app"), force=True))["accounts_kept"] == 2


@pytest.mark.long
def test_blobs_of_64_mb_and_a_thousand_tables_come_back_and_are_verified(
    mariadb: Server, fresh: str, tmp_path: Path
) -> None:
    execute(fresh, "SET GLOBAL max_allowed_packet = 1073741824")
    execute(
        fresh,
        "CREATE TABLE blobs (id INT PRIMARY KEY, body LONGBLOB)",
        "INSERT INTO blobs VALUES (1, REPEAT(x'00FF275C', 16777216))",
    )
    connection = connected(fresh)
    with connection.cursor() as cursor:
        for number in range(1000):
            cursor.execute(f"CREATE TABLE t{number} (id INT PRIMARY KEY, t VARCHAR(20))")
            cursor.execute(f"INSERT INTO t{number} VALUES (1, 'a'), (2, 'b')")
    connection.close()
    memory, _ = taken(part(fresh))
    compared = kind.verify(memory, tmp_path)
    assert compared.differences == ()
    assert compared.checked["tables"] == 1001 and compared.checked["rows"] == 2001


def test_single_tables_do_not_make_a_half_restored_database_whole(hard: str, fresh: str) -> None:
    memory, _ = taken(part(hard))

    class Died(BaseException):
        pass

    def die(done: int, total: int | None) -> None:
        raise Died

    with pytest.raises(Died):
        kind.restore(memory, Target(url=fresh, progress=die))
    with pytest.raises(RefusedError, match="half restored"):
        kind.restore(memory, Target(url=fresh, only=("dates",), force=True))
    assert kind.restore(memory, Target(url=fresh))["rows"] == sum(HARD_ROWS.values())


def test_the_checksum_of_a_table_with_a_virtual_column_is_the_same_whenever_it_is_taken(fresh: str) -> None:
    """CHECKSUM TABLE reads what lies in the memory of a virtual column: after each FLUSH TABLES something else."""
    execute(
        fresh,
        "CREATE TABLE orders (id INT PRIMARY KEY, t VARCHAR(80), g GEOMETRY, loud VARCHAR(80) AS (upper(t)) VIRTUAL)",
        "INSERT INTO orders (id, t, g) SELECT seq, concat('öl 🐘 ', seq), POINT(seq, 1) FROM seq_1_to_500",
    )
    connection, name = connected(fresh), access(fresh).database
    found = []
    for change in (
        *("FLUSH TABLES",) * 12,
        "UPDATE orders SET g = POINT(1, 2) WHERE id = 7",
        "UPDATE orders SET t = NULL WHERE id = 8",
    ):
        with connection.cursor() as cursor:
            for statement in (change, "BEGIN"):
                cursor.execute(statement)
        found.append(mariadb_facts.checksum(connection, name, "orders"))
        connection.commit()
    connection.close()
    assert len(set(found[:12])) == 1, found
    assert len({found[0], *found[12:]}) == 3, "and it sees what was changed"


def test_a_half_restored_database_is_not_backed_up_as_if_it_were_one(hard: str) -> None:
    execute(hard, f"CREATE TABLE {MARKER} (began_at DATETIME)")
    with pytest.raises(RefusedError, match=f"half restored.*drop its table {MARKER}"):
        part(hard).capture(Memory())
    execute(hard, f"DROP TABLE {MARKER}")
    part(hard).capture(Memory())
