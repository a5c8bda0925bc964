"""The registry's database: engine, transactions with their audit events, and the schema's revision. SQL of a table lives beside its noun."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from registry import actor as actors
from registry import audit
from registry.errors import ConflictError, ModelkeepError, StorageError, UnavailableError
from registry.schema import REVISION

ANSWER_SECONDS = 15.0

log = logging.getLogger("modelkeep.audit")


@dataclass(slots=True)
class Transaction:
    """One write transaction: the session, who does it, and the events that are appended when it ends."""

    session: Session
    actor: str
    flow_run_id: str | None = None
    events: list[audit.Event] = field(default_factory=list)

    def record(self, action: str, subject: str, *, before: Any = None, after: Any = None, reason: str = "") -> None:
        """Note a change. It is written with the transaction or not at all."""
        self.events.append(
            audit.Event(action, subject, self.actor, before, after, reason=reason, flow_run_id=self.flow_run_id)
        )


class Database:
    """The engine and its two kinds of transactions. Cheap to create; connects at the first use.

    `answer_seconds`: how long SQLite's lock or a connection to a server is waited for; an answer of a server is waited for
    four times as long.
    """

    def __init__(
        self,
        url: str,
        *,
        anchors: Path | None = None,
        pool: dict[str, Any] | None = None,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self.url = make_url(url)
        self.anchors = anchors
        self.sqlite = self.url.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"connect_args": self._waiting(answer_seconds)}
        if not self.sqlite:
            options.update(isolation_level="READ COMMITTED", pool_pre_ping=True, **(pool or {}))
        self.engine: Engine = create_engine(self.url, **options)
        self._writer = self.engine.execution_options(modelkeep_write=True)
        if self.sqlite:
            event.listen(self.engine, "connect", _sqlite_connect)
            event.listen(self.engine, "begin", _sqlite_begin)

    def _waiting(self, seconds: float) -> dict[str, Any]:
        if self.sqlite:
            return {"timeout": seconds, "check_same_thread": False}
        if self.url.drivername == "mysql+pymysql":  # its own default waits for ever once it is connected
            return {
                "connect_timeout": max(1, round(seconds)),
                "read_timeout": 4 * seconds,
                "write_timeout": 4 * seconds,
            }
        if self.url.drivername == "postgresql+psycopg":
            return {"connect_timeout": max(2, round(seconds)), "tcp_user_timeout": round(4000 * seconds)}
        return {}

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A session to read with. Nothing is written."""
        with self.translated(), Session(self.engine) as session:
            yield session

    @contextlib.contextmanager
    def write(self, *, actor: str | None = None, flow_run_id: str | None = None) -> Iterator[Transaction]:
        """A transaction: all of it and its audit events, or nothing.

        Raises StorageError where the disk is full or read-only, UnavailableError where the database does not answer,
        ConflictError where another transaction wrote the same row first. An anchor that cannot be written is logged and no
        error: the change is on record by then, and the next anchor covers it.
        """
        head: audit.Head | None = None
        with self.translated(), Session(self._writer, expire_on_commit=False) as session:
            transaction = Transaction(session, actor or actors.current(), flow_run_id)
            yield transaction
            session.flush()
            if transaction.events:
                head = audit.append(session, transaction.events)
            session.commit()
        if head is not None and self.anchors is not None:
            try:
                audit.anchor(self.anchors, head)
            except OSError as error:
                log.error(
                    "event %d is on record, but its anchor could not be written to %s: %s",
                    head.seq,
                    self.anchors,
                    error,
                )

    def revision(self) -> str | None:
        """The schema's revision in the database, None where it is empty."""
        with self.translated(), self.engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return None if found is None else str(found)

    def prepare(self) -> None:
        """Bring an empty or older database to this code's schema; refuse one that is newer than this code.

        Several processes may do so at once: on SQLite the first takes a lock, on a server the upgrade is one's by
        Alembic's own transaction, and who loses the race finds the work done.
        """
        if self.sqlite and self.url.database not in (None, "", ":memory:"):
            path = Path(str(self.url.database))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    f"the registry {path} cannot be created: {error.strerror or error}; "
                    f"make {path.parent} writable or set MODELKEEP_HOME to another folder"
                ) from error
        if self.revision() == REVISION:
            return
        from registry.migrate import upgrade

        upgrade(self)

    def dispose(self) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Errors of the database, in the words of registry.errors; the URL is shown without its password."""
        try:
            yield
        except DBAPIError as error:
            raise _translate(error, self.url.render_as_string(hide_password=True)) from error
        except PoolTimeoutError as error:
            url = self.url.render_as_string(hide_password=True)
            raise UnavailableError(f"the registry {url}: no connection of the pool became free: {error}") from error


def _translate(error: DBAPIError, url: str) -> ModelkeepError | DBAPIError:
    message = str(error.orig).lower()
    if "disk is full" in message or "disk i/o error" in message:
        return StorageError(
            f"the registry {url} could not be written: {error.orig}; free some space and repeat the command"
        )
    if "readonly" in message or "read-only" in message or "unable to open database file" in message:
        return StorageError(
            f"the registry {url} cannot be opened for writing: {error.orig}; check its folder's permissions, or set MODELKEEP_HOME"
        )
    if "not a database" in message or "malformed" in message:
        return StorageError(f"the registry {url} is damaged: {error.orig}; restore it from a backup")
    if isinstance(error, IntegrityError):
        return ConflictError(
            f"another process changed the same row of {url} at the same time: {error.orig}; repeat the command"
        )
    if isinstance(error, OperationalError) or error.connection_invalidated:
        return UnavailableError(f"the registry {url} does not answer: {error.orig}")
    return error


def _sqlite_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the "begin" event below speaks to SQLite, not the driver
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            # Of several processes that open a new file at once, SQLite tells one at once that it is locked, whatever the
            # timeout: both hold a lock that the other would have to give up.
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _sqlite_begin(connection: Connection) -> None:
    # A transaction that begins as a reader and then writes fails at once under contention, whatever the timeout.
    write = connection.get_execution_options().get("modelkeep_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
