"""A registry as one file: taken from a database of any kind in one moment, and brought back into one of any kind with a new epoch."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import inspect, select, text
from sqlalchemy.orm import Session

from registry import audit, clock, copying, endings, leases, migrate, replicas
from registry.copying import VERSION_TABLE
from registry.database import Database, Transaction
from registry.errors import ConflictError, StorageError, UnavailableError, UsageError
from registry.migrate import COPYING
from registry.schema import REVISION, AuditEvent, AuditHead, Lease, Promotion
from registry.stories import ACTIVE

RESTORED = "registry.restored"

OnTable = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Restored:
    """What `bring_back` did. `again`: the target had been restored from this very file before, and nothing has happened since."""

    target: str
    origin: str
    rows: dict[str, int]
    head: audit.Head
    """Of the file: the chain goes on behind it with the event of the restore."""
    epochs: dict[str, str]
    again: bool = False
    replaced: list[str] = field(default_factory=list)
    """What the target held before, in words."""
    anchors_kept: str | None = None
    """The anchors of what was replaced, put aside as evidence."""
    damaged_kept: str | None = None
    """Where the damaged file went that stood in the way."""

    def as_dict(self) -> dict[str, Any]:
        value = {name: getattr(self, name) for name in self.__slots__}
        value["head"] = {"seq": self.head.seq, "hash": self.head.hash}
        return value


def snapshot(source: Database, path: Path, *, on_table: OnTable | None = None) -> str:
    """Write the registry `source`, as it is at one moment, into the new SQLite file `path`. Its writers go on meanwhile.

    SQLite itself copies an SQLite file; of a server all rows are read in one transaction. The result is the same: a file that
    restores into every kind of database, and that is verified without a server. Returns how it was done, in words.

    Raises UsageError (another release's schema), UnavailableError, StorageError, AuditError (what arrived is not what was read).
    """
    if source.sqlite and not Path(str(source.url.database)).exists():
        raise UnavailableError(f"the registry {source.shown} is not there: nothing of it can be backed up")
    if (found := source.revision()) != REVISION:
        raise UsageError(
            f"the registry {source.shown} has schema revision {found}, this modelkeep {REVISION}: bring them together first, "
            "with modelkeep db upgrade"
        )
    if source.sqlite:
        _by_sqlite(source, path)
        how = "one copy by SQLite's backup API"
    else:
        _by_rows(source, path, on_table)
        how = "all rows, read in one REPEATABLE READ transaction"
    alone(path)
    return how


def _by_sqlite(source: Database, path: Path) -> None:
    try:
        # All pages in one step: copied in steps, it would begin again with every write of another process.
        with source.engine.connect() as connection:
            raw = connection.connection.driver_connection
            assert isinstance(raw, sqlite3.Connection)
            target = sqlite3.connect(path)
            try:
                raw.backup(target, pages=-1)
            finally:
                target.close()
    except sqlite3.Error as error:
        raise StorageError(f"the registry {source.shown} could not be copied to {path}: {error}") from error


def _by_rows(source: Database, path: Path, on_table: OnTable | None) -> None:
    target = Database(f"sqlite:///{path}")
    try:
        migrate.upgrade(target)
        with source.read() as session, target.write() as transaction:
            head = session.execute(select(AuditHead.seq, AuditHead.hash)).one()
            rows = copying.fill(session, transaction.session, on_table)
            copying.checked(session, transaction.session, rows, audit.Head(*head))
    finally:
        target.dispose()


def alone(path: Path) -> None:
    """Make an SQLite file one file, without a log beside it, and look that it is whole. Raises StorageError."""
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=DELETE")
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StorageError(f"{path.name} is no whole SQLite file: {error}") from error
    if found != "ok":
        raise StorageError(f"{path.name} is damaged: {found}")


def bring_back(
    source: Database,
    target: Database,
    *,
    origin: str,
    force: bool = False,
    actor: str | None = None,
    on_table: OnTable | None = None,
) -> Restored:
    """Make `target` the registry that lies in the private file `source`: one transaction, and one event `registry.restored`.

    Every environment gets a new epoch, by which servers see that they have to follow and by which every fencing token is dead.
    Leases are given back, promotions that were under way are ended, and the rows of servers go: each reports anew. `origin` is
    the backup, for the record. Anchors that know what was replaced are put aside, so that the chain verifies by those that are left.

    A target that holds something is refused without `force`, unless it is what a call for the same file left. Killed before the
    transaction ends, nothing has changed; killed later, the next call finishes it.

    Raises ConflictError, UsageError (a file of a later release), StorageError, UnavailableError, AuditError.
    """
    if source.revision() != REVISION:
        migrate.upgrade(source)  # a private file, taken by an earlier release
    target.make_folder()
    damaged = None
    try:
        held = copying.held(target)
    except StorageError as error:
        if not (force and target.sqlite and "is damaged" in str(error)):
            raise
        damaged, held = _put_aside(target), []
    with source.read() as session:
        head = audit.Head(*session.execute(select(AuditHead.seq, AuditHead.hash)).one())
    if held and (epochs := _again(target, head, origin)) is not None:
        kept = _follow(target)
        return Restored(target.shown, origin, {}, head, epochs, again=True, anchors_kept=kept)
    if held and not force:
        raise ConflictError(
            f"{target.shown} is not empty, so nothing was restored: it holds {', '.join(held)}; name an empty database, or replace "
            "it with --force"
        )
    replaced = _head(target) if held else None
    _make_ready(target, fresh=not held)
    with source.read() as session, target.write(actor=actor) as transaction:
        rows = copying.fill(session, transaction.session, on_table)
        copying.checked(session, transaction.session, rows, head)
        epochs = copying.new_epochs(transaction.session)
        let_go = _let_go(transaction, origin)
        transaction.record(
            RESTORED,
            "registry",
            before=None if replaced is None else {"events": replaced.seq, "hash": replaced.hash},
            after={"from": origin, "events": head.seq, "hash": head.hash, "epochs": epochs, "let_go": let_go},
            reason=f"restored from {origin} at head {head.seq}",
        )
        transaction.session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{REVISION}'"))
    kept = _follow(target)
    return Restored(target.shown, origin, rows, head, epochs, replaced=held, anchors_kept=kept, damaged_kept=damaged)


def _make_ready(target: Database, *, fresh: bool) -> None:
    """The schema of this release. An empty target is marked, so that nobody takes it for a registry before it is one."""
    if target.revision() == COPYING:
        return
    migrate.upgrade(target)
    if fresh:
        with target.write() as marking:
            marking.session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{COPYING}'"))


def _head(target: Database) -> audit.Head | None:
    """Of the registry that is replaced; None where what stands there has none."""
    if target.revision() != REVISION:
        return None
    with target.read() as session:
        row = session.execute(select(AuditHead.seq, AuditHead.hash)).one_or_none()
    return None if row is None else audit.Head(*row)


def _again(target: Database, head: audit.Head, origin: str) -> dict[str, str] | None:
    """The epochs of a target that was restored from this file, and has seen nothing else since."""
    if target.revision() != REVISION:
        return None
    with target.read() as session:
        now = session.execute(select(AuditHead.seq)).scalar_one_or_none()
        event, before = session.get(AuditEvent, head.seq + 1), session.get(AuditEvent, head.seq)
        if now != head.seq + 1 or event is None or event.action != RESTORED:
            return None
        fields = audit.read_text(event.text)
    if fields["after"]["from"] != origin or (before is not None and before.hash != head.hash):
        return None
    epochs: dict[str, str] = fields["after"]["epochs"]
    return epochs


def _let_go(transaction: Transaction, origin: str) -> list[dict[str, Any]]:
    """What was under way when the backup was taken is not under way any more. Returns what was changed, for the restore's own event:
    the chain gets longer by that one, whatever was under way."""
    session, reason = transaction.session, f"the registry was restored from {origin}"
    quiet = Transaction(session, transaction.actor, transaction.flow_run_id)
    for lease in session.scalars(select(Lease).where(Lease.state != leases.RELEASED).order_by(Lease.subject)).all():
        leases.preempt(quiet, lease.subject, lease.environment, reason=reason)
    under_way = select(Promotion).where(Promotion.state.in_(ACTIVE)).order_by(Promotion.created_at, Promotion.id)
    for row in session.scalars(under_way).all():
        if row.progress.get("promoted"):
            detail = f"{reason}. {row.version} stays the stable version, no longer watched."
            endings.close(quiet, row, "promoted", "The watch was ended by a restore", detail, {})
        else:
            detail = f"{reason}. The stable version stays."
            endings.close(quiet, row, "withdrawn", "Ended by a restore", detail, {})
    replicas.forget_all(session)
    return [
        {"action": one.action, "subject": one.subject, "before": one.before, "after": one.after} for one in quiet.events
    ]


def _follow(target: Database) -> str | None:
    """Leave only the anchors that fit the chain which is there now. Returns where the others were put, if there were any."""
    path = target.anchors
    if path is None or not path.exists():
        return None
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    left_out = 0
    try:
        with target.read() as session, path.open("rb") as old, fresh.open("xb") as new:
            fresh.chmod(0o600)
            for lines in _by_hundreds(old):
                stored = _hashes(session, [mark.seq for _, mark in lines])
                for line, mark in lines:
                    if stored.get(mark.seq) == mark.hash:
                        new.write(line)
                    else:
                        left_out += 1
            new.flush()
            os.fsync(new.fileno())
        if not left_out:
            return None
        kept = path.with_name(f"{path.name}.before-restore-{clock.now():%Y%m%dT%H%M%S%fZ}")
        kept.hardlink_to(path)
        fresh.replace(path)
    except OSError as error:
        raise StorageError(
            f"the registry {target.shown} is restored, but its anchors in {path} could not be brought after it ({error}); repeat the "
            "command"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
    return str(kept)


def _by_hundreds(lines: Iterable[bytes]) -> Iterable[list[tuple[bytes, audit.Head]]]:
    batch: list[tuple[bytes, audit.Head]] = []
    for line in lines:
        mark = audit.read_anchor(line)
        if mark is not None:
            batch.append((line, mark))
        if len(batch) == 500:
            yield batch
            batch = []
    yield batch


def _hashes(session: Session, seqs: list[int]) -> dict[int, str]:
    found = session.execute(select(AuditEvent.seq, AuditEvent.hash).where(AuditEvent.seq.in_(seqs)))
    return {0: audit.GENESIS, **{seq: hash_ for seq, hash_ in found}}


def _put_aside(target: Database) -> str:
    """A damaged file, with its log: a log that stayed would be played over the new file. Raises StorageError."""
    target.dispose()
    path = Path(str(target.url.database))
    kept = path.with_name(f"{path.name}.damaged-{clock.now():%Y%m%dT%H%M%S%fZ}")
    try:
        for end in ("-wal", "-shm", ""):
            one = path.with_name(path.name + end)
            if one.exists():
                shutil.move(one, kept.with_name(kept.name + end))
    except OSError as error:
        raise StorageError(f"the damaged registry {path} could not be put aside: {error}") from error
    return str(kept)


def row_counts(database: Database) -> dict[str, int]:
    """Rows of every table that is there, whatever the release that made them."""
    with database.translated(), database.engine.connect() as connection:
        names = sorted(set(inspect(connection).get_table_names()) - {VERSION_TABLE})
        quote = connection.dialect.identifier_preparer.quote
        return {
            name: int(connection.execute(text(f"SELECT count(*) FROM {quote(name)}")).scalar_one()) for name in names
        }
