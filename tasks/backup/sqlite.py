"""SQLite databases: copied and brought back by SQLite's own backup, never as files. Also what the registry's part is made with."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from registry import clock
from registry.errors import ArtifactError, ConflictError, NotFoundError, RefusedError, StorageError, UnavailableError
from registry.settings import Settings
from tasks.backup.components import Captured, Compared, Sink, Source, Target
from tasks.backup.manifest import Entry
from tasks.backup.revisions import REVISIONS

ENTRY = "database.sqlite"
LOCK_SECONDS = 60.0
PIECE_BYTES = 1 << 20
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Part:
    """One SQLite database of the application."""

    name: str
    url: str
    kind: str = "sqlite"
    spool: Path | None = None

    def capture(self, sink: Sink) -> Captured:
        with _private(self.spool) as folder:
            copy = folder / ENTRY
            facts = snapshot_to(self.url, copy)
            size = copy.stat().st_size
            sink.progress(0, size)
            stream = sink.store(_pieces(copy, sink, size))
            sink.add(Entry(ENTRY, "sqlite", stream, {"database": Path(path_of(self.url)).name}))
        snapshot = {"method": "sqlite-backup-api", "pages": -1, "at": facts.pop("at")}
        return Captured(facts, snapshot, {"sqlite": sqlite3.sqlite_version})


def parts(settings: Settings) -> list[Part]:
    return [
        Part(f"database:{one.name}", one.connection_url())
        for one in settings.databases
        if one.url.startswith("sqlite:")
    ]


def restore(source: Source, target: Target) -> dict[str, Any]:
    """The database back into the live file, through SQLite; `only` brings back single tables. Raises RefusedError, ArtifactError."""
    url = _url(target)
    entry = next((one for one in source.entries() if one.name == ENTRY), None)
    if entry is None or entry.stream is None:
        raise ArtifactError(f"{source.record.name} has no {ENTRY} in this backup")
    with _private(None) as folder:
        copy = folder / ENTRY
        done = 0
        with copy.open("wb") as file:
            for piece in source.open(entry.stream):
                file.write(piece)
                done += len(piece)
                target.progress(done, entry.stream.size_bytes)
        if differing := compare(copy, source.record.facts):
            raise ArtifactError(f"{source.record.name} is not what its manifest says: {'; '.join(differing)}")
        if target.only:
            return restore_tables(copy, url, target.only, force=target.force)
        facts = restore_into(copy, url, force=target.force, journal_mode=source.record.facts.get("journal_mode"))
    if differing := differences(facts, source.record.facts):
        raise ArtifactError(
            f"{url} is not what was backed up ({'; '.join(differing)}): does somebody write there? Stop it, and restore again"
        )
    return facts


def verify(source: Source, folder: Path) -> Compared:
    path = folder / "restored.sqlite"
    path.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: path.unlink(missing_ok=True))
        try:
            facts = restore(source, Target(path=path))
        except ArtifactError as error:
            return Compared((str(error),))
        found = differences(facts, source.record.facts)
        rows = sum(count for count in facts["tables"].values())
        return Compared(
            tuple(found), {"tables": len(facts["tables"]), "rows": rows, "integrity_check": facts["integrity"]}
        )


def occupied(target: Target) -> str | None:
    """What stands at the target already, in words."""
    path = path_of(_url(target))
    if not path.exists():
        return None
    with _opened(path) as connection:
        names = _tables(connection)
    if target.only:
        there = [name for name in names if name in target.only]
        return f"the tables {', '.join(there)} in {path}" if there else None
    return f"{len(names)} tables in {path}" if names else None


def path_of(url: str) -> Path:
    """The file of a SQLite URL."""
    from sqlalchemy import make_url

    return Path(str(make_url(url).database))


def snapshot_to(url: str, path: Path) -> dict[str, Any]:
    """One moment of the database as a new file at `path`, checked. Returns its facts.

    All pages in one step: with steps of some pages a writer makes SQLite begin again each time, for ever. Raises NotFoundError,
    StorageError where the disk is full, ArtifactError where the database is damaged, UnavailableError where it stays locked.
    """
    origin = path_of(url)
    if not origin.exists():
        raise NotFoundError(f"there is no database {origin}")
    path.unlink(missing_ok=True)
    try:
        with _opened(origin) as live, contextlib.closing(_connect(path)) as copy:
            _copy(live, copy, f"{origin} to {path}")
        path.chmod(0o600)
        with contextlib.closing(_connect(path)) as copy:
            # A file that is alone, without -wal and -shm beside it: whoever reads it needs no leave to write.
            copy.execute("PRAGMA journal_mode=DELETE")
            facts = facts_of(copy)
            with _opened(origin) as live:
                facts["journal_mode"] = live.execute("PRAGMA journal_mode").fetchone()[0]
    except sqlite3.DatabaseError as error:
        raise _translated(error, origin) from error
    if facts["integrity"] != "ok":
        raise ArtifactError(
            f"{origin} is damaged ({facts['integrity']}): a backup of it would be, too; restore it first"
        )
    return facts


def restore_into(path: Path, url: str, *, force: bool = False, journal_mode: str | None = None) -> dict[str, Any]:
    """The copy at `path` becomes the content of the database: all or nothing, also when it is killed, and also beside a -wal.

    A new file gets `journal_mode`, one that is there keeps its own. Returns the facts of what is there now. Raises ArtifactError
    where the copy is damaged, RefusedError where there are tables
    already and not `force`, UnavailableError where others hold the database.
    """
    place = path_of(url)
    try:
        with contextlib.closing(_connect(path, read_only=True)) as copy:
            facts = facts_of(copy)
            if facts["integrity"] != "ok":
                raise ArtifactError(f"{path} is damaged ({facts['integrity']}): nothing was restored")
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh = not place.exists()
            with contextlib.closing(_connect(place)) as live:
                if (names := _tables(live)) and not force:
                    raise RefusedError(
                        f"{place} has {len(names)} tables already: restore to another place, or force it (a safety copy is taken first)"
                    )
                mode = live.execute("PRAGMA journal_mode").fetchone()[0]
                if _page_size(live) != _page_size(copy):  # a database in WAL mode keeps its page size
                    live.execute("PRAGMA journal_mode=DELETE")
                _copy(copy, live, f"{path} into {place}")
                wanted = journal_mode if fresh else mode
                if wanted == "wal":
                    live.execute("PRAGMA journal_mode=WAL")
                return facts_of(live)
    except sqlite3.DatabaseError as error:
        raise _translated(error, place) from error


def restore_tables(path: Path, url: str, names: tuple[str, ...], *, force: bool = False) -> dict[str, Any]:
    """Single tables of the copy, with their indexes and triggers, in one transaction. Raises NotFoundError, RefusedError."""
    place = path_of(url)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.closing(_connect(place)) as live:
            live.execute("ATTACH DATABASE ? AS kept", (f"file:{quote(str(path))}?mode=ro",))
            live.execute("PRAGMA foreign_keys=OFF")
            live.execute("BEGIN IMMEDIATE")
            counts: dict[str, int] = {}
            for name in names:
                rows = live.execute(
                    "SELECT type, name, sql FROM kept.sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL "
                    "ORDER BY CASE type WHEN 'table' THEN 0 WHEN 'index' THEN 1 ELSE 2 END",
                    (name,),
                ).fetchall()
                if not rows:
                    raise NotFoundError(f"there is no table {name!r} in this backup")
                there = live.execute("SELECT 1 FROM main.sqlite_master WHERE type='table' AND name = ?", (name,))
                if there.fetchone():
                    if not force:
                        raise RefusedError(f"{place} has a table {name!r} already: force it to replace that one")
                    live.execute(f"DROP TABLE main.{_quoted(name)}")
                for kind, _, sql in rows:
                    if kind == "table":
                        live.execute(sql)
                        columns = ", ".join(_quoted(one) for one in _stored_columns(live, name))
                        live.execute(
                            f"INSERT INTO main.{_quoted(name)} ({columns}) SELECT {columns} FROM kept.{_quoted(name)}"
                        )
                    else:
                        live.execute(sql)
                counts[name] = _count(live, name)
            live.execute("COMMIT")
            return {"tables": counts}
    except sqlite3.DatabaseError as error:
        raise _translated(error, place) from error


def compare(path: Path, facts: Mapping[str, Any]) -> list[str]:
    """In what the database at `path` differs from the facts of its backup."""
    try:
        with contextlib.closing(_connect(path, read_only=True)) as copy:
            return differences(facts_of(copy), facts)
    except sqlite3.DatabaseError as error:
        return [f"{path} cannot be read: {error}"]


def differences(found: Mapping[str, Any], due: Mapping[str, Any]) -> list[str]:
    """In words, for people: what a copy has that differs from what it should have."""
    said = []
    if found["integrity"] != "ok":
        said.append(f"integrity_check: {found['integrity']}")
    there, wanted = found["tables"], due.get("tables", {})
    for name in sorted({*there, *wanted}):
        if there.get(name) != wanted.get(name):
            said.append(f"table {name}: {there.get(name, 'no')} rows, not {wanted.get(name, 'none')}")
    for name in ("schema_sha256", "user_version", "application_id", "revision", "foreign_key_violations"):
        if name in due and found.get(name) != due[name]:
            said.append(f"{name}: {found.get(name)!r}, not {due[name]!r}")
    return said[:_SHOWN]


def facts_of(connection: sqlite3.Connection) -> dict[str, Any]:
    """Rows by table, the schema's digest and revision, and what SQLite's own checks say."""
    import hashlib

    problems = [row[0] for row in connection.execute("PRAGMA integrity_check(5)")]
    schema = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY 1, 2, 3").fetchall()
    names = _tables(connection)
    facts: dict[str, Any] = {
        "flavour": "sqlite",
        "integrity": "; ".join(problems),
        "tables": {name: _count(connection, name) for name in names},
        "schema_sha256": hashlib.sha256(repr(schema).encode("utf-8", "surrogatepass")).hexdigest(),
        "foreign_key_violations": len(connection.execute("PRAGMA foreign_key_check").fetchall()),
        "user_version": connection.execute("PRAGMA user_version").fetchone()[0],
        "application_id": connection.execute("PRAGMA application_id").fetchone()[0],
        "page_size": _page_size(connection),
        "at": clock.text(clock.now()),
    }
    revision = {}
    for table, query in REVISIONS.items():
        try:
            row = connection.execute(query).fetchone() if table in names else None
        except sqlite3.OperationalError:  # a table of that name that is not that tool's: it has other columns
            continue
        if row is not None:
            revision[table] = str(row[0])
    if revision:
        facts["revision"] = revision
    return facts


def _copy(origin: sqlite3.Connection, target: sqlite3.Connection, what: str) -> None:
    deadline = time.monotonic() + LOCK_SECONDS

    def bounded(status: int, _remaining: int, _total: int) -> None:
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) and time.monotonic() > deadline:
            raise UnavailableError(f"{what}: another program has held the database for {LOCK_SECONDS:.0f} s; stop it")

    origin.backup(target, pages=-1, progress=bounded, sleep=0.05)


def _connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    url = f"file:{quote(str(path))}{'?mode=ro' if read_only else ''}"
    return sqlite3.connect(url, uri=True, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The database as it is; never made anew."""
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw", uri=True, timeout=LOCK_SECONDS, isolation_level=None
    )
    try:
        yield connection
    finally:
        connection.close()


