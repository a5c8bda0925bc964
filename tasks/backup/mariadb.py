"""MariaDB and MySQL: dumped by their own program and counted in the same moment, restored by their own client, and compared."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import clock
from registry.errors import ArtifactError, NotFoundError, RefusedError
from registry.settings import Settings
from tasks.backup import throwaway
from tasks.backup.chain import Program, ProgramError, output, version
from tasks.backup.components import Captured, Compared, Sink, Source, Target
from tasks.backup.manifest import Entry
from tasks.backup.mariadb_access import (
    MARIADB,
    MYSQL,
    PACKET,
    Access,
    Server,
    access,
    client,
    dumper,
    quoted,
    rows,
    server,
)
from tasks.backup.mariadb_dump import DumpText
from tasks.backup.mariadb_facts import (
    MARKER,
    MARKERS,
    TABLES_MARKER,
    accounts,
    auto_increments,
    check_privileges,
    checksum,
    counted,
    database_facts,
    definers,
    moving,
    revision,
    schema,
    tables,
)
from tasks.backup.mariadb_snapshot import MovedError, Snapshot

if TYPE_CHECKING:
    from pymysql.connections import Connection

ACCOUNTS = "accounts.jsonl"
TRIES = 3
_AGAIN = re.compile(r"\b(?:1412|1146|1213|1205|1356|1051)\b")
"""A table that was changed or went away, a deadlock, a lock that was not to be had, a view of what is no more."""
DUMP_SILENT_SECONDS = 600.0
"""A dump that gives no byte for so long waits for a lock that somebody holds."""
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Part:
    """One database of a MariaDB or MySQL server."""

    name: str
    url: str
    kind: str = "mariadb"

    def capture(self, sink: Sink) -> Captured:
        where = access(self.url)
        for left in reversed(range(TRIES)):
            try:
                with where.translated("failed while it was backed up"):
                    return _attempt(where, sink)
            except (MovedError, ProgramError) as error:
                again = isinstance(error, MovedError) or _AGAIN.search(error.said) is not None
                if not left or not again:
                    raise
        raise AssertionError("unreachable")


def parts(settings: Settings) -> list[Part]:
    return [
        Part(f"database:{one.name}", one.connection_url()) for one in settings.databases if one.url.startswith("mysql")
    ]


def _refuse_half(control: Connection[Any], where: Access) -> None:
    """A backup of it would verify, and push better ones out. Raises RefusedError."""
    listed = rows(
        control, "SELECT table_name FROM information_schema.tables WHERE table_schema = %s", (where.database,)
    )
    if marks := sorted({str(one) for (one,) in listed} & MARKERS):
        raise RefusedError(
            f"{where.shown} is half restored: repeat the recovery that was cut off; where what is there is good as it is, drop its table {marks[0]}"
        )


def _attempt(where: Access, sink: Sink) -> Captured:
    """One dump. Nothing of it is in the component's index unless all of it is right."""
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(_closing(where.connect()))
        host = server(control)
        check_privileges(control, where.database, where.shown)
        _refuse_half(control, where)
        before, found = moving(control, where.database), tables(control, where.database)
        program = dumper(host.flavour)
        options = stack.enter_context(where.option_file())
        for name in (name for name, one in found.items() if one["kind"] == "versioned"):
            sink.warn(f"table {name} keeps its history (system versioning): the dump has its present rows only")
        snapshot = stack.enter_context(Snapshot(where, host, found, sink.warn))
        began = clock.text(clock.now())
        text = DumpText(snapshot.start(lambda: output(_dump_program(where, program, options))), found)
        total = sum(int(one["bytes"]) for one in found.values())
        entries = list(_stored(text, sink, total))
        text.finish()
        counts = snapshot.counts()
        with _closing(where.connect()) as look:  # a new one: the first may have been idle for longer than servers like
            facts = database_facts(look, where.database, host)
            if facts["schema"]["sha256"] != before:
                raise MovedError(
                    f"the schema of {where.shown} was changed while it was dumped, {TRIES} times: back up when no migration runs"
                )
            increments = auto_increments(look, where.database)
            facts["revision"] = revision(look, where.database, found)
            facts["definers"] = definers(look, where.database)
            facts["lower_case_table_names"] = int(rows(look, "SELECT @@lower_case_table_names")[0][0])
            entries += _accounts(look, host, sink, facts)
        facts["tables"] = _checked_counts(where, found, text, counts, increments)
        for entry in entries:
            sink.add(entry)
        return Captured(
            facts, {**snapshot.facts, "began_at": began, "isolation": "REPEATABLE READ"}, {program.name: version(program), host.flavour: host.version}
        )  # fmt: skip


