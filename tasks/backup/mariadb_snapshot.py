"""One moment for a dump and for a count: the lock under which both begin, and the connection that counts while the dump runs."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from registry.errors import UnavailableError
from tasks.backup.mariadb_access import LOCK_SECONDS, MARIADB, Access, Server, hang_up, identity, quoted, rows
from tasks.backup.mariadb_dump import begun
from tasks.backup.mariadb_facts import TRANSACTIONAL, checksum, checksummed, counted

if TYPE_CHECKING:
    from pymysql.connections import Connection

READ_LOCK, IN_STREAM = "read-lock", "counted-in-stream"
HOLD_SECONDS = 20.0
"""The longest that writers wait for us under the lock. A dump that has not begun by then is counted in its stream instead."""
_NO_PRIVILEGE = frozenset({1044, 1045, 1142, 1227})
_LOCK_TIMEOUT = 1205


class MovedError(UnavailableError):
    """The schema changed while it was dumped: what the dump shows is of no moment. Taken again."""


class Snapshot:
    """What is known of the moment that a dump shows. Use `start` once; `counts` waits for the figures."""

    def __init__(
        self, where: Access, server: Server, tables: Mapping[str, Mapping[str, Any]], warn: Callable[[str], None]
    ) -> None:
        self.where, self.server, self.tables, self.warn = where, server, tables, warn
        self.facts: dict[str, Any] = {"method": IN_STREAM}
        self._stack = contextlib.ExitStack()
        self._counting: Connection[Any] | None = None
        self._thread: threading.Thread | None = None
        self._found: dict[str, dict[str, Any]] = {}
        self._failed: BaseException | None = None
        self._given_up = threading.Event()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up.set()
        if self._thread is not None:
            if self._counting is not None and self._thread.is_alive():
                hang_up(self._counting)  # it may be at a long count that nobody needs any more
            self._thread.join()
        self._stack.close()

    def start(self, dump: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
        """The dump's text. It, and our count, have begun when this returns, and the server takes writes again."""
        self._hold_others()
        lock = self._lock()
        pieces = dump()
        if lock is None:
            return pieces
        counting = self._connect()
        with counting.cursor() as cursor:
            cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            cursor.execute("START TRANSACTION WITH CONSISTENT SNAPSHOT")
        binlog = self._binlog(lock)
        late = threading.Event()

        def enough() -> None:
            late.set()
            lock._force_close()  # the server lets go of a lock whose connection is gone

        timer = threading.Timer(HOLD_SECONDS, enough)
        timer.start()
        try:
            text = begun(pieces, lambda: _unlock(lock, timer, late))
            first = next(text, b"")
        finally:
            timer.cancel()
            timer.join()
            with contextlib.suppress(Exception):  # closed by the timer already
                lock._force_close()
        if late.is_set():
            self.warn(
                f"the dump had not begun within {HOLD_SECONDS:.0f} s, so its rows were counted in its own text instead"
            )
        else:
            self.facts = {"method": READ_LOCK, **self.facts_of_tables(), **({"binlog": binlog} if binlog else {})}
            self._counting = counting
            self._thread = threading.Thread(target=self._count, name="modelkeep-count", daemon=True)
            self._thread.start()
        return itertools.chain([first] if first else [], text)

    def facts_of_tables(self) -> dict[str, Any]:
        return {name: value for name, value in self.facts.items() if name != "method"}

    def counts(self) -> dict[str, dict[str, Any]] | None:
        """{table: {"rows", "checksum"}} of the moment; None where only the stream can be counted. Raises UnavailableError."""
        if self._thread is None:
            return None
        self._thread.join()
        if self._failed is not None:
            failed = self.where.failed(self._failed, "could not be counted")
            moved = getattr(self._failed, "args", (None,))[:1] in ((1412,), (1146,))
            raise (MovedError(str(failed)) if moved else failed) from self._failed
        return self._found

    def _count(self) -> None:
        assert self._counting is not None
        try:
            names = [name for name, one in self.tables.items() if one["kind"] != "sequence"]
            for name in names:
                if self._given_up.is_set():
                    return
                self._found[name] = {"rows": counted(self._counting, self.where.database, name)}
            for name in sorted(checksummed(self.tables) & set(names)):
                if self._given_up.is_set():
                    return
                self._found[name]["checksum"] = checksum(self._counting, self.where.database, name)
        except Exception as error:  # told by `counts`
            self._failed = error

    def _hold_others(self) -> None:
        """Tables without transactions have no snapshot: nobody writes to them while they are dumped."""
        import pymysql

        names = [
            name
            for name, one in self.tables.items()
            if one["engine"] not in TRANSACTIONAL and one["kind"] != "sequence"
        ]
        if not names:
            return
        engines = ", ".join(sorted({str(self.tables[name]["engine"]) for name in names}))
        shown = f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''} ({engines})"
        holder = self._connect()
        places = ", ".join(f"{quoted(self.where.database)}.{quoted(name)} READ" for name in names)
        try:
            with holder.cursor() as cursor:
                cursor.execute(f"LOCK TABLES {places}")
        except (pymysql.err.OperationalError, pymysql.err.ProgrammingError) as error:
            if error.args[0] not in _NO_PRIVILEGE | {_LOCK_TIMEOUT}:
                raise self.where.failed(error, "could not be locked") from error
            self.warn(
                f"{shown} know no transactions and could not be locked ({error.args[0]}): they may show several moments"
            )
            self.facts["without_transactions"] = {"tables": names, "kept_by": None}
            return
        self.warn(f"{shown} know no transactions: who writes to them waited until they were dumped")
        self.facts["without_transactions"] = {"tables": names, "kept_by": "lock-tables"}

    def _lock(self) -> Connection[Any] | None:
        import pymysql

        connection = self._connect()
        try:
            with connection.cursor() as cursor:
                cursor.execute("FLUSH TABLES WITH READ LOCK")
        except (pymysql.err.OperationalError, pymysql.err.InternalError) as error:
            if error.args[0] in _NO_PRIVILEGE:
                self.facts["why"] = "the user lacks RELOAD"
            elif error.args[0] == _LOCK_TIMEOUT:
                self.facts["why"] = f"the lock was not to be had within {LOCK_SECONDS} s"
                self.warn("somebody held tables for long, so the dump's rows were counted in its own text instead")
            else:
                raise self.where.failed(error, "could not be locked") from error
            return None
        return connection

    def _binlog(self, lock: Connection[Any]) -> dict[str, Any] | None:
        """Where the server's log stands under the lock, which is where the dump stands."""
        import pymysql

        if not int(rows(lock, "SELECT @@log_bin")[0][0]):
            return None
        try:
            found = rows(lock, "SHOW MASTER STATUS")
            if not found:
                return None
            position: dict[str, Any] = {"file": str(found[0][0]), "position": int(found[0][1])}
            gtid = "SELECT @@gtid_binlog_pos" if self.server.flavour == MARIADB else "SELECT @@gtid_executed"
            position["gtid"] = str(rows(lock, gtid)[0][0])
            position["server"] = identity(lock)
        except (pymysql.err.OperationalError, pymysql.err.ProgrammingError) as error:
            self.warn(
                f"the position in the server's log is not known ({error.args[0]}): GRANT BINLOG MONITOR ON *.* to the user"
            )
            return None
        return position

    def _connect(self) -> Connection[Any]:
        connection = self.where.connect()
        self._stack.callback(connection._force_close)
        return connection


def _unlock(lock: Connection[Any], timer: threading.Timer, late: threading.Event) -> None:
    timer.cancel()
    timer.join()
    if late.is_set():
        return
    try:
        with lock.cursor() as cursor:
            cursor.execute("UNLOCK TABLES")
    except Exception as error:
        raise UnavailableError(f"the lock of the database was lost before its dump began: {error}") from error
