"""What a MariaDB or MySQL database holds, to compare a restored copy with: rows, checksums, the schema's digest; and who may do what."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from registry.errors import RefusedError
from tasks.backup.mariadb_access import MARIADB, Server, quoted, rows
from tasks.backup.revisions import REVISIONS

if TYPE_CHECKING:
    from pymysql.connections import Connection

CHECKSUM_BYTES = 256 << 20
"""Content is compared by CHECKSUM TABLE for the smaller tables, so many bytes of them; of the others only the rows."""
TRANSACTIONAL = frozenset({"InnoDB", "RocksDB", "SEQUENCE"})
MARKER, TABLES_MARKER = "modelkeep_restore_under_way", "modelkeep_tables_under_way"
MARKERS = frozenset({MARKER, TABLES_MARKER})
"""Tables that stand in a database while it, or some tables of it, are brought back: what has one is a half."""
_NEEDED = ("SELECT", "SHOW VIEW", "TRIGGER", "EVENT")
_SYSTEM_USERS = frozenset({"mariadb.sys", "mysql.sys", "mysql.session", "mysql.infoschema", "root", ""})

_SCHEMA: Mapping[str, str] = {
    "tables": "SELECT table_name, table_type, engine, table_collation FROM information_schema.tables WHERE table_schema = %s",
    "columns": "SELECT table_name, column_name, ordinal_position, column_default, is_nullable, column_type, collation_name, extra, "
    "generation_expression FROM information_schema.columns WHERE table_schema = %s",
    "indexes": "SELECT table_name, index_name, seq_in_index, column_name, non_unique, sub_part, index_type "
    "FROM information_schema.statistics WHERE table_schema = %s",
    "foreign_keys": "SELECT k.table_name, k.constraint_name, k.ordinal_position, k.column_name, k.referenced_table_name, "
    "k.referenced_column_name, r.update_rule, r.delete_rule FROM information_schema.key_column_usage k "
    "JOIN information_schema.referential_constraints r ON r.constraint_schema = k.constraint_schema "
    "AND r.constraint_name = k.constraint_name AND r.table_name = k.table_name WHERE k.table_schema = %s",
    "views": "SELECT table_name, view_definition, definer, security_type FROM information_schema.views WHERE table_schema = %s",
    "triggers": "SELECT trigger_name, event_object_table, action_timing, event_manipulation, action_statement, definer, sql_mode "
    "FROM information_schema.triggers WHERE trigger_schema = %s",
    "routines": "SELECT routine_name, routine_type, routine_definition, definer, sql_mode, dtd_identifier, security_type "
    "FROM information_schema.routines WHERE routine_schema = %s",
    "parameters": "SELECT specific_name, ordinal_position, parameter_mode, parameter_name, dtd_identifier "
    "FROM information_schema.parameters WHERE specific_schema = %s",
    "events": "SELECT event_name, event_definition, definer, interval_value, interval_field, status, sql_mode "
    "FROM information_schema.events WHERE event_schema = %s",
}


def tables(connection: Connection[Any], database: str) -> dict[str, dict[str, Any]]:
    """By name: {"engine", "kind": "table" | "sequence" | "versioned", "bytes"}. Views are no tables."""
    found = rows(
        connection,
        "SELECT table_name, table_type, engine, coalesce(data_length, 0) FROM information_schema.tables WHERE table_schema = %s "
        "AND table_type <> 'VIEW' ORDER BY table_name",
        (database,),
    )
    kinds = {"SEQUENCE": "sequence", "SYSTEM VERSIONED": "versioned"}
    return {
        str(name): {"engine": engine, "kind": kinds.get(str(kind).upper(), "table"), "bytes": int(size)}
        for name, kind, engine, size in found
        if name not in MARKERS
    }


def schema(connection: Connection[Any], database: str) -> dict[str, Any]:
    """{"sha256", "parts": {"columns": sha256, …}, "counts": {"views": 2, …}}: the same for the same schema, wherever it lies."""
    digests, counts = {}, {}
    for name, statement in _SCHEMA.items():
        found = [_plain(row, database) for row in rows(connection, statement, (database,)) if row[0] not in MARKERS]
        digests[name] = hashlib.sha256(repr(sorted(found)).encode("utf-8", "surrogatepass")).hexdigest()
        counts[name] = len(found)
    counts["views"] = len(rows(connection, _SCHEMA["views"], (database,)))
    whole = hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
    return {"sha256": whole, "parts": digests, "counts": counts}


def _plain(row: tuple[Any, ...], database: str) -> tuple[str, ...]:
    """Names of the database itself and spaces at the ends of bodies differ between a database and its copy, and mean nothing."""
    return tuple(str(value).replace(f"{quoted(database)}.", "").strip() for value in row)


def moving(connection: Connection[Any], database: str) -> str:
    """A digest that changes with any DDL in the database: taken before and after a dump."""
    return str(schema(connection, database)["sha256"])


def database_facts(connection: Connection[Any], database: str, server: Server) -> dict[str, Any]:
    [(charset, collation)] = rows(
        connection,
        "SELECT default_character_set_name, default_collation_name FROM information_schema.schemata WHERE schema_name = %s",
        (database,),
    )
    found = schema(connection, database)
    return {
        "flavour": server.flavour,
        "server": server.version,
        "database": database,
        "charset": charset,
        "collation": collation,
        "schema": found,
    }


def counted(connection: Connection[Any], database: str, table: str) -> int:
    """Rows of a table, in the transaction of the connection; DDL waits no longer for us than this takes."""
    with connection.cursor() as cursor:
        cursor.execute("SAVEPOINT modelkeep")
        cursor.execute(f"SELECT count(*) FROM {quoted(database)}.{quoted(table)}")
        (number,) = cursor.fetchone() or (0,)
        cursor.execute("ROLLBACK TO SAVEPOINT modelkeep")
    return int(number)


def checksum(connection: Connection[Any], database: str, table: str) -> int | None:
    """Of the content in the transaction of the connection, whatever the order of its rows: CHECKSUM TABLE, or our own where the
    table has virtual columns, of which CHECKSUM TABLE reads whatever lies in the server's memory.
    """
    columns = rows(
        connection,
        "SELECT column_name, extra FROM information_schema.columns WHERE table_schema = %s AND table_name = %s ORDER BY ordinal_position",
        (database, table),
    )
    statement, place = f"CHECKSUM TABLE {quoted(database)}.{quoted(table)}", 1
    if any("VIRTUAL" in str(extra).upper() for _, extra in columns):
        real = [quoted(str(name)) for name, extra in columns if "VIRTUAL" not in str(extra).upper()]
        each = ", ".join(f"ifnull(crc32({name}), 'N')" for name in real) or "''"
        statement = f"SELECT coalesce(sum(crc32(concat_ws(',', {each}))), 0) FROM {quoted(database)}.{quoted(table)}"
        place = 0
    with connection.cursor() as cursor:
        cursor.execute("SAVEPOINT modelkeep")
        cursor.execute(statement)
        row = cursor.fetchone()
        cursor.execute("ROLLBACK TO SAVEPOINT modelkeep")
    return None if row is None or row[place] is None else int(row[place])


def checksummed(found: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The tables whose content is compared: the smallest, together CHECKSUM_BYTES at most. Sequences are read by their value."""
    chosen, total = set(), 0
    for name in sorted(
        (one for one in found if found[one]["kind"] == "table"), key=lambda one: (found[one]["bytes"], one)
    ):
        total += int(found[name]["bytes"])
        if total > CHECKSUM_BYTES:
            break
        chosen.add(name)
    return chosen


