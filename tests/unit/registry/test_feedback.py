"""Verdicts in the registry: each id counts once, whoever brings it, and only while its promotion is under way."""

from __future__ import annotations

import datetime as dt
import threading

import pytest

from registry import clock, feedback, replicas, routes
from registry.database import Database
from registry.feedback import Recorded, Verdict
from registry.routes import Desired
from tests.unit.registry.kit import ENVIRONMENT, MODEL, add_version, begin, canary, end, last_event, promote, stable_by


@pytest.fixture
def window(database: Database) -> tuple[str, int]:
    """A canary of version 2 beside version 1: (epoch, generation)."""
    for version in ("1", "2"):
        add_version(database, version)
    stable_by(database, "1")
    operation = begin(database, "2")
    return canary(database, operation)


def verdict(generation: int, n: int, version: str = "2", *, bad: bool = False, **more: str) -> Verdict:
    return Verdict(f"r1.abcdef.{generation}.{version}.{n}", version, generation, bad, **more)


def record(database: Database, *verdicts: Verdict, observer: str = "replica:r1") -> Recorded:
    return feedback.record(database, ENVIRONMENT, verdicts, observer=observer)


def counts(database: Database, window: tuple[str, int]) -> dict[str, tuple[int, int]]:
    with database.read() as session:
        return feedback.counts(session, MODEL, *window)


def test_verdicts_are_counted_by_version_and_are_no_events(database: Database, window: tuple[str, int]) -> None:
    events = last_event(database)
    generation = window[1]
    written = record(
        database, *(verdict(generation, n, bad=n < 3) for n in range(10)), verdict(generation, 99, "1", bad=True)
    )
    assert written == Recorded(kept=11)
    assert counts(database, window) == {"2": (10, 3), "1": (1, 1)}
    assert last_event(database) == events


def test_an_id_counts_once_whatever_is_said_later_and_whoever_brings_it(
    database: Database, window: tuple[str, int]
) -> None:
    generation = window[1]
    assert record(database, verdict(generation, 1), verdict(generation, 1, bad=True)) == Recorded(kept=1, known=1)
    again = record(database, verdict(generation, 1, bad=True), verdict(generation, 2), observer="replica:r2")
    assert again == Recorded(kept=1, known=1)
    assert counts(database, window) == {"2": (2, 0)}


def test_two_servers_that_write_the_same_ids_at_once_count_them_once(
    database: Database, window: tuple[str, int]
) -> None:
    batch = [verdict(window[1], n) for n in range(700)]
    written: list[Recorded] = []
    start = threading.Barrier(2)

    def write(observer: str) -> None:
        start.wait(30)
        written.append(feedback.record(database, ENVIRONMENT, batch, observer=observer))

    threads = [threading.Thread(target=write, args=(f"replica:{k}",)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(one.kept for one in written) == [0, 700]
    assert counts(database, window) == {"2": (700, 0)}


def test_what_no_promotion_asks_for_is_not_kept(database: Database, window: tuple[str, int]) -> None:
    generation = window[1]
    assert record(database, verdict(generation, 1, "9")) == Recorded(unknown=1)
    assert record(database, verdict(generation + 50, 1)) == Recorded(unknown=1)
    assert record(database, verdict(generation, 1, model="letters")) == Recorded(unknown=1)
    assert record(database, verdict(generation, 1, epoch="another")) == Recorded(unknown=1)
    with database.write(actor="test") as transaction:
        other = routes.change(transaction, ENVIRONMENT, "letters", Desired(stable="5"), kind="first", reason="")
    assert record(database, verdict(other.generation, 1, "5")) == Recorded(unwatched=1)


def test_verdicts_of_a_stage_before_and_of_the_soak_count_and_none_after_the_end(database: Database) -> None:
    for version in ("1", "2"):
        add_version(database, version)
    stable_by(database, "1")
    operation = begin(database, "2")
    first = canary(database, operation)
    second = canary(database, operation, 0.5)
    soak = promote(database, operation)
    assert record(database, verdict(first[1], 1), verdict(second[1], 2, bad=True), verdict(soak, 3)) == Recorded(kept=3)
    assert (counts(database, first), counts(database, second)) == ({"2": (1, 0)}, {"2": (1, 1)})
    end(database, operation, "promoted")
    assert record(database, verdict(soak, 4)) == Recorded(unwatched=1)


def test_ids_longer_than_the_column_keep_their_difference(database: Database, window: tuple[str, int]) -> None:
    long = "x" * 300
    ids = [f"{long}{k}" for k in (1, 2, 1)]
    written = record(database, *(Verdict(identity, "2", window[1], bad=False) for identity in ids))
    assert written == Recorded(kept=2, known=1)


def test_the_verdicts_of_an_ended_promotion_are_forgotten_with_its_counts(
    database: Database, window: tuple[str, int]
) -> None:
    record(database, verdict(window[1], 1))
    replicas.forget_counts(database, MODEL, [window])
    assert counts(database, window) == {}


def test_the_next_promotion_forgets_what_was_counted_in_those_that_ended_long_ago(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2", "3"):
        add_version(database, version)
    stable_by(database, "1")
    operation = begin(database, "2")
    window = canary(database, operation)
    counted = {"model": MODEL, "version": "2", "epoch": window[0], "generation": window[1], "requests": 5}
    report = replicas.Report(
        id="r1", environment=ENVIRONMENT, address="a", boot_id="b", epoch=window[0], generation=window[1], serving={},
        started_at=clock.now(), counts=(counted,),
    )  # fmt: skip
    replicas.report(database, report)
    record(database, verdict(window[1], 1))

    def kept() -> tuple[int, int]:
        with database.read() as session:
            return len(replicas.counts(session, MODEL, *window)), len(feedback.counts(session, MODEL, *window))

    end(database, operation, "withdrawn")
    operation = begin(database, "3")
    assert kept() == (1, 1), "one that has just ended can still be looked at"
    end(database, operation, "withdrawn")
    later = clock.now() + dt.timedelta(seconds=replicas.COUNTS_KEPT_SECONDS + 60)
    monkeypatch.setattr(clock, "now", lambda: later)
    begin(database, "3")
    assert kept() == (0, 0)
