"""Leases: one operation at a time, dead tokens write nothing, and only what stands still is expired."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import update

from registry import leases, routes
from registry.database import Database
from registry.errors import FencedError, LockedError
from registry.leases import Beat, Held, Observer
from registry.schema import Environment, Lease, Model
from tests.unit.registry.kit import ENVIRONMENT, Clock, actions, last_event

SUBJECT = leases.subject_of(ENVIRONMENT, "digits")


def acquire(
    database: Database, holder: str = "ann", *, promotion: str | None = "p1", ttl_seconds: float = 30.0
) -> Held:
    with database.write(actor=holder) as transaction:
        return leases.acquire(
            transaction, SUBJECT, ENVIRONMENT, holder=holder, ttl_seconds=ttl_seconds, promotion=promotion
        )


def take_over(database: Database) -> Held:
    with database.write() as transaction:
        return leases.take_over(transaction, SUBJECT, ENVIRONMENT, holder="ann again", ttl_seconds=30.0)


def release(database: Database, held: Held) -> None:
    with database.write() as transaction:
        leases.release(transaction, held)


def row(database: Database) -> Lease:
    with database.read() as session:
        return session.get_one(Lease, SUBJECT)


def beats(database: Database) -> list[Beat]:
    with database.read() as session:
        return leases.beats(session, ENVIRONMENT)


def refused(database: Database, held: Held) -> None:
    """Whatever a process with this token tries fails, and leaves nothing behind."""
    before, events = row(database).heartbeat, last_event(database)
    with pytest.raises(FencedError):
        leases.beat(database, held)
    with pytest.raises(FencedError, match="nothing was written"), database.write() as transaction:
        leases.check(transaction, held)
        transaction.session.add(Model(name="smuggled"))
    with pytest.raises(FencedError), database.write() as transaction:
        transaction.record("thing.done", "thing")
        leases.release(transaction, held)
    assert (row(database).heartbeat, last_event(database)) == (before, events)
    with database.read() as session:
        assert session.get(Model, "smuggled") is None


def test_a_free_lease_is_taken_and_the_trail_says_by_whom(database: Database) -> None:
    acquire(database)
    assert (row(database).state, row(database).holder, row(database).promotion) == ("held", "ann", "p1")
    assert actions(database) == ["environment.created", "lease.acquired"]


def test_a_second_operation_is_refused_with_the_holder_and_the_time(database: Database) -> None:
    held = acquire(database)
    since = row(database).since
    with pytest.raises(LockedError) as error:
        acquire(database, "bob")
    assert "is locked by ann since" in str(error.value)
    assert since.strftime("%Y-%m-%dT%H:%M:%S") in str(error.value)
    assert "promotion p1" in str(error.value)
    assert error.value.exit_code == 4
    assert row(database).token == held.token


def test_a_released_lease_is_free_and_its_next_token_is_another(database: Database) -> None:
    first = acquire(database)
    release(database, first)
    second = acquire(database, "bob")
    assert second.token != first.token
    refused(database, first)


def test_a_token_is_the_epoch_and_a_counter(database: Database) -> None:
    held = acquire(database)
    with database.read() as session:
        epoch = session.get_one(Environment, ENVIRONMENT).epoch
    assert held.token == f"{epoch}.1"


def test_a_lease_that_is_taken_over_fences_the_process_before(database: Database) -> None:
    first = acquire(database)
    second = take_over(database)
    refused(database, first)
    leases.beat(database, second)
    assert (row(database).heartbeat, row(database).promotion) == (1, "p1")


def test_a_lease_that_has_run_out_cannot_be_taken_over(database: Database) -> None:
    with pytest.raises(FencedError, match="start a new one"):
        take_over(database)
    release(database, acquire(database))
    with pytest.raises(FencedError, match="start a new one"):
        take_over(database)


def test_a_released_lease_is_dead_for_its_holder(database: Database) -> None:
    held = acquire(database)
    release(database, held)
    refused(database, held)


def test_a_pre_empted_lease_is_dead_for_its_holder_and_free_for_others(database: Database) -> None:
    held = acquire(database)
    with database.write() as transaction:
        assert leases.preempt(transaction, SUBJECT, ENVIRONMENT, reason="night") == "p1"
        assert leases.preempt(transaction, SUBJECT, ENVIRONMENT, reason="night") is None
    refused(database, held)
    assert acquire(database, "bob").token != held.token
    refused(database, held)


def test_a_token_of_another_epoch_is_dead_although_the_row_still_holds_it(database: Database) -> None:
    """A restore brings the row back, under a new epoch: the process of the time before must not write into it."""
    held = acquire(database)
    with database.write() as transaction:
        transaction.session.execute(update(Environment).values(epoch=routes.new_epoch()))
    assert row(database).token == held.token
    refused(database, held)
    after = take_over(database)
    leases.beat(database, after)
    refused(database, held)


def test_a_made_up_token_is_dead(database: Database) -> None:
    refused(database, replace(acquire(database), token="f.1"))


def test_only_held_leases_of_the_environment_need_a_heartbeat(database: Database) -> None:
    held = acquire(database)
    assert beats(database) == [Beat(SUBJECT, held.token, 0, 30.0)]
    with database.read() as session:
        assert leases.beats(session, "elsewhere") == []
    with database.write() as transaction:
        transaction.session.execute(update(Lease).values(state=leases.AWAITING))
    assert beats(database) == []
    with database.write() as transaction:
        leases.check(transaction, held)  # who waits for an approval still holds it


def test_a_heartbeat_is_no_event(database: Database) -> None:
    held, before = acquire(database), last_event(database)
    for _ in range(3):
        leases.beat(database, held)
    assert (row(database).heartbeat, last_event(database)) == (3, before)


# The observer


def watch(observer: Observer, clock: Clock, *beats: Beat, seconds: float, step: float = 0.5) -> list[Beat]:
    """Look at leases that stand, again and again; returns what was stale at the last look."""
    stale: list[Beat] = []
    for _ in range(round(seconds / step)):
        clock.seconds += step
        stale = observer.stale(beats)
    return stale


def test_what_moves_is_never_stale() -> None:
    clock = Clock()
    observer = Observer(clock)
    for heartbeat in range(100):
        assert watch(observer, clock, Beat("s", "e.1", heartbeat, 2.0), seconds=2.0) == []


def test_what_stands_for_its_time_to_live_is_stale_and_stays_so() -> None:
    clock = Clock(1000.0)
    observer, beat = Observer(clock), Beat("s", "e.1", 7, 2.0)
    assert observer.stale([beat]) == []
    assert watch(observer, clock, beat, seconds=1.5) == []
    assert watch(observer, clock, beat, seconds=0.5) == [beat]
    assert watch(observer, clock, beat, seconds=3.0) == [beat]
    assert watch(observer, clock, replace(beat, heartbeat=8), seconds=1.5) == []


def test_the_time_counts_from_when_this_observer_saw_it_first() -> None:
    clock = Clock(10_000.0)
    assert watch(Observer(clock), clock, Beat("s", "e.1", 7, 2.0), seconds=2.0) == []


def test_a_new_token_at_the_same_heartbeat_has_moved() -> None:
    clock = Clock()
    observer = Observer(clock)
    watch(observer, clock, Beat("s", "e.1", 0, 2.0), seconds=1.5)
    assert watch(observer, clock, Beat("s", "e.2", 0, 2.0), seconds=2.0) == []
    assert watch(observer, clock, Beat("s", "e.2", 0, 2.0), seconds=0.5) == [Beat("s", "e.2", 0, 2.0)]


def test_time_in_which_the_observer_could_not_look_does_not_count() -> None:
    """Who stopped the observer, or cut it off from the database, may have stopped the holder too."""
    clock = Clock()
    observer, beat = Observer(clock), Beat("s", "e.1", 7, 2.0)
    watch(observer, clock, beat, seconds=1.5)
    clock.seconds += 3600.0
    assert observer.stale([beat]) == []
    assert watch(observer, clock, beat, seconds=1.5) == []
    assert watch(observer, clock, beat, seconds=0.5) == [beat]


def test_a_released_lease_is_forgotten() -> None:
    clock = Clock()
    observer, beat = Observer(clock), Beat("s", "e.1", 7, 2.0)
    watch(observer, clock, beat, seconds=2.0)
    watch(observer, clock, seconds=0.5)
    assert watch(observer, clock, beat, seconds=2.0) == []  # seen anew: the time begins again


def test_leases_are_watched_apart() -> None:
    clock = Clock()
    observer = Observer(clock)
    still, other = Beat("still", "e.1", 0, 2.0), Beat("moves", "e.1", 0, 2.0)
    watch(observer, clock, still, other, seconds=2.0)
    assert watch(observer, clock, still, replace(other, heartbeat=1), seconds=0.5) == [still]


def test_compare_and_set_loses_against_a_heartbeat(database: Database) -> None:
    held = acquire(database)
    (seen,) = beats(database)
    leases.beat(database, held)
    with database.write() as transaction:
        assert leases.still(transaction, ENVIRONMENT, seen) is None
    (seen,) = beats(database)
    with database.write() as transaction:
        assert leases.still(transaction, ENVIRONMENT, seen) is not None


def test_compare_and_set_loses_against_a_new_holder(database: Database) -> None:
    acquire(database)
    (seen,) = beats(database)
    take_over(database)
    with database.write() as transaction:
        assert leases.still(transaction, ENVIRONMENT, seen) is None


def test_the_longest_names_fit_the_columns() -> None:
    longest = "x" * 128
    columns = Lease.__table__.c
    assert len(leases.subject_of(longest, longest)) <= columns.subject.type.length
    assert len(f"promotion of {longest} {longest} by {longest}") <= columns.holder.type.length
