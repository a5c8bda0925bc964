"""PostgreSQL: dumped by pg_dump in a snapshot that we hold and count in, restored by psql in one transaction, and compared."""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import clock
from registry.errors import ArtifactError, NotFoundError, RefusedError, UnavailableError
from registry.settings import Settings
from tasks.backup import postgresql_facts as facts_of
from tasks.backup import throwaway
from tasks.backup.chain import Program, ProgramError, output, run, version
from tasks.backup.components import Captured, Compared, Sink, Source, Target
from tasks.backup.manifest import Entry
from tasks.backup.postgresql_access import LOCK_SECONDS, Access, access, program, quoted
from tasks.backup.postgresql_dump import DumpText

if TYPE_CHECKING:
    from psycopg import Connection

ROLES = "roles.sql"
TRIES = 3
_AGAIN = ("does not exist", "lock timeout", "could not obtain lock", "deadlock detected", "concurrently")
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Part:
    """One database of a PostgreSQL cluster."""

    name: str
    url: str
    kind: str = "postgresql"

    def capture(self, sink: Sink) -> Captured:
        where = access(self.url)
        for left in reversed(range(TRIES)):
            try:
                with where.translated("failed while it was backed up"):
                    return _attempt(where, sink)
            except ProgramError as error:
                if not left or not any(mark in error.said for mark in _AGAIN):
                    raise
        raise AssertionError("unreachable")


def parts(settings: Settings) -> list[Part]:
    return [
        Part(f"database:{one.name}", one.connection_url())
        for one in settings.databases
        if one.url.startswith("postgresql")
    ]


def _attempt(where: Access, sink: Sink) -> Captured:
    """One dump. Nothing of it is in the component's index unless all of it is right."""
    with contextlib.ExitStack() as stack:
        holder = stack.enter_context(contextlib.closing(where.connect()))
        environment = stack.enter_context(where.environment())
        began = clock.text(clock.now())
        holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        [snapshot, lsn, recovering] = holder.execute(
            "SELECT pg_export_snapshot(), CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END::text, "
            "pg_is_in_recovery()"
        ).fetchone() or ("", "", False)
        found = facts_of.tables(holder)
        facts: dict[str, Any] = {
            "flavour": "postgresql",
            "server": holder.info.parameter_status("server_version"),
            "server_number": holder.info.server_version,
            "database": facts_of.database(holder),
            "schema": facts_of.schema(holder),
            "extensions": facts_of.extensions(holder),
            "sequences": facts_of.sequences(holder),
            "large_objects": facts_of.large_objects(holder),
            "revision": facts_of.revision(holder),
        }
        dump = where.program(
            "pg_dump", environment, "--format=plain", "--no-password", f"--snapshot={snapshot}", "--encoding=UTF8", "--no-tablespaces",
            f"--lock-wait-timeout={LOCK_SECONDS}s",
        )  # fmt: skip
        counting = stack.enter_context(_Counting(where, holder, found))
        text = DumpText(output(dump), found)
        total = sum(int(one["bytes"]) for one in found.values())
        entries = list(_stored(text, sink, total))
        text.finish()
        counts = counting.result()
        _check(where, found, text, counts)
        facts["tables"] = counts
        entries += _roles(where, environment, sink, facts)
        for entry in entries:
            sink.add(entry)
        moment = {"method": "exported-snapshot", "lsn": lsn, "standby": bool(recovering), "began_at": began}
        return Captured(facts, moment, {"pg_dump": version(program("pg_dump")), "postgresql": facts["server"]})


def _stored(text: DumpText, sink: Sink, total: int) -> Iterator[Entry]:
    for number, section in enumerate(text.sections()):
        stream = sink.store(_told(section.pieces, text, sink, total))
        yield Entry(f"{number:06d}.sql", "sql", stream, {} if section.table is None else {"table": section.table})


def _told(pieces: Iterator[bytes], text: DumpText, sink: Sink, total: int) -> Iterator[bytes]:
    for piece in pieces:
        sink.progress(text.bytes, max(total, text.bytes))
        yield piece


class _Counting:
    """Counts in the snapshot that is dumped, while it is dumped."""

    def __init__(self, where: Access, connection: Connection[Any], tables: Mapping[str, Mapping[str, Any]]) -> None:
        self.where, self.connection, self.tables = where, connection, tables
        self._found: dict[str, dict[str, Any]] = {}
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._count, name="modelkeep-count", daemon=True)

    def __enter__(self) -> _Counting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.connection.cancel_safe()  # it may be at a long count that nobody needs any more
        self._thread.join()

    def result(self) -> dict[str, dict[str, Any]]:
        self._thread.join()
        if self._failed is not None:
            raise self.where.failed(self._failed, "could not be counted") from self._failed
        return self._found

    def _count(self) -> None:
        try:
            self._found = facts_of.counted(self.connection, self.tables)
        except Exception as error:  # told by `result`
            self._failed = error