def auto_increments(connection: Connection[Any], database: str) -> dict[str, int]:
    """The next value of each table that has one. Read from the tables' text: information_schema keeps old figures."""
    found = rows(
        connection,
        "SELECT table_name FROM information_schema.columns WHERE table_schema = %s AND extra LIKE '%%auto_increment%%'",
        (database,),
    )
    values = {}
    for (name,) in found:
        text = str(rows(connection, f"SHOW CREATE TABLE {quoted(database)}.{quoted(name)}")[0][1])
        tail = text.rpartition("\n)")[2]
        match = re.search(r"AUTO_INCREMENT=(\d+)", tail)
        values[str(name)] = int(match.group(1)) if match else 1
    return values


def revision(connection: Connection[Any], database: str, names: Mapping[str, Any]) -> dict[str, str]:
    import pymysql

    found: dict[str, str] = {}
    for table, statement in REVISIONS.items():
        if table not in names:
            continue
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement.replace(f"FROM {table}", f"FROM {quoted(database)}.{table}"))
                row = cursor.fetchone()
        except pymysql.err.OperationalError as error:
            if error.args[0] != 1054:  # a table of that name that is not that tool's: it has other columns
                raise
            continue
        if row is not None:
            found[table] = str(row[0])
    return found


def definers(connection: Connection[Any], database: str) -> list[str]:
    """Whom views, triggers, routines and events name as theirs: "user@host"."""
    found: set[str] = set()
    for name in ("views", "triggers", "routines", "events"):
        column = {
            "views": "table_schema",
            "triggers": "trigger_schema",
            "routines": "routine_schema",
            "events": "event_schema",
        }[name]
        statement = f"SELECT definer FROM information_schema.{name} WHERE {column} = %s"
        found |= {str(one) for (one,) in rows(connection, statement, (database,)) if one}
    return sorted(found)


