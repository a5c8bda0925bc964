"""Leases: one operation per subject at a time, with a fencing token that each of its writes must present."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from registry import clock
from registry.database import Database, Transaction
from registry.errors import FencedError, LockedError
from registry.routes import lock_environment
from registry.schema import Environment, Lease

HELD, AWAITING, RELEASED = "held", "awaiting_approval", "released"


@dataclass(frozen=True, slots=True)
class Held:
    """A lease in hand. `token` is epoch and counter: it stays dead after a restore too."""

    subject: str
    environment: str
    token: str
    ttl_seconds: float


@dataclass(frozen=True, slots=True)
class Beat:
    """What an observer sees of a lease: who holds it, and how far its heartbeat has come."""

    subject: str
    token: str
    heartbeat: int
    ttl_seconds: float


def subject_of(environment: str, model: str) -> str:
    return f"model:{environment}/{model}"


def acquire(
    transaction: Transaction, subject: str, environment: str, *, holder: str, ttl_seconds: float, promotion: str | None
) -> Held:
    """Take a free lease, with a new token. Raises LockedError, which says who holds it and since when."""
    row = _locked(transaction, subject, environment)
    if row is not None and row.state != RELEASED:
        raise LockedError(
            f"{subject} is locked by {row.holder} since {clock.text(row.since)}"
            + (f" (promotion {row.promotion})" if row.promotion else "")
            + ": wait for it to end"
            + (f", or end it with: modelkeep promotions stop {row.promotion}" if row.promotion else "")
        )
    return _give(transaction, row, subject, environment, holder, ttl_seconds, promotion, "lease.acquired")


def take_over(transaction: Transaction, subject: str, environment: str, *, holder: str, ttl_seconds: float) -> Held:
    """The same operation goes on in another process: a new token, so that the old process is fenced off."""
    row = _locked(transaction, subject, environment)
    if row is None or row.state == RELEASED:
        raise FencedError(f"{subject}: the lease has run out, so the operation was withdrawn; start a new one")
    return _give(transaction, row, subject, environment, holder, ttl_seconds, row.promotion, "lease.taken-over")


def preempt(transaction: Transaction, subject: str, environment: str, *, reason: str) -> str | None:
    """Take a lease away from whoever holds it (emergency rollback). Returns the promotion that was under way."""
    row = _locked(transaction, subject, environment)
    if row is None or row.state == RELEASED:
        return None
    promotion, row.promotion = row.promotion, None
    row.state, row.counter = RELEASED, row.counter + 1
    transaction.record("lease.pre-empted", subject, before={"holder": row.holder, "token": row.token}, reason=reason)
    return promotion


def check(transaction: Transaction, held: Held) -> None:
    """Every write of an operation begins with this. Raises FencedError where the token is dead.

    A token of another epoch is dead too: a restored registry may hold the very row that this process once held.
    """
    row = _locked(transaction, held.subject, held.environment)
    epoch = lock_environment(transaction, held.environment).epoch
    if row is None or row.state == RELEASED or row.token != held.token or not _of_epoch(held, epoch):
        raise FencedError(
            f"{held.subject}: this run no longer holds the lease (its token {held.token} is dead), so nothing was written; "
            "see: modelkeep promotions"
        )


def release(transaction: Transaction, held: Held) -> None:
    check(transaction, held)
    row = transaction.session.get_one(Lease, held.subject)
    row.state, row.promotion = RELEASED, None
    transaction.record("lease.released", held.subject, before={"token": held.token})


def wait_for_approval(transaction: Transaction, held: Held) -> None:
    """From now on nobody has to beat: the operation waits for a person. Raises FencedError where the token is dead."""
    check(transaction, held)
    row = transaction.session.get_one(Lease, held.subject)
    row.state = AWAITING
    transaction.record("lease.awaiting-approval", held.subject, after={"token": held.token, "holder": row.holder})


def end_waiting(transaction: Transaction, subject: str, environment: str, *, promotion: str, reason: str) -> None:
    """Release the lease of a promotion that waited and is over. One that another operation has by now is left alone."""
    row = _locked(transaction, subject, environment)
    if row is None or row.state == RELEASED or row.promotion != promotion:
        return
    row.state, row.promotion = RELEASED, None
    transaction.record("lease.released", subject, before={"token": row.token}, reason=reason)


def beat_waiting(database: Database, subject: str, token: str) -> bool:
    """A process that waits for the approval itself says that it is there. False once the lease does not wait any more.

    Nothing expires by it: it only tells others that nobody else has to go on with the promotion. Not audited.
    """
    with database.write(exclusive=False) as transaction:
        moved = transaction.session.execute(
            update(Lease)
            .where(Lease.subject == subject, Lease.token == token, Lease.state == AWAITING)
            .values(heartbeat=Lease.heartbeat + 1)
            .execution_options(synchronize_session=False)
        )
        return bool(moved.rowcount == 1)  # type: ignore[attr-defined]


def waiting(session: Session, environment: str) -> list[Beat]:
    """The leases that wait for an approval."""
    rows = session.execute(
        select(Lease.subject, Lease.token, Lease.heartbeat, Lease.ttl_seconds).where(
            Lease.environment == environment, Lease.state == AWAITING
        )
    )
    return [Beat(*row) for row in rows]


def beat(database: Database, held: Held) -> None:
    """Move the heartbeat. Raises FencedError where the lease is no longer ours. Not audited."""
    with database.write(exclusive=False) as transaction:
        epoch = transaction.session.scalar(select(Environment.epoch).where(Environment.name == held.environment))
        moved = transaction.session.execute(
            update(Lease)
            .where(Lease.subject == held.subject, Lease.token == held.token, Lease.state == HELD)
            .values(heartbeat=Lease.heartbeat + 1)
            .execution_options(synchronize_session=False)
        )
        if moved.rowcount != 1 or not _of_epoch(held, epoch):  # type: ignore[attr-defined]
            raise FencedError(f"{held.subject}: the lease with token {held.token} has expired or was taken")


def beats(session: Session, environment: str) -> list[Beat]:
    """The leases that need a heartbeat (one that waits for an approval has none)."""
    rows = session.execute(
        select(Lease.subject, Lease.token, Lease.heartbeat, Lease.ttl_seconds).where(
            Lease.environment == environment, Lease.state == HELD
        )
    )
    return [Beat(*row) for row in rows]


def is_free(session: Session, subject: str) -> bool:
    """Whether nobody holds a lease on it, and none waits for an approval."""
    state = session.scalar(select(Lease.state).where(Lease.subject == subject))
    return state is None or state == RELEASED


def beats_everywhere(session: Session) -> dict[str, list[Beat]]:
    """The same of every environment that has such a lease."""
    rows = session.execute(
        select(Lease.environment, Lease.subject, Lease.token, Lease.heartbeat, Lease.ttl_seconds).where(
            Lease.state == HELD
        )
    )
    found: dict[str, list[Beat]] = {}
    for environment, *beat in rows:
        found.setdefault(environment, []).append(Beat(*beat))
    return found


class Observer:
    """Tells which leases have not moved for their time to live, on the observer's own monotonic clock.

    Wall clocks are never compared: a lease is stale when *this* process has watched the same token and heartbeat for that
    long. Time in which it could not look (the database was gone, the process was stopped) does not count: the holder may not have
    been able to beat either.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._seen: dict[str, tuple[str, int, float]] = {}
        self._looked = monotonic()

    def stale(self, beats: Iterable[Beat]) -> list[Beat]:
        now, stale, alive = self._monotonic(), [], set()
        gap, self._looked = now - self._looked, now
        for beat in beats:
            alive.add(beat.subject)
            token, heartbeat, since = self._seen.get(beat.subject, ("", -1, now))
            if (token, heartbeat) != (beat.token, beat.heartbeat) or gap > beat.ttl_seconds / 2:
                self._seen[beat.subject] = (beat.token, beat.heartbeat, now)
            elif now - since >= beat.ttl_seconds:
                stale.append(beat)
        for subject in self._seen.keys() - alive:
            del self._seen[subject]
        return stale


