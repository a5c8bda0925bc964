"""The audit chain: whatever is changed, removed or added behind its back is found and named."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, text

from registry import audit
from registry.audit import GENESIS, Head, Verdict, canonical, link, read_anchors
from registry.database import Database
from registry.errors import AuditError
from registry.schema import AuditEvent
from tests.unit.registry.kit import verdict

EVENTS = 6
SPAWN = multiprocessing.get_context("spawn")


def sql(database: Database, *statements: str) -> None:
    """Statements behind the registry's back, as someone with a database shell would give them."""
    with database.engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


@pytest.fixture
def chain(database: Database) -> Database:
    """A registry with six events, each anchored."""
    for number in range(1, EVENTS + 1):
        with database.write(actor="ann") as transaction:
            transaction.record("thing.done", f"thing:{number}", before={"n": number - 1}, after={"n": number})
    return database


def faults(database: Database) -> list[str]:
    found = verdict(database)
    assert not found.holds
    return found.faults


def test_an_untouched_chain_holds_and_says_how_long_it_is(chain: Database) -> None:
    found = verdict(chain)
    assert found.faults == []
    assert found.holds
    assert (found.events, found.head.seq, found.anchors) == (EVENTS, EVENTS, EVENTS)


def test_an_empty_chain_holds(database: Database) -> None:
    assert verdict(database) == Verdict(events=0, head=Head(0, GENESIS), anchors=0, faults=[])


def test_the_hash_of_an_event_is_that_of_the_one_before_it_and_its_text(chain: Database) -> None:
    with chain.read() as session:
        rows = session.scalars(select(AuditEvent).order_by(AuditEvent.seq)).all()
    before = GENESIS
    for row in rows:
        before = link(before, row.text)
        assert row.hash == before
    assert json.loads(rows[2].text)["after"] == {"n": 3}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("actor", "'eve'"),
        ("action", "'thing.undone'"),
        ("subject", "'thing:9'"),
        ("at", "'2020-01-01T00:00:00.000000Z'"),
    ],
)
def test_a_changed_column_is_named(chain: Database, column: str, value: str) -> None:
    sql(chain, f"UPDATE audit SET {column} = {value} WHERE seq = 3")
    (fault,) = faults(chain)
    assert fault.startswith("event 3 (")
    assert f"has {column} {value} in its column" in fault
    assert fault.endswith("changed")


@pytest.mark.parametrize("seq", [1, 3, EVENTS])
def test_a_changed_text_is_one_fault_that_names_the_event(chain: Database, seq: int) -> None:
    sql(
        chain,
        f"UPDATE audit SET text = replace(text, 'thing.done', 'thing.done '), action = 'thing.done ' WHERE seq = {seq}",
    )
    (fault,) = faults(chain)
    assert fault.startswith(f"event {seq} (")
    assert "does not hash to what is stored: changed" in fault


@pytest.mark.parametrize("seq", [1, 3, EVENTS])
def test_a_changed_hash_is_one_fault_that_names_the_event(chain: Database, seq: int) -> None:
    sql(chain, f"UPDATE audit SET hash = '{'0' * 64}' WHERE seq = {seq}")
    (fault,) = faults(chain)
    assert fault.startswith(f"event {seq} (")


@pytest.mark.parametrize("value", ["no json", "[]", "{}", "[" * 100_000])
def test_a_text_that_says_nothing_is_named(chain: Database, value: str) -> None:
    sql(chain, f"UPDATE audit SET text = '{value}' WHERE seq = 4")
    (fault,) = faults(chain)
    assert fault.startswith("event 4 (")


def test_two_changed_rows_are_both_named(chain: Database) -> None:
    sql(chain, "UPDATE audit SET text = replace(text, 'thing.done', 'thing.gone') WHERE seq IN (2, 5)")
    assert [fault.split(" (")[0] for fault in faults(chain)] == ["event 2", "event 5"]


def test_a_row_removed_from_the_middle_is_named(chain: Database) -> None:
    sql(chain, "DELETE FROM audit WHERE seq = 3")
    assert faults(chain) == ["event 3 is missing: removed from the table"]


def test_rows_removed_from_the_middle_are_named(chain: Database) -> None:
    sql(chain, "DELETE FROM audit WHERE seq IN (3, 4)")
    assert faults(chain) == ["events 3 to 4 are missing: removed from the table"]


def test_a_removed_first_row_is_named(chain: Database) -> None:
    sql(chain, "DELETE FROM audit WHERE seq = 1")
    assert faults(chain) == ["event 1 is missing: removed from the table"]


