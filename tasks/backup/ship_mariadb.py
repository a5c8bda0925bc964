"""The binary logs of a MariaDB, brought to where its backups are: each read to its end and found whole, and none left out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import clock
from registry.errors import ArtifactError, RefusedError, StorageError
from tasks.backup import binlog, logs
from tasks.backup.chain import find, run
from tasks.backup.logs import Head, Shelf, Shipped
from tasks.backup.mariadb_access import MARIADB, Access, identity, rows, server

if TYPE_CHECKING:
    from pymysql.connections import Connection

KIND = "mariadb"
_PIECE_BYTES = 1 << 20
_DENIED = 1227


@dataclass(frozen=True, slots=True)
class Standing:
    """The server's logs at one moment. `there`: name -> bytes, oldest first; the last is the one being written."""

    server: str
    gtid: str
    covers_until: str
    there: dict[str, int]
    whole: bool
    """The log that was written before is closed; else (no RELOAD) the last one is shipped as far as it goes."""

    @property
    def active(self) -> str:
        return next(reversed(self.there))

    @property
    def ready(self) -> list[str]:
        return list(self.there)[:-1] if self.whole else list(self.there)


@dataclass(frozen=True, slots=True)
class Found:
    """What a shipment did. `broke`: why the logs do not follow those that were shipped before."""

    shipped: tuple[Shipped, ...]
    head: Head
    warnings: tuple[str, ...]
    broke: str | None = None
    lost: dict[str, Any] | None = None
    """{"why", "from", "until", "series"}, where a base backup was taken at once and the gap has an end."""


def ship(where: Access, shelf: Shelf, scratch: Path, starts: Callable[[], Sequence[dict[str, Any]]]) -> Found:
    """Ship what is new. `starts` gives the positions in the logs that backups of the database have.

    Raises RefusedError where the server keeps no log or does not let us read it, UnavailableError, ArtifactError for a log that
    is damaged, StorageError.
    """
    last = shelf.last()
    with contextlib.closing(where.connect(database=False)) as connection:
        warnings = list(_check(connection, where))
        now = _standing(connection, where, last)
    if not now.whole:
        warnings.append(
            "the user lacks RELOAD, so the log that is being written is fetched whole each time: GRANT RELOAD ON *.* to it"
        )
    why = _breaks(last, now)
    previous = None if why else last
    series = 1 if last is None else last.series + (1 if why else 0)
    lost_from = None if last is None else last.covers_until
    shipped: list[Shipped] = []
    broke = why if last is not None else None
    for name in _due(previous, now, starts):
        with _fetched(where, name, scratch) as path:
            found = _read(path, name, previous)
            if now.there[name] != found.size_bytes and name != now.active:
                raise StorageError(f"{name} came with {found.size_bytes} bytes of {now.there[name]}: ship again")
            if previous is not None and (gap := _gap(previous, name, found)):
                why = broke = gap
                lost_from, previous, series = previous.covers_until, None, series + 1
            begins = None
            if previous is None or (previous.log == name and previous.begins is not None):
                begins = (
                    previous.begins
                    if previous
                    else {"why": why or "the first that was shipped", "lost_from": lost_from}
                )
            one = Shipped(
                database=shelf.database, kind=KIND, server=now.server, series=series, log=name, closed=name != now.active,
                size_bytes=found.size_bytes, sha256=found.sha256, begins_with=binlog.state_text(found.begins_with),
                ends_with=binlog.state_text(found.ends_with), transactions=found.transactions,
                first_at=logs.text(binlog.moment(found.first_at)), last_at=logs.text(binlog.moment(found.last_at)),
                covers_until=now.covers_until, shipped_at=clock.text(clock.now()),
                pieces=shelf.put_pieces(series, name, _pieces(path)), begins=begins,
            )  # fmt: skip
        shelf.put(one)
        if previous is not None and previous.log == name:
            kept = {piece.object for piece in one.pieces}
            shelf.forget(previous, [piece for piece in previous.pieces if piece.object not in kept])
        shipped.append(one)
        previous = one
    newest = shipped[-1] if shipped else previous
    head = Head(
        shelf.database, KIND, now.server, series if newest is None else newest.series, "" if newest is None else newest.log,
        now.covers_until, clock.text(clock.now()), {"gtid": now.gtid, "file": now.active},
    )  # fmt: skip
    return Found(tuple(shipped), head, tuple(warnings), broke)


