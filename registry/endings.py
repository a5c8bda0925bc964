"""The ways in which a promotion ends without its carrier, and what each end does to route and placements."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import clock, leases, routes, states
from registry.database import Database, Transaction
from registry.errors import ConflictError
from registry.schema import Lease, Promotion, Route
from registry.stories import ACTIVE, SOAKING, add_step, leave_untaken

Outcome = Literal["promoted", "shadowed", "rejected", "withdrawn", "held", "failed"]
STAGING = "staging"


def expire(database: Database, environment: str, beat: leases.Beat, *, observer: str) -> str | None:
    """Withdraw what a dead process left, by compare-and-set on its heartbeat; the stable version stays.

    A soak is not ended by that: it stays "soaking" with a free lease, for the next carrier.

    Called by whoever saw the lease stand still for its time to live. Returns the promotion, or None where the lease moved.
    """
    with database.write(actor=observer) as transaction:
        lease = leases.still(transaction, environment, beat)
        if lease is None:
            return None
        identity = lease.promotion
        lease.state, lease.promotion = leases.RELEASED, None
        reason = f"the run that held the lease has not moved for {beat.ttl_seconds:g} s"
        transaction.record(
            "lease.expired", beat.subject, before={"token": beat.token, "heartbeat": beat.heartbeat}, reason=reason
        )
        promotion = transaction.session.get(Promotion, identity) if identity else None
        if promotion is None or promotion.state not in ACTIVE:
            return identity
        if promotion.progress.get("promoted"):
            # All that the judge needs is on record: whoever takes the lease next goes on with the watch.
            promotion.state = SOAKING
            detail = f"{reason}; seen by {observer}. The version is watched on by whoever takes it up."
            add_step(transaction, promotion, "orphaned", "The soak lost its flow", detail, {})
            return identity
        detail = f"{reason}; seen by {observer}. The candidate is withdrawn, the stable version stays."
        close(transaction, promotion, "withdrawn", "Lease expired", detail, {})
        return identity


def orphaned(session: Session, environment: str, model: str) -> Promotion | None:
    """The promotion of a model that is in its soak. Nobody carries it where the model's lease is free, or the caller's."""
    query = select(Promotion).where(
        Promotion.environment == environment, Promotion.model == model, Promotion.state == SOAKING
    )
    return session.scalars(query.order_by(Promotion.created_at.desc()).limit(1)).first()


def orphans(session: Session) -> list[str]:
    """The promotions in their soak that nobody carries: their models' leases are free."""
    rows = session.execute(
        select(Promotion.id, Promotion.environment, Promotion.model)
        .where(Promotion.state == SOAKING)
        .order_by(Promotion.created_at)
    ).all()
    if not rows:
        return []
    subjects = [leases.subject_of(environment, model) for _, environment, model in rows]
    taken = set(
        session.scalars(select(Lease.subject).where(Lease.subject.in_(subjects), Lease.state != leases.RELEASED))
    )
    return [row[0] for row, subject in zip(rows, subjects, strict=True) if subject not in taken]


def supersede(
    transaction: Transaction, environment: str, model: str, outcome: Literal["promoted", "withdrawn"], *, by: str
) -> Promotion | None:
    """End a soak that nobody carries, because something else begins with the model. Returns the promotion, if there was one.

    "promoted": the version stays the stable one; "withdrawn": the version before it comes back.
    """
    row = orphaned(transaction.session, environment, model)
    if row is not None:
        detail = f"its flow was gone, and {by} began before the soak was over"
        close(transaction, row, outcome, "Soak superseded", detail, {})
    return row


def make_stable(transaction: Transaction, environment: str, model: str, version: str, *, reason: str) -> None:
    route = routes.read(transaction.session, environment, model)
    if route is not None and route.stable not in (None, version):
        before = states.placement(transaction.session, model, str(route.stable), environment)
        if before is not None and before.status == "stable":
            states.place(transaction, model, str(route.stable), environment, "retired", reason=reason)
    states.place(transaction, model, version, environment, "stable", reason=reason)


def close(
    transaction: Transaction, row: Promotion, outcome: Outcome, title: str, detail: str, figures: dict[str, Any]
) -> None:
    """End a promotion of record, whoever ends it. Takes its candidate (or, in the soak, its new stable version) out."""
    if row.state not in ACTIVE:
        raise ConflictError(f"promotion {row.id} has ended already ({row.state})")
    session, promoted = transaction.session, bool(row.progress.get("promoted"))
    if outcome == "shadowed" and row.strategy != "shadow":
        raise ConflictError(f"promotion {row.id} cannot end as shadowed: its strategy is {row.strategy}")
    if outcome == "promoted" and not promoted:
        raise ConflictError(
            f"promotion {row.id} cannot end as promoted: {row.model} {row.version} was never made stable"
        )
    route: Route | None = routes.read(session, row.environment, row.model)
    if route is not None and route.promotion == row.id:
        if outcome == "promoted":
            # The route stays; only the counting ends.
            routes.change(
                transaction,
                row.environment,
                row.model,
                routes.Desired(stable=row.version),
                kind="settled",
                reason=title,
                promotion=None,
            )
        elif promoted or route.candidate is not None or route.watch:
            stable = row.from_version
            if promoted and stable is not None:
                states.place(transaction, row.model, stable, row.environment, "stable", reason=title)
            routes.change(
                transaction,
                row.environment,
                row.model,
                routes.Desired(stable=stable),
                kind="settled" if outcome == "shadowed" else "withdraw",
                reason=title,
                promotion=None,
            )
    if outcome == "shadowed":
        states.place(transaction, row.model, row.version, STAGING, "passed", reason=title)
    elif outcome != "promoted":
        _leave(transaction, row, title)
    if "soak" in row.progress:  # how the soak was cut is of use to the next carrier only, and there is none any more
        soak = {key: value for key, value in row.progress["soak"].items() if key != "parts"}
        row.progress = {**row.progress, "soak": soak}
    leave_untaken(transaction, row, "the promotion had ended")
    row.state, row.reason, row.finished_at = outcome, title, clock.now()
    add_step(transaction, row, outcome, title, detail, figures)


def _leave(transaction: Transaction, row: Promotion, reason: str) -> None:
    """Move the placements of a version that did not make it."""
    for environment in (STAGING, row.environment):
        place = states.placement(transaction.session, row.model, row.version, environment)
        if place is not None and place.status in ("testing", "candidate", "stable"):
            states.place(transaction, row.model, row.version, environment, "withdrawn", reason=reason)
