"""What a person tells a promotion under way: pause, resume, advance, stop. Each is on record, and is taken once or not at all.

They are taken in the order given. A pause calls off an advance that was not carried out yet: who pauses wants nothing to move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry import clock, endings, leases, routes, stories
from registry.actor import Who
from registry.database import Database, Transaction
from registry.errors import FencedError, RefusedError, UsageError
from registry.promotions import Operation, writing
from registry.schema import Lease, Promotion, PromotionCommand, PromotionStep
from registry.stories import ACTIVE, AWAITING, SOAKING

Command = Literal["pause", "resume", "advance", "stop"]
COMMANDS: tuple[str, ...] = get_args(Command)


@dataclass(frozen=True, slots=True)
class Given:
    """A command as its promotion's carrier sees it."""

    number: int
    command: str
    actor: str
    reason: str

    def __str__(self) -> str:
        return f"{self.actor}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True)
class Standing:
    """What has been told to a promotion: whether it is paused and by whom, and what its carrier has not taken yet."""

    state: str
    reason: str
    paused: Given | None
    waiting: tuple[Given, ...]


def give(database: Database, promotion_id: str, *, command: str, who: Who, reason: str) -> dict[str, Any]:
    """Tell a promotion something. A stop happens at once; the rest is taken by whoever carries it, at its next look.

    An advance while one waits is that one: whoever lost the answer may ask again, and no stage is skipped by it.

    Returns promotion, command, state, step, paused, taken and a message that says what comes of it. Raises NotFoundError,
    UsageError (no such command), RefusedError (it has ended, or the command makes no sense now; the message says what it is doing).
    """
    if command not in COMMANDS:
        raise UsageError(f"{command!r} is no command: {', '.join(COMMANDS)} are")
    with database.write(actor=who.actor) as transaction:
        session = transaction.session
        row = stories.get(session, promotion_id)
        routes.lock_environment(transaction, row.environment)
        session.refresh(row)
        doing = _doing(row)
        if row.state not in ACTIVE:
            raise RefusedError(f"promotion {row.id} has ended ({doing}): there is nothing to {command}")
        paused = _paused(session, row.id)
        _check(row, command, paused, doing)
        before, told_before = row.state, _waiting_advance(session, row.id) if command == "advance" else None
        if told_before is None:
            given = _add(transaction, row, command, who, reason)
            if command == "pause":
                stories.leave_untaken(
                    transaction, row, f"paused by {given} before it was carried out", command="advance"
                )
            elif command == "stop":
                _stop(transaction, row, given)
        return {
            "promotion": row.id,
            "model": row.model,
            "version": row.version,
            "environment": row.environment,
            "command": command,
            "state": row.state,
            "step": row.step,
            "paused": command == "pause" or (paused is not None and command not in ("resume", "stop")),
            "taken": command == "stop",
            "message": _message(row, command, before) if told_before is None else _told_before(row, told_before),
        }


def standing(session: Session, promotion_id: str) -> Standing:
    """What a carrier has to know at each look, in two small queries. Raises FencedError where the promotion is gone."""
    row = session.execute(select(Promotion.state, Promotion.reason).where(Promotion.id == promotion_id)).one_or_none()
    if row is None:
        raise FencedError(
            f"the registry knows no promotion {promotion_id} any more: it is another one, or it went back in time; nothing was written"
        )
    state, reason = row
    rows = session.scalars(
        select(PromotionCommand).where(PromotionCommand.promotion == promotion_id).order_by(PromotionCommand.number)
    ).all()
    waiting = tuple(_given(row) for row in rows if row.taken_at is None)
    return Standing(state, reason, _last_pause(list(rows)), waiting)


def take(database: Database, operation: Operation, given: Given) -> bool:
    """Mark a pause or a resume as taken, with a step in the story. False where it was taken before. Raises FencedError.

    An advance is taken with the decision that follows it (registry.promotions.note and end).
    """
    with writing(database, operation) as transaction:
        row = transaction.session.get_one(PromotionCommand, (operation.id, given.number), populate_existing=True)
        if row.taken_at is not None:
            return False
        row.taken_at = clock.now()
        promotion = transaction.session.get_one(Promotion, operation.id)
        title = "Paused" if given.command == "pause" else "Resumed"
        stories.add_step(transaction, promotion, given.command, title, f"by {given}", {"command": given.number})
        return True


def listed(session: Session, promotion_id: str) -> list[dict[str, Any]]:
    """All commands that a promotion was given, the oldest first. `outcome`: waiting, taken, or "not taken: " and why."""
    closed = _not_taken(session, promotion_id)
    rows = session.scalars(
        select(PromotionCommand).where(PromotionCommand.promotion == promotion_id).order_by(PromotionCommand.number)
    )
    return [
        {
            "number": row.number,
            "command": row.command,
            "actor": row.actor,
            "reason": row.reason,
            "at": clock.text(row.at),
            "taken_at": clock.text(row.taken_at) if row.taken_at and row.number not in closed else None,
            "outcome": closed.get(row.number, "taken" if row.taken_at else "waiting"),
        }
        for row in rows
    ]


