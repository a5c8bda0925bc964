"""What the servers report: a row each, and while something is watched their cumulative counts. Neither is audited."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from registry import clock, feedback, keys
from registry.database import Database
from registry.leases import Beat
from registry.schema import Environment, Feedback, Lease, Promotion, Reach, Replica, ReplicaCount, Route, Version

COUNTS_KEPT_SECONDS = 3600.0
"""How long after the end of a promotion its raw counts are there to be looked at."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """What one poll of a server brings: the generation to be at, and the leases to keep an eye on."""

    epoch: str
    generation: int
    beats: tuple[Beat, ...]
    keys: int = 0
    """The counter of `registry.keys`."""


@dataclass(frozen=True, slots=True)
class Reached:
    """A generation that a server switched to, and when, by its own wall clock, right after the switch.

    `behind`: models whose route it could not serve as wanted (a version that did not load).
    """

    epoch: str
    generation: int
    at: dt.datetime
    behind: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What a server says of itself."""

    id: str
    environment: str
    address: str
    boot_id: str
    epoch: str
    generation: int
    serving: dict[str, Any]
    started_at: dt.datetime
    counts: tuple[dict[str, Any], ...] = ()
    """[{"model", "version", "generation", "epoch", …cumulative figures}]"""
    reached: tuple[Reached, ...] = ()
    """Every switch since the last report that was written. Empty: `generation` is taken to be reached at the time of the report."""


def pulse(session: Session, environment: str) -> Pulse | None:
    """One cheap query. None where the environment has no route yet."""
    rows = session.execute(
        select(
            Environment.epoch,
            Environment.generation,
            Lease.subject,
            Lease.token,
            Lease.heartbeat,
            Lease.ttl_seconds,
            keys.counter_query(),
        )
        .join(Lease, (Lease.environment == Environment.name) & (Lease.state == "held"), isouter=True)
        .where(Environment.name == environment)
    ).all()
    if not rows:
        return None
    beats = tuple(Beat(row[2], row[3], row[4], row[5]) for row in rows if row[2] is not None)
    return Pulse(rows[0][0], rows[0][1], beats, rows[0][6] or 0)


def desired(session: Session, environment: str) -> tuple[list[Route], list[Version]]:
    """All routes of an environment and the versions that they name."""
    routes = list(session.scalars(select(Route).where(Route.environment == environment)))
    wanted = {(route.model, version) for route in routes for version in (route.stable, route.candidate) if version}
    models = {model for model, _ in wanted}
    query = select(Version).where(Version.model.in_(models), Version.version.in_({version for _, version in wanted}))
    rows: Iterable[Version] = session.scalars(query) if models else []
    return routes, [row for row in rows if (row.model, row.version) in wanted]


def report(database: Database, what: Report) -> None:
    """Write a server's row and counts. A new boot takes the row over."""
    # Counts are dropped by whoever ends a promotion: never between reading and writing them here.
    with database.write(actor=f"replica:{what.id}", exclusive=bool(what.counts)) as transaction:
        session, now = transaction.session, clock.now()
        row = session.get(Replica, what.id)
        if row is None:
            row = Replica(id=what.id, heartbeat=0, reached_at=now)
        elif row.boot_id != what.boot_id:
            _ended(session, row)
        fresh = row.boot_id != what.boot_id or (row.epoch, row.generation) != (what.epoch, what.generation)
        if fresh:
            row.reached_at = what.reached[-1].at if what.reached else now
        row.environment, row.address, row.boot_id = what.environment, what.address, what.boot_id
        row.epoch, row.generation, row.serving = what.epoch, what.generation, what.serving
        row.started_at, row.reported_at, row.heartbeat = what.started_at, now, row.heartbeat + 1
        session.add(row)
        if fresh or what.reached:
            _note_reached(session, what, row.reached_at)
        for counts in what.counts:
            figures = dict(counts)
            key = (
                what.id,
                what.boot_id,
                figures.pop("epoch"),
                figures.pop("generation"),
                figures.pop("model"),
                figures.pop("version"),
            )
            found = session.get(ReplicaCount, key)
            if found is None:
                replica, boot, epoch, generation, model, version = key
                session.add(
                    ReplicaCount(
                        replica=replica,
                        boot_id=boot,
                        epoch=epoch,
                        generation=generation,
                        model=model,
                        version=version,
                        counts=figures,
                    )
                )
            else:
                found.counts = figures


