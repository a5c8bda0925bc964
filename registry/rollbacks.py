"""Rollbacks of record: make an earlier version stable, in one transaction or by steps, and write back what a server did without the registry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import clock, endings, leases, promotions, routes, versions
from registry.actor import Who
from registry.database import Database, Transaction
from registry.errors import ConflictError, NotFoundError, RefusedError, UsageError
from registry.policy import PromotionPolicy
from registry.schema import Environment, Lease, Promotion, Route, RouteChange

GRADUAL = "rollback"
"""The strategy under which a gradual rollback is on record among the promotions."""


@dataclass(frozen=True, slots=True)
class Hold:
    """What a server serves against its last route, because it was told so while the registry did not answer."""

    model: str
    environment: str
    to: str
    before: str | None
    epoch: str
    generation: int
    """Of the route that the hold was made over: by these two it is written back, or not."""
    actor: str
    key_id: str | None
    claimed: str | None
    reason: str
    at: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Written = Literal["written-back", "met", "superseded"]


@dataclass(frozen=True, slots=True)
class Seen:
    """The route that a rollback was decided over. The generation is the route's own: changes of other models do not touch it."""

    epoch: str
    generation: int
    stable: str
    candidate: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Aim:
    """What a rollback comes to, decided once: whoever asks again because no answer came goes there, and no further."""

    to: str
    seen: Seen


def aim(session: Session, environment: str, model: str, *, to: str | None, emergency: bool) -> Aim:
    """Decide where a rollback goes: to the version named; else what is under way is undone, else to the stable version before.

    Changes nothing. Raises NotFoundError.
    """
    row, route = session.get(Environment, environment), routes.read(session, environment, model)
    if row is None or route is None or route.stable is None:
        raise _nothing(environment, model)
    seen = Seen(row.epoch, route.generation, route.stable, route.candidate)
    return Aim(to or _target(session, route, emergency=emergency), seen)


def roll_back(
    database: Database,
    *,
    environment: str,
    model: str,
    to: str | None,
    reason: str,
    ttl_seconds: float,
    emergency: bool = False,
    seen: Seen | None = None,
    flow_run_id: str | None = None,
    who: Who | None = None,
) -> dict[str, Any]:
    """Make an earlier version stable at once. One transaction: lease, route, placements, events.

    An emergency pre-empts any lease and closes the promotion that held it. `who` is the author where it is not this process.
    With `seen` and `to` (see `aim`) it can be asked for again: what is done already is not done twice. Raises LockedError,
    NotFoundError, RefusedError, and ConflictError where another version has become stable since what was seen.
    """
    with database.write(flow_run_id=flow_run_id, actor=None if who is None else who.actor) as transaction:
        return take_back(
            transaction, environment, model, to, reason=reason, ttl_seconds=ttl_seconds, emergency=emergency, seen=seen,
            who=who,
        )  # fmt: skip


def done_by(database: Database, flow_run_id: str | None, environment: str, model: str) -> dict[str, Any] | None:
    """What a flow run has rolled back already: it is started again to see that the servers follow, not to go one further back.

    None where it has not. Raises RefusedError where the route has changed since.
    """
    if flow_run_id is None:
        return None
    with database.read() as session:
        made = select(RouteChange).where(RouteChange.environment == environment, RouteChange.model == model)
        change = session.scalars(
            made.where(RouteChange.flow_run_id == flow_run_id, RouteChange.kind == "rollback").order_by(
                RouteChange.generation.desc()
            )
        ).first()
        if change is None:
            return None
        route = routes.read(session, environment, model)
        if route is None or route.generation != change.generation:
            raise RefusedError(
                f"this run has rolled {model} back to {change.stable} already, and its route has changed since: start a new rollback"
            )
        earlier = made.where(RouteChange.epoch == change.epoch, RouteChange.generation < change.generation)
        before = session.scalars(earlier.order_by(RouteChange.generation.desc())).first()
        return _outcome(route, before=None if before is None else before.stable, to=str(change.stable))