def _tables(connection: sqlite3.Connection) -> list[str]:
    rows = connection.execute(
        "SELECT name FROM sqlite_master WHERE type='table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name"
    )
    return [str(row[0]) for row in rows]


def _stored_columns(connection: sqlite3.Connection, table: str) -> list[str]:
    """Without generated columns."""
    return [row[1] for row in connection.execute(f"PRAGMA main.table_xinfo({_quoted(table)})") if row[6] == 0]


def _count(connection: sqlite3.Connection, table: str) -> int:
    return int(connection.execute(f"SELECT count(*) FROM {_quoted(table)}").fetchone()[0])


def _page_size(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA page_size").fetchone()[0])


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _url(target: Target) -> str:
    if target.url is not None:
        return target.url
    if target.path is None:
        raise NotFoundError("no database was named to restore to")
    return f"sqlite:///{target.path}"


def _pieces(path: Path, sink: Sink, size: int) -> Iterator[bytes]:
    done = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            done += len(piece)
            sink.progress(done, size)
            yield piece


@contextlib.contextmanager
def _private(folder: Path | None) -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="modelkeep-sqlite-", dir=folder) as name:
            yield Path(name)
    except OSError as error:
        raise StorageError(
            f"no room for a private copy in {folder or tempfile.gettempdir()}: {error.strerror or error}; free some, or set TMPDIR"
        ) from error


def _translated(error: sqlite3.DatabaseError, place: Path) -> Exception:
    said = str(error).lower()
    if "full" in said or "disk i/o" in said:
        return StorageError(f"{place}: {error}; free some space and repeat")
    if "not a database" in said or "malformed" in said:
        return ArtifactError(f"{place} is damaged: {error}")
    if "locked" in said or "busy" in said:
        return UnavailableError(f"{place}: {error}: another program holds it; stop it and repeat")
    if "readonly" in said or "unable to open" in said:
        return StorageError(f"{place} cannot be opened for this: {error}; check that folder and file are writable")
    return ConflictError(f"{place}: {error}")
