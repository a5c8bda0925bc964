"""Verdicts on answered requests: each id counts once, and only while the promotion that it tells of is under way."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, delete, func, insert, select
from sqlalchemy.orm import Session

from registry import clock
from registry.database import Database
from registry.schema import Feedback, Promotion, RouteChange

ID_LENGTH = 160


@dataclass(frozen=True, slots=True)
class Verdict:
    """What somebody found of one answer. `model` and `epoch` are None where only the id is known: they follow from its generation."""

    request_id: str
    version: str
    generation: int
    bad: bool
    model: str | None = None
    epoch: str | None = None
    reason: str | None = None
    key_id: str | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of a batch of verdicts."""

    kept: int = 0
    known: int = 0
    """An id that had its verdict already."""
    unwatched: int = 0
    """No promotion under way has that generation among its windows: nobody would judge it."""
    unknown: int = 0
    """No route of that generation names that version."""

    def outcome(self) -> tuple[tuple[str, int], ...]:
        return (("kept", self.kept), ("known", self.known), ("unwatched", self.unwatched), ("unknown", self.unknown))


def record(database: Database, environment: str, verdicts: Sequence[Verdict], *, observer: str) -> Recorded:
    """Write verdicts in one transaction. One that was written already, by whatever server, is left as it is."""
    if not verdicts:
        return Recorded()
    with database.write(actor=observer) as transaction:
        session, now = transaction.session, clock.now()
        changes = _changes(session, environment, {verdict.generation for verdict in verdicts})
        open_windows = _windows(session, environment, {change.model for found in changes.values() for change in found})
        rows: dict[str, dict[str, Any]] = {}
        unknown = unwatched = known = 0
        for verdict in verdicts:
            named = [change for change in changes.get(verdict.generation, ()) if _fits(change, verdict)]
            if not named:
                unknown += 1
                continue
            # After a restore two epochs may have the same generation; only the one under way has windows.
            change = next((c for c in named if (c.model, c.epoch, c.generation) in open_windows), None)
            if change is None:
                unwatched += 1
                continue
            row = _row(verdict, change.model, change.epoch, now)
            if row["request_id"] in rows:
                known += 1
                continue
            rows[row["request_id"]] = row
        there = set(session.scalars(select(Feedback.request_id).where(Feedback.request_id.in_(rows))))
        # In one order on every server, so that two that write the same ids never wait for each other.
        fresh = [rows[identity] for identity in sorted(rows.keys() - there)]
        kept = _insert(session, fresh)
        known += len(rows) - kept
        return Recorded(kept, known, unwatched, unknown)


def counts(session: Session, model: str, epoch: str, generation: int) -> dict[str, tuple[int, int]]:
    """(verdicts, bad ones) of one generation of a route, by version."""
    rows = session.execute(
        select(Feedback.version, func.count(), func.sum(case((Feedback.verdict == "bad", 1), else_=0)))
        .where(Feedback.model == model, Feedback.epoch == epoch, Feedback.generation == generation)
        .group_by(Feedback.version)
    )
    return {version: (int(total), int(bad or 0)) for version, total, bad in rows}


def forget(session: Session, model: str, generations: Iterable[tuple[str, int]]) -> None:
    """Drop the verdicts of a promotion that has ended; its decisions keep the sums."""
    for epoch, generation in generations:
        session.execute(
            delete(Feedback).where(Feedback.model == model, Feedback.epoch == epoch, Feedback.generation == generation)
        )


def _changes(session: Session, environment: str, generations: set[int]) -> dict[int, list[RouteChange]]:
    found: dict[int, list[RouteChange]] = {}
    query = select(RouteChange).where(
        RouteChange.environment == environment, RouteChange.generation.in_(sorted(generations))
    )
    for change in session.scalars(query):
        found.setdefault(change.generation, []).append(change)
    return found


def _windows(session: Session, environment: str, models: set[str]) -> set[tuple[str, str, int]]:
    """(model, epoch, generation) of every window of the promotions that have not ended."""
    rows = session.execute(
        select(Promotion.model, Promotion.progress).where(
            Promotion.environment == environment,
            Promotion.finished_at.is_(None),
            Promotion.model.in_(sorted(models)),
        )
    )
    return {
        (model, str(window["epoch"]), int(window["generation"]))
        for model, progress in rows
        for window in windows_of(progress)
    }


def windows_of(progress: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The windows of a promotion, that of its soak included."""
    soak = progress.get("soak")
    return [*progress.get("windows", []), *([soak] if soak else [])]


def _fits(change: RouteChange, verdict: Verdict) -> bool:
    return (
        verdict.version in (change.stable, change.candidate)
        and verdict.model in (None, change.model)
        and verdict.epoch in (None, change.epoch)
    )


def _row(verdict: Verdict, model: str, epoch: str, now: dt.datetime) -> dict[str, Any]:
    identity = verdict.request_id
    if len(identity) > ID_LENGTH:
        identity = "sha256:" + hashlib.sha256(identity.encode()).hexdigest()
    return {
        "request_id": identity,
        "model": model,
        "version": verdict.version,
        "epoch": epoch,
        "generation": verdict.generation,
        "verdict": "bad" if verdict.bad else "good",
        "reason": verdict.reason,
        "key_id": verdict.key_id,
        "at": now,
    }


def _insert(session: Session, rows: list[dict[str, Any]]) -> int:
    """Insert what is not there yet, whoever writes at the same time. The number of rows that are new."""
    if not rows:
        return 0
    kind = session.get_bind().dialect.name
    statement: Any
    if kind in ("mysql", "mariadb"):
        statement = insert(Feedback).prefix_with("IGNORE")
    elif kind == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as postgresql_insert

        statement = postgresql_insert(Feedback).on_conflict_do_nothing().returning(Feedback.request_id)
    else:
        from sqlalchemy.dialects.sqlite import insert as sqlite_insert

        statement = sqlite_insert(Feedback).on_conflict_do_nothing()
    kept = 0
    for start in range(0, len(rows), 500):
        part = rows[start : start + 500]
        done = session.connection().execute(statement.values(part))
        # psycopg tells no row count for this statement.
        kept += len(done.all()) if kind == "postgresql" else done.rowcount
    return kept
