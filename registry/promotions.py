"""Promotions of record: how each begins, goes on and decides. How it ends is registry.endings, who judges the figures tasks.judgement."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import clock, leases, names, orders, replicas, routes, states, versions
from registry.database import Database, Transaction
from registry.endings import STAGING, Outcome, close, expire, make_stable, orphaned, orphans, supersede
from registry.errors import ConflictError, RefusedError, UsageError
from registry.policy import PromotionPolicy
from registry.schema import Lease, Promotion
from registry.signature import Signature
from registry.stories import (
    ACTIVE,
    AWAITING,
    RUNNING,
    SOAKING,
    add_step,
    describe,
    get,
    listed,
    of_run,
    story,
)  # fmt: skip

__all__ = [
    "ACTIVE", "AWAITING", "RUNNING", "SOAKING", "STAGING", "Operation", "Outcome", "add_step", "begin", "carried",
    "carry_on", "close", "describe", "end", "expire", "get", "let_go", "listed", "make_stable", "note",
    "note_validation", "of_run", "operation_of", "orphaned", "orphans", "promote", "remember", "stage", "story",
    "supersede", "writing",
]  # fmt: skip


@dataclass(slots=True)
class Operation:
    """A promotion under way in this process: its lease, and what it needs to know to go on."""

    id: str
    environment: str
    model: str
    version: str
    stable: str | None
    policy: PromotionPolicy
    strategy: str
    held: leases.Held
    step: str
    progress: dict[str, Any]
    flow_run_id: str | None
    forced: str | None
    resumed: bool = False

    @property
    def subject(self) -> str:
        return f"promotion:{self.id}"


def begin(
    database: Database,
    *,
    environment: str,
    model: str,
    version: str,
    policy: PromotionPolicy,
    strategy: str,
    ttl_seconds: float,
    flow_run_id: str | None,
    force_reason: str | None = None,
    policy_from: dict[str, str] | None = None,
) -> Operation:
    """Take the lease and open the record; or, for the flow run that opened it before, go on from the recorded step.

    `policy_from` says of each field that is not at its default where it comes from; it goes on record.

    Raises LockedError where another operation holds the model, NotFoundError, RefusedError (archived; stable already),
    UsageError (an environment that has no routes).
    """
    names.check_name(environment, "name of an environment")
    if environment == STAGING:
        raise UsageError(
            "staging takes no traffic of its own: every promotion passes through it on the way to its environment; "
            "name the one that the servers serve"
        )
    subject = leases.subject_of(environment, model)
    with database.write(flow_run_id=flow_run_id) as transaction:
        session = transaction.session
        row = versions.get(session, model, version)
        holder = f"promotion of {model} {version} by {transaction.actor}"
        earlier = _of_this_run(session, flow_run_id, environment, model, version)
        if earlier is not None:
            return carried(transaction, earlier, holder=holder, ttl_seconds=ttl_seconds, flow_run_id=flow_run_id)
        if row.state == "archived":
            raise RefusedError(f"{model} {version} is archived: register its file as a new version")
        routes.lock_environment(transaction, environment)
        route = routes.read(session, environment, model)
        soaking = orphaned(session, environment, model)
        if soaking is not None and soaking.version == version:
            # The command again, after the process that was watching has died: the watch goes on.
            return carried(transaction, soaking, holder=holder, ttl_seconds=ttl_seconds, flow_run_id=flow_run_id)
        identity = secrets.token_hex(6)
        held = leases.acquire(
            transaction, subject, environment, holder=holder, ttl_seconds=ttl_seconds, promotion=identity
        )
        if route is not None and route.stable == version:
            raise RefusedError(f"{model} {version} is the stable version in {environment} already: nothing to promote")
        supersede(transaction, environment, model, "promoted", by=f"the promotion of {version}")
        promotion = Promotion(
            id=identity,
            environment=environment,
            model=model,
            version=version,
            from_version=route.stable if route else None,
            strategy=strategy,
            policy=policy.model_dump(),
            state=RUNNING,
            step="begin",
            progress={"forced": force_reason},
            actor=transaction.actor,
            flow_run_id=flow_run_id,
            created_at=clock.now(),
        )
        session.add(promotion)
        replicas.forget_ended(session, model)
        transaction.record(
            "promotion.begun",
            f"promotion:{identity}",
            after={
                "model": model,
                "version": version,
                "environment": environment,
                "from": promotion.from_version,
                "strategy": strategy,
                "policy": promotion.policy,
                "policy_from": policy_from or {},
            },
            reason=force_reason or "",
        )
        return operation_of(promotion, held)


def carry_on(
    database: Database,
    identity: str,
    *,
    ttl_seconds: float,
    flow_run_id: str | None = None,
    holder: str | None = None,
) -> Operation:
    """Go on with a promotion of record under a new token: one whose lease is free, or that is this run's.

    One that waits for an approval goes on by registry.approvals.carry_on. Raises NotFoundError, ConflictError (it has ended, it
    waits), LockedError (another process carries it, or another operation holds the model).
    """
    with database.write(flow_run_id=flow_run_id) as transaction:
        row = get(transaction.session, identity)
        routes.lock_environment(transaction, row.environment)
        transaction.session.refresh(row)
        if row.state not in ACTIVE:
            raise ConflictError(f"promotion {identity} has ended already ({row.state}): there is nothing to carry on")
        holder = holder or f"promotion of {row.model} {row.version} by {transaction.actor}"
        return carried(transaction, row, holder=holder, ttl_seconds=ttl_seconds, flow_run_id=flow_run_id)


def remember(database: Database, operation: Operation, progress: dict[str, Any]) -> None:
    """Keep what the next carrier needs. No decision, so no step and, like a heartbeat, no audit event."""
    with writing(database, operation) as transaction:
        row = transaction.session.get_one(Promotion, operation.id)
        operation.progress = {**operation.progress, **progress}
        row.progress = operation.progress


def note(
    database: Database,
    operation: Operation,
    step: str,
    title: str,
    detail: str,
    figures: dict[str, Any] | None = None,
    *,
    progress: dict[str, Any] | None = None,
    placements: list[tuple[str, states.PlacementStatus]] | None = None,
    taken: int | None = None,
) -> None:
    """Add a decision to the story, and remember the step (and what a restart needs) in the same transaction.

    `taken` is the number of the command that it follows. Raises orders.OvertakenError.
    """
    with writing(database, operation) as transaction:
        orders.take(transaction, operation.id, taken)
        _place(transaction, operation, placements or [], title)
        _note(transaction, operation, step, title, detail, figures or {}, progress)


def note_validation(
    database: Database,
    operation: Operation,
    *,
    passed: bool,
    report: dict[str, Any],
    signature: Signature | None,
    rows_independent: bool | None,
    title: str,
    detail: str,
    seconds: float | None = None,
) -> None:
    """Keep the figures of a validation with the version, and move it to validated or rejected."""
    with writing(database, operation) as transaction:
        row = versions.get(transaction.session, operation.model, operation.version)
        versions.note_validation(
            transaction, row, report=report, signature=signature, rows_independent=rows_independent
        )
        states.move_version(transaction, row, "validated" if passed else "rejected", reason=title)
        _note(
            transaction,
            operation,
            "validate",
            title,
            detail,
            report,
            {"validated": passed, "validation_seconds": seconds},
        )


def stage(
    database: Database,
    operation: Operation,
    desired: routes.Desired,
    *,
    step: str,
    kind: str,
    title: str,
    detail: str,
    placements: list[tuple[str, states.PlacementStatus]],
    progress: dict[str, Any] | None = None,
    window: dict[str, Any] | None = None,
    figures: dict[str, Any] | None = None,
) -> tuple[str, int]:
    """Change the route for this promotion. Returns (epoch, generation), which `window` is kept under.

    `placements` are moves of the candidate: (environment, status). Raises ConflictError for a version that is stable by now, or where
    the promotion waits for an approval.
    """
    with writing(database, operation) as transaction:
        if operation.progress.get("promoted"):
            raise ConflictError(
                f"promotion {operation.id} is past its stages: {operation.version} is the stable version"
            )
        _not_awaiting(transaction, operation)
        orders.void_advances(transaction, operation.id, title)
        _place(transaction, operation, placements, title)
        route = routes.change(
            transaction,
            operation.environment,
            operation.model,
            desired,
            kind=kind,
            reason=title,
            promotion=operation.id,
        )
        epoch = routes.lock_environment(transaction, operation.environment).epoch
        merged = dict(progress or {})
        if window is not None:
            windows = [
                *operation.progress.get("windows", []),
                {**window, "epoch": epoch, "generation": route.generation},
            ]
            merged["windows"] = windows
        _note(transaction, operation, step, title, detail, {"generation": route.generation, **(figures or {})}, merged)
        return epoch, route.generation


def promote(
    database: Database, operation: Operation, *, title: str, detail: str, watch: bool, window: dict[str, Any]
) -> int:
    """Make the candidate the stable version; the one before it is retired. With `watch` it is counted on for the soak.

    Raises ConflictError for one that waits for an approval.
    """
    with writing(database, operation) as transaction:
        _not_awaiting(transaction, operation)
        orders.void_advances(transaction, operation.id, title)
        make_stable(transaction, operation.environment, operation.model, operation.version, reason=title)
        threshold = operation.progress.get("slow_threshold_seconds")
        route = routes.change(
            transaction,
            operation.environment,
            operation.model,
            routes.Desired(stable=operation.version, watch=watch, slow_threshold_seconds=threshold),
            kind="promote" if operation.stable else "first",
            reason=title,
            promotion=operation.id,
        )
        epoch = routes.lock_environment(transaction, operation.environment).epoch
        transaction.session.get_one(Promotion, operation.id).state = SOAKING
        soak = {**window, "epoch": epoch, "generation": route.generation, "watch": watch, "watched_seconds": 0.0}
        progress = {"soak": soak, "promoted": True}
        _note(transaction, operation, "promote", title, detail, {"generation": route.generation}, progress)
        transaction.record(
            "promotion.promoted",
            operation.subject,
            after={"stable": operation.version, "before": operation.stable},
            reason=title,
        )
        return route.generation


def end(
    database: Database,
    operation: Operation,
    outcome: Outcome,
    *,
    title: str,
    detail: str,
    figures: dict[str, Any] | None = None,
    progress: dict[str, Any] | None = None,
    taken: int | None = None,
) -> None:
    """Close the promotion and free the lease; take the candidate out of the route unless it was promoted.

    `taken` is the number of the command that it follows. Raises orders.OvertakenError.
    """
    with writing(database, operation) as transaction:
        orders.take(transaction, operation.id, taken)
        if progress:
            row = transaction.session.get_one(Promotion, operation.id)
            row.progress = {**row.progress, **progress}
        close(transaction, transaction.session.get_one(Promotion, operation.id), outcome, title, detail, figures or {})
        leases.release(transaction, operation.held)


class writing:
    """A transaction of an operation: its first statement checks the lease, so a fenced process writes nothing."""

    def __init__(self, database: Database, operation: Operation) -> None:
        self._context = database.write(flow_run_id=operation.flow_run_id)
        self._operation = operation
        self._before = (operation.step, operation.progress)

    def __enter__(self) -> Transaction:
        transaction = self._context.__enter__()
        try:
            leases.check(transaction, self._operation.held)
        except BaseException as error:
            self._context.__exit__(type(error), error, error.__traceback__)
            raise
        return transaction

    def __exit__(self, *error: Any) -> bool | None:
        try:
            suppressed = self._context.__exit__(*error)
        except BaseException:
            self._operation.step, self._operation.progress = (
                self._before
            )  # the commit failed: nothing of it is on record
            raise
        if error[0] is not None:
            self._operation.step, self._operation.progress = self._before
        return suppressed


def _of_this_run(
    session: Session, flow_run_id: str | None, environment: str, model: str, version: str
) -> Promotion | None:
    if flow_run_id is None:
        return None
    query = select(Promotion).where(
        Promotion.flow_run_id == flow_run_id,
        Promotion.environment == environment,
        Promotion.model == model,
        Promotion.version == version,
        Promotion.state.in_(ACTIVE),
    )
    return session.scalars(query.limit(1)).first()


def carried(
    transaction: Transaction, row: Promotion, *, holder: str, ttl_seconds: float, flow_run_id: str | None
) -> Operation:
    """A promotion of record in new hands. Raises ConflictError for one that waits: registry.approvals knows whether it may go on."""
    if row.state == AWAITING:
        raise ConflictError(f"promotion {row.id} waits for an approval: modelkeep approve {row.id} --note TEXT")
    subject, session = leases.subject_of(row.environment, row.model), transaction.session
    environment = routes.lock_environment(transaction, row.environment)
    lease = session.get(Lease, subject, populate_existing=True)
    mine = lease is not None and lease.state != leases.RELEASED and lease.promotion == row.id
    ours = flow_run_id is not None and row.flow_run_id == flow_run_id
    if mine and lease is not None and (ours or lease.state == leases.AWAITING):
        held = leases.take_over(transaction, subject, row.environment, holder=holder, ttl_seconds=ttl_seconds)
    else:
        held = leases.acquire(
            transaction, subject, row.environment, holder=holder, ttl_seconds=ttl_seconds, promotion=row.id
        )
    progress = dict(row.progress)
    if flow_run_id is not None and row.flow_run_id != flow_run_id:
        if row.flow_run_id is not None:
            progress["flow_runs"] = [*progress.get("flow_runs", []), row.flow_run_id]
        row.flow_run_id = flow_run_id
    soak = progress.get("soak")
    route = routes.read(session, row.environment, row.model)
    if soak is not None and route is not None and soak["epoch"] != environment.epoch:
        # The registry was restored: the servers count under the new epoch, so the watch begins anew.
        progress["soak"] = {
            "stage": soak["stage"], "weight": soak["weight"], "watch": soak.get("watch", True), "watched_seconds": 0.0,
            "epoch": environment.epoch, "generation": route.generation,
        }  # fmt: skip
    windows = progress.get("windows")
    if windows and route is not None and windows[-1]["generation"] == route.generation:
        # So with the stage under way, whose time is the carrier's own.
        progress["windows"] = [*windows[:-1], {**windows[-1], "epoch": environment.epoch}]
    row.progress = progress
    transaction.record(
        "promotion.carried-on", f"promotion:{row.id}", after={"by": holder, "state": row.state, "step": row.step}
    )
    return operation_of(row, held, resumed=True)


def operation_of(row: Promotion, held: leases.Held, *, resumed: bool = False) -> Operation:
    return Operation(
        id=row.id,
        environment=row.environment,
        model=row.model,
        version=row.version,
        stable=row.from_version,
        policy=PromotionPolicy.model_validate(row.policy),
        strategy=row.strategy,
        held=held,
        step=row.step,
        progress=dict(row.progress),
        flow_run_id=row.flow_run_id,
        forced=row.progress.get("forced"),
        resumed=resumed,
    )


def _note(
    transaction: Transaction,
    operation: Operation,
    step: str,
    title: str,
    detail: str,
    figures: dict[str, Any],
    progress: dict[str, Any] | None,
) -> None:
    row = transaction.session.get_one(Promotion, operation.id)
    row.step = operation.step = step
    if progress:
        operation.progress = {**operation.progress, **progress}
        row.progress = operation.progress
    add_step(transaction, row, step, title, detail, figures)


def let_go(database: Database, operation: Operation, why: str) -> None:
    """Free the lease of a soak and leave the rest to the next carrier: the watch is on record."""
    with writing(database, operation) as transaction:
        row = transaction.session.get_one(Promotion, operation.id)
        if row.state != SOAKING:
            raise ConflictError(f"promotion {row.id} is {row.state}: only a soak goes on without its process")
        detail = f"{why}. The version is watched on by whoever takes it up."
        add_step(transaction, row, "orphaned", "The soak lost its flow", detail, {})
        leases.release(transaction, operation.held)


def _not_awaiting(transaction: Transaction, operation: Operation) -> None:
    """No traffic before the answer, also by the process that asked: its token lives on while it waits."""
    if transaction.session.get_one(Promotion, operation.id, populate_existing=True).state == AWAITING:
        raise ConflictError(
            f"promotion {operation.id} waits for an approval: modelkeep approve {operation.id}, then it goes on when its run does"
        )


def _place(
    transaction: Transaction, operation: Operation, moves: list[tuple[str, states.PlacementStatus]], reason: str
) -> None:
    for environment, status in moves:
        states.place(transaction, operation.model, operation.version, environment, status, reason=reason)
