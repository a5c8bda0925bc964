"""What was live when: by the record of changes, and by what each replica had reached by then."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from sqlalchemy import update

from registry import clock, history, replicas, routes
from registry.database import Database
from registry.replicas import Reached, Report
from registry.routes import Desired
from registry.schema import Environment, Reach
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL, add_version, begin, canary, end, promote, stable_by

START = dt.datetime(2026, 3, 10, 3, 0, tzinfo=dt.UTC)


class Wall:
    """The wall clock of these tests: goes where it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> dt.datetime:
        return START + dt.timedelta(seconds=self.seconds)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    made = Wall()
    monkeypatch.setattr(clock, "now", made)
    return made


def second(seconds: float) -> dt.datetime:
    return START + dt.timedelta(seconds=seconds)


def change(
    database: Database, wall: Wall, seconds: float, stable: str, candidate: str | None = None, **more: Any
) -> int:
    """A change of the route at a second."""
    wall.seconds = seconds
    model = more.pop("model", MODEL)
    weight = more.pop("weight", 0.0)
    kind = more.pop("kind", "canary" if candidate else "promote")
    with database.write(actor=more.pop("actor", "ann"), flow_run_id=more.pop("flow_run_id", None)) as transaction:
        desired = Desired(stable=stable, candidate=candidate, weight=weight, **more)
        return routes.change(
            transaction, ENVIRONMENT, model, desired, kind=kind, reason=f"because of {stable}"
        ).generation


def reach(
    database: Database,
    seconds: float,
    generation: int,
    *,
    replica: str = "r1",
    boot: str = "b1",
    behind: tuple[str, ...] = (),
) -> None:
    """A replica's report that it switched at a second."""
    with database.read() as session:
        epoch = session.get_one(Environment, ENVIRONMENT).epoch
    one = Reached(epoch, generation, second(seconds), behind)
    replicas.report(
        database,
        Report(
            id=replica, environment=ENVIRONMENT, address="", boot_id=boot, epoch=epoch, generation=generation, serving={},
            started_at=START, reached=(one,),
        ),
    )  # fmt: skip


def at(database: Database, seconds: float, model: str = MODEL) -> dict[str, Any]:
    with database.read() as session:
        found = history.at(session, ENVIRONMENT, second(seconds))
    (row,) = [row for row in found["models"] if row["model"] == model] or [{}]
    return row


@pytest.fixture
def three(database: Database, wall: Wall) -> Database:
    """Version 1 from second 10, a quarter to 2 from second 20, 2 from second 30; r1 a second later each time, alive until 100."""
    for seconds, stable, candidate, weight in ((10, "1", None, 0.0), (20, "1", "2", 0.25), (30, "2", None, 0.0)):
        generation = change(database, wall, seconds, stable, candidate, weight=weight)
        reach(database, seconds + 1, generation)
    wall.seconds = 100
    reach(database, 31, 3)
    return database


def test_before_the_first_change_nothing_was_live(three: Database) -> None:
    assert at(three, 9.999) == {}


def test_the_change_in_force_says_share_who_why_and_since_when(three: Database) -> None:
    found = at(three, 25)
    assert (found["stable"], found["candidate"], found["weight"]) == ("1", "2", 0.25)
    assert found["answers"] == {"2": 0.25, "1": 0.75}
    assert (found["who"], found["reason"], found["kind"]) == ("ann", "because of 1", "canary")
    assert found["since"] == clock.text(second(20))
    assert found["settled"] and found["before"] == []


@pytest.mark.parametrize(
    ("seconds", "settled", "versions"),
    [
        (15, True, {"1"}),
        (20, False, {"1", "2"}),
        (20.5, False, {"1", "2"}),
        (21, True, {"1", "2"}),
        (29.999, True, {"1", "2"}),
        (30, False, {"1", "2"}),
        (31, True, {"2"}),
        (90, True, {"2"}),
    ],
)
def test_between_a_change_and_its_reaching_both_answers_are_given(
    three: Database, seconds: float, settled: bool, versions: set[str]
) -> None:
    found = at(three, seconds)
    assert (found["settled"], history.versions_at(found)) == (settled, versions)
    assert found["replicas"][0]["reached"] is settled