def check_privileges(connection: Connection[Any], database: str, shown: str) -> None:
    """Raises RefusedError where the user cannot see all of the database: what it does not see would silently not be dumped."""
    missing = set(_NEEDED)
    for (line,) in rows(connection, "SHOW GRANTS"):
        found = re.match(r"GRANT (.*?) ON (?:TABLE )?(\*|`(?:[^`]|``)*`)\.\* TO ", str(line))
        if found is None:
            continue
        place = found.group(2)
        if place != "*" and not _fits(place[1:-1].replace("``", "`"), database):
            continue
        words = {word.strip() for word in found.group(1).split(",")}
        missing -= set(_NEEDED) if "ALL PRIVILEGES" in words or "ALL" in words else words
    if missing:
        raise RefusedError(
            f"the user of {shown} lacks {', '.join(sorted(missing))}: what it cannot see would be missing in the dump; "
            f"GRANT {', '.join(_NEEDED)}, LOCK TABLES ON {quoted(database)}.* to it (and RELOAD ON *.* for a short lock)"
        )
    hidden = rows(
        connection,
        "SELECT routine_name FROM information_schema.routines WHERE routine_schema = %s AND routine_definition IS NULL",
        (database,),
    )
    if hidden:
        raise RefusedError(
            f"the user of {shown} cannot see the body of {len(hidden)} routines ({hidden[0][0]} …): GRANT SELECT ON mysql.proc to it"
        )


def _fits(pattern: str, name: str) -> bool:
    """A database of a grant, where _ and % stand for letters unless a backslash is before them."""
    expression = ""
    letters = iter(pattern)
    for letter in letters:
        if letter == "\\":
            expression += re.escape(next(letters, "\\"))
        else:
            expression += {"_": ".", "%": ".*"}.get(letter, re.escape(letter))
    return re.fullmatch(expression, name, re.DOTALL) is not None


def accounts(connection: Connection[Any], server: Server) -> list[dict[str, Any]]:
    """Roles and users with the statements that make them: [{"name": "`a`@`%`", "role": False, "create": […], "grants": […]}].

    Their passwords are in it as hashes. Raises pymysql's errors where we may not read them.
    """
    columns = "user, host, is_role" if server.flavour == MARIADB else "user, host, 'N'"
    found = []
    for user, host, is_role in rows(connection, f"SELECT {columns} FROM mysql.user ORDER BY 3 DESC, 1, 2"):
        name, place, role = _text(user), _text(host), _text(is_role) == "Y"
        if name in _SYSTEM_USERS:
            continue
        shown = quoted(name) if role else f"{quoted(name)}@{quoted(place)}"
        create = (
            [f"CREATE ROLE IF NOT EXISTS {shown}"]
            if role
            else [
                str(one[0]).replace("CREATE USER ", "CREATE USER IF NOT EXISTS ", 1)
                for one in rows(connection, f"SHOW CREATE USER {shown}")
            ]
        )
        grants = [str(one[0]) for one in rows(connection, f"SHOW GRANTS FOR {shown}")]
        found.append({"name": shown, "role": role, "create": create, "grants": grants})
    return found


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
