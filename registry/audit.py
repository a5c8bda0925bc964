"""The audit chain: append-only events, each hashed over the one before it, with one head row, anchored in a log outside the database."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Row, func, select
from sqlalchemy.orm import Session

from registry import clock
from registry.errors import AuditError
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
    """Write `events` behind the head and move it. Call it last in a transaction: the head is the last lock taken.

    Raises AuditError where the head row is gone: without it nothing can be put on record.
    """
    head = session.execute(select(AuditHead).where(AuditHead.id == 1).with_for_update()).scalar_one_or_none()
    if head is None:
        raise AuditError(
            "the audit chain has lost its head row, so no change can be put on record; see: modelkeep audit verify"
        )
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
    """Note the head in a file outside the database, so that a cut tail or a rewritten chain shows. Raises OSError."""
    line = f"{head.seq} {head.hash} {clock.text(clock.now())}\n".encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a kill tore the line before: it shall not take this one with it
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def read_anchors(path: Path, until: int | None = None) -> Iterator[Head]:
    """The anchors in the order written, of the first `until` bytes where that is given. A line that a kill tore is left out:
    the one after it knows more."""
    if not path.exists():
        return
    read = 0
    with path.open("rb") as file:
        for raw in file:
            read += len(raw)
            if until is not None and read > until:
                return
            if (mark := read_anchor(raw)) is not None:
                yield mark


def read_anchor(raw: bytes) -> Head | None:
    """A line of the anchors; None for one that a kill tore."""
    line = raw.decode("utf-8", errors="replace")
    parts = line.split()
    if line.endswith("\n") and len(parts) == 3 and parts[0].isdecimal() and len(parts[1]) == 64:
        return Head(int(parts[0]), parts[1])
    return None


def read_text(text: str) -> dict[str, Any]:
    """The fields of an event, from the text that is hashed. Empty where it was changed into something else."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


class _Marks:
    """The anchors that were there when the look began, read beside the chain, so that neither is ever held in memory whole.

    They lie nearly in the order of the events: processes that commit at the same time may swap theirs, and after a restore
    they begin again from an earlier event. Those that come too late are kept, and compared at the end.
    """

    def __init__(self, path: Path | None) -> None:
        self._size = path.stat().st_size if path is not None and path.exists() else 0
        self.count = self.known = 0
        for mark in self._read(path):
            self.count, self.known = self.count + 1, max(self.known, mark.seq)
        self._rest = self._read(path)
        self._ahead: dict[int, list[str]] = {}
        self.late: list[Head] = []
        self.differing: int | None = None

    def _read(self, path: Path | None) -> Iterator[Head]:
        return read_anchors(path, self._size) if path is not None and self._size else iter(())

    def pass_by(self, seq: int) -> list[str]:
        """The hashes that the anchors have for an event; events are asked for in their order."""
        while seq not in self._ahead and (not self._ahead or max(self._ahead) < seq):
            mark = next(self._rest, None)
            if mark is None:
                break
            if mark.seq >= seq:
                self._ahead.setdefault(mark.seq, []).append(mark.hash)
            else:
                self.late.append(mark)
        for passed in [known for known in self._ahead if known < seq]:  # of events that are missing
            del self._ahead[passed]
        return self._ahead.pop(seq, [])

    def compare(self, seq: int, hash_: str, marked: Iterable[str]) -> None:
        if any(mark != hash_ for mark in marked):
            self.differing = seq if self.differing is None else min(seq, self.differing)


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

    Each fault names the event by its number. One changed row is one fault and not all that follow it. Others may write
    meanwhile; `session` must not have read anything before, so that it sees all that the anchors know.
    """
    # The order matters: what an anchor knows was committed before, so the tables that are read later must have it.
    marks = _Marks(anchors)
    newest = select(func.max(AuditEvent.seq)).scalar_subquery()
    # Head and newest event in one statement: one moment, on every database.
    row = session.execute(select(AuditHead.seq, AuditHead.hash, newest).where(AuditHead.id == 1)).one_or_none()
    until = session.scalar(select(newest)) if row is None else row[2]
    faults: list[str] = []
    faulty: set[int] = set()
    events, last = 0, 0
    previous: tuple[str, ...] = (GENESIS,)
    marks.compare(0, GENESIS, marks.pass_by(0))
    columns = (getattr(AuditEvent, name) for name in ("seq", "at", "actor", "action", "subject", "text", "hash"))
    for event in session.execute(
        select(*columns)
        .where(AuditEvent.seq <= (until or 0))
        .order_by(AuditEvent.seq)
        .execution_options(yield_per=1000)
    ):
        events += 1
        if event.seq <= last:
            faults.append(f"event {event.seq} ({event.at}, {event.action} {event.subject}) is none: added to the table")
            continue
        if event.seq > last + 1:
            gap = f"event {last + 1} is" if event.seq == last + 2 else f"events {last + 1} to {event.seq - 1} are"
            faults.append(f"{gap} missing: removed from the table")
            previous = ()
        links = tuple(link(before, event.text) for before in previous)
        fault = _changed(event)
        if fault is None and links and event.hash not in links:
            fault = "does not hash to what is stored: changed"
        marked = marks.pass_by(event.seq)
        if fault is not None:
            faults.append(f"event {event.seq} ({event.at}, {event.action} {event.subject}) {fault}")
            faulty.add(event.seq)
        else:
            marks.compare(event.seq, event.hash, marked)
        # Where the text or the hash of a row was changed, the next row fits the one that was not.
        previous = (event.hash,) if fault is None else (event.hash, *links)
        last = event.seq
    if row is None:
        faults.append("the head row is missing: removed from the table")
        head = Head(last, previous[0])
    else:
        head = Head(row[0], row[1])
        if head.seq > last:
            faults.append(f"the tail is cut: the head row says event {head.seq}, the table ends at {last}")
        elif head.seq < last:
            which = f"event {last} stands" if last == head.seq + 1 else f"events {head.seq + 1} to {last} stand"
            faults.append(
                f"{which} behind the head row, which says {head.seq}: added to the table, or the head was changed"
            )
        elif head.hash not in previous:
            faults.append(f"the head row's hash is not that of event {last}: the chain or the head was changed")
    if marks.known > last:
        faults.append(f"the tail is cut: an anchor in {anchors} knows event {marks.known}, the table ends at {last}")
    for start in range(0, len(marks.late), 500):
        chunk = [mark for mark in marks.late[start : start + 500] if mark.seq not in faulty]
        found = select(AuditEvent.seq, AuditEvent.hash).where(AuditEvent.seq.in_([mark.seq for mark in chunk]))
        stored = {0: GENESIS, **{seq: hash_ for seq, hash_ in session.execute(found)}}
        for mark in chunk:
            marks.compare(mark.seq, stored.get(mark.seq, mark.hash), [mark.hash])
    if marks.differing is not None:
        faults.append(
            f"event {marks.differing} differs from its anchor in {anchors}: the chain was rewritten at it or before it"
        )
    return Verdict(events=events, head=head, anchors=marks.count, faults=faults)


def _changed(event: AuditEvent | Row[Any]) -> str | None:
    """What the row itself shows: its text is broken, or says something else than its columns."""
    try:
        fields = json.loads(event.text)
    except (ValueError, RecursionError):
        return "holds text that is no JSON: changed"
    if not isinstance(fields, dict) or sorted(fields) != sorted(_FIELDS):
        return "lacks or adds fields: changed"
    for name in ("seq", "at", "actor", "action", "subject"):
        if fields[name] != getattr(event, name):
            return f"has {name} {getattr(event, name)!r} in its column and {fields[name]!r} in its text: changed"
    return None