def test_a_replica_that_lags_several_changes_may_have_answered_by_each(database: Database, wall: Wall) -> None:
    for seconds, stable in ((10, "1"), (20, "2"), (30, "3"), (40, "4")):
        generation = change(database, wall, seconds, stable)
        reach(database, seconds + 0.5, generation, replica="quick")
        if stable == "1":
            reach(database, seconds + 0.5, generation, replica="slow")
    wall.seconds = 60
    reach(database, 50, 4, replica="slow")
    reach(database, 40.5, 4, replica="quick")
    found = at(database, 45)
    assert history.versions_at(found) == {"1", "2", "3", "4"}
    assert {row["replica"]: row["reached"] for row in found["replicas"]} == {"quick": True, "slow": False}
    assert at(database, 50)["settled"]


def test_a_change_of_another_model_moves_nobody_else(three: Database, wall: Wall) -> None:
    change(three, wall, 40, "1", model="letters")
    assert at(three, 40.5)["settled"], "the change in force for digits is one that r1 reached long before"
    assert not at(three, 40.5, "letters")["replicas"][0]["reached"]


def test_a_server_that_starts_later_had_nothing_to_answer_by(three: Database) -> None:
    reach(three, 60, 3, replica="r2")
    assert [row["replica"] for row in at(three, 50)["replicas"]] == ["r1"]
    assert [row["replica"] for row in at(three, 61)["replicas"]] == ["r1", "r2"]


def test_a_server_that_was_not_heard_of_is_silent_and_leaves_nothing_open(database: Database, wall: Wall) -> None:
    reached = change(database, wall, 10, "1")
    wall.seconds = 12
    reach(database, 11, reached)  # and never again: switched off
    change(database, wall, 500, "2")
    (row,) = at(database, 510)["replicas"]
    assert (row["reached"], row["silent"], row["heard_at"]) == (False, True, clock.text(second(12)))
    assert at(database, 510)["settled"]
    assert not at(database, 12)["replicas"][0]["silent"]


def test_a_boot_that_a_later_one_replaced_may_have_answered_until_it_was_last_heard_of(
    database: Database, wall: Wall
) -> None:
    first = change(database, wall, 10, "1")
    wall.seconds = 18
    reach(database, 11, first)
    then = change(database, wall, 20, "2")
    wall.seconds = 200
    reach(database, 190, then, boot="b2")
    assert history.versions_at(at(database, 21)) == {"1", "2"}, (
        "killed within a report's time of the change, perhaps after it"
    )
    assert at(database, 100)["replicas"][0]["silent"]
    assert at(database, 190)["replicas"][0]["boot_id"] == "b2"
    assert at(database, 191)["settled"]


def test_a_model_that_a_replica_could_not_load_is_not_reached_there(database: Database, wall: Wall) -> None:
    reach(database, 11, change(database, wall, 10, "1"))
    broken = change(database, wall, 20, "2")
    reach(database, 21, broken, behind=(MODEL,))
    reach(database, 31, change(database, wall, 30, "1", model="letters"), behind=(MODEL,))
    wall.seconds = 60
    reach(database, 31, 3, behind=(MODEL,))
    assert history.versions_at(at(database, 40)) == {"1", "2"}
    assert at(database, 40, "letters")["settled"]
    reach(database, 50, 3)  # what was missing was put back
    assert not at(database, 49)["settled"]
    assert at(database, 51)["settled"]


def test_a_restart_from_an_old_state_is_what_counts_and_not_what_the_boot_before_had_reached(
    database: Database, wall: Wall
) -> None:
    first = change(database, wall, 10, "1")
    reach(database, 11, first)
    reach(database, 21, change(database, wall, 20, "2"))
    wall.seconds = 40
    reach(database, 35, first, boot="b2")  # from its own disk, while the registry was away
    reach(database, 38, 2, boot="b2")
    assert history.versions_at(at(database, 36)) == {"1", "2"}
    assert history.versions_at(at(database, 39)) == {"2"}


def test_a_clock_that_went_back_makes_a_moment_that_came_twice_and_all_of_it_is_named(
    database: Database, wall: Wall
) -> None:
    for seconds, stable in ((10, "1"), (100, "2"), (50, "3"), (150, "4")):
        change(database, wall, seconds, stable)
    with database.read() as session:
        found = history.at(session, ENVIRONMENT, second(70))
    (row,) = found["models"]
    assert (row["stable"], [one["stable"] for one in row["or"]], row["settled"]) == ("3", ["2", "1"], False)
    assert "a clock went back" in found["notes"][0]
    for seconds, stable in ((20, "1"), (120, "3"), (151, "4")):
        assert (at(database, seconds)["stable"], at(database, seconds)["or"]) == (stable, [])


