"""Routes, the desired state of each model in an environment, and the generation that tells servers to look."""

from __future__ import annotations

import datetime as dt
import secrets
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import clock, points
from registry.database import Transaction
from registry.errors import NotFoundError
from registry.schema import Environment, Route, RouteChange


@dataclass(frozen=True, slots=True)
class Desired:
    """What a route shall be. A candidate answers `weight` of the requests; with `shadow` it sees copies of the rest."""

    stable: str | None
    candidate: str | None = None
    weight: float = 0.0
    shadow: bool = False
    watch: bool = False
    slow_threshold_seconds: float | None = None
    shadow_share: float | None = None
    """Share of the requests that the shadow sees copies of; None: all."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight {self.weight}: a share between 0 and 1 is")
        if self.shadow_share is not None and not 0 < self.shadow_share <= 1:
            raise ValueError(f"shadow_share {self.shadow_share}: a share above 0 and at most 1 is")
        if self.candidate is None and (self.weight or self.shadow):
            raise ValueError("a weight or a shadow needs a candidate")
        if self.candidate is not None and self.candidate == self.stable:
            raise ValueError(f"version {self.candidate} cannot be stable and candidate at once")


def new_epoch() -> str:
    """A random id: a counter would repeat when one backup is restored twice."""
    return secrets.token_hex(8)


def lock_environment(transaction: Transaction, name: str) -> Environment:
    """The generation row, locked. The first lock of every transaction that changes a route or a lease."""
    row = transaction.session.execute(
        select(Environment).where(Environment.name == name).with_for_update()
    ).scalar_one_or_none()
    if row is None:
        row = Environment(name=name, epoch=new_epoch(), generation=0)
        transaction.session.add(row)
        transaction.session.flush()
        transaction.record("environment.created", f"environment:{name}", after={"epoch": row.epoch})
    return row


def read(session: Session, environment: str, model: str) -> Route | None:
    return session.get(Route, (environment, model))


def change(
    transaction: Transaction,
    environment: str,
    model: str,
    desired: Desired,
    *,
    kind: str,
    reason: str,
    promotion: str | None = None,
) -> Route:
    """Set a route and give it the next generation. The caller has checked its lease in this transaction."""
    session = transaction.session
    row = lock_environment(transaction, environment)
    route = session.get(Route, (environment, model))
    before = None if route is None else as_dict(route)
    # A change by which a promotion leaves the route is still that promotion's.
    ending = before["promotion"] if before is not None and kind in ("settled", "withdraw") else None
    row.generation += 1
    if route is None:
        route = Route(environment=environment, model=model)
        session.add(route)
    for name, value in asdict(desired).items():
        setattr(route, name, value)
    route.generation, route.promotion = row.generation, promotion
    made = RouteChange(
        environment=environment,
        epoch=row.epoch,
        generation=row.generation,
        model=model,
        kind=kind,
        stable=desired.stable,
        candidate=desired.candidate,
        weight=desired.weight,
        shadow=desired.shadow,
        at=clock.now(),
        actor=transaction.actor,
        reason=reason,
        promotion=promotion or ending,
        flow_run_id=transaction.flow_run_id,
    )
    session.add(made)
    session.flush()
    points.write(transaction, made, before=before, after=as_dict(route), promotion=promotion)
    transaction.record(
        f"route.{kind}", f"route:{environment}/{model}", before=before, after=as_dict(route), reason=reason
    )
    return route


def as_dict(route: Route) -> dict[str, Any]:
    return {
        "stable": route.stable,
        "candidate": route.candidate,
        "weight": route.weight,
        "shadow": route.shadow,
        "watch": route.watch,
        "slow_threshold_seconds": route.slow_threshold_seconds,
        "shadow_share": route.shadow_share,
        "generation": route.generation,
        "promotion": route.promotion,
    }


def previous_stable(session: Session, environment: str, model: str) -> str:
    """The version that a rollback without --to goes to: the one below the stable version on the stack of promotions.

    A promotion puts a version on top, a rollback takes everything above its target away: rolling back twice goes back
    two steps, never forward again to the version that was rolled back from. Raises NotFoundError where nothing is below.
    """
    changes = _history(session, environment, model)
    # Where the first version was withdrawn nothing is left of what stood before.
    stack = points.stack(points.Step(row.stable, row.kind, first=row.stable is None) for row in changes)
    if len(stack) < 2:
        raise NotFoundError(
            f"{model} has no earlier stable version in {environment}"
            + (f" than {stack[-1]}" if stack else "")
            + "; name one with --to VERSION"
        )
    return stack[-2]


def has_been_stable(session: Session, environment: str, model: str, version: str) -> bool:
    """Whether a version was ever the stable one there."""
    query = select(RouteChange.generation).where(
        RouteChange.environment == environment, RouteChange.model == model, RouteChange.stable == version
    )
    return session.scalars(query.limit(1)).first() is not None


def _history(session: Session, environment: str, model: str) -> list[RouteChange]:
    """All changes of a route in the order made: by generation; wall time orders epochs only, since a clock may go back."""
    rows = session.scalars(
        select(RouteChange).where(RouteChange.environment == environment, RouteChange.model == model)
    ).all()
    began: dict[str, dt.datetime] = {}
    for row in rows:
        began[row.epoch] = min(row.at, began.get(row.epoch, row.at))
    return sorted(rows, key=lambda row: (began[row.epoch], row.epoch, row.generation))
