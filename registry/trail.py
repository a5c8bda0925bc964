"""Reading the audit trail: search it, and stream it to a log store. Who writes and proves it is registry.audit."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, String, cast, literal, or_, select, union_all
from sqlalchemy.orm import Session

from registry import clock
from registry.database import Database
from registry.schema import AuditEvent, Environment, Model, Promotion, Version

_CHUNK = 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events. `since` and `until` are the times that events have; `after` is the number of the last one that is known."""

    subject: str | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None
    actor: str | None = None
    action: str | None = None
    after: int = 0


def listed(session: Session, wanted: Wanted, *, limit: int = 50) -> list[dict[str, Any]]:
    """The newest events that are wanted, the newest first."""
    query = select(AuditEvent).where(*_where(session, wanted)).order_by(AuditEvent.seq.desc()).limit(limit)
    return [as_dict(row.text, row.hash) for row in session.scalars(query)]


def stream(database: Database, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Every event that is wanted, the oldest first. In short transactions of a thousand, so that memory stays the same and
    nobody waits; it ends at the newest event that there is when it comes there, and goes on from `after`."""
    after = wanted.after
    while True:
        with database.read() as session:
            query = (
                select(AuditEvent.seq, AuditEvent.text, AuditEvent.hash)
                .where(AuditEvent.seq > after, *_where(session, wanted))
                .order_by(AuditEvent.seq)
                .limit(_CHUNK)
            )
            rows = session.execute(query).all()
        for row in rows:
            yield as_dict(row.text, row.hash)
        if len(rows) < _CHUNK:
            return
        after = rows[-1].seq


def as_dict(text: str, hash_: str) -> dict[str, Any]:
    """An event as it is shown. One whose text was broken is shown as it is: `audit verify` names it."""
    try:
        fields = json.loads(text)
    except ValueError:
        return {"broken": text, "hash": hash_}
    return {**fields, "hash": hash_} if isinstance(fields, dict) else {"broken": text, "hash": hash_}


def _where(session: Session, wanted: Wanted) -> list[ColumnElement[bool]]:
    where: list[ColumnElement[bool]] = []
    if wanted.after:
        where.append(AuditEvent.seq > wanted.after)
    if wanted.since is not None:
        where.append(AuditEvent.at >= clock.text(wanted.since))
    if wanted.until is not None:
        where.append(AuditEvent.at <= clock.text(wanted.until))
    if wanted.actor is not None:
        where.append(AuditEvent.actor == wanted.actor)
    if wanted.action is not None:
        # "promotion" is every action of promotions, "promotion.begun" that one
        where.append(
            or_(AuditEvent.action == wanted.action, AuditEvent.action.startswith(f"{wanted.action}.", autoescape=True))
        )
    if wanted.subject is not None:
        where.append(_about(session, wanted.subject))
    return where


def _about(session: Session, subject: str) -> ColumnElement[bool]:
    """Events about a subject. A model's name means all that is about it: its versions, routes, leases and promotions, which the
    index finds; a whole subject means itself; anything else is looked for inside subjects, event by event."""
    if session.get(Model, subject) is not None:
        versions = select(literal("version:") + Version.model + literal("/") + Version.version).where(
            Version.model == subject
        )
        runs = select(literal("promotion:") + cast(Promotion.id, String(32))).where(Promotion.model == subject)
        routes = [
            f"{kind}:{name}/{subject}"
            for name in session.scalars(select(Environment.name))
            for kind in ("route", "model")
        ]
        return or_(
            AuditEvent.subject.in_([f"model:{subject}", *routes]), AuditEvent.subject.in_(union_all(versions, runs))
        )
    known = session.scalars(select(AuditEvent.seq).where(AuditEvent.subject == subject).limit(1)).first()
    if known is not None:
        return AuditEvent.subject == subject
    return AuditEvent.subject.contains(subject, autoescape=True)
