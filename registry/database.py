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

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from registry import actor as actors
from registry import audit, dialects
from registry.errors import StorageError, UnavailableError
from registry.schema import REVISION, AuditHead

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

    `answer_seconds`: how long a lock or a connection is waited for; an answer of a server is waited for four times as long,
    or `statement_seconds`.
    """

    def __init__(
        self,
        url: str,
        *,
        anchors: Path | None = None,
        pool: dict[str, Any] | None = None,
        answer_seconds: float = ANSWER_SECONDS,
        statement_seconds: float | None = None,
    ) -> None:
        self.url = make_url(url)
        self.anchors = anchors
        self.answer_seconds = answer_seconds
        self.facts: dict[str, Any] = {}
        """What the settings say of serving, kept with a rollback point. See registry.connect."""
        self.sqlite = self.url.get_backend_name() == "sqlite"
        patience = dialects.Patience(answer_seconds, statement_seconds or 4 * answer_seconds)
        options: dict[str, Any] = {
            "connect_args": dialects.connect_arguments(self.url, patience),
            "json_serializer": dialects.json_text,
        }
        if not self.sqlite:
            options.update(isolation_level="READ COMMITTED", pool_pre_ping=True, **(pool or {}))
        self.engine: Engine = create_engine(self.url, **options)
        self._reader = self.engine.execution_options(modelkeep_snapshot=True)
        self._writer = self.engine.execution_options(modelkeep_write=True)
        if self.sqlite:
            event.listen(self.engine, "connect", _sqlite_connect)
            event.listen(self.engine, "begin", _sqlite_begin)
        else:
            event.listen(self.engine, "connect", dialects.prepare_session(self.url, patience))
            event.listen(self.engine, "begin", dialects.begin_snapshot)

    @property
    def shown(self) -> str:
        """The URL without its password, for people."""
        return self.url.render_as_string(hide_password=True)

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A session to read with, which sees one moment of the database. Nothing is written."""
        with self.translated(), Session(self._reader) as session:
            yield session

    @contextlib.contextmanager
    def write(
        self, *, actor: str | None = None, flow_run_id: str | None = None, exclusive: bool = True
    ) -> Iterator[Transaction]:
        """A transaction: all of it and its audit events, or nothing.

        Writers go one at a time on every database: on SQLite by its own lock, on a server by that of the audit head, which is
        taken first. What was read inside is true until the end. Not `exclusive` is for what writes rows of its own and
        records nothing (a heartbeat, a report).

        Raises StorageError where the disk is full or read-only, UnavailableError where the database does not answer,
        ConflictError where another transaction wrote the same row first. An anchor that cannot be written is logged and no
        error: the change is on record by then, and the next anchor covers it.
        """
        head: audit.Head | None = None
        with self.translated(), Session(self._writer, expire_on_commit=False, info={"settings": self.facts}) as session:
            if exclusive and not self.sqlite:
                session.execute(select(AuditHead.id).where(AuditHead.id == 1).with_for_update())
            transaction = Transaction(session, actor or actors.current(), flow_run_id)
            yield transaction
            session.flush()
            if transaction.events:
                head = audit.append(session, transaction.events)
            try:
                session.commit()
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise UnavailableError(
                        f"the registry {self.shown} went away while a change was committed: it is on record as a whole or not at "
                        f"all; see which (modelkeep status, modelkeep audit list) before you repeat the command ({error.orig})"
                    ) from error
                raise
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

        Several processes may do so at once: the first takes a lock, and who loses the race finds the work done.
        """
        self.make_folder()
        if self.revision() == REVISION:
            return
        from registry.migrate import upgrade

        upgrade(self)

    def make_folder(self) -> None:
        """The folder of SQLite's file. Raises StorageError."""
        if self.sqlite and self.url.database not in (None, "", ":memory:"):
            path = Path(str(self.url.database))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    f"the registry {path} cannot be created: {error.strerror or error}; "
                    f"make {path.parent} writable or set MODELKEEP_HOME to another folder"
                ) from error

    def dispose(self) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Errors of the database, in the words of registry.errors; the URL is shown without its password."""
        try:
            yield
        except DBAPIError as error:
            raise dialects.translate(error, self.shown) from error
        except PoolTimeoutError as error:
            raise UnavailableError(
                f"the registry {self.shown}: no connection of the pool became free: {error}"
            ) from error


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