def _check(where: Access, found: Mapping[str, Any], text: DumpText, counts: Mapping[str, Mapping[str, Any]]) -> None:
    for name, one in found.items():
        if one["kind"] == "materialized":  # made anew from its query
            continue
        if name not in text.seen or counts[name]["rows"] != text.rows[name]:
            raise ArtifactError(
                f"the dump of {where.shown} has {text.rows.get(name, 'no')} rows of {name}, and the table had {counts[name]['rows']} at its "
                "moment: the dump is not whole"
            )


def _roles(where: Access, environment: Mapping[str, str], sink: Sink, facts: dict[str, Any]) -> list[Entry]:
    arguments = ("--roles-only", "--no-password", f"--database={where.database}")
    try:
        text = run(where.program("pg_dumpall", environment, *arguments))
        facts["role_passwords"] = True
    except ProgramError:
        try:
            text = run(where.program("pg_dumpall", environment, *arguments, "--no-role-passwords"))
        except ProgramError as error:
            sink.warn(f"roles are not in it: {error}")
            return []
        facts["role_passwords"] = False
        sink.warn("roles are in it without their passwords, which only a superuser may read: set them after a restore")
    return [Entry(ROLES, "roles", sink.store([text]))]


def occupied(target: Target) -> str | None:
    """What stands at the target already, in words."""
    where = access(str(target.url))
    if not _exists(where):
        return None
    with contextlib.closing(where.connect()) as connection:
        return _occupied(connection, target.only)


def restore(source: Source, target: Target) -> dict[str, Any]:
    """The database as it was dumped, in one transaction: all of it or what was there before. Compared by rows, digests, schema.

    `only` (TABLE or SCHEMA.TABLE) brings back tables with their indexes and triggers, by way of a private server. Raises
    RefusedError where there is something already and not `force`, ArtifactError where what arrived is not what was backed up,
    UnavailableError where the server or its client fails.
    """
    where = access(str(target.url))
    with where.translated("failed in a restore"):
        return _restore_tables(source, target, where) if target.only else _restore_all(source, target, where)


def _restore_all(source: Source, target: Target, where: Access) -> dict[str, Any]:
    facts = source.record.facts
    roles = _make_roles(source, where)
    _make_database(where, facts)
    with contextlib.closing(where.connect()) as connection, where.environment() as environment:
        there = _occupied(connection, ())
        if there and not target.force:
            raise RefusedError(
                f"{where.shown} has {there} already: restore to another database, or force it (a safety copy is taken first)"
            )
        first = _clearing(connection) if there else []
        _load(where, environment, _dump_text(source, target, first))
        for setting in facts["database"].get("settings", []):
            name, _, value = str(setting).partition("=")
            if re.fullmatch(r"[A-Za-z_.][\w.]*", name):
                literal = value.replace("'", "''")
                connection.execute(f"ALTER DATABASE {quoted(where.database)} SET {name} TO '{literal}'")
        found = _look(connection)
    if differing := _differences(found, facts):
        raise ArtifactError(f"{where.shown} is not what was backed up: {'; '.join(differing)}")
    total = sum(one["rows"] for one in found["tables"].values())
    return {"tables": len(found["tables"]), "rows": total, **roles}


def verify(source: Source, folder: Path) -> Compared:
    facts = source.record.facts
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(throwaway.postgresql(folder))
        except NotFoundError as error:
            return Compared(unverifiable=f"{error}")
        with contextlib.closing(access(running.url).connect()) as control:
            if control.info.server_version // 10000 < int(facts["server_number"]) // 10000:
                return Compared(
                    unverifiable=f"the dump is of PostgreSQL {facts['server']}, and the one here is older ({running.version}): "
                    "install one that is not"
                )
            offered = {name for (name,) in control.execute("SELECT name FROM pg_available_extensions")}
        if missing := sorted(set(facts["extensions"]) - offered):
            return Compared(unverifiable=f"the PostgreSQL here lacks the extensions {', '.join(missing)}: install them")
        try:
            found = restore(source, Target(url=running.database_url(str(facts["database"]["name"]))))
        except ArtifactError as error:
            return Compared((f"restored into a private server: {error}",))
        except ProgramError as error:
            if not running.blames_the_content(error.said):
                raise
            return Compared((f"restored into a private server: {error}",))
        digests = sum("digest" in one for one in facts["tables"].values())
        failed = found.pop("roles_failed", {})
        checked = {**found, "digests": digests, **facts["schema"]["counts"], "revision": facts.get("revision", {})}
        return Compared(tuple(f"role {name}: {why}" for name, why in failed.items()), checked)