def test_the_generation_orders_changes_of_the_same_time(database: Database, wall: Wall) -> None:
    for stable in ("1", "2", "3"):
        change(database, wall, 10, stable)
    assert at(database, 10)["stable"] == "3"
    assert at(database, 11)["or"] == []


def test_after_a_restore_the_new_epoch_comes_after_the_old_whatever_its_generation(
    database: Database, wall: Wall
) -> None:
    for seconds, stable in ((10, "1"), (20, "2"), (30, "3")):
        change(database, wall, seconds, stable)
    with database.write() as transaction:
        transaction.session.execute(update(Environment).values(epoch="restored", generation=1))
    change(database, wall, 40, "4")
    assert at(database, 35)["stable"] == "3"
    assert at(database, 45)["stable"] == "4"
    with database.read() as session:
        assert list(history.epochs(session, ENVIRONMENT))[-1] == "restored"
        assert "may have been lost" in history.at(session, ENVIRONMENT, second(35))["notes"][0]
        listed = history.changes(session, MODEL)["changes"]
    assert [(row["stable"], row["generation"]) for row in listed] == [("4", 2), ("3", 3), ("2", 2), ("1", 1)]


def test_reaches_of_a_replica_whose_clock_went_back_count_by_generation(database: Database, wall: Wall) -> None:
    reach(database, 100, change(database, wall, 10, "1"))
    reach(database, 50, change(database, wall, 20, "2"))
    wall.seconds = 200
    reach(database, 50, 2)
    assert at(database, 120)["settled"]


def test_the_history_of_a_model_names_the_promotion_and_its_run_to_its_very_end(database: Database) -> None:
    add_version(database, "1")
    add_version(database, "2")
    stable_by(database, "1")
    operation = begin(database, "2", flow_run_id="run-7")
    canary(database, operation)
    promote(database, operation)
    end(database, operation, "promoted")
    with database.read() as session:
        found = history.changes(session, MODEL)
    settled, promoted, *_, first = found["changes"]
    assert [row["kind"] for row in (settled, promoted, first)] == ["settled", "promote", "first"]
    for row in (settled, promoted):
        assert (row["promotion"], row["flow_run_id"]) == (operation.id, "run-7")
    assert all(row["who"] for row in found["changes"])


def test_the_history_comes_in_pages_and_since(three: Database) -> None:
    with three.read() as session:
        pages = [history.changes(session, MODEL, page=page, limit=2) for page in (1, 2)]
        late = history.changes(session, MODEL, since=second(20))
    assert [[row["generation"] for row in page["changes"]] for page in pages] == [[3, 2], [1]]
    assert [(page["total"], page["next"]) for page in pages] == [(3, 2), (3, None)]
    assert [row["generation"] for row in late["changes"]] == [3, 2]


def test_when_a_version_was_the_stable_one(three: Database, wall: Wall) -> None:
    change(three, wall, 50, "1", kind="rollback", actor="bea")
    with three.read() as session:
        one, again = history.times_stable(session, MODEL, "1")
        (two,) = history.times_stable(session, MODEL, "2")
    assert (one["since"], one["until"], one["ended_by"]) == (clock.text(second(10)), clock.text(second(30)), "promote")
    assert (again["who"], again["kind"], again["until"]) == ("bea", "rollback", None)
    assert (two["since"], two["until"], two["ended_by"]) == (clock.text(second(30)), clock.text(second(50)), "rollback")


def test_a_moment_is_found_with_few_questions_however_many_models_there_are(database: Database, wall: Wall) -> None:
    for number in range(30):
        reach(database, number + 0.5, change(database, wall, number, "1", model=f"m{number}"))
    with kit.statements(database) as sent, database.read() as session:
        assert len(history.at(session, ENVIRONMENT, second(100))["models"]) == 30
    assert len(sent) < 20, sent


def test_a_report_without_switches_is_taken_to_reach_its_generation_when_it_is_written(
    database: Database, wall: Wall
) -> None:
    wall.seconds = 7
    for _ in range(2):
        replicas.report(
            database,
            Report(
                id="r1", environment=ENVIRONMENT, address="", boot_id="b1", epoch="e", generation=4, serving={},
                started_at=START,
            ),
        )  # fmt: skip
    with database.read() as session:
        (row,) = session.query(Reach).all()
    assert (row.generation, row.at, row.until) == (4, second(7), None)
