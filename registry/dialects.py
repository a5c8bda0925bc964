"""Where the databases differ: how long each waits, what a session is told first, and their errors in the words of registry.errors."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, Connection, make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError

from registry.errors import ConflictError, ModelkeepError, RefusedError, StorageError, UnavailableError

_FULL = ("disk is full", "disk i/o error", "no space left", "is full")
_READ_ONLY = ("readonly", "read-only", "read_only", "unable to open database file")
# MySQL: deadlock, lock wait timeout, record changed since the snapshot. PostgreSQL: serialization, deadlock, lock not available.
_LOST_TO_ANOTHER = frozenset({1213, 1205, 1020, "40001", "40P01", "55P03"})
_MISSING = frozenset({1146, 1054, "42P01", "42703"})


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: for a lock or a connection, and for a server's answer to a statement."""

    lock_seconds: float
    statement_seconds: float


def connect_arguments(url: URL, patience: Patience) -> dict[str, Any]:
    """What the driver is told, so that nothing is waited for for ever."""
    if url.get_backend_name() == "sqlite":
        return {"timeout": patience.lock_seconds, "check_same_thread": False}
    if url.get_driver_name() == "pymysql":  # its own default waits for ever once it is connected
        return {
            "connect_timeout": max(1, round(patience.lock_seconds)),
            "read_timeout": patience.statement_seconds,
            "write_timeout": patience.statement_seconds,
        }
    return {
        "connect_timeout": max(2, round(patience.lock_seconds)),
        "tcp_user_timeout": round(1000 * patience.statement_seconds),
    }


def prepare_session(url: URL, patience: Patience) -> Callable[[Any, object], None]:
    """A listener for new connections to a server.

    A lock is waited for as long as on SQLite. Who stands still inside a transaction (a stopped process, a machine that is gone)
    loses it after a while, so that its locks hold nobody up.
    """
    lock, idle = max(1, round(patience.lock_seconds)), max(4, round(patience.statement_seconds))

    def mysql(connection: Any, _record: object) -> None:
        settings = [
            "sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'",
            f"innodb_lock_wait_timeout = {lock}",
            f"lock_wait_timeout = {lock}",
        ]
        if "mariadb" in str(connection.get_server_info()).lower():
            settings.append(f"idle_transaction_timeout = {idle}")
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION " + ", SESSION ".join(settings))

    def postgresql(connection: Any, _record: object) -> None:
        connection.autocommit = True
        connection.execute(f"SET lock_timeout = '{lock}s'")
        connection.execute(f"SET idle_in_transaction_session_timeout = '{idle}s'")
        connection.autocommit = False

    return mysql if url.get_driver_name() == "pymysql" else postgresql


def begin_snapshot(connection: Connection) -> None:
    """A reader of a server sees one moment in all its statements, as a reader of SQLite does."""
    if connection.get_execution_options().get("modelkeep_snapshot", False):
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


def json_text(value: Any) -> str:
    """JSON that every database takes: a number that is none (NaN, an infinity) is absent."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def translate(error: DBAPIError, url: str) -> ModelkeepError | DBAPIError:
    """An error of a driver as one of ours; one that only a fault of the code can cause stays what it is."""
    said, code = " ".join(str(error.orig).split()), _code(error)
    message = said.lower()
    if any(words in message for words in _FULL):
        return StorageError(f"the registry {url} could not be written: {said}; free some space and repeat the command")
    if any(words in message for words in _READ_ONLY):
        remedy = (
            "check its folder's permissions, or set MODELKEEP_HOME"
            if url.startswith("sqlite")
            else "point MODELKEEP_DATABASE_URL at the server that takes writes"
        )
        return StorageError(f"the registry {url} cannot be opened for writing: {said}; {remedy}")
    if "not a database" in message or "malformed" in message:
        return StorageError(f"the registry {url} is damaged: {said}; restore it from a backup")
    if code in _LOST_TO_ANOTHER:
        return UnavailableError(
            f"the registry {url}: another transaction held what this one needed, so nothing of it was written; repeat the "
            f"command ({said})"
        )
    if isinstance(error, IntegrityError):
        return ConflictError(
            f"another process changed the same row of {url} at the same time: {said}; repeat the command"
        )
    if isinstance(error, DataError):
        return RefusedError(
            f"the registry {url} does not take a value: {said}; shorten it, or leave out its control characters"
        )
    if code in _MISSING:
        return UnavailableError(
            f"the registry {url} lacks a table or column ({said}); bring it to this release: modelkeep db upgrade"
        )
    if "database is locked" in message:
        return UnavailableError(
            f"the registry {url}: another process has its lock for writing, and nothing was written here; repeat the command. If "
            f"it lasts, one stands still within a write (stopped, or its machine asleep): fuser {_file(url)} names those that "
            f"have it open; let that one go on (kill -CONT) or end it (kill -KILL), and nothing is left of what it had begun"
        )
    if isinstance(error, OperationalError) or error.connection_invalidated:
        return UnavailableError(f"the registry {url} does not answer: {said}")
    return error


def _file(url: str) -> str:
    """The path in the URL of SQLite, as a shell takes it."""
    return shlex.quote(make_url(url).database or "")


def _code(error: DBAPIError) -> int | str | None:
    """MySQL's number or PostgreSQL's SQLSTATE."""
    arguments = getattr(error.orig, "args", ())
    if arguments and isinstance(arguments[0], int):
        return arguments[0]
    state = getattr(error.orig, "sqlstate", None)
    return None if state is None else str(state)