def test_a_row_removed_and_the_rest_moved_up_is_found_by_what_the_texts_say(chain: Database) -> None:
    sql(
        chain,
        "DELETE FROM audit WHERE seq = 3",
        *(f"UPDATE audit SET seq = {n - 1} WHERE seq = {n}" for n in (4, 5, 6)),
    )
    found = faults(chain)
    assert found[0].startswith("event 3 (")
    assert "has seq 3 in its column and 4 in its text" in found[0]


@pytest.mark.parametrize("seq", [0, -1])
def test_a_row_added_before_the_first_is_named_and_blames_no_other(chain: Database, seq: int) -> None:
    sql(chain, f"INSERT INTO audit SELECT {seq}, at, actor, action, subject, text, hash FROM audit WHERE seq = 2")
    (fault,) = faults(chain)
    assert fault.startswith(f"event {seq} (")
    assert fault.endswith("added to the table")


def test_a_row_added_at_the_end_is_named(chain: Database) -> None:
    sql(chain, f"INSERT INTO audit SELECT 7, at, actor, action, subject, text, hash FROM audit WHERE seq = {EVENTS}")
    found = faults(chain)
    assert any(fault.startswith("event 7 (") for fault in found)
    assert any(fault.startswith("event 7 stands behind the head row, which says 6: added") for fault in found)


def test_a_row_added_at_the_end_with_a_hash_that_fits_is_named(chain: Database) -> None:
    with chain.read() as session:
        last = session.get_one(AuditEvent, EVENTS)
    fields = json.loads(last.text) | {"seq": 7, "actor": "eve"}
    line = canonical(fields)
    with chain.engine.begin() as connection:
        connection.execute(
            text("INSERT INTO audit VALUES (7, :at, 'eve', :action, :subject, :text, :hash)"),
            {
                "at": last.at,
                "action": last.action,
                "subject": last.subject,
                "text": line,
                "hash": link(last.hash, line),
            },
        )
    assert faults(chain) == [
        "event 7 stands behind the head row, which says 6: added to the table, or the head was changed"
    ]


def test_swapped_rows_are_both_named(chain: Database) -> None:
    sql(
        chain,
        "UPDATE audit SET seq = 99 WHERE seq = 2",
        "UPDATE audit SET seq = 2 WHERE seq = 4",
        "UPDATE audit SET seq = 4 WHERE seq = 99",
    )
    named = {fault.split(" (")[0] for fault in faults(chain)}
    assert {"event 2", "event 4"} <= named


def test_a_cut_tail_is_named_by_the_head(chain: Database) -> None:
    sql(chain, "DELETE FROM audit WHERE seq > 4")
    assert "the tail is cut: the head row says event 6, the table ends at 4" in faults(chain)


def test_an_emptied_table_is_named_by_the_head(chain: Database) -> None:
    sql(chain, "DELETE FROM audit")
    assert "the tail is cut: the head row says event 6, the table ends at 0" in faults(chain)


def test_a_tail_that_is_cut_together_with_the_head_is_known_by_the_anchors(chain: Database) -> None:
    sql(
        chain,
        "DELETE FROM audit WHERE seq > 4",
        "UPDATE audit_head SET seq = 4, hash = (SELECT hash FROM audit WHERE seq = 4)",
    )
    (fault,) = faults(chain)
    assert fault == f"the tail is cut: an anchor in {chain.anchors} knows event 6, the table ends at 4"
    with chain.read() as session:
        assert audit.verify(session).holds, "the tables alone agree with each other: only the anchors know better"


def test_a_head_that_is_set_back_is_named(chain: Database) -> None:
    sql(chain, "UPDATE audit_head SET seq = 4, hash = (SELECT hash FROM audit WHERE seq = 4)")
    assert faults(chain) == [
        "events 5 to 6 stand behind the head row, which says 4: added to the table, or the head was changed"
    ]


def test_a_head_with_another_hash_is_named(chain: Database) -> None:
    sql(chain, f"UPDATE audit_head SET hash = '{'0' * 64}'")
    (fault,) = faults(chain)
    assert fault == "the head row's hash is not that of event 6: the chain or the head was changed"


def rewritten(database: Database, start: int) -> None:
    """Change event `start` and compute all hashes behind it anew, the head's as well, as someone who read the source would."""
    with database.engine.begin() as connection:
        rows = connection.execute(text("SELECT seq, text, hash FROM audit ORDER BY seq")).all()
        before = GENESIS
        for seq, line, old in rows:
            if seq < start:
                before = old
                continue
            fields = json.loads(line)
            if seq == start:
                fields["actor"] = "eve"
            line = canonical(fields)
            before = link(before, line)
            connection.execute(
                text("UPDATE audit SET actor = :actor, text = :text, hash = :hash WHERE seq = :seq"),
                {"actor": fields["actor"], "text": line, "hash": before, "seq": seq},
            )
        connection.execute(text("UPDATE audit_head SET hash = :hash"), {"hash": before})


