"""The audit chain: append-only events, each hashed over the one before it, with one head row, anchored in a log outside the database."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import clock
from registry.schema import AuditEvent, AuditHead

GENESIS = hashlib.sha256(b"modelkeep audit chain, version 1").hexdigest()
_FIELDS = ("seq", "at", "actor", "action", "subject", "before", "after", "flow_run_id", "reason")


@dataclass(frozen=True, slots=True)
class Event:
    """A change that waits for its transaction to end. `before` and `after` are JSON-able."""

    action: str
    subject: str
    actor: str
    before: Any = None
    after: Any = None
    reason: str = ""
    flow_run_id: str | None = None


@dataclass(frozen=True, slots=True)
class Head:
    seq: int
    hash: str


def canonical(fields: dict[str, Any]) -> str:
    """The text that is hashed: JSON with sorted keys, no spaces, ASCII only (the same bytes on every database)."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)


def link(previous: str, text: str) -> str:
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def append(session: Session, events: list[Event]) -> Head:
    """Write `events` behind the head and move it. Call it last in a transaction: the head is the last lock taken."""
    head = session.execute(select(AuditHead).where(AuditHead.id == 1).with_for_update()).scalar_one()
    for event in events:
        fields = {
            "seq": head.seq + 1,
            "at": clock.text(clock.now()),
            "actor": event.actor,
            "action": event.action,
            "subject": event.subject,
            "before": event.before,
            "after": event.after,
            "flow_run_id": event.flow_run_id,
            "reason": event.reason,
        }
        text = canonical(fields)
        head.seq, head.hash = head.seq + 1, link(head.hash, text)
        session.add(
            AuditEvent(
                seq=head.seq,
                at=fields["at"],
                actor=event.actor,
                action=event.action,
                subject=event.subject,
                text=text,
                hash=head.hash,
            )
        )
    session.flush()
    return Head(head.seq, head.hash)


def anchor(path: Path, head: Head) -> None:
    """Note the head in a file outside the database, so that a cut tail or a rewritten chain shows."""
    line = f"{head.seq} {head.hash} {clock.text(clock.now())}\n".encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_anchors(path: Path) -> Iterator[Head]:
    """The anchors in the order written. A torn last line (a kill in the middle of it) is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        parts = line.split()
        if line.endswith("\n") and len(parts) == 3 and parts[0].isdigit():
            yield Head(int(parts[0]), parts[1])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found. `faults` is empty where the chain is whole."""

    events: int
    head: Head
    anchors: int
    faults: list[str]

    @property
    def holds(self) -> bool:
        return not self.faults


def verify(session: Session, anchors: Path | None = None) -> Verdict:
    """Walk the chain from its start; name every event that was changed, removed or added, and a cut tail.

    Each fault names the event by its number. After a fault the walk goes on from the hash that is stored, so that one
    changed row is one fault and not all that follow it.
    """
    faults: list[str] = []
    previous, expected, hashes = GENESIS, 1, {0: GENESIS}
    for event in session.execute(
        select(AuditEvent).order_by(AuditEvent.seq).execution_options(yield_per=1000)
    ).scalars():
        if event.seq > expected:
            gap = f"event {expected} is" if event.seq == expected + 1 else f"events {expected} to {event.seq - 1} are"
            faults.append(f"{gap} missing: removed from the table")
        elif event.seq < expected:
            faults.append(f"event {event.seq} stands where {expected} belongs: added to the table")
        fault = _event_fault(event, previous, contiguous=event.seq == expected)
        if fault:
            faults.append(f"event {event.seq} ({event.at}, {event.action} {event.subject}) {fault}")
        previous, expected = event.hash, event.seq + 1
        hashes[event.seq] = event.hash
    last = expected - 1
    head = session.get(AuditHead, 1)
    if head is None:
        faults.append("the head row is missing: removed from the table")
        head = AuditHead(id=1, seq=last, hash=previous)
    elif head.seq > last:
        faults.append(f"the tail is cut: the head row says event {head.seq}, the table ends at {last}")
    elif head.seq < last:
        faults.append(f"events {head.seq + 1} to {last} stand behind the head row: added to the table")
    elif head.hash != previous:
        faults.append(f"the head row's hash is not that of event {last}: the chain or the head was rewritten")
    found = list(read_anchors(anchors)) if anchors is not None else []
    for mark in found:
        if mark.seq > last:
            faults.append(f"the tail is cut: an anchor in {anchors} knows event {mark.seq}, the table ends at {last}")
            break
        if mark.seq in hashes and hashes[mark.seq] != mark.hash:
            faults.append(f"event {mark.seq} differs from its anchor in {anchors}: the chain was rewritten up to there")
            break
    return Verdict(events=len(hashes) - 1, head=Head(head.seq, head.hash), anchors=len(found), faults=faults)


def _event_fault(event: AuditEvent, previous: str, *, contiguous: bool) -> str | None:
    try:
        fields = json.loads(event.text)
    except ValueError:
        return "holds text that is no JSON: changed"
    if not isinstance(fields, dict) or sorted(fields) != sorted(_FIELDS):
        return "lacks or adds fields: changed"
    for name in ("seq", "at", "actor", "action", "subject"):
        if fields[name] != getattr(event, name):
            return f"has {name} {getattr(event, name)!r} in its column and {fields[name]!r} in its text: changed"
    if contiguous and link(previous, event.text) != event.hash:
        return "does not hash to what is stored: changed"
    return None
