"""What is on record of promotions: reading them, and adding to the story of one. Who moves them is registry.promotions."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry import clock
from registry.database import Transaction
from registry.errors import NotFoundError
from registry.schema import Promotion, PromotionCommand, PromotionStep

RUNNING, AWAITING, SOAKING = "running", "awaiting", "soaking"
ACTIVE = (RUNNING, AWAITING, SOAKING)
ENDED = ("promoted", "shadowed", "rejected", "withdrawn", "held", "failed")
"""Under way. `awaiting` waits for an approval; `soaking` is promoted and still watched."""

_RUNS_LOOKED_AT = 200


def get(session: Session, identity: str) -> Promotion:
    row = session.get(Promotion, identity)
    if row is None:
        raise NotFoundError(f"there is no promotion {identity!r}; see: modelkeep promotions")
    return row


def of_run(session: Session, flow_run_id: str) -> Promotion | None:
    """The promotion that a flow run began or carried on (the last, where a restart began another)."""
    query = select(Promotion).where(Promotion.flow_run_id == flow_run_id).order_by(Promotion.created_at.desc())
    found = session.scalars(query.limit(1)).first()
    if found is not None:
        return found
    # Another run carries it on by now; whoever asks for the earlier run means the same promotion.
    recent = session.scalars(select(Promotion).order_by(Promotion.created_at.desc()).limit(_RUNS_LOOKED_AT))
    return next((row for row in recent if flow_run_id in row.progress.get("flow_runs", ())), None)


def listed(
    session: Session,
    *,
    model: str | None = None,
    environment: str | None = None,
    states: Collection[str] = (),
    limit: int = 50,
) -> list[dict[str, Any]]:
    """The newest first. `states` of none are all."""
    query = select(Promotion).order_by(Promotion.created_at.desc()).limit(limit)
    if model is not None:
        query = query.where(Promotion.model == model)
    if environment is not None:
        query = query.where(Promotion.environment == environment)
    if states:
        query = query.where(Promotion.state.in_(states))
    return [describe(row) for row in session.scalars(query)]


def describe(row: Promotion) -> dict[str, Any]:
    return {
        "id": row.id,
        "environment": row.environment,
        "model": row.model,
        "version": row.version,
        "from_version": row.from_version,
        "strategy": row.strategy,
        "state": row.state,
        "step": row.step,
        "reason": row.reason,
        "actor": row.actor,
        "flow_run_id": row.flow_run_id,
        "created_at": clock.text(row.created_at),
        "finished_at": clock.text(row.finished_at) if row.finished_at else None,
        **_durations(row),
    }


def _durations(row: Promotion) -> dict[str, float | None]:
    """Of the validation; of the swap, from the command to all of the traffic; of the watch after it, as far as it was judged."""
    swapped, soak = row.progress.get("all_traffic_at"), row.progress.get("soak")
    seconds = None
    if swapped is not None:
        seconds = max(0.0, (dt.datetime.fromisoformat(swapped) - row.created_at).total_seconds())
    return {
        "validation_seconds": row.progress.get("validation_seconds"),
        "swap_seconds": seconds,
        "watch_seconds": None if soak is None else soak.get("watched_seconds"),
    }


def story(session: Session, identity: str) -> list[dict[str, Any]]:
    """The decisions of a promotion in order, with their figures."""
    rows = session.scalars(
        select(PromotionStep).where(PromotionStep.promotion == identity).order_by(PromotionStep.number)
    )
    return [
        {
            "number": s.number,
            "at": clock.text(s.at),
            "step": s.step,
            "title": s.title,
            "detail": s.detail,
            "figures": s.figures,
        }
        for s in rows
    ]


def add_step(
    transaction: Transaction, row: Promotion, step: str, title: str, detail: str, figures: dict[str, Any]
) -> None:
    """One more decision, with its audit event."""
    session = transaction.session
    session.flush()
    number = (session.scalar(select(func.max(PromotionStep.number)).where(PromotionStep.promotion == row.id)) or 0) + 1
    session.add(
        PromotionStep(
            promotion=row.id,
            number=number,
            at=clock.now(),
            step=step,
            title=title[:255],
            detail=detail,
            figures=figures,
        )
    )
    transaction.record(f"promotion.{step}", f"promotion:{row.id}", after={"title": title}, reason=detail[:2000])


def leave_untaken(transaction: Transaction, row: Promotion, why: str, *, command: str | None = None) -> None:
    """Close the commands that wait for a carrier (those of one name, or all): none will take them. The story says why."""
    query = select(PromotionCommand).where(
        PromotionCommand.promotion == row.id, PromotionCommand.taken_at.is_(None)
    )  # fmt: skip
    if command is not None:
        query = query.where(PromotionCommand.command == command)
    for waiting in transaction.session.scalars(query.order_by(PromotionCommand.number)).all():
        waiting.taken_at = clock.now()
        figures = {"command": waiting.number, "not_taken": why}
        add_step(
            transaction, row, waiting.command, "Not taken", f"{waiting.command} by {waiting.actor}: {why}", figures
        )
