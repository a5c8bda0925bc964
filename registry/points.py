"""Rollback points: at each change of a stable version, what it takes to come back to it. Where servers keep the files: serving.loaded.keeping."""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from registry import clock
from registry.actor import Who
from registry.database import Database, Transaction
from registry.errors import NotFoundError, UsageError
from registry.schema import Promotion, RollbackPoint, Route, RouteChange, Version


@dataclass(frozen=True, slots=True)
class Step:
    """A change of the stable version, as `stack` reads it. `first`: nothing was stable before it."""

    version: str | None
    kind: str
    first: bool = False


KEPT = 10
"""Points of a model in an environment that are kept by themselves: each holds files on the disk of every server."""
LEAST = 2


def write(
    transaction: Transaction,
    change: RouteChange,
    *,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any],
    promotion: str | None,
) -> None:
    """Keep the point of a change that made another version stable. For routes.change, which nobody can pass by.

    What stood before has its point too, be it from a time before there were points. The oldest beyond `KEPT` are gone.
    """
    session, version = transaction.session, change.stable
    if version is None or (before is not None and before["stable"] == version):
        return
    earlier = before["stable"] if before is not None else None
    if earlier is not None and not _has(session, change.environment, change.model, earlier):
        _add(session, change, earlier, generation=before["generation"] if before else 0, route={"after": before})
    row = _add(
        session,
        change,
        version,
        generation=change.generation,
        route={"before": before, "after": after, "kind": change.kind, "reason": change.reason, "actor": change.actor},
    )
    run = session.get(Promotion, promotion) if promotion else None
    row.policy = None if run is None else run.policy
    session.flush()
    _retire(transaction, change.environment, change.model, keep=KEPT, older_than=None, reason=f"the newest {KEPT} stay")


def listed(session: Session, environment: str, model: str | None = None, *, gone: bool = False) -> list[dict[str, Any]]:
    """The points of a model (or of all), newest first; those that are gone as well where asked."""
    query = select(RollbackPoint).where(RollbackPoint.environment == environment)
    if model is not None:
        query = query.where(RollbackPoint.model == model)
    if not gone:
        query = query.where(RollbackPoint.gone_at.is_(None))
    return [describe(row) for row in session.scalars(query.order_by(*_NEWEST))]


def get(session: Session, identity: str) -> RollbackPoint:
    """Raises NotFoundError."""
    row = session.get(RollbackPoint, identity)
    if row is None:
        raise NotFoundError(f"there is no rollback point {identity!r}; see: modelkeep rollback NAME --points")
    return row


def describe(row: RollbackPoint) -> dict[str, Any]:
    return {
        "id": row.id,
        "environment": row.environment,
        "model": row.model,
        "version": row.version,
        "epoch": row.epoch,
        "generation": row.generation,
        "route": row.route,
        "digests": row.digests,
        "policy": row.policy,
        "settings": row.settings,
        "created_at": clock.text(row.created_at),
        "gone_at": clock.text(row.gone_at) if row.gone_at else None,
    }


def stack(steps: Iterable[Step]) -> list[str]:
    """The stable versions that lie below each other, the present one last.

    A promotion puts a version on top, a rollback takes everything above its target away: rolling back twice goes back
    two steps, never forward again to the version that was rolled back from.
    """
    found: list[str] = []
    for step in steps:
        if step.first:
            found.clear()  # nothing was left of what stood before
        if step.version is None or (found and found[-1] == step.version):
            continue
        if step.kind in ("rollback", "withdraw", "unfit") and step.version in found:
            del found[len(found) - found[::-1].index(step.version) :]
        else:
            found.append(step.version)
    return found


def needed(session: Session, environment: str) -> dict[str, list[Step]]:
    """The living points of an environment by model, oldest first, without what a server does not need to find its way back."""
    # Sorted here: to have them in order, SQLite would go through all that are gone as well, which every server asks again and again.
    rows = session.execute(
        select(
            RollbackPoint.model, RollbackPoint.created_at, RollbackPoint.generation, RollbackPoint.version, RollbackPoint.route
        ).where(RollbackPoint.environment == environment, RollbackPoint.gone_at.is_(None))
    ).all()  # fmt: skip
    found: dict[str, list[Step]] = {}
    for model, _, _, version, route in sorted(rows, key=lambda row: (row.model, row.created_at, row.generation)):
        found.setdefault(model, []).append(Step(version, str(route.get("kind", "")), _first(route)))
    return found


def _first(route: Mapping[str, Any]) -> bool:
    return "before" in route and (route["before"] or {}).get("stable") is None


