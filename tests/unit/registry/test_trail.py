"""Searching the audit trail, and streaming it to a log store."""

from __future__ import annotations

import datetime as dt
import itertools
import tracemalloc

import pytest
from sqlalchemy import insert, text

from registry import audit, clock, trail
from registry.database import Database
from registry.schema import AuditEvent
from tests.unit.registry import kit
from tests.unit.registry.kit import MODEL, add_version, begin, canary, end, last_event, stable_by

START = dt.datetime(2026, 3, 10, tzinfo=dt.UTC)


def seqs(database: Database, **wanted: object) -> list[int]:
    limit = int(wanted.pop("limit", 1000))  # type: ignore[call-overload]
    with database.read() as session:
        return [event["seq"] for event in trail.listed(session, trail.Wanted(**wanted), limit=limit)]  # type: ignore[arg-type]


@pytest.fixture
def lived(database: Database) -> Database:
    """Two models; a promotion of digits 2 that was withdrawn."""
    for version in ("1", "2"):
        add_version(database, version)
    add_version(database, "1", model="digits-large")
    stable_by(database, "1")
    operation = begin(database, "2")
    canary(database, operation)
    end(database, operation, "withdrawn")
    return database


def test_the_name_of_a_model_finds_all_that_is_about_it_and_nothing_of_its_neighbours(lived: Database) -> None:
    with lived.read() as session:
        found = trail.listed(session, trail.Wanted(MODEL), limit=1000)
    kinds = {event["subject"].partition(":")[0] for event in found}
    assert {"version", "promotion", "route", "model"} <= kinds
    assert not any("digits-large" in event["subject"] for event in found)
    everything = seqs(lived)
    others = set(everything) - {event["seq"] for event in found}
    with lived.read() as session:
        left = {session.get_one(AuditEvent, seq).subject for seq in others}
    assert left == {"environment:production", "version:digits-large/1"}


def test_a_whole_subject_and_a_part_of_one_are_found(lived: Database) -> None:
    assert len(seqs(lived, subject="version:digits-large/1")) == 1
    assert len(seqs(lived, subject="digits-l")) == 1
    assert len(seqs(lived, subject="-large")) == 1
    assert seqs(lived, subject="no%such") == []


def test_events_are_found_by_action_actor_and_time(lived: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = seqs(lived, action="promotion.begun")
    assert len(begun) == 2
    assert len(seqs(lived, action="promotion")) > 4
    assert seqs(lived, action="promo") == []
    before = last_event(lived)
    monkeypatch.setattr(clock, "now", lambda: dt.datetime(2999, 1, 1, tzinfo=dt.UTC))
    with lived.write(actor="key:ann") as transaction:
        transaction.record("thing.done", "thing:1")
    assert seqs(lived, actor="key:ann") == [before + 1]
    assert seqs(lived, since=dt.datetime(2998, 1, 1, tzinfo=dt.UTC)) == [before + 1]
    assert len(seqs(lived, until=dt.datetime(2998, 1, 1, tzinfo=dt.UTC))) == before
    assert seqs(lived, limit=2) == [before + 1, before]


def test_a_stream_has_every_event_in_order_and_goes_on_where_it_ended(lived: Database) -> None:
    events = list(trail.stream(lived, trail.Wanted()))
    assert [event["seq"] for event in events] == list(range(1, last_event(lived) + 1))
    assert (
        audit.link(events[0]["hash"], audit.canonical({k: v for k, v in events[1].items() if k != "hash"}))
        == events[1]["hash"]
    )
    assert [event["seq"] for event in trail.stream(lived, trail.Wanted(after=5))] == list(
        range(6, last_event(lived) + 1)
    )
    assert [event["seq"] for event in trail.stream(lived, trail.Wanted(after=10_000))] == []


def test_an_event_whose_text_was_broken_does_not_end_the_stream(lived: Database) -> None:
    with lived.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE audit SET text = 'no json' WHERE seq = 3")
    events = list(trail.stream(lived, trail.Wanted()))
    assert len(events) == last_event(lived)
    assert events[2]["broken"] == "no json"


def long_chain(database: Database, events: int) -> None:
    """A chain of many events, written as `audit.append` would, without a transaction for each."""
    head, rows = audit.GENESIS, []
    for seq in range(1, events + 1):
        moment = clock.text(START + dt.timedelta(seconds=seq))
        fields = {
            "seq": seq, "at": moment, "actor": "test", "action": "thing.done", "subject": f"thing:{seq % 100}",
            "before": None, "after": None, "flow_run_id": None, "reason": "x" * 200,
        }  # fmt: skip
        line = audit.canonical(fields)
        head = audit.link(head, line)
        rows.append({**{k: fields[k] for k in ("seq", "at", "actor", "action", "subject")}, "text": line, "hash": head})
    with database.engine.begin() as connection:
        connection.execute(insert(AuditEvent), rows)
        connection.execute(text("UPDATE audit_head SET seq = :seq, hash = :hash"), {"seq": events, "hash": head})
    assert database.anchors is not None
    with database.anchors.open("w") as anchors:
        anchors.writelines(f"{row['seq']} {row['hash']} {row['at']}\n" for row in rows)


def test_neither_verifying_nor_streaming_grows_with_the_chain(database: Database) -> None:
    """Held in memory whole, these events and their anchors would take more than twice what is allowed."""
    events = 4_000
    long_chain(database, events)
    kit.verdict(database)  # what is compiled and cached once
    list(itertools.islice(trail.stream(database, trail.Wanted()), 10))
    tracemalloc.start()
    try:
        found = kit.verdict(database)
        verify_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        count = sum(1 for _ in trail.stream(database, trail.Wanted()))
        stream_peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert (found.holds, found.events, found.anchors, count) == (True, events, events, events)
    assert max(stream_peak, verify_peak) < 2_000_000, (stream_peak, verify_peak)