def _dump_program(where: Access, program: Path, options: Path) -> Program:
    arguments = [
        "--single-transaction", "--quick", "--routines", "--triggers", "--events", "--hex-blob", "--default-character-set=utf8mb4",
        "--tz-utc", "--no-tablespaces", "--skip-dump-date", f"--max-allowed-packet={PACKET}", "--skip-lock-tables", "--", where.database,
    ]  # fmt: skip
    return where.program(program, options, *arguments, silent_seconds=DUMP_SILENT_SECONDS)


def _stored(text: DumpText, sink: Sink, total: int) -> Iterator[Entry]:
    for number, section in enumerate(text.sections()):
        stream = sink.store(_told(section.pieces, text, sink, total))
        yield Entry(f"{number:06d}.sql", "sql", stream, {} if section.table is None else {"table": section.table})


def _told(pieces: Iterator[bytes], text: DumpText, sink: Sink, total: int) -> Iterator[bytes]:
    for piece in pieces:
        sink.progress(text.bytes, max(total, text.bytes))
        yield piece


def _checked_counts(
    where: Access,
    found: Mapping[str, Mapping[str, Any]],
    text: DumpText,
    counts: Mapping[str, Mapping[str, Any]] | None,
    increments: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """The facts of each table. Raises ArtifactError where the dump's text lacks a table, or rows that its moment had."""
    if missing := sorted(set(found) - text.seen):
        raise MovedError(f"the dump of {where.shown} lacks {', '.join(missing[:5])}: they went while it was made")
    facts: dict[str, dict[str, Any]] = {}
    for name, one in found.items():
        facts[name] = {"engine": one["engine"], "kind": one["kind"]}
        if one["kind"] == "sequence":
            continue
        facts[name]["rows"] = text.rows[name]
        if name in increments:
            facts[name]["auto_increment"] = increments[name]
        if counts is None:
            continue
        if counts[name]["rows"] != text.rows[name]:
            raise ArtifactError(
                f"the dump of {where.shown} has {text.rows[name]} rows of {name}, and the table had {counts[name]['rows']} at its "
                "moment: the dump is not whole"
            )
        if counts[name].get("checksum") is not None:
            facts[name]["checksum"] = counts[name]["checksum"]
    return facts


def _accounts(connection: Connection[Any], host: Any, sink: Sink, facts: dict[str, Any]) -> list[Entry]:
    import pymysql

    try:
        found = accounts(connection, host)
    except (pymysql.err.OperationalError, pymysql.err.ProgrammingError) as error:
        sink.warn(
            f"users and their grants are not in it: the user may not read them ({error.args[0]}); GRANT SELECT ON mysql.*"
        )
        return []
    facts["accounts"] = len(found)
    stream = sink.store([(json.dumps(one, sort_keys=True) + "\n").encode() for one in found])
    return [Entry(ACCOUNTS, "accounts", stream)]


def occupied(target: Target) -> str | None:
    """What stands at the target already, in words."""
    where = access(str(target.url))
    with _closing(where.connect(database=False)) as connection:
        return _occupied(connection, where.database, target.only)


def restore(source: Source, target: Target) -> dict[str, Any]:
    """The database as it was dumped, compared by rows, checksums and schema; with `only`, these tables beside what is there.

    While it runs, and after a kill, the database has a table `modelkeep_restore_under_way`: the next call then starts over.
    Raises RefusedError where there is something already and not `force`, or where the server is of another flavour,
    ArtifactError where what arrived is not what was backed up, UnavailableError where the server or its client fails.
    """
    facts, where = source.record.facts, access(str(target.url))
    with (
        where.translated("failed in a restore"),
        _closing(where.connect(database=False)) as control,
        where.option_file() as options,
    ):
        host = server(control)
        if facts.get("flavour", host.flavour) != host.flavour:
            raise RefusedError(
                f"{where.shown} is a {host.flavour}, and the backup is of a {facts['flavour']}: their dumps do not fit each other; "
                "restore to a server of its own kind"
            )
        fed = _dump_text(source, target)
        marker = _make_room(control, where, facts, target)
        people = None if target.only else _Accounts(source, control)
        if people is not None:
            people.make()
        program = where.program(client(host.flavour), options, *_client_arguments(where.database, host.flavour))
        for _ in output(program, fed):
            pass
        found = _look(control, where.database, host, facts, target.only)
        if differing := _differences(found, facts, target.only, same_version=host.version == facts.get("server")):
            raise ArtifactError(f"{where.shown} is not what was backed up: {'; '.join(differing)}")
        made = {} if people is None else people.finish()
        rows(control, f"DROP TABLE {quoted(where.database)}.{quoted(marker)}")
    total = sum(one.get("rows", 0) for one in found["tables"].values())
    return {"tables": len(found["tables"]), "rows": total, **made}


def verify(source: Source, folder: Path) -> Compared:
    facts = source.record.facts
    if facts.get("flavour") == MYSQL:
        return Compared(
            unverifiable="a MySQL's dump is verified by MySQL's own server only, and this release starts none: it stays complete"
        )
    lower = int(facts.get("lower_case_table_names", 0))
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(
                throwaway.mariadb(folder, options=[f"--lower-case-table-names={lower}"] if lower else [])
            )
        except NotFoundError as error:
            return Compared(unverifiable=f"{error}")
        where = access(running.database_url(str(facts["database"])))
        with _closing(where.connect(database=False)) as control:
            host = server(control)
            if Server(MARIADB, str(facts["server"])).number > host.number:
                return Compared(
                    unverifiable=f"the dump is of {facts['server']}, and the server here is older ({host.version}): "
                    "install one that is not"
                )
            if not facts.get("accounts"):
                make_definers(control, facts)
        try:
            found = restore(source, Target(url=running.database_url(str(facts["database"]))))
        except ArtifactError as error:
            return Compared((f"restored into a private server: {error}",))
        except ProgramError as error:
            if not running.blames_the_content(error.said):
                raise
            return Compared((f"restored into a private server: {error}",))
        content = sum("checksum" in one for one in facts["tables"].values())
        checked = {**found, "checksums": content, **facts["schema"]["counts"], "revision": facts.get("revision", {})}
        failed = found.get("accounts_failed", {})
        return Compared(tuple(f"account {name}: {why}" for name, why in failed.items()), checked)


def _make_room(control: Connection[Any], where: Access, facts: Mapping[str, Any], target: Target) -> str:
    """An empty database; with `only`, the one that is there. Returns the name of the table that marks it as a half."""
    name = quoted(where.database)
    listed = rows(
        control, "SELECT table_name FROM information_schema.tables WHERE table_schema = %s", (where.database,)
    )
    marks = {str(one) for (one,) in listed} & MARKERS
    if target.only and MARKER in marks:
        raise RefusedError(f"{where.shown} is half restored: restore all of it first")
    marker = TABLES_MARKER if target.only else MARKER
    there = _occupied(control, where.database, target.only)
    if there and not target.force and marker not in marks:
        raise RefusedError(
            f"{where.shown} has {there} already: restore to another database, or force it (a safety copy is taken first)"
        )
    charset, collation = (re.sub(r"\W", "", str(facts[field])) for field in ("charset", "collation"))
    create = f"CREATE DATABASE IF NOT EXISTS {name} CHARACTER SET {charset} COLLATE {collation}"
    mark = f"CREATE TABLE IF NOT EXISTS {name}.{quoted(marker)} (began_at DATETIME) ENGINE=InnoDB"
    rows(control, create)
    rows(control, mark)  # before anything goes, so that a half is known as one
    if not target.only and (there or marks):
        rows(control, f"DROP DATABASE {name}")
        rows(control, create)
        rows(control, mark)
    return marker


def _occupied(connection: Connection[Any], database: str, only: tuple[str, ...]) -> str | None:
    there = rows(connection, "SELECT table_name FROM information_schema.tables WHERE table_schema = %s", (database,))
    names = {str(name) for (name,) in there if name not in MARKERS}
    if only:
        hit = sorted(names & set(only))
        return f"the tables {', '.join(hit)}" if hit else None
    counts = {"tables and views": len(names)}
    for kind, column in (("routines", "routine_schema"), ("events", "event_schema")):
        counts[kind] = int(
            rows(connection, f"SELECT count(*) FROM information_schema.{kind} WHERE {column} = %s", (database,))[0][0]
        )
    shown = [f"{number} {kind}" for kind, number in counts.items() if number]
    return ", ".join(shown) or None


def _client_arguments(database: str, flavour: str) -> list[str]:
    # Without --comments the client takes the comments out of routines; --binary-mode keeps \r\n in them, and runs no command
    # of the client that a dump might hold.
    words = [
        "--batch",
        "--binary-mode",
        "--comments",
        "--default-character-set=utf8mb4",
        f"--max-allowed-packet={PACKET}",
    ]
    return [*words, *(["--loose-sandbox"] if flavour == MARIADB else []), f"--database={database}"]


def _dump_text(source: Source, target: Target) -> Iterator[bytes]:
    """The dump's sections in order. Raises NotFoundError for a table that is not in it, before anything is sent."""
    sections = sorted((one for one in source.entries() if one.kind == "sql"), key=lambda one: one.name)
    if not sections:
        raise ArtifactError(f"{source.record.name} has no dump in this backup")
    if target.only:
        there = {str(one.facts["table"]) for one in sections if "table" in one.facts}
        if missing := sorted(set(target.only) - there):
            raise NotFoundError(f"{', '.join(missing)}: not in this backup of {source.record.name}")
        sections = [sections[0], *(one for one in sections[1:] if one.facts.get("table") in target.only)]
    total = sum(one.stream.size_bytes for one in sections if one.stream)

    def pieces() -> Iterator[bytes]:
        done = 0
        for section in sections:
            for piece in source.open(section.stream) if section.stream else ():
                done += len(piece)
                target.progress(done, total)
                yield piece
        yield b"\n"

    return pieces()


def _look(
    connection: Connection[Any], database: str, host: Any, facts: Mapping[str, Any], only: tuple[str, ...]
) -> dict[str, Any]:
    """The restored database, in the words of the facts of its backup."""
    there = tables(connection, database)
    rows(connection, "START TRANSACTION")  # for the savepoints of a count
    found: dict[str, Any] = {"tables": {}, "schema": schema(connection, database)}
    for name, due in facts["tables"].items():
        if name not in there or (only and name not in only):
            continue
        one: dict[str, Any] = {"kind": there[name]["kind"], "engine": there[name]["engine"]}
        if due["kind"] != "sequence":
            one["rows"] = counted(connection, database, name)
            if "checksum" in due:
                one["checksum"] = checksum(connection, database, name)
        found["tables"][name] = one
    rows(connection, "COMMIT")
    increments = auto_increments(connection, database)
    for name, one in found["tables"].items():
        if "auto_increment" in facts["tables"][name]:
            one["auto_increment"] = increments.get(name)
    if not only:
        found["revision"] = revision(connection, database, there)
    return found


def _differences(
    found: Mapping[str, Any], facts: Mapping[str, Any], only: tuple[str, ...], *, same_version: bool
) -> list[str]:
    said = []
    for name, due in facts["tables"].items():
        if only and name not in only:
            continue
        one = found["tables"].get(name)
        if one is None:
            said.append(f"table {name} is missing")
            continue
        said += [
            f"{name}: {field} {one.get(field)}, not {due[field]}"
            for field in ("rows", "checksum", "engine")
            # Another release may lay out its rows, and so their checksums, otherwise.
            if field in due and one.get(field) != due[field] and (field != "checksum" or same_version)
        ]
    if only:
        return said[:_SHOWN]
    counts, due_counts = found["schema"]["counts"], facts["schema"]["counts"]
    said += [f"{kind}: {counts.get(kind)}, not {due}" for kind, due in due_counts.items() if counts.get(kind) != due]
    if same_version:
        parts_found, parts_due = found["schema"]["parts"], facts["schema"]["parts"]
        said += [f"the schema's {kind} differ" for kind, due in parts_due.items() if parts_found.get(kind) != due]
    if found["revision"] != facts.get("revision", {}):
        said.append(f"revision {found['revision']}, not {facts.get('revision')}")
    return said[:_SHOWN]


class _Accounts:
    """Roles and users that are not there yet: made before the dump, whose views and routines speak in their names. Who is there
    keeps password and grants.
    """

    def __init__(self, source: Source, control: Connection[Any]) -> None:
        entry = next((one for one in source.entries() if one.kind == "accounts"), None)
        lines = [] if entry is None or entry.stream is None else b"".join(source.open(entry.stream)).splitlines()
        self.control = control
        self.wanted: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.made = 0
        self.failed: dict[str, str] = {}
        self._later: list[tuple[str, str]] = []

    def make(self) -> None:
        import pymysql

        if not self.wanted:
            return
        try:
            there = {one["name"] for one in accounts(self.control, server(self.control))}
        except (pymysql.err.OperationalError, pymysql.err.ProgrammingError) as error:
            self.failed["all"] = f"the user may not read mysql.user ({error.args[0]})"
            return
        new = [one for one in self.wanted if one["name"] not in there]
        for one in new:
            if all(self._done(one["name"], statement, "could not be made") for statement in one["create"]):
                self.made += 1
                self._later += [(one["name"], statement) for statement in one["grants"]]
        # Those on single tables and routines come when these are there.
        self._later = [one for one in self._later if not self._done(*one, "")]

    def finish(self) -> dict[str, Any]:
        for name, statement in self._later:
            self._done(name, statement, "lacks a grant")
        if not self.wanted:
            return {}
        kept = len(self.wanted) - self.made - len(self.failed)
        return {"accounts": self.made, "accounts_kept": max(kept, 0), "accounts_failed": self.failed}

    def _done(self, name: str, statement: str, how: str) -> bool:
        import pymysql

        try:
            rows(self.control, statement)
        except pymysql.err.MySQLError as error:
            if how:
                self.failed[name] = f"{how} ({error.args[0]})"
            return False
        return True


def make_definers(control: Connection[Any], facts: Mapping[str, Any]) -> None:
    """In a private server: those whom views and routines name, if no account of the backup made them. They are nobody."""
    for definer in facts.get("definers", ()):
        user, _, host = str(definer).rpartition("@")
        rows(control, f"CREATE USER IF NOT EXISTS {quoted(user)}@{quoted(host)} ACCOUNT LOCK")
        rows(control, f"GRANT ALL ON *.* TO {quoted(user)}@{quoted(host)}")


@contextlib.contextmanager
def _closing(connection: Connection[Any]) -> Iterator[Connection[Any]]:
    try:
        yield connection
    finally:
        connection._force_close()
