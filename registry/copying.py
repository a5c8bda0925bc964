"""A registry, whole, into an empty database of any kind: all rows, the audit chain checked, a new epoch. One transaction there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import JSON, Column, Table, Text, cast, delete, func, inspect, null, select, text, update
from sqlalchemy.orm import Session

from registry import audit, leases, migrate, routes
from registry.database import Database
from registry.errors import AuditError, ConflictError, LockedError, UsageError
from registry.migrate import COPYING
from registry.schema import REVISION, AuditHead, Base, Environment, Lease

BATCH = 1000
VERSION_TABLE = "alembic_version"


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied. `faults` are those of the source's audit chain, which the copy has too."""

    source: str
    target: str
    rows: dict[str, int]
    """By table, without the copy's own event."""
    events: int
    epochs: dict[str, str]
    """Environment -> its epoch in the copy."""
    behind: int
    """Events that the source got since the copy began: they are not in it."""
    faults: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def copy(source: Database, target: Database, *, on_table: Callable[[str, int], None] | None = None) -> Copied:
    """Copy the registry `source` into the empty database `target`, which must be another one. Anchors are not copied.

    What is copied is one moment of the source, whose writers go on. An interrupted copy leaves a database that every modelkeep
    refuses, and that a second try fills. `on_table` is told each table and its rows.

    Raises UsageError (the same database; a source of another release), ConflictError (the target holds something), LockedError
    (a promotion is under way), AuditError (what arrived is not what was sent).
    """
    if source.url == target.url:
        raise UsageError(f"{target.shown} is the registry itself: name another database")
    if (found := source.revision()) != REVISION:
        raise UsageError(
            f"the registry {source.shown} has schema revision {found}, this modelkeep {REVISION}: bring them together first, "
            "with modelkeep db upgrade"
        )
    target.make_folder()
    _check_empty(target)
    with source.write() as begun:
        _check_idle(begun.session)
        begun.record("registry.copy-begun", "registry", after={"to": target.shown})
    if target.revision() != COPYING:
        migrate.upgrade(target)
        with target.write() as marking:
            marking.session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{COPYING}'"))
    with source.read() as session, target.write() as transaction:
        head = session.execute(select(AuditHead.seq, AuditHead.hash)).one()
        rows = fill(session, transaction.session, on_table)
        faults = checked(session, transaction.session, rows, audit.Head(*head))
        epochs = new_epochs(transaction.session)
        transaction.record(
            "registry.copied",
            "registry",
            before={"from": source.shown, "events": head.seq},
            after={"to": target.shown, "rows": rows, "epochs": epochs},
            reason="; ".join(faults[:20]),
        )
        transaction.session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{REVISION}'"))
    with source.read() as session:
        behind = session.execute(select(AuditHead.seq)).scalar_one() - head.seq
    return Copied(source.shown, target.shown, rows, int(head.seq), epochs, behind, faults)


def _check_idle(session: Session) -> None:
    lease = session.scalars(select(Lease).where(Lease.state == leases.HELD).limit(1)).first()
    if lease is not None:
        raise LockedError(
            f"{lease.subject} is locked by {lease.holder}: a copy would cut that off; wait for it to end, or end it: "
            "modelkeep promotions"
        )


def _check_empty(target: Database) -> None:
    """Nothing there, a schema without rows, or what an interrupted copy left. Raises ConflictError, which says what there is."""
    if found := held(target):
        raise ConflictError(
            f"{target.shown} is not empty, so nothing was copied: it holds {', '.join(found)}; name an empty database"
        )


def held(target: Database) -> list[str]:
    """What a database holds, in words. Nothing where it is empty, has a schema without rows, or what an interrupted copy left."""
    with target.translated(), target.engine.connect() as connection:
        there = set(inspect(connection).get_table_names())
        found = []
        if VERSION_TABLE in there:
            version = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
            if version == COPYING:
                return []
        for name in sorted(there - {VERSION_TABLE}):
            table = Base.metadata.tables.get(name)
            if table is None:
                found.append(f"table {name}, which is not of a registry")
            elif name == AuditHead.__tablename__:
                continue  # the migration makes its row
            elif count := connection.execute(select(func.count()).select_from(table)).scalar():
                found.append(f"{count} row{'' if count == 1 else 's'} in {name}")
    return found


def fill(source: Session, target: Session, on_table: Callable[[str, int], None] | None) -> dict[str, int]:
    """Every row of every table, in batches. What an interrupted copy left goes first."""
    rows: dict[str, int] = {}
    for table in Base.metadata.sorted_tables:
        target.execute(delete(table))
        rows[table.name] = 0
        for batch in _batches(source, table):
            target.execute(table.insert(), batch)
            rows[table.name] += len(batch)
        if on_table is not None:
            on_table(table.name, rows[table.name])
    return rows


def _batches(session: Session, table: Table) -> Iterator[list[dict[str, Any]]]:
    nullable = [column for column in table.columns if isinstance(column.type, JSON) and column.nullable]
    query = select(table, *(_is_null(column) for column in nullable)).order_by(*table.primary_key.columns)
    for batch in session.execute(query.execution_options(yield_per=BATCH)).mappings().partitions():
        rows = [{column.name: row[column.name] for column in table.columns} for row in batch]
        for row, found in zip(rows, batch, strict=True):
            for column in nullable:
                if found[f"{column.name} is null"]:
                    row[column.name] = null()  # None would become the JSON null, which is another value
        yield rows


def _is_null(column: Column[Any]) -> Any:
    return cast(column, Text).is_(null()).label(f"{column.name} is null")


def checked(source: Session, target: Session, rows: dict[str, int], head: audit.Head) -> list[str]:
    """Count what arrived, and walk its audit chain. Raises AuditError; returns the faults that the source has too."""
    for table in Base.metadata.sorted_tables:
        arrived = target.scalar(select(func.count()).select_from(table))
        if arrived != rows[table.name]:
            raise AuditError(f"{arrived} rows arrived in {table.name}, {rows[table.name]} were sent; nothing was kept")
    verdict = audit.verify(target)
    if verdict.head != head:
        raise AuditError(
            f"the copy's audit chain ends at {verdict.head}, the source's at {head}; nothing was kept, repeat the copy"
        )
    if verdict.faults and verdict.faults != audit.verify(source).faults:
        raise AuditError(
            f"the copy's audit chain does not verify ({'; '.join(verdict.faults[:3])}), the source's does; nothing was kept"
        )
    target.expunge_all()
    return verdict.faults


def new_epochs(session: Session) -> dict[str, str]:
    """The servers see by it that this is another registry; every fencing token of the source is dead here."""
    epochs = {}
    for name in session.scalars(select(Environment.name).order_by(Environment.name)).all():
        epochs[name] = routes.new_epoch()
        session.execute(update(Environment).where(Environment.name == name).values(epoch=epochs[name]))
    return epochs
