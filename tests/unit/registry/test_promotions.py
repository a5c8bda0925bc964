"""Promotions of record: every way in, on and out leaves route, placements, lease, record and audit trail in step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from registry import audit, leases, promotions, rollbacks, routes, states
from registry.database import Database
from registry.errors import (
    ConflictError,
    FencedError,
    IllegalMoveError,
    LockedError,
    NotFoundError,
    RefusedError,
    StorageError,
    UsageError,
)
from registry.leases import Beat
from registry.promotions import Operation
from registry.routes import Desired
from registry.schema import Lease, Promotion, RouteChange, Version
from registry.signature import Signature, TensorSpec
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL, actions, add_version, last_event, places, route, verdict


@pytest.fixture(scope="module")
def three_template(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Path:
    folder = tmp_path_factory.mktemp("three")
    database = kit.prepared(folder, template)
    for version in ("1", "2", "3"):
        add_version(database, version)
    kit.stable_by(database, "1")
    database.dispose()
    return folder / "registry.db"


@pytest.fixture
def three(engine: Database, three_template: Path) -> Database:
    """Versions 1, 2 and 3 validated, 1 stable."""
    kit.reset(engine, three_template)
    return engine


def record(database: Database, identity: str) -> Promotion:
    with database.read() as session:
        return promotions.get(session, identity)


def lease(database: Database) -> Lease:
    with database.read() as session:
        return session.get_one(Lease, leases.subject_of(ENVIRONMENT, MODEL))


def beat_of(database: Database) -> Beat:
    with database.read() as session:
        (found,) = leases.beats(session, ENVIRONMENT)
    return found


def expire(database: Database, beat: Beat | None = None) -> str | None:
    return promotions.expire(database, ENVIRONMENT, beat or beat_of(database), observer="replica:r1")


def roll_back(database: Database, to: str | None = None, **changes: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"environment": ENVIRONMENT, "model": MODEL, "reason": "bad", "ttl_seconds": 30.0}
    return rollbacks.roll_back(database, to=to, **(asked | changes))


def state_of_world(database: Database) -> tuple[Any, ...]:
    """What a refused call must leave alone."""
    held = lease(database)
    return (
        routes.as_dict(route(database)), places(database), places(database, "staging"), last_event(database),
        (held.state, held.token, held.holder),
    )  # fmt: skip


def settled(database: Database, stable: str | None) -> None:
    """Nothing is under way: one stable version or none, no candidate, nothing counted, the lease free, the chain whole."""
    found = route(database)
    assert (found.stable, found.candidate, found.weight) == (stable, None, 0.0)
    assert (found.shadow, found.watch, found.promotion) == (False, False, None)
    assert [version for version, status in places(database).items() if status == "stable"] == (
        [stable] if stable else []
    )
    assert "candidate" not in places(database).values()
    assert "testing" not in places(database, "staging").values()
    assert lease(database).state == leases.RELEASED
    with database.read() as session:
        assert session.scalars(select(Promotion).where(Promotion.state.in_(promotions.ACTIVE))).all() == []
        changes = session.scalars(select(RouteChange).order_by(RouteChange.generation)).all()
    told = [action for action in actions(database) if action.startswith("route.")]
    assert told == [f"route.{change.kind}" for change in changes], "every change of a route has its event"
    assert [change.generation for change in changes] == list(range(1, len(changes) + 1))
    assert verdict(database).faults == []


# The way up


def test_the_first_version_takes_all_of_the_traffic(database: Database) -> None:
    add_version(database, "1")
    operation = kit.begin(database, "1")
    assert operation.stable is None
    kit.promote(database, operation, watch=False)
    kit.end(database, operation, "promoted")
    settled(database, "1")
    assert actions(database)[-9:] == [
        "lease.acquired", "promotion.begun",
        "placement.changed", "route.first", "promotion.promote", "promotion.promoted",
        "route.settled", "promotion.promoted", "lease.released",
    ]  # fmt: skip


def test_a_promotion_goes_from_shadow_to_canary_to_stable_to_settled(three: Database) -> None:
    operation = kit.begin(three, "2")
    assert (operation.stable, operation.step, operation.resumed) == ("1", "begin", False)
    assert (lease(three).state, lease(three).promotion) == ("held", operation.id)

    kit.shadow(three, operation)
    assert (route(three).stable, route(three).candidate, route(three).shadow) == ("1", "2", True)
    assert (places(three), places(three, "staging")) == ({"1": "stable"}, {"2": "testing"})

    epoch, generation = kit.canary(three, operation)
    found = route(three)
    assert (found.candidate, found.weight, found.generation, found.promotion) == ("2", 0.05, generation, operation.id)
    assert (places(three), places(three, "staging")) == ({"1": "stable", "2": "candidate"}, {"2": "passed"})
    assert operation.progress["windows"][-1] == {
        "stage": "canary at 5%", "weight": 0.05, "epoch": epoch, "generation": generation,
    }  # fmt: skip

    assert kit.promote(three, operation) == generation + 1
    found = route(three)
    assert (found.stable, found.candidate, found.watch) == ("2", None, True)
    assert places(three) == {"1": "retired", "2": "stable"}
    assert operation.progress["soak"]["generation"] == generation + 1

    kit.end(three, operation, "promoted")
    settled(three, "2")
    ended = record(three, operation.id)
    assert (ended.state, ended.from_version, ended.step) == ("promoted", "1", "promote")
    assert ended.finished_at is not None
    with three.read() as session:
        told = promotions.story(session, operation.id)
    assert [(step["number"], step["step"]) for step in told] == [
        (1, "shadow"), (2, "canary"), (3, "promote"), (4, "promoted"),
    ]  # fmt: skip


def test_one_transaction_changes_all_or_nothing(three: Database) -> None:
    """An illegal move in the middle of a stage takes route, steps and events of that stage with it."""
    operation = kit.begin(three, "2")
    before = state_of_world(three)
    with pytest.raises(IllegalMoveError):
        promotions.stage(
            three, operation, Desired(stable="1", candidate="2", weight=0.5), step="canary", kind="canary", title="half",
            detail="", placements=[(ENVIRONMENT, "candidate"), ("staging", "passed")],
        )  # fmt: skip
    assert state_of_world(three) == before
    assert (operation.step, operation.progress) == ("begin", {"forced": None})
    kit.canary(three, operation)


@pytest.mark.parametrize("outcome", ["passed", "failed"])
def test_a_validation_is_kept_with_the_version(database: Database, outcome: str) -> None:
    add_version(database, "1", state="registered")
    operation = kit.begin(database, "1")
    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 2)),))
    promotions.note_validation(
        database, operation, passed=outcome == "passed", report={"passed": outcome == "passed", "cases": 9},
        signature=signature, rows_independent=True, title="validated", detail="",
    )  # fmt: skip
    with database.read() as session:
        row = session.get_one(Version, (MODEL, "1"))
    assert row.state == ("validated" if outcome == "passed" else "rejected")
    assert (row.rows_independent, row.validation) == (True, {"passed": outcome == "passed", "cases": 9})
    assert row.signature == signature.as_dict()
    assert operation.progress["validated"] is (outcome == "passed")


def test_what_a_restart_needs_is_on_record(three: Database) -> None:
    operation = kit.begin(three, "2")
    promotions.note(three, operation, "baseline", "measured", "", progress={"slow_threshold_seconds": 0.25})
    kit.canary(three, operation)
    kept = record(three, operation.id)
    assert kept.progress == operation.progress
    assert (kept.progress["slow_threshold_seconds"], kept.step) == (0.25, "canary")


# Who may begin


def test_a_second_promotion_of_the_model_is_locked_out(three: Database) -> None:
    first = kit.begin(three, "2")
    before = state_of_world(three)
    with pytest.raises(LockedError) as error:
        kit.begin(three, "3")
    assert error.value.exit_code == 4
    assert f"promotion of {MODEL} 2 by" in str(error.value)
    assert first.id in str(error.value)
    assert state_of_world(three) == before


def test_another_model_or_environment_is_not_locked(three: Database) -> None:
    kit.begin(three, "2")
    add_version(three, "1", model="letters")
    kit.begin(three, "1", model="letters")
    kit.begin(three, "2", environment="lab")


def test_a_version_that_is_stable_already_is_refused(three: Database) -> None:
    before = state_of_world(three)
    with pytest.raises(RefusedError, match="is the stable version in production already"):
        kit.begin(three, "1")
    assert state_of_world(three) == before


def test_an_archived_version_is_refused(three: Database) -> None:
    add_version(three, "4", state="archived")
    with pytest.raises(RefusedError, match="is archived"):
        kit.begin(three, "4")


@pytest.mark.parametrize(("model", "version"), [("nothing", "1"), (MODEL, "99")])
def test_what_is_not_there_is_not_found(three: Database, model: str, version: str) -> None:
    with pytest.raises(NotFoundError, match=r"nothing|99"):
        kit.begin(three, version, model=model)


@pytest.mark.parametrize("environment", ["staging", "", "a/b"])
def test_staging_and_broken_names_are_no_environments_to_promote_to(three: Database, environment: str) -> None:
    with pytest.raises(UsageError):
        kit.begin(three, "2", environment=environment)


def test_the_same_flow_run_goes_on_and_fences_its_former_process(three: Database) -> None:
    before = kit.begin(three, "2", flow_run_id="run-1")
    kit.canary(three, before)
    after = kit.begin(three, "2", flow_run_id="run-1")
    assert (after.id, after.resumed, after.step) == (before.id, True, "canary")
    assert (after.progress, after.stable, after.policy) == (before.progress, "1", before.policy)
    world = state_of_world(three)
    with pytest.raises(FencedError):
        kit.canary(three, before, 0.25)
    with pytest.raises(FencedError):
        kit.promote(three, before)
    with pytest.raises(FencedError):
        kit.end(three, before, "failed")
    assert state_of_world(three) == world
    assert before.progress == after.progress
    kit.promote(three, after)
    kit.end(three, after, "promoted")
    settled(three, "2")


def test_a_canary_that_its_run_goes_on_with_after_a_restore_is_judged_by_what_is_counted_from_then_on(
    three: Database,
) -> None:
    operation = kit.begin(three, "2", flow_run_id="run-1")
    kit.canary(three, operation)
    before = operation.progress["windows"]
    epoch = kit.new_epoch(three)
    again = kit.begin(three, "2", flow_run_id="run-1")
    assert again.progress["windows"] == [*before[:-1], {**before[-1], "epoch": epoch}]


def test_another_flow_run_does_not_go_on_with_it(three: Database) -> None:
    kit.begin(three, "2", flow_run_id="run-1")
    with pytest.raises(LockedError):
        kit.begin(three, "2", flow_run_id="run-2")


def test_a_promotion_is_found_by_its_run_and_by_its_number(three: Database) -> None:
    first = kit.begin(three, "2", flow_run_id="run-1")
    kit.end(three, first, "withdrawn")
    second = kit.begin(three, "2", flow_run_id="run-1")
    with three.read() as session:
        found = promotions.of_run(session, "run-1")
        assert found is not None
        assert found.id == second.id, "the last where a restart began another"
        assert promotions.of_run(session, "run-9") is None
        with pytest.raises(NotFoundError, match="no promotion 'nope'"):
            promotions.get(session, "nope")
        assert [row["id"] for row in promotions.listed(session, model=MODEL, limit=2)] == [second.id, first.id]


# The ways out


@pytest.mark.parametrize("outcome", ["withdrawn", "held", "failed"])
@pytest.mark.parametrize("at", ["begin", "shadow", "canary"])
def test_a_candidate_that_does_not_make_it_is_taken_out(three: Database, outcome: promotions.Outcome, at: str) -> None:
    operation = kit.begin(three, "2")
    if at != "begin":
        {"shadow": kit.shadow, "canary": kit.canary}[at](three, operation)
    kit.end(three, operation, outcome)
    settled(three, "1")
    assert record(three, operation.id).state == outcome
    assert places(three).get("2") == ("withdrawn" if at == "canary" else None)
    kit.stable_by(three, "2")  # and it may be tried again
    settled(three, "2")


@pytest.mark.parametrize("outcome", ["withdrawn", "held", "failed"])
@pytest.mark.parametrize("watch", [True, False])
def test_in_the_soak_the_old_stable_version_comes_back(
    three: Database, outcome: promotions.Outcome, watch: bool
) -> None:
    operation = kit.begin(three, "2")
    kit.canary(three, operation)
    kit.promote(three, operation, watch=watch)
    kit.end(three, operation, outcome)
    settled(three, "1")
    assert places(three) == {"1": "stable", "2": "withdrawn"}


@pytest.mark.parametrize("watch", [True, False])
def test_a_first_version_that_is_withdrawn_leaves_no_route_to_it(database: Database, watch: bool) -> None:
    add_version(database, "1")
    operation = kit.begin(database, "1")
    kit.promote(database, operation, watch=watch)
    kit.end(database, operation, "withdrawn")
    settled(database, None)
    assert places(database) == {"1": "withdrawn"}


def test_a_version_that_is_stable_by_now_is_no_candidate_again(three: Database) -> None:
    operation = kit.begin(three, "2")
    kit.canary(three, operation)
    kit.promote(three, operation)
    before = state_of_world(three)
    for attempt in (kit.shadow, kit.weigh):
        with pytest.raises(ConflictError, match="is past its stages"):
            attempt(three, operation)
    assert state_of_world(three) == before


def test_what_was_never_made_stable_cannot_end_as_promoted(three: Database) -> None:
    operation = kit.begin(three, "2")
    kit.canary(three, operation)
    before = state_of_world(three)
    with pytest.raises(ConflictError, match="was never made stable"):
        kit.end(three, operation, "promoted")
    assert state_of_world(three) == before


def test_an_ended_promotion_cannot_go_on(three: Database) -> None:
    operation = kit.begin(three, "2")
    kit.end(three, operation, "withdrawn")
    before = state_of_world(three)
    for attempt in (kit.canary, kit.promote):
        with pytest.raises(FencedError):
            attempt(three, operation)
    with pytest.raises(FencedError):
        kit.end(three, operation, "withdrawn")
    assert state_of_world(three) == before


# The lease runs out


@pytest.mark.parametrize("at", ["begin", "shadow", "canary"])
def test_a_dead_run_loses_its_candidate(three: Database, at: str) -> None:
    operation = kit.begin(three, "2", flow_run_id="run-1")
    if at != "begin":
        {"shadow": kit.shadow, "canary": kit.canary}[at](three, operation)
    assert expire(three) == operation.id
    settled(three, "1")
    ended = record(three, operation.id)
    assert (ended.state, ended.reason) == ("withdrawn", "Lease expired")
    assert "lease.expired" in actions(three)
    before = state_of_world(three)
    with pytest.raises(FencedError):
        kit.end(three, operation, "promoted")
    assert state_of_world(three) == before


def soaking(database: Database, version: str = "2", *, run: str | None = None) -> Operation:
    operation = kit.begin(database, version, flow_run_id=run)
    kit.canary(database, operation)
    kit.promote(database, operation)
    return operation


def test_a_dead_run_in_the_soak_keeps_what_it_had_promoted_under_watch(three: Database) -> None:
    operation = soaking(three)
    assert record(three, operation.id).state == promotions.SOAKING
    assert expire(three) == operation.id
    found = route(three)
    assert (found.stable, found.watch, found.promotion) == ("2", True, operation.id)
    assert (record(three, operation.id).state, lease(three).state) == (promotions.SOAKING, leases.RELEASED)
    with three.read() as session:
        assert promotions.orphans(session) == [operation.id]
    again = promotions.carry_on(three, operation.id, ttl_seconds=30.0)
    with three.read() as session:
        assert promotions.orphans(session) == []
    with pytest.raises(FencedError):
        kit.end(three, operation, "promoted")
    kit.end(three, again, "promoted")
    settled(three, "2")
    assert "promotion.carried-on" in actions(three)


def test_an_orphaned_soak_ends_when_the_next_promotion_begins(three: Database) -> None:
    operation = soaking(three)
    expire(three)
    after = kit.begin(three, "3")
    assert after.stable == "2"
    ended = record(three, operation.id)
    assert (ended.state, ended.reason) == ("promoted", "Soak superseded")
    kit.end(three, after, "withdrawn")
    settled(three, "2")


@pytest.mark.parametrize("emergency", [False, True])
def test_a_rollback_in_an_orphaned_soak_withdraws_what_it_watched(three: Database, emergency: bool) -> None:
    operation = soaking(three)
    expire(three)
    result = roll_back(three, emergency=emergency)
    assert (result["to"], result["withdrawn"]) == ("1", "2")
    assert record(three, operation.id).state == "withdrawn"
    settled(three, "1")


def test_the_same_command_again_goes_on_with_the_orphaned_soak(three: Database) -> None:
    operation = soaking(three)
    with pytest.raises(LockedError, match="promotion of digits 2"):
        kit.begin(three, "2")
    expire(three)
    again = kit.begin(three, "2", flow_run_id="run-2")
    assert (again.id, again.resumed, again.progress["promoted"]) == (operation.id, True, True)
    with three.read() as session:
        assert promotions.of_run(session, "run-2") is not None
    kit.end(three, again, "promoted")
    settled(three, "2")


def test_whoever_asks_for_an_earlier_run_finds_the_promotion_that_another_carries(three: Database) -> None:
    operation = soaking(three, run="run-1")
    expire(three)
    promotions.carry_on(three, operation.id, ttl_seconds=30.0, flow_run_id="run-2")
    with three.read() as session:
        found = [promotions.of_run(session, run) for run in ("run-1", "run-2", "run-3")]
    assert [row.id if row else None for row in found] == [operation.id, operation.id, None]


def test_only_its_own_run_takes_a_promotion_from_a_living_carrier(three: Database) -> None:
    operation = kit.begin(three, "2", flow_run_id="run-1")
    for run in (None, "run-2"):
        with pytest.raises(LockedError):
            promotions.carry_on(three, operation.id, ttl_seconds=30.0, flow_run_id=run)
    again = promotions.carry_on(three, operation.id, ttl_seconds=30.0, flow_run_id="run-1")
    assert again.held.token != operation.held.token
    kit.end(three, again, "withdrawn")
    with pytest.raises(ConflictError, match="has ended already"):
        promotions.carry_on(three, operation.id, ttl_seconds=30.0, flow_run_id="run-1")
    with pytest.raises(NotFoundError):
        promotions.carry_on(three, "nothing", ttl_seconds=30.0)


def test_only_a_soak_is_left_to_others(three: Database) -> None:
    operation = kit.begin(three, "2")
    with pytest.raises(ConflictError, match="only a soak"):
        promotions.let_go(three, operation, "told to end")


def test_a_run_that_moved_meanwhile_loses_nothing(three: Database) -> None:
    operation = kit.begin(three, "2")
    kit.canary(three, operation)
    seen = beat_of(three)
    leases.beat(three, operation.held)
    before = state_of_world(three)
    assert expire(three, seen) is None
    assert state_of_world(three) == before
    kit.promote(three, operation)


def test_of_two_observers_one_withdraws(three: Database) -> None:
    kit.canary(three, kit.begin(three, "2"))
    seen = beat_of(three)
    assert expire(three, seen) is not None
    before = state_of_world(three)
    assert expire(three, seen) is None
    assert state_of_world(three) == before


# Rollback


def test_a_rollback_goes_one_back_then_another_and_never_forward(three: Database) -> None:
    kit.stable_by(three, "2", "3")
    assert roll_back(three)["to"] == "2"
    settled(three, "2")
    assert places(three) == {"1": "retired", "2": "stable", "3": "retired"}
    assert roll_back(three)["to"] == "1"
    settled(three, "1")
    with pytest.raises(NotFoundError, match="no earlier stable version"):
        roll_back(three)
    settled(three, "1")


def test_a_rollback_may_name_its_version_and_come_back(three: Database) -> None:
    kit.stable_by(three, "2")
    done = roll_back(three, "1")
    assert done == {
        "model": MODEL, "environment": ENVIRONMENT, "from": "2", "to": "1", "withdrawn": None,
        "generation": route(three).generation,
    }  # fmt: skip
    assert roll_back(three, "2")["to"] == "2"
    settled(three, "2")
    assert roll_back(three)["to"] == "1"
    settled(three, "1")


def test_a_rollback_is_one_transaction_with_its_events(three: Database) -> None:
    kit.stable_by(three, "2")
    before = last_event(three)
    roll_back(three)
    assert actions(three, before) == [
        "lease.acquired", "lease.released", "placement.changed", "placement.changed", "route.rollback",
        "model.rolled-back",
    ]  # fmt: skip


def test_a_locked_model_is_not_rolled_back_without_an_emergency(three: Database) -> None:
    kit.canary(three, kit.begin(three, "2"))
    before = state_of_world(three)
    with pytest.raises(LockedError):
        roll_back(three, "1")
    assert state_of_world(three) == before


@pytest.mark.parametrize("emergency", [False, True])
@pytest.mark.parametrize("state", ["archived", "rejected", "registered"])
def test_only_a_validated_version_can_be_gone_back_to(three: Database, state: str, emergency: bool) -> None:
    kit.stable_by(three, "2")
    with three.write() as transaction:
        transaction.session.get_one(Version, (MODEL, "1")).state = state
    before = state_of_world(three)
    for to in ("1", None):
        with pytest.raises(RefusedError, match=f"is {state}: only a validated version can take traffic"):
            roll_back(three, to, emergency=emergency)
    assert state_of_world(three) == before


@pytest.mark.parametrize("emergency", [False, True])
def test_a_version_that_was_never_stable_cannot_be_gone_back_to(three: Database, emergency: bool) -> None:
    """A rollback shall be no way around the canary: version 2 was withdrawn by it, 3 never began."""
    operation = kit.begin(three, "2")
    kit.canary(three, operation)
    kit.end(three, operation, "withdrawn")
    before = state_of_world(three)
    for version in ("2", "3"):
        with pytest.raises(RefusedError, match="has never been the stable version"):
            roll_back(three, version, emergency=emergency)
    assert state_of_world(three) == before


def test_a_rollback_to_where_it_is_already_is_refused(three: Database) -> None:
    before = state_of_world(three)
    with pytest.raises(RefusedError, match="is the stable version in production already"):
        roll_back(three, "1")
    assert state_of_world(three) == before


@pytest.mark.parametrize(("model", "to"), [("letters", None), (MODEL, "99")])
def test_what_is_not_there_cannot_be_rolled_back(three: Database, model: str, to: str | None) -> None:
    before = state_of_world(three)
    with pytest.raises(NotFoundError):
        roll_back(three, to, model=model)
    assert state_of_world(three) == before


@pytest.mark.parametrize(("at", "back"), [("begin", "1"), ("shadow", "1"), ("canary", "2")])
def test_an_emergency_withdraws_what_is_under_way_and_goes_back_where_that_had_no_traffic(
    three: Database, at: str, back: str
) -> None:
    kit.stable_by(three, "2")
    operation = kit.begin(three, "3")
    if at != "begin":
        {"shadow": kit.shadow, "canary": kit.canary}[at](three, operation)
    done = roll_back(three, emergency=True)
    assert (done["from"], done["to"], done["withdrawn"]) == ("2", back, "3")
    settled(three, back)
    assert (record(three, operation.id).state, record(three, operation.id).reason) == (
        "withdrawn",
        "Emergency rollback",
    )
    before = state_of_world(three)
    with pytest.raises(FencedError):
        kit.promote(three, operation)
    with pytest.raises(FencedError):
        leases.beat(three, operation.held)
    assert state_of_world(three) == before


def test_an_emergency_before_any_traffic_stays_where_nothing_is_below(database: Database) -> None:
    for version in "12":
        kit.add_version(database, version)
    kit.stable_by(database, "1")
    operation = kit.begin(database, "2")
    assert roll_back(database, emergency=True)["to"] == "1"
    assert record(database, operation.id).state == "withdrawn"


def test_an_emergency_in_the_canary_may_name_a_version_further_back(three: Database) -> None:
    kit.stable_by(three, "2")
    kit.canary(three, kit.begin(three, "3"))
    assert roll_back(three, "1", emergency=True)["to"] == "1"
    settled(three, "1")
    assert places(three) == {"1": "stable", "2": "retired", "3": "withdrawn"}


def test_an_emergency_in_the_soak_brings_the_old_stable_version_back(three: Database) -> None:
    operation = kit.begin(three, "2")
    kit.canary(three, operation)
    kit.promote(three, operation)
    done = roll_back(three, emergency=True)
    assert (done["from"], done["to"]) == ("2", "1")
    settled(three, "1")
    assert places(three) == {"1": "stable", "2": "withdrawn"}
    assert record(three, operation.id).state == "withdrawn"


def test_an_emergency_while_nothing_is_under_way_goes_one_back(three: Database) -> None:
    kit.stable_by(three, "2")
    assert roll_back(three, emergency=True)["to"] == "1"
    settled(three, "1")


# When the commit fails


@pytest.mark.parametrize("attempt", ["note", "canary", "promote"])
def test_a_commit_that_fails_leaves_the_operation_where_it_was(
    three: Database, attempt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = kit.begin(three, "2")
    kit.canary(three, operation)
    before, kept = state_of_world(three), (operation.step, operation.progress)

    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(audit, "append", full)  # the last thing before the commit
    steps = {
        "note": lambda: promotions.note(three, operation, "other", "noted", "", progress={"seen": 1}),
        "canary": lambda: kit.canary(three, operation, 0.25),
        "promote": lambda: kit.promote(three, operation),
    }
    with pytest.raises(StorageError):
        steps[attempt]()
    monkeypatch.undo()
    assert (operation.step, operation.progress) == kept
    assert state_of_world(three) == before
    steps[attempt]()
    assert (operation.step, operation.progress) != kept
    assert record(three, operation.id).progress == operation.progress


def test_an_anchor_that_cannot_be_written_does_not_take_the_operation_back(three: Database) -> None:
    """The change is committed by then: who forgot it would do it twice."""
    operation = kit.begin(three, "2")
    assert three.anchors is not None
    three.anchors.unlink(missing_ok=True)
    three.anchors.mkdir()
    kit.canary(three, operation)
    assert operation.step == "canary"
    assert record(three, operation.id).progress == operation.progress


def test_the_lease_is_checked_before_anything_else_of_a_write(three: Database) -> None:
    operation = kit.begin(three, "2")
    with kit.statements(three) as statements:
        promotions.note(three, operation, "other", "noted", "")
    assert statements[0] == "BEGIN IMMEDIATE" or "FROM audit_head" in statements[0], "writers go one at a time"
    assert "FROM environments" in statements[1]
    assert "FROM leases" in statements[2]
    writes = [statement.split()[0] for statement in statements].index("INSERT")
    assert writes > 2
    assert any("FROM audit_head" in statement for statement in statements[writes:]), "the head is the last lock"


def test_placements_of_an_operation_are_those_of_its_version(three: Database) -> None:
    operation: Operation = kit.begin(three, "2")
    promotions.note(three, operation, "stage", "staged", "", placements=[("staging", "testing")])
    with three.read() as session:
        assert states.placement(session, MODEL, "2", "staging") is not None
        assert states.placement(session, MODEL, "1", "staging") is None