def versions_of(session: Session, wanted: Iterable[tuple[str, str]]) -> list[Version]:
    """The versions named, whose bytes are still there."""
    names = sorted(set(wanted))
    found: list[Version] = []
    for start in range(0, len(names), 200):
        part = names[start : start + 200]
        named = or_(*(and_(Version.model == model, Version.version == version) for model, version in part))
        found.extend(session.scalars(select(Version).where(named, Version.deleted_at.is_(None))))
    return found


def retire(
    database: Database,
    *,
    environment: str,
    model: str | None = None,
    keep: int | None = None,
    older_than: dt.datetime | None = None,
    who: Who,
    reason: str,
) -> list[dict[str, Any]]:
    """Let points go: all but the newest `keep` of each model, or those older than a time. Servers drop what they kept for them.

    Never the point of the version that is stable now, nor of the one below it. Raises UsageError for `keep` below 2, or
    where neither is given.
    """
    if keep is None and older_than is None:
        raise UsageError("which rollback points shall go? Give how many to keep, or how old they may be")
    if keep is not None and keep < LEAST:
        raise UsageError(f"keep = {keep}: at least {LEAST}, the present stable version's and the one before")
    from registry import routes

    with database.write(actor=who.actor) as transaction:
        routes.lock_environment(transaction, environment)
        names = [model] if model is not None else _models(transaction.session, environment)
        gone: list[dict[str, Any]] = []
        for name in names:
            gone += _retire(transaction, environment, name, keep=keep, older_than=older_than, reason=reason)
        return gone


def _retire(
    transaction: Transaction,
    environment: str,
    model: str,
    *,
    keep: int | None,
    older_than: dt.datetime | None,
    reason: str,
) -> list[dict[str, Any]]:
    session = transaction.session
    living = select(func.count()).where(
        RollbackPoint.environment == environment, RollbackPoint.model == model, RollbackPoint.gone_at.is_(None)
    )
    if older_than is None and (session.scalar(living) or 0) <= (keep or 0):
        return []
    rows = list(
        session.scalars(
            select(RollbackPoint)
            .where(
                RollbackPoint.environment == environment,
                RollbackPoint.model == model,
                RollbackPoint.gone_at.is_(None),
            )
            .order_by(*_NEWEST)
        )
    )
    route = session.get(Route, (environment, model))
    stay = {route.stable if route is not None else None}
    steps = [Step(row.version, str(row.route.get("kind", "")), _first(row.route)) for row in reversed(rows)]
    stay.update(stack(steps)[-LEAST:])
    # Of several points of one version the newest is the one that holds its files.
    newest: dict[str, str] = {}
    for row in rows:
        newest.setdefault(row.version, row.id)
    gone = []
    for number, row in enumerate(rows):
        if row.version in stay and newest[row.version] == row.id:
            continue
        if (keep is not None and number >= keep) or (older_than is not None and row.created_at < older_than):
            row.gone_at = clock.now()
            gone.append(describe(row))
    for one in gone:
        transaction.record(
            "rollback-point.gone",
            f"rollback-point:{one['id']}",
            before={name: one[name] for name in ("model", "environment", "version", "generation", "created_at")},
            reason=reason,
        )
    return gone


def _models(session: Session, environment: str) -> list[str]:
    query = select(RollbackPoint.model).where(RollbackPoint.environment == environment, RollbackPoint.gone_at.is_(None))
    return sorted(session.scalars(query.distinct()))


def _has(session: Session, environment: str, model: str, version: str) -> bool:
    query = select(RollbackPoint.id).where(
        RollbackPoint.environment == environment,
        RollbackPoint.model == model,
        RollbackPoint.version == version,
        RollbackPoint.gone_at.is_(None),
    )
    return session.scalars(query.limit(1)).first() is not None


def _add(
    session: Session, change: RouteChange, version: str, *, generation: int, route: dict[str, Any]
) -> RollbackPoint:
    found = session.get(Version, (change.model, version))
    row = RollbackPoint(
        id=secrets.token_hex(6),
        environment=change.environment,
        model=change.model,
        version=version,
        epoch=change.epoch,
        generation=generation,
        route=route,
        digests={}
        if found is None
        else {"artifact": found.digest, "golden": found.golden_digest, "files": list(found.files)},
        policy=None,
        settings=dict(session.info.get("settings", {})),
        created_at=change.at if generation == change.generation else change.at - dt.timedelta(microseconds=1),
        gone_at=None,
    )
    session.add(row)
    return row


_NEWEST = (RollbackPoint.created_at.desc(), RollbackPoint.generation.desc())