def take_back(
    transaction: Transaction,
    environment: str,
    model: str,
    to: str | None,
    *,
    reason: str,
    ttl_seconds: float = 0.0,
    emergency: bool = False,
    seen: Seen | None = None,
    who: Who | None = None,
) -> dict[str, Any]:
    """What `roll_back` does, inside a transaction."""
    subject, session = leases.subject_of(environment, model), transaction.session
    row = routes.lock_environment(transaction, environment)
    route = routes.read(session, environment, model)
    if route is None or route.stable is None:
        raise _nothing(environment, model)
    if seen is not None:
        if to is None:
            raise UsageError("a rollback by what was seen needs the version to go back to: give `to` beside `seen`")
        if _done_since(session, route, row.epoch, seen, to):
            return _outcome(route, before=seen.stable, to=to)
    if not emergency:
        held = leases.acquire(
            transaction,
            subject,
            environment,
            holder=f"rollback by {transaction.actor}",
            ttl_seconds=ttl_seconds,
            promotion=None,
        )
        leases.release(transaction, held)
    before, withdrawn = route.stable, None
    target = to or _target(session, route, emergency=emergency)
    if emergency:
        under_way = leases.preempt(transaction, subject, environment, reason=reason)
        promotion = session.get(Promotion, under_way) if under_way else None
        if promotion is not None and promotion.state in promotions.ACTIVE:
            promotions.close(transaction, promotion, "withdrawn", "Emergency rollback", reason, {})
            withdrawn = None if promotion.strategy == GRADUAL else promotion.version
    if withdrawn is None:
        soak = promotions.supersede(transaction, environment, model, "withdrawn", by="a rollback")
        withdrawn = None if soak is None else soak.version
    _check(transaction, environment, model, target)
    if route.stable == target:
        if not emergency and withdrawn is None:
            raise RefusedError(f"{model} {target} is the stable version in {environment} already")
    else:
        promotions.make_stable(transaction, environment, model, target, reason=reason)
    changed = routes.change(
        transaction, environment, model, routes.Desired(stable=target), kind="rollback", reason=reason
    )
    _record(transaction, environment, model, before, target, reason, who)
    return _outcome(changed, before=before, to=target, withdrawn=withdrawn)


def _target(session: Session, route: Route, *, emergency: bool) -> str:
    """Where a rollback goes that names no version.

    To withdraw what answered requests is the rollback that was asked for. What had no traffic yet (it was validated, waited for an
    approval, saw copies) cannot be what is wrong: then the stable version goes back.
    """
    environment, model = route.environment, route.model
    closing = None
    if emergency:
        lease = session.get(Lease, leases.subject_of(environment, model))
        if lease is not None and lease.state != leases.RELEASED and lease.promotion is not None:
            closing = session.get(Promotion, lease.promotion)
    if closing is not None and closing.state not in promotions.ACTIVE:
        closing = None
    if closing is not None and closing.strategy == GRADUAL:
        return closing.version  # what was on its way back by steps goes back at once
    closing = closing or promotions.orphaned(session, environment, model)
    if closing is None:
        return routes.previous_stable(session, environment, model)
    back = route.stable
    if route.promotion == closing.id and closing.progress.get("promoted"):
        back = closing.from_version
        if back is None:
            raise NotFoundError(
                f"{model} {route.stable} is the first version in {environment}: there is none before it to go back to"
            )
    if back is not None and (back != route.stable or (route.candidate is not None and route.weight > 0)):
        return back
    try:
        return routes.previous_stable(session, environment, model)
    except NotFoundError:
        return str(route.stable)  # what is under way is withdrawn, and this one stays


