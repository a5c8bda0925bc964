"""Steps of a migration. Each looks before it acts: MySQL commits after each, so a killed upgrade is repaired by the next one."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from registry.errors import UnavailableError

FLOAT = sa.Float().with_variant(mysql.DOUBLE(asdecimal=False), "mysql", "mariadb")
"""A float as Python has it: MySQL's own FLOAT keeps seven digits."""

UPGRADE_SECONDS = 900.0
"""How long another process's upgrade is waited for."""

_MYSQL = {"engine": "InnoDB", "charset": "utf8mb4", "collate": "utf8mb4_bin"}


@contextlib.contextmanager
def alone(connection: sa.Connection, *, patience_seconds: float = UPGRADE_SECONDS) -> Iterator[None]:
    """One migration at a time. SQLite's transaction is a lock already. Raises UnavailableError after `patience_seconds`."""
    kind = connection.dialect.name
    if kind == "postgresql":  # until the transaction ends
        deadline = time.monotonic() + patience_seconds
        while not connection.execute(
            sa.text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _key(connection)}
        ).scalar():
            _wait(deadline)
        if sa.inspect(connection).has_table("audit_head"):
            connection.execute(sa.text("SELECT id FROM audit_head FOR UPDATE"))  # writers wait, instead of a deadlock
        yield
    elif kind in ("mysql", "mariadb"):  # until it is released, or the connection ends
        name = f"modelkeep.{_key(connection)}"
        deadline = time.monotonic() + patience_seconds
        while connection.execute(sa.text("SELECT GET_LOCK(:name, 1)"), {"name": name}).scalar() != 1:
            _wait(deadline)
        try:
            yield
            # Before anybody else has the lock, who would else read the revision before this one.
            connection.exec_driver_sql("COMMIT")
        finally:
            if not connection.invalidated:
                connection.execute(sa.text("SELECT RELEASE_LOCK(:name)"), {"name": name})
    else:
        yield


def _wait(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise UnavailableError(
            "another process has been upgrading this registry for long: see what it does, then repeat: modelkeep db upgrade"
        )
    time.sleep(0.05)


def _key(connection: sa.Connection) -> int:
    """The same for all who upgrade this database. GET_LOCK names are the server's, not the database's."""
    database = str(connection.engine.url.database)
    return int.from_bytes(hashlib.sha256(f"modelkeep upgrade {database}".encode()).digest()[:7], "big")


def create_table(name: str, *parts: Any) -> None:
    """Names in it are compared byte by byte on every database, and sorted so."""
    if _inspector().has_table(name):
        return
    for part in parts:
        _by_bytes(part)
    options: dict[str, Any] = {
        f"{kind}_{option}": value for kind in ("mysql", "mariadb") for option, value in _MYSQL.items()
    }
    op.create_table(name, *parts, **options)


def create_index(table: str, columns: Sequence[str], *, unique: bool = False) -> None:
    name = index_name(table, columns)
    if name not in {index["name"] for index in _inspector().get_indexes(table)}:
        op.create_index(op.f(name), table, list(columns), unique=unique)


def index_name(table: str, columns: Sequence[str]) -> str:
    return f"ix_{table}_{'_'.join(columns)}"


def add_column(table: str, column: sa.Column[Any]) -> None:
    if column.name not in _columns(table):
        _by_bytes(column)
        op.add_column(table, column)


def drop_index(table: str, columns: Sequence[str]) -> None:
    name = index_name(table, columns)
    if name in {index["name"] for index in _inspector().get_indexes(table)}:
        op.drop_index(op.f(name), table_name=table)


def drop_columns(table: str, *names: str) -> None:
    there = [name for name in names if name in _columns(table)]
    if there:
        with op.batch_alter_table(table) as batch:
            for name in there:
                batch.drop_column(name)


def drop_tables(*names: str) -> None:
    """With their indexes."""
    for name in names:
        if _inspector().has_table(name):
            op.drop_table(name)


def compare_by_bytes(*tables: str) -> None:
    """Give tables that were made otherwise the collation of `create_table`. Rewrites what needs it and nothing else."""
    connection = op.get_bind()
    kind = connection.dialect.name
    for table in tables:
        if kind in ("mysql", "mariadb"):
            other = connection.execute(
                sa.text(
                    "SELECT count(*) FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = :table "
                    "AND collation_name IS NOT NULL AND collation_name <> :collation"
                ),
                {"table": table, "collation": _MYSQL["collate"]},
            ).scalar()
            if other:
                op.execute(
                    f"ALTER TABLE `{table}` CONVERT TO CHARACTER SET {_MYSQL['charset']} COLLATE {_MYSQL['collate']}"
                )
        elif kind == "postgresql":
            rows = connection.execute(
                sa.text(
                    "SELECT column_name, character_maximum_length FROM information_schema.columns WHERE table_schema = current_schema() "
                    "AND table_name = :table AND data_type = 'character varying' AND collation_name IS DISTINCT FROM 'C'"
                ),
                {"table": table},
            ).all()
            if rows:
                changes = ", ".join(
                    f'ALTER COLUMN "{name}" TYPE VARCHAR({length}) COLLATE "C"' for name, length in rows
                )
                op.execute(f'ALTER TABLE "{table}" {changes}')


def keep_all_digits(table: str, column: str, *, nullable: bool) -> None:
    """MySQL only: a FLOAT that keeps seven digits becomes a DOUBLE."""
    connection = op.get_bind()
    if connection.dialect.name not in ("mysql", "mariadb"):
        return
    kind = connection.execute(
        sa.text(
            "SELECT data_type FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = :table "
            "AND column_name = :column"
        ),
        {"table": table, "column": column},
    ).scalar()
    if str(kind).lower() == "float":
        op.execute(f"ALTER TABLE `{table}` MODIFY `{column}` DOUBLE {'NULL' if nullable else 'NOT NULL'}")


def _by_bytes(part: Any) -> None:
    """On PostgreSQL the collation is the column's; on MySQL it is that of the table."""
    if op.get_bind().dialect.name == "postgresql" and isinstance(part, sa.Column) and type(part.type) is sa.String:
        part.type = sa.String(part.type.length, collation="C")


def _inspector() -> sa.Inspector:
    return sa.inspect(op.get_bind())


def _columns(table: str) -> set[str]:
    return {column["name"] for column in _inspector().get_columns(table)}
