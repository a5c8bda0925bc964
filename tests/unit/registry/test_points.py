"""Rollback points: one for each change of the stable version, whoever makes it, and what lets them go."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from sqlalchemy import event, select

from registry import clock, history, leases, points, promotions, rollbacks, routes
from registry.actor import Who
from registry.database import Database
from registry.errors import FencedError, LockedError, NotFoundError, RefusedError, UsageError
from registry.points import Step, stack
from registry.rollbacks import Hold
from registry.schema import RollbackPoint
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL, POLICY, add_version, route, stable_by

ME = Who("os:me")


@pytest.fixture
def three(database: Database) -> Database:
    """Versions 1 to 4, of which 1, 2, 3 have been stable in that order."""
    for name in ("1", "2", "3", "4"):
        add_version(database, name)
    stable_by(database, "1", "2", "3")
    return database


def back(database: Database, to: str | None = None, **options: object) -> dict[str, object]:
    asked = {"environment": ENVIRONMENT, "model": MODEL, "to": to, "reason": "bad", "ttl_seconds": 30.0}
    return rollbacks.roll_back(database, **(asked | options))  # type: ignore[arg-type]


def listed(database: Database, *, gone: bool = False) -> list[dict[str, object]]:
    with database.read() as session:
        return points.listed(session, ENVIRONMENT, MODEL, gone=gone)


def hold(database: Database, to: str, **changes: object) -> Hold:
    """A hold over the route as it is now."""
    found = route(database)
    with database.read() as session:
        row = session.get(RollbackPoint, listed(database)[0]["id"])
        assert row is not None
        epoch = row.epoch
    values: dict[str, object] = {
        "model": MODEL, "environment": ENVIRONMENT, "to": to, "before": found.stable, "epoch": epoch,
        "generation": found.generation, "actor": "key:ops", "key_id": "k1", "claimed": None, "reason": "answers are off",
        "at": "2026-01-01T00:00:00.000000Z",
    }  # fmt: skip
    return Hold(**(values | changes))  # type: ignore[arg-type]


def test_every_change_of_the_stable_version_leaves_a_point_with_route_digests_policy_and_settings(
    three: Database,
) -> None:
    three.facts = {"batch_size": 32}
    try:
        kit.stable_by(three, "4")
    finally:
        three.facts = {}
    newest, *earlier = listed(three)
    assert [row["version"] for row in (newest, *earlier)] == ["4", "3", "2", "1"]
    assert newest["route"]["before"]["stable"] == "3" and newest["route"]["after"]["stable"] == "4"
    assert (newest["route"]["kind"], newest["settings"]) == ("promote", {"batch_size": 32})
    assert newest["digests"] == {"artifact": "0" * 64, "golden": None, "files": []}
    assert newest["policy"] == POLICY.model_dump()


def test_a_rollback_leaves_a_point_and_a_canary_that_changes_no_stable_version_leaves_none(three: Database) -> None:
    operation = kit.begin(three, "4")
    kit.canary(three, operation)
    kit.end(three, operation, "withdrawn")
    assert [row["version"] for row in listed(three)] == ["3", "2", "1"]
    back(three)
    assert next((row["version"], row["route"]["kind"]) for row in listed(three)) == ("2", "rollback")


def test_a_version_that_was_stable_before_there_were_points_gets_one_with_the_next_change(three: Database) -> None:
    with three.write(actor="test") as transaction:
        for row in transaction.session.scalars(select(RollbackPoint)):
            transaction.session.delete(row)
    stable_by(three, "4")
    assert [row["version"] for row in listed(three)] == ["4", "3"]


def test_only_the_newest_points_stay_and_that_they_went_is_on_record(
    three: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points, "KEPT", 3)
    before = kit.last_event(three)
    stable_by(three, "4")
    assert [row["version"] for row in listed(three)] == ["4", "3", "2"]
    assert [row["version"] for row in listed(three, gone=True) if row["gone_at"]] == ["1"]
    assert kit.actions(three, before).count("rollback-point.gone") == 1


def test_points_are_let_go_of_by_number_or_age_but_never_the_present_one_nor_the_one_before(three: Database) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        points.retire(three, environment=ENVIRONMENT, keep=1, who=ME, reason="")
    with pytest.raises(UsageError, match="which rollback points"):
        points.retire(three, environment=ENVIRONMENT, who=ME, reason="")
    later = clock.now() + dt.timedelta(days=1)
    gone = points.retire(three, environment=ENVIRONMENT, older_than=later, who=ME, reason="old")
    assert [row["version"] for row in gone] == ["1"]
    assert [row["version"] for row in listed(three)] == ["3", "2"]
    assert points.retire(three, environment=ENVIRONMENT, older_than=later, who=ME, reason="old") == []
    assert kit.verdict(three).holds


def test_what_was_stable_at_a_time_is_found(three: Database) -> None:
    moments = {row["version"]: dt.datetime.fromisoformat(str(row["created_at"])) for row in listed(three)}
    with three.read() as session:
        for version, moment in moments.items():
            assert history.stable_at(session, ENVIRONMENT, MODEL, moment) == version
        with pytest.raises(NotFoundError, match="had no stable version"):
            history.stable_at(session, ENVIRONMENT, MODEL, moments["1"] - dt.timedelta(days=1))


def test_servers_learn_the_living_points_oldest_first_and_find_their_way_back_by_them(three: Database) -> None:
    back(three)
    with three.read() as session:
        found = points.needed(session, ENVIRONMENT)[MODEL]
        assert [(step.version, step.kind, step.first) for step in found] == [
            ("1", "first", True), ("2", "promote", False), ("3", "promote", False), ("2", "rollback", False),
        ]  # fmt: skip
        assert stack(found) == ["1", "2"]
        assert stack(found)[-2] == routes.previous_stable(session, ENVIRONMENT, MODEL)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], []),
        ([("1", "first", True)], ["1"]),
        (
            [("1", "first", True), ("2", "promote", False), ("1", "rollback", False), ("3", "promote", False)],
            ["1", "3"],
        ),
        ([("1", "first", True), (None, "withdraw", True), ("2", "first", True)], ["2"]),
        ([("5", "", False), ("6", "promote", False), ("6", "rollback", False)], ["5", "6"]),
    ],
)
def test_the_stack_of_stable_versions(steps: list[tuple[str | None, str, bool]], expected: list[str]) -> None:
    assert stack(Step(*step) for step in steps) == expected


# gradual


def gradual(database: Database, to: str | None = None) -> promotions.Operation:
    return rollbacks.begin_gradual(
        database, environment=ENVIRONMENT, model=MODEL, to=to, policy=POLICY, ttl_seconds=30.0, reason="slowly"
    )


def part(database: Database, operation: promotions.Operation, weight: float = 0.5) -> None:
    promotions.stage(
        database, operation, routes.Desired(stable=operation.stable, candidate=operation.version, weight=weight, watch=True),
        step="rollback", kind="canary", title="back", detail="", placements=[(ENVIRONMENT, "candidate")],
        window={"stage": "back", "weight": weight},
    )  # fmt: skip


def test_a_gradual_rollback_ends_with_the_earlier_version_stable_and_the_way_back_one_shorter(three: Database) -> None:
    operation = gradual(three)
    assert (operation.version, operation.strategy) == ("2", rollbacks.GRADUAL)
    part(three, operation)
    with pytest.raises(LockedError):
        back(three)
    assert rollbacks.finish_gradual(three, operation, reason="slowly", detail="")["to"] == "2"
    found = route(three)
    assert (found.stable, found.candidate, found.watch, found.promotion) == ("2", None, False, None)
    assert kit.places(three) == {"1": "retired", "2": "stable", "3": "retired"}
    with three.read() as session:
        assert routes.previous_stable(session, ENVIRONMENT, MODEL) == "1"
        assert promotions.get(session, operation.id).state == "promoted"
    assert kit.verdict(three).holds


def test_a_gradual_rollback_whose_run_died_leaves_the_stable_version_and_no_candidate(three: Database) -> None:
    operation = gradual(three)
    part(three, operation)
    with three.read() as session:
        (beat,) = leases.beats(session, ENVIRONMENT)
    assert promotions.expire(three, ENVIRONMENT, beat, observer="test") == operation.id
    found = route(three)
    assert (found.stable, found.candidate) == ("3", None)
    with pytest.raises(FencedError):
        rollbacks.finish_gradual(three, operation, reason="", detail="")
    assert back(three)["to"] == "2"


def test_an_emergency_during_a_gradual_rollback_goes_where_that_was_going(three: Database) -> None:
    operation = gradual(three, to="1")
    part(three, operation)
    assert back(three, emergency=True)["to"] == "1"
    assert route(three).stable == "1"


def test_a_gradual_rollback_to_the_version_in_its_orphaned_soak_is_refused_and_leaves_the_soak_alone(
    three: Database,
) -> None:
    operation = kit.begin(three, "4")
    kit.canary(three, operation)
    kit.promote(three, operation)
    promotions.let_go(three, operation, "its process was killed")
    with pytest.raises(RefusedError, match="is the stable version"):
        gradual(three, to="4")
    with three.read() as session:
        assert promotions.orphans(session) == [operation.id]


def test_a_run_that_is_started_again_has_rolled_back_once(three: Database) -> None:
    def run(number: str) -> dict[str, Any]:
        done = rollbacks.done_by(three, number, ENVIRONMENT, MODEL)
        return done or rollbacks.roll_back(
            three, environment=ENVIRONMENT, model=MODEL, to=None, reason="", ttl_seconds=30.0, flow_run_id=number
        )

    first = run("run-1")
    assert run("run-1") == first
    assert (first["from"], first["to"], route(three).stable) == ("3", "2", "2")
    assert run("run-2")["to"] == "1"
    with pytest.raises(RefusedError, match="start a new rollback"):
        run("run-1")


def test_a_gradual_rollback_goes_only_to_what_has_been_stable(three: Database) -> None:
    with pytest.raises(RefusedError, match="has never been the stable version"):
        gradual(three, to="4")


# holds come home


def test_several_servers_with_the_same_hold_make_one_rollback_with_the_author_of_the_hold(three: Database) -> None:
    held, before = hold(three, "2"), kit.last_event(three)
    assert rollbacks.write_back(three, held, replica="a") == "written-back"
    assert rollbacks.write_back(three, held, replica="b") == "met"
    assert rollbacks.write_back(three, held, replica="a") == "met", "a server that died before it dropped the hold"
    assert route(three).stable == "2"
    assert kit.actions(three, before).count("model.rolled-back") == 1
    with three.read() as session:
        from registry.schema import AuditEvent

        (event,) = session.scalars(select(AuditEvent).where(AuditEvent.action == "model.rolled-back"))
        assert event.actor == "key:ops" and "hold of 2026-01-01" in event.text and '"key_id":"k1"' in event.text
    assert kit.verdict(three).holds


def test_a_route_that_changed_since_wins_over_the_hold(three: Database) -> None:
    held = hold(three, "1")
    back(three)
    before = kit.last_event(three)
    assert rollbacks.write_back(three, held, replica="a") == "superseded"
    assert route(three).stable == "2"
    assert kit.actions(three, before) == ["hold.superseded"]


def test_a_hold_of_another_epoch_is_superseded_or_met_never_written_back(three: Database) -> None:
    assert rollbacks.write_back(three, hold(three, "1", epoch="before"), replica="a") == "superseded"
    assert rollbacks.write_back(three, hold(three, "3", epoch="before"), replica="a") == "met"
    assert route(three).stable == "3"


def test_a_hold_takes_what_is_under_way_out_of_the_registry_as_any_emergency(three: Database) -> None:
    operation = kit.begin(three, "4")
    kit.canary(three, operation)
    assert rollbacks.write_back(three, hold(three, "3"), replica="a") == "written-back"
    found = route(three)
    assert (found.stable, found.candidate) == ("3", None)
    with pytest.raises(FencedError):
        kit.promote(three, operation)


def test_a_hold_on_what_the_registry_refuses_stays_with_its_server(three: Database) -> None:
    before = kit.last_event(three)
    with pytest.raises(RefusedError, match="never been the stable version"):
        rollbacks.write_back(three, hold(three, "4"), replica="a")
    assert kit.actions(three, before) == [] and route(three).stable == "3"


@pytest.mark.sqlite  # others choose by their statistics, and read a table as small as this one as a whole
def test_servers_find_the_living_points_without_reading_those_that_are_gone(three: Database) -> None:
    """They ask again and again; with each change of a version there is one more that is gone."""
    asked: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(three.engine, "before_cursor_execute", note)
    try:
        with three.read() as session:
            assert [step.version for step in points.needed(session, ENVIRONMENT)[MODEL]] == ["1", "2", "3"]
    finally:
        event.remove(three.engine, "before_cursor_execute", note)
    [(statement, parameters)] = [one for one in asked if "rollback_points" in one[0]]
    with three.read() as session:
        plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    assert [row.detail for row in plan] == [
        "SEARCH rollback_points USING INDEX ix_rollback_points_environment_gone_at (environment=? AND gone_at=?)"
    ]