@pytest.mark.parametrize("start", [1, 3, EVENTS])
def test_a_chain_rewritten_with_right_hashes_is_known_by_the_anchors(chain: Database, start: int) -> None:
    rewritten(chain, start)
    with chain.read() as session:
        assert audit.verify(session).holds
    (fault,) = faults(chain)
    assert fault == (
        f"event {start} differs from its anchor in {chain.anchors}: the chain was rewritten at it or before it"
    )


def test_a_missing_head_row_is_named_and_nothing_more_can_be_put_on_record(chain: Database) -> None:
    sql(chain, "DELETE FROM audit_head")
    assert faults(chain) == ["the head row is missing: removed from the table"]
    with pytest.raises(AuditError, match="has lost its head row"), chain.write() as transaction:
        transaction.record("thing.done", "thing:7")
    assert verdict(chain).events == EVENTS


def test_the_chain_goes_on_after_a_fault_and_the_fault_stays_named(chain: Database) -> None:
    sql(chain, "UPDATE audit SET actor = 'eve' WHERE seq = 3")
    with chain.write(actor="ann") as transaction:
        transaction.record("thing.done", "thing:7")
    (fault,) = faults(chain)
    assert fault.startswith("event 3 (")


@pytest.mark.parametrize("cut", [1, 40, 90])
def test_a_torn_last_anchor_is_left_out_and_takes_no_other_with_it(chain: Database, cut: int) -> None:
    assert chain.anchors is not None
    content = chain.anchors.read_bytes()
    chain.anchors.write_bytes(content[:-cut])
    assert (verdict(chain).holds, verdict(chain).anchors) == (True, EVENTS - 1)
    with chain.write() as transaction:
        transaction.record("thing.done", "thing:7")
    assert [head.seq for head in read_anchors(chain.anchors)] == [1, 2, 3, 4, 5, *([6] if cut == 1 else []), 7]


def test_an_anchor_file_of_rubbish_breaks_nothing(chain: Database) -> None:
    assert chain.anchors is not None
    chain.anchors.write_bytes(b"\xff\xfe\n1 2\n9 short now\n\xb2 " + b"0" * 64 + b" now\n")
    assert (verdict(chain).holds, verdict(chain).anchors) == (True, 0)


def test_a_change_is_on_record_although_its_anchor_cannot_be_written(
    chain: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = Database(
        chain.url.render_as_string(hide_password=False), anchors=tmp_path
    )  # a folder: nothing can be appended to it
    with blocked.write() as transaction:
        transaction.record("thing.done", "thing:7")
    blocked.dispose()
    assert verdict(chain).events == EVENTS + 1
    assert "event 7 is on record, but its anchor could not be written" in caplog.text


def test_no_anchor_is_written_for_what_was_not_committed(chain: Database) -> None:
    with pytest.raises(ZeroDivisionError), chain.write() as transaction:
        transaction.record("thing.done", "thing:7")
        raise ZeroDivisionError
    assert (verdict(chain).events, verdict(chain).anchors) == (EVENTS, EVENTS)


def test_whoever_verifies_while_others_write_raises_no_false_alarm(
    chain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two looks of `verify` at the world another process may commit and anchor."""

    def meanwhile() -> None:
        with chain.write() as transaction:
            transaction.record("thing.done", "thing:meanwhile")

    def anchors(path: Path, until: int | None = None) -> Iterator[Head]:
        meanwhile()
        found = list(read_anchors(path, until))
        meanwhile()
        return iter(found)

    monkeypatch.setattr(audit, "read_anchors", anchors)
    interrupted: Callable[[AuditEvent], str | None] = audit._changed

    def changed(event: AuditEvent) -> str | None:
        if event.seq == 2:
            meanwhile()
        return interrupted(event)

    monkeypatch.setattr(audit, "_changed", changed)
    assert verdict(chain).faults == []


def test_the_text_is_the_same_bytes_everywhere() -> None:
    assert canonical({"b": "ü", "a": [1, None, True]}) == '{"a":[1,null,true],"b":"\\u00fc"}'


def append_many(url: str, anchors: str, count: int, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    database = Database(url, anchors=Path(anchors))
    for number in range(count):
        with database.write(actor=f"process {os.getpid()}") as transaction:
            transaction.record("thing.done", f"thing:{number}")
            transaction.record("thing.done", f"thing:{number}.5")
    database.dispose()


def test_two_processes_that_write_at_once_keep_one_chain(database: Database) -> None:
    start = SPAWN.Barrier(2)
    arguments = (database.url.render_as_string(hide_password=False), str(database.anchors), 10, start)
    processes = [SPAWN.Process(target=append_many, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    found = verdict(database)
    assert (found.faults, found.events, found.anchors) == ([], 40, 20)
    with database.read() as session:
        assert len(set(session.scalars(select(AuditEvent.actor)))) == 2
