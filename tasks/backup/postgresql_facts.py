"""What a PostgreSQL database holds, to compare a restored copy with: rows and their digests, the schema, extensions, roles."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tasks.backup.postgresql_access import quoted
from tasks.backup.revisions import REVISIONS

if TYPE_CHECKING:
    from psycopg import Connection

DIGEST_BYTES = 1 << 30
"""Content is compared by a sum over its rows' hashes for the smaller tables, so many bytes of them; of the others only the rows."""

_OWN = "n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg\\_%'"
_NOT_OF_EXTENSION = "NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.objid = {} AND d.deptype = 'e')"
_SCHEMA: Mapping[str, str] = {
    "relations": f"SELECT n.nspname, c.relname, c.relkind::text, c.relpersistence::text, c.relrowsecurity, pg_get_userbyid(c.relowner), "
    f"pg_get_partkeydef(c.oid), pg_get_expr(c.relpartbound, c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
    f"WHERE c.relkind IN ('r','p','v','m','S','f') AND {_OWN} AND {_NOT_OF_EXTENSION.format('c.oid')}",
    "columns": f"SELECT n.nspname, c.relname, a.attname, a.attnum, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::text, "
    f"a.attgenerated::text, pg_get_expr(f.adbin, f.adrelid) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
    f"JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_attrdef f ON f.adrelid = c.oid AND f.adnum = a.attnum "
    f"WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r','p','m','f') AND {_OWN} AND {_NOT_OF_EXTENSION.format('c.oid')}",
    "constraints": f"SELECT n.nspname, c.relname, k.conname, pg_get_constraintdef(k.oid) FROM pg_constraint k "
    f"JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {_OWN}",
    "indexes": f"SELECT n.nspname, c.relname, pg_get_indexdef(i.indexrelid) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid "
    f"JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {_OWN}",
    "views": f"SELECT n.nspname, c.relname, pg_get_viewdef(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
    f"WHERE c.relkind IN ('v','m') AND {_OWN} AND {_NOT_OF_EXTENSION.format('c.oid')}",
    "triggers": f"SELECT n.nspname, c.relname, t.tgname, pg_get_triggerdef(t.oid), t.tgenabled::text FROM pg_trigger t "
    f"JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE NOT t.tgisinternal AND {_OWN}",
    "routines": f"SELECT n.nspname, p.proname, p.prokind::text, pg_get_function_identity_arguments(p.oid), "
    f"CASE WHEN p.prokind = 'a' THEN '' ELSE pg_get_functiondef(p.oid) END FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace "
    f"WHERE {_OWN} AND {_NOT_OF_EXTENSION.format('p.oid')}",
    "types": f"SELECT n.nspname, t.typname, t.typtype::text, (SELECT string_agg(e.enumlabel, ',' ORDER BY e.enumsortorder) FROM pg_enum e "
    f"WHERE e.enumtypid = t.oid) FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.typtype IN ('e','d','r') AND {_OWN} "
    f"AND {_NOT_OF_EXTENSION.format('t.oid')}",
    "policies": "SELECT schemaname, tablename, policyname, qual, with_check FROM pg_policies",
}


def tables(connection: Connection[Any]) -> dict[str, dict[str, Any]]:
    """By the quoted name: {"bytes", "kind": "table" | "materialized"}. A partitioned table's rows are in its parts."""
    found = connection.execute(
        "SELECT n.nspname, c.relname, c.relkind::text, pg_table_size(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        f"WHERE c.relkind IN ('r', 'm') AND c.relpersistence = 'p' AND {_OWN} AND {_NOT_OF_EXTENSION.format('c.oid')} "
        "ORDER BY 1, 2"
    ).fetchall()
    return {
        f"{quoted(schema)}.{quoted(name)}": {"bytes": int(size), "kind": "materialized" if kind == "m" else "table"}
        for schema, name, kind, size in found
    }


def schema(connection: Connection[Any]) -> dict[str, Any]:
    """{"sha256", "parts": {"columns": sha256, …}, "counts": {"views": 2, …}}."""
    digests, counts = {}, {}
    for name, statement in _SCHEMA.items():
        found = [tuple(str(value) for value in row) for row in connection.execute(statement)]
        digests[name] = hashlib.sha256(repr(sorted(found)).encode("utf-8", "surrogatepass")).hexdigest()
        counts[name] = len(found)
    return {
        "sha256": hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest(),
        "parts": digests,
        "counts": counts,
    }


def counted(connection: Connection[Any], found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{"rows"} of each table, and "digest", a sum that any changed row changes, whatever their order, for the smaller ones."""
    counts: dict[str, dict[str, Any]] = {}
    total = 0
    for name in sorted(found, key=lambda one: (found[one]["bytes"], one)):
        total += int(found[name]["bytes"])
        only = "ONLY " if found[name]["kind"] == "table" else ""
        what = (
            "count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text"
            if total <= DIGEST_BYTES
            else "count(*), NULL"
        )
        row = connection.execute(f"SELECT {what} FROM {only}{name} t").fetchone()
        assert row is not None
        counts[name] = {"rows": int(row[0]), "kind": found[name]["kind"]} | (
            {} if row[1] is None else {"digest": row[1]}
        )
    return counts


def sequences(connection: Connection[Any]) -> dict[str, Any]:
    """The last value of each sequence, None where it was never asked."""
    return {
        f"{schema}.{name}": value
        for schema, name, value in connection.execute(
            "SELECT schemaname, sequencename, last_value FROM pg_sequences ORDER BY 1, 2"
        )
    }


def large_objects(connection: Connection[Any]) -> int:
    [number] = connection.execute("SELECT count(*) FROM pg_largeobject_metadata").fetchone() or (0,)
    return int(number)


def extensions(connection: Connection[Any]) -> dict[str, str]:
    return dict(
        connection.execute("SELECT extname, extversion FROM pg_extension WHERE extname <> 'plpgsql'").fetchall()
    )


def database(connection: Connection[Any]) -> dict[str, Any]:
    row = connection.execute(
        "SELECT current_database(), pg_encoding_to_char(encoding), datcollate, datctype, pg_get_userbyid(datdba) FROM pg_database "
        "WHERE datname = current_database()"
    ).fetchone()
    assert row is not None
    settings = connection.execute(
        "SELECT unnest(setconfig) FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase "
        "WHERE s.setrole = 0 AND d.datname = current_database()"
    ).fetchall()
    return {
        **dict(zip(("name", "encoding", "collate", "ctype", "owner"), row, strict=True)),
        "settings": sorted(one for (one,) in settings),
    }


def revision(connection: Connection[Any]) -> dict[str, str]:
    """Of tools that change schemas, in the schema `public`."""
    import psycopg

    found = {}
    for table, statement in REVISIONS.items():
        there = connection.execute("SELECT to_regclass(%s)", (f"public.{table}",)).fetchone()
        if there is None or there[0] is None:
            continue
        try:
            with connection.transaction():
                row = connection.execute(statement.replace(f"FROM {table}", f"FROM public.{table}")).fetchone()
        except psycopg.errors.UndefinedColumn:  # a table of that name that is not that tool's
            continue
        if row is not None:
            found[table] = str(row[0])
    return found


_ROLE = re.compile(r"^(?:CREATE|ALTER) ROLE (\"(?:[^\"]|\"\")*\"|[^\s;]+)")


def role_of(statement: str) -> str | None:
    """Whom a line of pg_dumpall makes or alters."""
    found = _ROLE.match(statement)
    if found is None:
        return None
    name = found.group(1)
    return name[1:-1].replace('""', '"') if name.startswith('"') else name