def _done_since(session: Session, route: Route, epoch: str, seen: Seen, to: str) -> bool:
    """Whether the rollback that was decided over `seen` has been done since, by whoever it was.

    What the promotion does that was under way then is no reason to stop an emergency. Raises ConflictError where somebody has
    made another version stable.
    """
    since: list[RouteChange] = []
    if epoch == seen.epoch:
        query = select(RouteChange).where(
            RouteChange.environment == route.environment, RouteChange.model == route.model,
            RouteChange.epoch == epoch, RouteChange.generation > seen.generation,
        )  # fmt: skip
        since = list(session.scalars(query.order_by(RouteChange.generation)))
        if not since:
            return False
    backs = [change for change in since if change.kind == "rollback"]
    if route.stable == to and (route.candidate is None or backs):
        return True
    others = [
        change for change in since if change.kind == "rollback" or change.stable not in (seen.stable, seen.candidate)
    ]
    if epoch == seen.epoch and not others:
        return False
    told = [f"{change.stable} by {change.actor} at {clock.text(change.at)} ({change.kind})" for change in others]
    raise ConflictError(
        f"{route.model} has changed in {route.environment} since this rollback from {seen.stable} to {to} was decided: "
        + ("; ".join(f"to {one}" for one in told) or "the registry was restored meanwhile")
        + f". {route.stable} is stable now, and nothing was done: look at it (modelkeep status), then ask for a new rollback"
    )


def _outcome(route: Route, *, before: str | None, to: str, withdrawn: str | None = None) -> dict[str, Any]:
    return {
        "model": route.model,
        "environment": route.environment,
        "from": before,
        "to": to,
        "withdrawn": withdrawn,
        "generation": route.generation,
    }


def _nothing(environment: str, model: str) -> NotFoundError:
    return NotFoundError(f"{model} serves nothing in {environment}: there is nothing to roll back")


def write_back(database: Database, hold: Hold, *, replica: str) -> Written:
    """Bring a server's hold into the registry, by compare-and-set on the route that it was made over.

    "written-back": the route was still that one, and is rolled back now as an emergency by the hold's author. "met": it is what the
    hold wants already (another server was first). "superseded": it has changed since, and the registry wins. Each is on record.
    Raises RefusedError, NotFoundError where the registry would not take this version back: the hold stays then.
    """
    subject = f"model:{hold.environment}/{hold.model}"
    with database.write(actor=hold.actor) as transaction:
        row = routes.lock_environment(transaction, hold.environment)
        route = routes.read(transaction.session, hold.environment, hold.model)
        now = None if route is None else {"epoch": row.epoch, **routes.as_dict(route)}
        outcome = _fate(hold, row.epoch, route)
        reason = f"{hold.reason} (hold of {hold.at} on server {replica}, made while the registry did not answer)"
        if outcome == "written-back":
            who = Who(hold.actor, key_id=hold.key_id, via="api", claimed=hold.claimed)
            take_back(transaction, hold.environment, hold.model, hold.to, reason=reason, emergency=True, who=who)
        transaction.record(
            f"hold.{outcome}", subject, before={**hold.as_dict(), "replica": replica}, after=now, reason=reason
        )
        return outcome


def _fate(hold: Hold, epoch: str, route: Route | None) -> Written:
    if route is not None and (epoch, route.generation) == (hold.epoch, hold.generation):
        return "written-back"
    if route is not None and route.stable == hold.to and route.candidate is None:
        return "met"
    return "superseded"


def released(database: Database, hold: Hold, *, replica: str, who: Who, reason: str) -> None:
    """Put on record that a person took a hold away by hand."""
    with database.write(actor=who.actor) as transaction:
        transaction.record(
            "hold.released",
            f"model:{hold.environment}/{hold.model}",
            before={**hold.as_dict(), "replica": replica},
            reason=reason,
        )