def _check(connection: Connection[Any], where: Access) -> Iterator[str]:
    host = server(connection)
    if host.flavour != MARIADB:
        raise RefusedError(
            f"{where.shown} is a {host.flavour}: this release ships the logs of MariaDB; take {where.database} out of logs"
        )
    known = {str(name): str(value) for name, value in rows(connection, "SHOW GLOBAL VARIABLES LIKE '%bin%log%'")}
    known |= {str(name): str(value) for name, value in rows(connection, "SHOW GLOBAL VARIABLES LIKE 'log\\_bin'")}
    if known.get("log_bin") != "ON":
        raise RefusedError(f"{where.shown} keeps no binary log: set log_bin in the server's options and start it again")
    if known.get("binlog_format", "").upper() != "ROW":
        yield (
            f"binlog_format is {known.get('binlog_format')}: statements that read other databases, the time or random numbers may not "
            "replay to the same rows; set binlog_format=ROW"
        )


def _standing(connection: Connection[Any], where: Access, last: Shipped | None) -> Standing:
    """The server's logs, the one that was being written closed by us where something is in it."""
    import pymysql

    [(moment, gtid)] = rows(connection, "SELECT UTC_TIMESTAMP(6), @@gtid_binlog_pos")
    covers = clock.text(moment.replace(tzinfo=clock.now().tzinfo))
    who = identity(connection)
    idle = (
        last is not None and last.closed and last.server == who and binlog.state(last.ends_with) == binlog.state(gtid)
    )
    whole = True
    if not idle:
        try:
            rows(connection, "FLUSH BINARY LOGS")
        except (pymysql.err.OperationalError, pymysql.err.InternalError) as error:
            if error.args[0] != _DENIED:
                raise where.failed(error, "could not close its log") from error
            whole = False
    try:
        there = {str(row[0]): int(row[1]) for row in rows(connection, "SHOW BINARY LOGS")}
    except (pymysql.err.OperationalError, pymysql.err.InternalError) as error:
        if error.args[0] != _DENIED:
            raise where.failed(error, "does not list its logs") from error
        raise RefusedError(
            f"{where.user} may not see the logs of {where.shown}: GRANT BINLOG MONITOR, REPLICATION SLAVE, RELOAD ON *.* to it"
        ) from error
    if not there:
        raise RefusedError(f"{where.shown} lists no binary log: look at log_bin and at the server's own log")
    return Standing(who, str(gtid), covers, there, whole)


def _breaks(last: Shipped | None, now: Standing) -> str | None:
    """Why what the server has cannot follow what was shipped last, as far as that is seen without reading a log."""
    if last is None:
        return None
    if last.server != now.server:
        return f"it is another server (its id is {now.server}, and was {last.server})"
    size = now.there.get(last.log)
    anew = logs.base(now.active) != logs.base(last.log) or logs.number(now.active) < last.number
    if anew or (size is not None and (size != last.size_bytes if last.closed else size < last.size_bytes)):
        return "the server's logs began anew (RESET MASTER, or another data directory)"
    return None


def _due(previous: Shipped | None, now: Standing, starts: Callable[[], Sequence[dict[str, Any]]]) -> list[str]:
    if previous is not None:
        return [
            name
            for name in now.ready
            if logs.number(name) > previous.number or (name == previous.log and not previous.closed)
        ]
    ready = now.ready
    files = {str(one.get("file")) for one in starts() if one.get("server") == now.server}
    wanted = [number for number, name in enumerate(ready) if name in files]
    return ready[wanted[0] :] if wanted else ready[-1:]


def _gap(previous: Shipped, name: str, found: binlog.Log) -> str | None:
    """Why this log does not follow the one that was shipped before it."""
    if name == previous.log:
        if found.prefixes.get(previous.size_bytes) == previous.sha256:
            return None
        return f"{name} is not the log of that name that was shipped before"
    if binlog.state_text(found.begins_with) == previous.ends_with:
        return None
    between = logs.number(name) - previous.number - 1
    if between > 0 or not previous.closed:
        return f"the server purged what was between {previous.log} and {name} before it was shipped"
    return f"{name} does not go on where {previous.log} ended"


@contextlib.contextmanager
def _fetched(where: Access, name: str, scratch: Path) -> Iterator[Path]:
    logs.number(name)  # a name that a place takes
    path = scratch / name
    path.unlink(missing_ok=True)
    try:
        with where.option_file() as options:
            program = where.program(
                find("mariadb-binlog", "mysqlbinlog"), options, "--read-from-remote-server", "--raw",
                "--verify-binlog-checksum", f"--result-file={scratch}/", "--", name,
            )  # fmt: skip
            run(program)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _read(path: Path, name: str, previous: Shipped | None) -> binlog.Log:
    prefixes = [previous.size_bytes] if previous is not None and previous.log == name else []
    try:
        return binlog.Reader(_pieces(path), name, prefixes).finish()
    except ArtifactError as error:
        raise ArtifactError(f"{error}; it is not shipped: take a backup, and look at the server's disk") from error


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
