"""Promotions of record: how each begins, what it decides, and the ways in which it ends. Who judges the figures is tasks.judgement."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry import clock, leases, names, routes, states, versions
from registry.database import Database, Transaction
from registry.errors import ConflictError, NotFoundError, RefusedError, UsageError
from registry.policy import PromotionPolicy
from registry.schema import Promotion, PromotionStep, Route
from registry.signature import Signature

Outcome = Literal["promoted", "rejected", "withdrawn", "held", "failed"]
RUNNING = "running"
STAGING = "staging"


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
) -> Operation:
    """Take the lease and open the record; or, for the flow run that opened it before, go on from the recorded step.

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
            held = leases.take_over(transaction, subject, environment, holder=holder, ttl_seconds=ttl_seconds)
            return _operation(earlier, held, resumed=True)
        if row.state == "archived":
            raise RefusedError(f"{model} {version} is archived: register its file as a new version")
        routes.lock_environment(transaction, environment)
        route = routes.read(session, environment, model)
        identity = secrets.token_hex(6)
        held = leases.acquire(
            transaction, subject, environment, holder=holder, ttl_seconds=ttl_seconds, promotion=identity
        )
        if route is not None and route.stable == version:
            raise RefusedError(f"{model} {version} is the stable version in {environment} already: nothing to promote")
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
            },
            reason=force_reason or "",
        )
        return _operation(promotion, held)


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
) -> None:
    """Add a decision to the story, and remember the step (and what a restart needs) in the same transaction."""
    with _write(database, operation) as transaction:
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
) -> None:
    """Keep the figures of a validation with the version, and move it to validated or rejected."""
    with _write(database, operation) as transaction:
        row = versions.get(transaction.session, operation.model, operation.version)
        versions.note_validation(
            transaction, row, report=report, signature=signature, rows_independent=rows_independent
        )
        states.move_version(transaction, row, "validated" if passed else "rejected", reason=title)
        _note(transaction, operation, "validate", title, detail, report, {"validated": passed})


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

    `placements` are moves of the candidate: (environment, status). Raises ConflictError for a version that is stable by now.
    """
    with _write(database, operation) as transaction:
        if operation.progress.get("promoted"):
            raise ConflictError(
                f"promotion {operation.id} is past its stages: {operation.version} is the stable version"
            )
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
    """Make the candidate the stable version; the one before it is retired. With `watch` it is counted on for the soak."""
    with _write(database, operation) as transaction:
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
        progress = {"soak": {**window, "epoch": epoch, "generation": route.generation}, "promoted": True}
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
) -> None:
    """Close the promotion and free the lease; take the candidate out of the route unless it was promoted."""
    with _write(database, operation) as transaction:
        close(transaction, transaction.session.get_one(Promotion, operation.id), outcome, title, detail, figures or {})
        leases.release(transaction, operation.held)


def expire(database: Database, environment: str, beat: leases.Beat, *, observer: str) -> str | None:
    """Withdraw what a dead process left, by compare-and-set on its heartbeat; the stable version stays.

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
        if promotion is None or promotion.state != RUNNING:
            return identity
        soaking = bool(promotion.progress.get("promoted"))
        close(
            transaction,
            promotion,
            "promoted" if soaking else "withdrawn",
            "Lease expired",
            f"{reason}; seen by {observer}. "
            + (
                "The version had been promoted; its soak was cut short."
                if soaking
                else "The candidate is withdrawn, the stable version stays."
            ),
            {},
        )
        return identity


def get(session: Session, identity: str) -> Promotion:
    row = session.get(Promotion, identity)
    if row is None:
        raise NotFoundError(f"there is no promotion {identity!r}; see: modelkeep promotions")
    return row


def of_run(session: Session, flow_run_id: str) -> Promotion | None:
    """The promotion that a flow run began (the last, where a restart began another)."""
    query = select(Promotion).where(Promotion.flow_run_id == flow_run_id).order_by(Promotion.created_at.desc())
    return session.scalars(query.limit(1)).first()


def listed(
    session: Session, *, model: str | None = None, environment: str | None = None, limit: int = 50
) -> list[dict[str, Any]]:
    query = select(Promotion).order_by(Promotion.created_at.desc()).limit(limit)
    if model is not None:
        query = query.where(Promotion.model == model)
    if environment is not None:
        query = query.where(Promotion.environment == environment)
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


class _write:
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
        Promotion.state == RUNNING,
    )
    return session.scalars(query.limit(1)).first()


def _operation(row: Promotion, held: leases.Held, *, resumed: bool = False) -> Operation:
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
    _add_step(transaction, row, step, title, detail, figures)


def _add_step(
    transaction: Transaction, row: Promotion, step: str, title: str, detail: str, figures: dict[str, Any]
) -> None:
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


def _place(
    transaction: Transaction, operation: Operation, moves: list[tuple[str, states.PlacementStatus]], reason: str
) -> None:
    for environment, status in moves:
        states.place(transaction, operation.model, operation.version, environment, status, reason=reason)


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
    if row.state != RUNNING:
        raise ConflictError(f"promotion {row.id} has ended already ({row.state})")
    session, promoted = transaction.session, bool(row.progress.get("promoted"))
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
                kind="withdraw",
                reason=title,
                promotion=None,
            )
    if outcome != "promoted":
        _leave(transaction, row, title)
    row.state, row.reason, row.finished_at = outcome, title, clock.now()
    _add_step(transaction, row, outcome, title, detail, figures)


def _leave(transaction: Transaction, row: Promotion, reason: str) -> None:
    """Move the placements of a version that did not make it."""
    for environment in (STAGING, row.environment):
        place = states.placement(transaction.session, row.model, row.version, environment)
        if place is not None and place.status in ("testing", "candidate", "stable"):
            states.place(transaction, row.model, row.version, environment, "withdrawn", reason=reason)