def begin_gradual(
    database: Database,
    *,
    environment: str,
    model: str,
    to: str | None,
    policy: PromotionPolicy,
    ttl_seconds: float,
    reason: str,
    flow_run_id: str | None = None,
) -> promotions.Operation:
    """Open the record of a rollback by steps, with the lease: the version to go back to is the candidate until it has all traffic.

    A run that dies leaves the stable version and no candidate once its lease has run out, as with any promotion. The flow run that
    opened it before goes on from its step. Raises LockedError, NotFoundError, RefusedError.
    """
    with database.read() as session:
        route = routes.read(session, environment, model)
        if route is None or route.stable is None:
            raise _nothing(environment, model)
        target = to or routes.previous_stable(session, environment, model)
        if route.stable == target:  # in its orphaned soak, promotions.begin would take up that promotion instead
            raise RefusedError(f"{model} {target} is the stable version in {environment} already")
        if not routes.has_been_stable(session, environment, model, target):
            raise _never(environment, model, target)
        if versions.get(session, model, target).state != "validated":
            raise RefusedError(f"{model} {target} is not validated: only a validated version can take traffic")
    return promotions.begin(
        database,
        environment=environment,
        model=model,
        version=target,
        policy=policy,
        strategy=GRADUAL,
        ttl_seconds=ttl_seconds,
        flow_run_id=flow_run_id,
        force_reason=reason or None,
    )


def finish_gradual(database: Database, operation: promotions.Operation, *, reason: str, detail: str) -> dict[str, Any]:
    """All traffic goes to the version that was gone back to: it is the stable one, the record is closed, the lease is free."""
    with promotions.writing(database, operation) as transaction:
        row = transaction.session.get_one(Promotion, operation.id)
        route = routes.read(transaction.session, operation.environment, operation.model)
        before = None if route is None else route.stable
        _check(transaction, operation.environment, operation.model, operation.version)
        promotions.make_stable(transaction, operation.environment, operation.model, operation.version, reason=reason)
        changed = routes.change(
            transaction,
            operation.environment,
            operation.model,
            routes.Desired(stable=operation.version),
            kind="rollback",
            reason=reason,
        )
        row.progress = operation.progress = {**operation.progress, "promoted": True}
        endings.close(transaction, row, "promoted", "Rolled back by steps", detail, {"generation": changed.generation})
        _record(transaction, operation.environment, operation.model, before, operation.version, reason, None)
        leases.release(transaction, operation.held)
        return _outcome(changed, before=before, to=operation.version)


def finished(session: Session, identity: str) -> dict[str, Any] | None:
    """What a gradual rollback came to, from its record: its process may not have heard that it was done. None where it was not."""
    row = session.get(Promotion, identity)
    if row is None or row.strategy != GRADUAL or row.state != "promoted":
        return None
    return {
        "model": row.model,
        "environment": row.environment,
        "from": row.from_version,
        "to": row.version,
        "withdrawn": None,
        "generation": promotions.story(session, identity)[-1]["figures"].get("generation"),
    }


def _check(transaction: Transaction, environment: str, model: str, target: str) -> None:
    row = versions.get(transaction.session, model, target)
    if row.state in ("archived", "rejected", "registered"):
        raise RefusedError(f"{model} {target} is {row.state}: only a validated version can take traffic")
    if not routes.has_been_stable(transaction.session, environment, model, target):
        raise _never(environment, model, target)


def _never(environment: str, model: str, target: str) -> RefusedError:
    return RefusedError(
        f"{model} {target} has never been the stable version in {environment}, so nothing can go back to it: "
        f"modelkeep promote {model} {target}"
    )


def _record(
    transaction: Transaction,
    environment: str,
    model: str,
    before: str | None,
    target: str,
    reason: str,
    who: Who | None,
) -> None:
    after: dict[str, Any] = {"stable": target}
    if who is not None and who.key_id is not None:
        after["key_id"] = who.key_id
    if who is not None and who.claimed is not None:
        after["claimed"] = who.claimed
    transaction.record(
        "model.rolled-back",
        f"model:{environment}/{model}",
        before={"stable": before},
        after=after,
        reason=reason,
    )