def _load(where: Access, environment: Mapping[str, str], pieces: Iterator[bytes]) -> None:
    psql = where.program(
        "psql", environment, "--no-psqlrc", "--quiet", "--no-password", "--single-transaction", "--set=ON_ERROR_STOP=1", "--output=/dev/null",
        "--file=-",
    )  # fmt: skip
    for _ in output(psql, pieces):
        pass


def _dump_text(source: Source, target: Target, first: list[str]) -> Iterator[bytes]:
    sections = sorted((one for one in source.entries() if one.kind == "sql"), key=lambda one: one.name)
    if not sections:
        raise ArtifactError(f"{source.record.name} has no dump in this backup")
    total = sum(one.stream.size_bytes for one in sections if one.stream)

    def pieces() -> Iterator[bytes]:
        yield ("".join(f"{statement};\n" for statement in first)).encode()
        done = 0
        for section in sections:
            for piece in source.open(section.stream) if section.stream else ():
                done += len(piece)
                target.progress(done, total)
                yield piece

    return pieces()


def _restore_tables(source: Source, target: Target, where: Access) -> dict[str, Any]:
    """Single tables. pg_dump's text names no table at an index or a trigger, so the dump is restored privately first."""
    names = [name if "." in name else f"public.{name}" for name in target.only]
    wanted = [".".join(quoted(part) for part in name.split(".", 1)) for name in names]
    if missing := sorted(set(wanted) - set(source.record.facts["tables"])):
        raise NotFoundError(f"{', '.join(missing)}: not in this backup of {source.record.name}")
    _make_database(where, source.record.facts)
    with contextlib.closing(where.connect()) as connection:
        there = _occupied(connection, tuple(target.only))
    if there and not target.force:
        raise RefusedError(f"{where.shown} has {there} already: force it to replace them")
    with (
        tempfile.TemporaryDirectory(prefix="modelkeep-table-") as folder,
        throwaway.postgresql(Path(folder)) as running,
    ):
        copy = access(running.database_url(str(source.record.facts["database"]["name"])))
        restore(source, Target(url=running.database_url(copy.database), progress=target.progress))
        with copy.environment() as here, where.environment() as environment:
            clean = ("--clean", "--if-exists") if there else ()
            dump: Program = copy.program(
                "pg_dump", here, "--format=plain", *clean, *(f"--table={name}" for name in wanted)
            )
            _load(where, environment, output(dump))
    with contextlib.closing(where.connect()) as connection:
        tables = facts_of.tables(connection)
        found = facts_of.counted(connection, {name: tables[name] for name in wanted if name in tables})
    due = {name: source.record.facts["tables"][name] for name in wanted}
    if differing := _differing_tables(found, due):
        raise ArtifactError(f"{where.shown} is not what was backed up: {'; '.join(differing)}")
    return {"tables": len(found), "rows": sum(one["rows"] for one in found.values())}


def _exists(where: Access) -> bool:
    with contextlib.closing(_maintenance(where)) as connection:
        found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (where.database,)).fetchone()
    return found is not None


def _maintenance(where: Access) -> Connection[Any]:
    """A connection to the cluster, whose database may not be there yet."""
    try:
        return where.at("postgres").connect()
    except UnavailableError:  # an account may be shut out of that one
        return where.connect()


def _make_database(where: Access, facts: Mapping[str, Any]) -> None:
    import psycopg

    if _exists(where):
        return
    kept = {name: str(facts["database"][name]).replace("'", "''") for name in ("encoding", "collate", "ctype")}
    create = f"CREATE DATABASE {quoted(where.database)} TEMPLATE template0 ENCODING '{kept['encoding']}'"
    with contextlib.closing(_maintenance(where)) as connection:
        try:
            connection.execute(f"{create} LC_COLLATE '{kept['collate']}' LC_CTYPE '{kept['ctype']}'")
        except (
            psycopg.errors.WrongObjectType,
            psycopg.errors.InvalidParameterValue,
        ):  # a locale that is not installed here
            connection.execute(create)


