"""Rollbacks of record: make an earlier version stable, in one transaction."""

from __future__ import annotations

from typing import Any

from registry import leases, promotions, routes, versions
from registry.database import Database
from registry.errors import NotFoundError, RefusedError
from registry.schema import Promotion


def roll_back(
    database: Database,
    *,
    environment: str,
    model: str,
    to: str | None,
    reason: str,
    ttl_seconds: float,
    emergency: bool = False,
    flow_run_id: str | None = None,
    actor: str | None = None,
) -> dict[str, Any]:
    """Make an earlier version stable at once. One transaction: lease, route, placements, events.

    An emergency pre-empts any lease and closes the promotion that held it. Raises LockedError, NotFoundError, RefusedError.
    """
    subject = leases.subject_of(environment, model)
    with database.write(flow_run_id=flow_run_id, actor=actor) as transaction:
        session = transaction.session
        routes.lock_environment(transaction, environment)
        route = routes.read(session, environment, model)
        if route is None or route.stable is None:
            raise NotFoundError(f"{model} serves nothing in {environment}: there is nothing to roll back")
        before, closed = route.stable, False
        withdrawn: str | None = None
        if emergency:
            under_way = leases.preempt(transaction, subject, environment, reason=reason)
            promotion = session.get(Promotion, under_way) if under_way else None
            if promotion is not None and promotion.state == promotions.RUNNING:
                promotions.close(transaction, promotion, "withdrawn", "Emergency rollback", reason, {})
                closed, withdrawn = True, promotion.version
        else:
            held = leases.acquire(
                transaction,
                subject,
                environment,
                holder=f"rollback by {transaction.actor}",
                ttl_seconds=ttl_seconds,
                promotion=None,
            )
            leases.release(transaction, held)
        # To withdraw what was under way is the rollback that was asked for, unless a version was named.
        target = to or (
            route.stable if closed and route.stable else routes.previous_stable(session, environment, model)
        )
        row = versions.get(session, model, target)
        if row.state in ("archived", "rejected", "registered"):
            raise RefusedError(f"{model} {target} is {row.state}: only a validated version can take traffic")
        if not routes.has_been_stable(session, environment, model, target):
            raise RefusedError(
                f"{model} {target} has never been the stable version in {environment}, so nothing can go back to it: "
                f"modelkeep promote {model} {target}"
            )
        if route.stable == target:
            if not emergency:
                raise RefusedError(f"{model} {target} is the stable version in {environment} already")
        else:
            promotions.make_stable(transaction, environment, model, target, reason=reason)
        changed = routes.change(
            transaction, environment, model, routes.Desired(stable=target), kind="rollback", reason=reason
        )
        transaction.record(
            "model.rolled-back",
            f"model:{environment}/{model}",
            before={"stable": before},
            after={"stable": target},
            reason=reason,
        )
        return {
            "model": model,
            "environment": environment,
            "from": before,
            "to": target,
            "withdrawn": withdrawn,
            "generation": changed.generation,
        }