def _note_reached(session: Session, what: Report, now: dt.datetime) -> None:
    """When this boot reached which generation, each once. One that was behind has reached it when it no longer is."""
    for one in what.reached or (Reached(what.epoch, what.generation, now),):
        key = (what.environment, one.epoch, one.generation, what.id, what.boot_id)
        found = session.get(Reach, key)
        if found is None:
            environment, epoch, generation, replica, boot = key
            session.add(
                Reach(
                    environment=environment,
                    epoch=epoch,
                    generation=generation,
                    replica=replica,
                    boot_id=boot,
                    at=one.at,
                    behind=list(one.behind) or None,
                )
            )
        elif one.behind:
            found.behind = sorted(one.behind)
        elif found.behind:
            found.at, found.behind = one.at, None


def _ended(session: Session, row: Replica) -> None:
    """Another boot of a replica has reported: keep until when the one before was heard of."""
    session.execute(
        update(Reach)
        .where(Reach.environment == row.environment, Reach.replica == row.id, Reach.boot_id == row.boot_id)
        .where(Reach.epoch == row.epoch, Reach.generation == row.generation)
        .values(until=row.reported_at)
    )


def forget_all(session: Session) -> None:
    """For a registry that was restored: what servers said then says nothing of now. Each that lives reports anew."""
    for row in session.scalars(select(Replica)).all():
        _ended(session, row)
    session.execute(delete(ReplicaCount))
    session.execute(delete(Replica))


def counts(session: Session, model: str, epoch: str, generation: int) -> dict[str, list[dict[str, Any]]]:
    """What all boots of all replicas counted under one generation of a route, by version."""
    found: dict[str, list[dict[str, Any]]] = {}
    rows = session.scalars(
        select(ReplicaCount).where(
            ReplicaCount.model == model, ReplicaCount.epoch == epoch, ReplicaCount.generation == generation
        )
    )
    for row in rows:
        found.setdefault(row.version, []).append(row.counts)
    return found


def forget_counts(database: Database, model: str, generations: Iterable[tuple[str, int]]) -> None:
    """Drop the raw counts and verdicts of a promotion that has ended; its decisions keep the sums."""
    with database.write() as transaction:
        for epoch, generation in generations:
            transaction.session.execute(
                delete(ReplicaCount).where(
                    ReplicaCount.model == model, ReplicaCount.epoch == epoch, ReplicaCount.generation == generation
                )
            )
            feedback.forget(transaction.session, model, [(epoch, generation)])


def forget_ended(session: Session, model: str) -> None:
    """Drop the counts and verdicts of a model's promotions that ended more than COUNTS_KEPT_SECONDS ago."""
    cut = clock.now() - dt.timedelta(seconds=COUNTS_KEPT_SECONDS)
    recent = (Promotion.finished_at.is_(None)) | (Promotion.finished_at > cut)
    rows = session.scalars(select(Promotion.progress).where(Promotion.model == model, recent))
    kept = {
        (str(window["epoch"]), int(window["generation"]))
        for progress in rows
        for window in feedback.windows_of(progress)
    }
    for table in (ReplicaCount, Feedback):
        found = session.execute(select(table.epoch, table.generation).where(table.model == model).distinct()).all()
        for epoch, generation in {(row[0], row[1]) for row in found} - kept:
            session.execute(
                delete(table).where(table.model == model, table.epoch == epoch, table.generation == generation)
            )


def listed(session: Session, environment: str | None = None) -> list[dict[str, Any]]:
    query = select(Replica).order_by(Replica.environment, Replica.id)
    if environment is not None:
        query = query.where(Replica.environment == environment)
    return [
        {
            "id": row.id,
            "environment": row.environment,
            "address": row.address,
            "boot_id": row.boot_id,
            "heartbeat": row.heartbeat,
            "epoch": row.epoch,
            "generation": row.generation,
            "serving": row.serving,
            "started_at": clock.text(row.started_at),
            "reached_at": clock.text(row.reached_at),
            "reported_at": clock.text(row.reported_at),
        }
        for row in session.scalars(query)
    ]
