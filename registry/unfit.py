"""Take a version that cannot serve (it crashes the server, or is unhealthy) out of its route, where another can answer instead."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import leases, promotions, routes, versions
from registry.database import Database, Transaction
from registry.errors import NotFoundError
from registry.schema import Promotion, Route, RouteChange

KIND = "unfit"


def take_out(
    database: Database, environment: str, model: str, version: str, *, observer: str, reason: str
) -> str | None:
    """Withdraw a candidate, or put the stable version before back, whatever lease is held. Returns what was done, in words.

    None where the version has no traffic there by now, or nothing else can serve: then it stays, for a bad answer is no
    worse than none. A stable version is taken out once in a row: where the one before it was put there by this very
    function, both are unfit, and going to and fro would help nobody.
    """
    with database.write(actor=observer) as transaction:
        session = transaction.session
        routes.lock_environment(transaction, environment)
        route = routes.read(session, environment, model)
        if route is None:
            return None
        if route.promotion is not None and version in (route.candidate, route.stable):
            return _withdrawn(transaction, route, version, reason)
        if route.candidate == version:
            routes.change(
                transaction, environment, model, routes.Desired(stable=route.stable), kind=KIND, reason=reason
            )
            return _told(transaction, route, version, f"stays on {route.stable}", reason)
        if route.stable != version or (target := _before(session, environment, model)) is None:
            return None
        # A promotion that has not touched the route yet (it validates, or waits) began beside a version that goes now.
        under_way = leases.preempt(transaction, leases.subject_of(environment, model), environment, reason=reason)
        promotion = session.get(Promotion, under_way) if under_way else None
        if promotion is not None and promotion.state in promotions.ACTIVE:
            title = f"{model} {version}, which it began beside, is taken out"
            promotions.close(transaction, promotion, "withdrawn", title, reason, {})
        promotions.make_stable(transaction, environment, model, target, reason=reason)
        routes.change(transaction, environment, model, routes.Desired(stable=target), kind=KIND, reason=reason)
        return _told(transaction, route, version, f"goes back to {target}", reason)


def _withdrawn(transaction: Transaction, route: Route, version: str, reason: str) -> str | None:
    """The version is under promotion: its candidate, or watched in its soak. That promotion ends as withdrawn."""
    session = transaction.session
    promotion = session.get(Promotion, route.promotion)
    if promotion is None or promotion.version != version or promotion.state not in promotions.ACTIVE:
        return None
    leases.preempt(transaction, leases.subject_of(route.environment, route.model), route.environment, reason=reason)
    title = f"{route.model} {version} is withdrawn"
    promotions.close(transaction, promotion, "withdrawn", title, reason, {})
    return _told(transaction, route, version, f"the promotion {promotion.id} is withdrawn", reason)


def _told(transaction: Transaction, route: Route, version: str, what: str, reason: str) -> str:
    subject = f"version:{route.model}/{version}"
    transaction.record("version.unfit", subject, after={"environment": route.environment, "done": what}, reason=reason)
    return f"{route.model} {what}"


def _before(session: Session, environment: str, model: str) -> str | None:
    last = session.scalars(
        select(RouteChange)
        .where(RouteChange.environment == environment, RouteChange.model == model)
        .order_by(RouteChange.at.desc(), RouteChange.generation.desc())
        .limit(1)
    ).first()
    if last is not None and last.kind == KIND:
        return None
    try:
        target = routes.previous_stable(session, environment, model)
    except NotFoundError:
        return None
    row = versions.get(session, model, target)
    return target if row.state == "validated" and row.deleted_at is None else None


def note_unloadable(
    database: Database, environment: str, model: str, version: str, *, observer: str, error: str
) -> None:
    """Put on record that a replica could not load a version (its bytes have rotted, say). What it goes on with is its own matter."""
    with database.write(actor=observer) as transaction:
        transaction.record(
            "version.unloadable", f"version:{model}/{version}", after={"environment": environment}, reason=error
        )