def still(transaction: Transaction, environment: str, beat: Beat) -> Lease | None:
    """The lease, locked, if it has not moved since `beat` was seen (compare-and-set), else None."""
    row = _locked(transaction, beat.subject, environment)
    if row is None or (row.state, row.token, row.heartbeat) != (HELD, beat.token, beat.heartbeat):
        return None
    return row


def _of_epoch(held: Held, epoch: str | None) -> bool:
    return held.token.rpartition(".")[0] == epoch


def _locked(transaction: Transaction, subject: str, environment: str) -> Lease | None:
    lock_environment(transaction, environment)
    return transaction.session.execute(
        select(Lease).where(Lease.subject == subject).with_for_update().execution_options(populate_existing=True)
    ).scalar_one_or_none()


def _give(
    transaction: Transaction,
    row: Lease | None,
    subject: str,
    environment: str,
    holder: str,
    ttl_seconds: float,
    promotion: str | None,
    action: str,
) -> Held:
    epoch = lock_environment(transaction, environment).epoch
    if row is None:
        row = Lease(subject=subject, environment=environment, counter=0)
        transaction.session.add(row)
    row.counter += 1
    row.token = f"{epoch}.{row.counter}"
    row.state, row.heartbeat, row.ttl_seconds = HELD, 0, ttl_seconds
    row.holder, row.promotion, row.since = holder, promotion, clock.now()
    transaction.session.flush()
    transaction.record(action, subject, after={"holder": holder, "token": row.token, "promotion": promotion})
    return Held(subject, environment, row.token, ttl_seconds)