def _occupied(connection: Connection[Any], only: tuple[str, ...]) -> str | None:
    there = facts_of.tables(connection)
    if only:
        wanted = {
            ".".join(quoted(part) for part in (name if "." in name else f"public.{name}").split(".", 1))
            for name in only
        }
        hit = sorted(wanted & set(there))
        return f"the tables {', '.join(hit)}" if hit else None
    counts = facts_of.schema(connection)["counts"]
    shown = [f"{counts[kind]} {kind}" for kind in ("relations", "routines", "types") if counts[kind]]
    return ", ".join(shown) or None


def _clearing(connection: Connection[Any]) -> list[str]:
    """What takes everything away that is there, inside of the transaction that brings the rest."""
    schemas = connection.execute(
        "SELECT nspname FROM pg_namespace WHERE nspname NOT IN ('pg_catalog', 'information_schema') AND nspname NOT LIKE 'pg\\_%'"
    )
    statements = [f"DROP SCHEMA {quoted(name)} CASCADE" for (name,) in schemas]
    statements += [
        f"DROP EVENT TRIGGER IF EXISTS {quoted(name)}"
        for (name,) in connection.execute("SELECT evtname FROM pg_event_trigger")
    ]
    statements.append("SELECT lo_unlink(oid) FROM pg_largeobject_metadata")
    statements += ["CREATE SCHEMA public AUTHORIZATION pg_database_owner", "GRANT USAGE ON SCHEMA public TO PUBLIC"]
    return statements


def _make_roles(source: Source, where: Access) -> dict[str, Any]:
    """Roles that are not there yet, with their memberships. Who is there keeps password and rights."""
    import psycopg

    entry = next((one for one in source.entries() if one.kind == "roles"), None)
    if entry is None or entry.stream is None:
        return {}
    statements = [line for line in b"".join(source.open(entry.stream)).decode().splitlines() if line.endswith(";")]
    made: set[str] = set()
    failed: dict[str, str] = {}
    with contextlib.closing(_maintenance(where)) as connection:
        there = {name for (name,) in connection.execute("SELECT rolname FROM pg_roles")}
        for statement in statements:
            name = facts_of.role_of(statement)
            member = re.match(r'GRANT .* TO ("(?:[^"]|"")*"|[^\s;]+)', statement)
            if name is None and member is not None:
                name = member.group(1).strip('"').replace('""', '"')
            if name is None or name in there or name in failed:
                continue
            try:
                connection.execute(statement.encode())
            except psycopg.Error as error:
                failed[name] = f"{statement.split(' ', 1)[0]} failed ({error.sqlstate})"
                continue
            made.add(name)
    return {"roles": len(made), "roles_failed": failed}


def _look(connection: Connection[Any]) -> dict[str, Any]:
    return {
        "tables": facts_of.counted(connection, facts_of.tables(connection)),
        "schema": facts_of.schema(connection),
        "extensions": facts_of.extensions(connection),
        "sequences": facts_of.sequences(connection),
        "large_objects": facts_of.large_objects(connection),
        "revision": facts_of.revision(connection),
        "server_number": connection.info.server_version,
    }


def _differing_tables(found: Mapping[str, Mapping[str, Any]], due: Mapping[str, Mapping[str, Any]]) -> list[str]:
    said = [f"table {name} is not of the backup" for name in sorted(set(found) - set(due))]
    for name, one in due.items():
        if name not in found:
            said.append(f"table {name} is missing")
            continue
        said += [
            f"{name}: {field} {found[name].get(field)}, not {one[field]}"
            for field in ("rows", "digest")
            if field in one and field in found[name] and found[name][field] != one[field]
        ]
    return said


def _differences(found: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    said = _differing_tables(found["tables"], facts["tables"])
    for name in ("sequences", "large_objects", "revision"):
        if found[name] != facts[name]:
            said.append(f"{name}: {found[name]}, not {facts[name]}")
    said += [f"extension {name} is missing" for name in sorted(set(facts["extensions"]) - set(found["extensions"]))]
    counts, due = found["schema"]["counts"], facts["schema"]["counts"]
    said += [f"{kind}: {counts.get(kind)}, not {number}" for kind, number in due.items() if counts.get(kind) != number]
    if (
        found["server_number"] // 10000 == int(facts["server_number"]) // 10000
    ):  # another release may word them otherwise
        there, wanted = found["schema"]["parts"], facts["schema"]["parts"]
        said += [f"the schema's {kind} differ" for kind, digest in wanted.items() if there.get(kind) != digest]
    return said[:_SHOWN]