def _not_taken(session: Session, promotion_id: str) -> dict[int, str]:
    """The commands that were closed because nothing was left for them to do: why, as the story says it."""
    steps = session.scalars(
        select(PromotionStep.figures).where(PromotionStep.promotion == promotion_id, PromotionStep.step.in_(COMMANDS))
    )
    return {
        int(figures["command"]): f"not taken: {figures['not_taken']}" for figures in steps if "not_taken" in figures
    }


def _waiting_advance(session: Session, promotion_id: str) -> PromotionCommand | None:
    query = select(PromotionCommand).where(
        PromotionCommand.promotion == promotion_id,
        PromotionCommand.command == "advance",
        PromotionCommand.taken_at.is_(None),
    )
    return session.scalars(query.order_by(PromotionCommand.number)).first()


def _told_before(row: Promotion, given: PromotionCommand) -> str:
    return (
        f"{_doing(row)}: told to advance at {clock.text(given.at)} already, by {_given(given)}; that one waits for the next look, "
        "and this one adds nothing"
    )


def _check(row: Promotion, command: str, paused: Given | None, doing: str) -> None:
    if row.state == AWAITING and command != "stop":
        raise RefusedError(
            f"promotion {row.id} is {doing}: `modelkeep approve {row.id}` lets it go on, "
            f"`modelkeep promotions stop {row.id}` ends it; there is nothing to {command}"
        )
    if command == "pause" and paused is not None:
        raise RefusedError(f"promotion {row.id} is paused already (by {paused})")
    if command == "resume" and paused is None:
        raise RefusedError(f"promotion {row.id} is not paused: it is {doing}")
    if command == "advance" and paused is not None:
        raise RefusedError(f"promotion {row.id} is paused (by {paused}): resume it first")
    if command == "advance" and not row.progress.get("windows") and not row.progress.get("promoted"):
        raise RefusedError(f"promotion {row.id} is {doing}: there is no stage to pass yet")


def _doing(row: Promotion) -> str:
    if row.state == AWAITING:
        return "waiting for an approval"
    if row.state == SOAKING:
        return "watching the promoted version"
    if row.state not in ACTIVE:
        return row.state
    windows = row.progress.get("windows") or []
    if windows:
        return f"in {windows[-1]['stage']}"
    return "preparing the first stage" if "validated" in row.progress else "validating"


def _stop(transaction: Transaction, row: Promotion, given: Given) -> None:
    """End it here and now: its carrier may be dead, waiting, or busy for minutes; its lease is taken from it."""
    transaction.session.get_one(PromotionCommand, (row.id, given.number)).taken_at = clock.now()
    subject = leases.subject_of(row.environment, row.model)
    lease = transaction.session.get(Lease, subject)
    if lease is not None and lease.promotion == row.id:
        leases.preempt(transaction, subject, row.environment, reason=f"stopped by {given}")
    if row.progress.get("promoted"):
        detail = f"by {given}. {row.version} stays the stable version, no longer watched."
        endings.close(transaction, row, "promoted", "The watch was stopped", detail, {})
    else:
        endings.close(transaction, row, "withdrawn", "Stopped", f"by {given}. The stable version stays.", {})


def _message(row: Promotion, command: str, before: str) -> str:
    if command == "stop":
        if before == SOAKING or row.progress.get("promoted"):
            return (
                f"{row.model} {row.version} stays the stable version and is no longer watched; "
                f"to go back: modelkeep rollback {row.model}"
            )
        return f"{row.model} {row.version} is withdrawn; the stable version stays"
    return {
        "pause": "the shares of the traffic and the time of judging stand still; evidence still withdraws a bad version",
        "resume": "it goes on where it stood",
        "advance": f"{_doing(row)}: passed at the next look, unless the evidence says withdraw",
    }[command]


def _add(transaction: Transaction, row: Promotion, command: str, who: Who, reason: str) -> Given:
    session = transaction.session
    last = session.scalar(select(func.max(PromotionCommand.number)).where(PromotionCommand.promotion == row.id)) or 0
    session.add(
        PromotionCommand(
            promotion=row.id, number=last + 1, command=command, actor=who.actor, reason=reason, at=clock.now()
        )
    )
    session.flush()
    transaction.record(
        f"promotion.asked-to-{command}",
        f"promotion:{row.id}",
        after={"command": last + 1, "via": who.via, "key": who.key_id, "claimed": who.claimed, "while": _doing(row)},
        reason=reason,
    )
    return Given(last + 1, command, who.actor, reason)


def _paused(session: Session, promotion_id: str) -> Given | None:
    query = select(PromotionCommand).where(PromotionCommand.promotion == promotion_id)
    return _last_pause(list(session.scalars(query.order_by(PromotionCommand.number))))


def _last_pause(rows: list[PromotionCommand]) -> Given | None:
    last = next((row for row in reversed(rows) if row.command in ("pause", "resume")), None)
    return _given(last) if last is not None and last.command == "pause" else None


def _given(row: PromotionCommand) -> Given:
    return Given(row.number, row.command, row.actor, row.reason)
