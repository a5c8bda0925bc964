"""What a person tells a promotion: on record, taken once, refused where it makes no sense, and a stop that needs nobody."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from registry import approvals, commands, leases, orders, promotions
from registry.actor import Who
from registry.database import Database
from registry.errors import FencedError, LockedError, NotFoundError, RefusedError, UsageError
from registry.promotions import Operation
from tests.unit.registry import kit

WHO = Who("key:ops", key_id="k1", via="api", claimed=None)


@pytest.fixture(scope="module")
def two_template(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Path:
    folder = tmp_path_factory.mktemp("two")
    database = kit.prepared(folder, template)
    for version in ("1", "2"):
        kit.add_version(database, version)
    kit.stable_by(database, "1")
    database.dispose()
    return folder / "registry.db"


@pytest.fixture
def two(engine: Database, two_template: Path) -> Database:
    """Versions 1 and 2 validated, 1 stable."""
    kit.reset(engine, two_template)
    return engine


def give(database: Database, operation: Operation, command: str, reason: str = "because") -> dict[str, Any]:
    return commands.give(database, operation.id, command=command, who=WHO, reason=reason)


def standing(database: Database, operation: Operation) -> commands.Standing:
    with database.read() as session:
        return commands.standing(session, operation.id)


def state_of(database: Database, operation: Operation) -> str:
    with database.read() as session:
        return promotions.get(session, operation.id).state


def test_a_pause_is_on_record_and_taken_once(two: Database) -> None:
    operation = kit.begin(two, "2")
    kit.canary(two, operation)
    told = give(two, operation, "pause")
    assert (told["paused"], told["taken"], told["state"]) == (True, False, "running")
    found = standing(two, operation)
    assert found.paused is not None and str(found.paused) == "key:ops: because"
    (waiting,) = found.waiting
    assert commands.take(two, operation, waiting) is True
    assert commands.take(two, operation, waiting) is False
    assert standing(two, operation).waiting == ()
    assert standing(two, operation).paused is not None, "taken, and still paused"
    with two.read() as session:
        steps = [step["title"] for step in promotions.story(session, operation.id)]
        (event,) = [row for row in commands.listed(session, operation.id)]
    assert steps[-1] == "Paused" and steps.count("Paused") == 1
    assert event["actor"] == "key:ops" and event["taken_at"] is not None
    assert "promotion.asked-to-pause" in kit.actions(two)


def test_a_command_is_taken_by_the_carrier_only(two: Database) -> None:
    operation = kit.begin(two, "2", flow_run_id="run-1")
    give(two, operation, "pause")
    kit.begin(two, "2", flow_run_id="run-1")  # the run goes on in another process
    (waiting,) = standing(two, operation).waiting
    with pytest.raises(FencedError):
        commands.take(two, operation, waiting)
    assert standing(two, operation).waiting == (waiting,)


@pytest.mark.parametrize(
    ("before", "command", "said"),
    [
        ([], "resume", "not paused: it is in canary at 5%"),
        (["pause"], "pause", "paused already \\(by key:ops: because\\)"),
        (["pause"], "advance", "resume it first"),
        (["stop"], "stop", "has ended \\(withdrawn\\)"),
        (["stop"], "pause", "nothing to pause"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    two: Database, before: list[str], command: str, said: str
) -> None:
    operation = kit.begin(two, "2")
    kit.canary(two, operation)
    for earlier in before:
        give(two, operation, earlier)
    seen = kit.last_event(two)
    with pytest.raises(RefusedError, match=said):
        give(two, operation, command)
    assert kit.last_event(two) == seen


def outcomes(database: Database, operation: Operation) -> list[tuple[str, str]]:
    with database.read() as session:
        return [(row["command"], row["outcome"]) for row in commands.listed(session, operation.id)]


def test_a_second_advance_is_the_one_that_waits_and_skips_no_stage(two: Database) -> None:
    operation = kit.begin(two, "2")
    kit.canary(two, operation)
    first = give(two, operation, "advance", "it is fine")
    seen = kit.last_event(two)
    again = give(two, operation, "advance", "has it arrived?")
    assert kit.last_event(two) == seen
    assert {key: value for key, value in again.items() if key != "message"} == {
        key: value for key, value in first.items() if key != "message"
    }
    assert re.search("told to advance at 20.*Z already, by key:ops: it is fine; .* adds nothing", again["message"])
    (waiting,) = standing(two, operation).waiting
    promotions.note(two, operation, "canary", "passed", "at the word of somebody", taken=waiting.number)
    assert outcomes(two, operation) == [("advance", "taken")]
    give(two, operation, "advance")
    assert outcomes(two, operation) == [("advance", "taken"), ("advance", "waiting")], "this one is for the next stage"


def test_a_pause_calls_off_an_advance_that_was_not_carried_out(two: Database) -> None:
    operation = kit.begin(two, "2")
    kit.canary(two, operation)
    give(two, operation, "advance")
    (looked_at,) = standing(two, operation).waiting
    give(two, operation, "pause", "wait")
    called_off = ("advance", "not taken: paused by key:ops: wait before it was carried out")
    assert outcomes(two, operation) == [called_off, ("pause", "waiting")]
    with two.read() as session:
        assert promotions.story(session, operation.id)[-1]["title"] == "Not taken"
    with pytest.raises(orders.OvertakenError, match="advance by key:ops was called off"):
        promotions.note(two, operation, "canary", "passed", "", taken=looked_at.number)
    give(two, operation, "resume")
    give(two, operation, "advance")
    assert [one.command for one in standing(two, operation).waiting] == ["pause", "resume", "advance"]
    assert outcomes(two, operation)[-1] == ("advance", "waiting")


@pytest.mark.parametrize("how", ["end", "stop"])
def test_what_waits_when_the_promotion_ends_is_closed_with_it(two: Database, how: str) -> None:
    operation = kit.begin(two, "2")
    kit.canary(two, operation)
    for command in ("pause", "resume", "advance"):
        give(two, operation, command)
    if how == "end":
        kit.end(two, operation, "withdrawn")
    else:
        give(two, operation, "stop")
    late = "not taken: the promotion had ended"
    stops = [("stop", "taken")] if how == "stop" else []
    assert outcomes(two, operation) == [("pause", late), ("resume", late), ("advance", late), *stops]
    assert standing(two, operation).waiting == ()
    with two.read() as session:
        story = promotions.story(session, operation.id)
        assert {row["taken_at"] is None for row in commands.listed(session, operation.id)[:3]} == {True}
    assert [step["title"] for step in story].count("Not taken") == 3
    assert story[-1]["step"] == "withdrawn", "how it ended is said last"
    assert kit.verdict(two).faults == []


def test_before_the_first_stage_there_is_nothing_to_pass(two: Database) -> None:
    operation = kit.begin(two, "2")
    with pytest.raises(RefusedError, match="validating: there is no stage to pass"):
        give(two, operation, "advance")


def test_an_unknown_command_or_promotion_is_an_error(two: Database) -> None:
    operation = kit.begin(two, "2")
    with pytest.raises(UsageError, match="pause, resume, advance, stop"):
        give(two, operation, "faster")
    with pytest.raises(NotFoundError):
        commands.give(two, "nothing", command="stop", who=WHO, reason="")


@pytest.mark.parametrize("at", ["begin", "shadow", "canary"])
def test_a_stop_withdraws_the_candidate_at_once_whoever_carries_it(two: Database, at: str) -> None:
    operation = kit.begin(two, "2")
    if at != "begin":
        {"shadow": kit.shadow, "canary": kit.canary}[at](two, operation)
    told = give(two, operation, "stop")
    assert (told["state"], told["taken"]) == ("withdrawn", True)
    route = kit.route(two)
    assert (route.stable, route.candidate, route.watch, route.promotion) == ("1", None, False, None)
    with pytest.raises(FencedError):
        kit.canary(two, operation)
    kit.begin(two, "2")  # the lease is free
    assert kit.verdict(two).faults == []


def test_a_stop_ends_a_promotion_that_waits_for_an_approval_and_nothing_else_does(two: Database) -> None:
    operation = kit.begin(two, "2")
    approvals.ask(two, operation, deadline_seconds=600.0)
    for command in ("pause", "resume", "advance"):
        with pytest.raises(RefusedError, match="waiting for an approval"):
            give(two, operation, command)
    assert give(two, operation, "stop")["state"] == "withdrawn"
    with two.read() as session:
        assert leases.waiting(session, kit.ENVIRONMENT) == []


def test_a_stop_of_an_orphaned_soak_needs_no_carrier(two: Database) -> None:
    operation = kit.begin(two, "2")
    kit.canary(two, operation)
    kit.promote(two, operation)
    promotions.let_go(two, operation, "told to end")
    assert give(two, operation, "stop")["state"] == "promoted"
    assert (kit.route(two).stable, kit.route(two).watch) == ("2", False)


def test_a_word_to_go_on_is_for_the_stage_that_it_was_given_in(two: Database) -> None:
    operation = kit.begin(two, "2")
    kit.canary(two, operation, 0.05)
    give(two, operation, "advance")
    kit.weigh(two, operation, 0.25)  # the stage was passed by its figures meanwhile
    assert standing(two, operation).waiting == ()
    with two.read() as session:
        details = [step["detail"] for step in promotions.story(session, operation.id) if step["step"] == "advance"]
    assert details == ["key:ops asked for it before 25%, which was reached without it"]


def test_the_decision_and_the_taking_of_its_command_are_one(two: Database) -> None:
    operation = kit.begin(two, "2")
    kit.canary(two, operation)
    give(two, operation, "advance")
    (given,) = standing(two, operation).waiting
    promotions.note(two, operation, "canary", "passed", "at the word of somebody", taken=given.number)
    assert standing(two, operation).waiting == ()


def test_five_promotions_of_different_models_run_at_the_same_time_and_each_locks_its_own(database: Database) -> None:
    models = [f"model-{number}" for number in range(5)]
    for model in models:
        for version in ("1", "2"):
            kit.add_version(database, version, model=model)
    refusals: dict[str, str] = {}
    together = threading.Barrier(len(models))

    def all_the_way(model: str) -> None:
        first = kit.begin(database, "1", model=model)
        kit.promote(database, first, watch=False)
        kit.end(database, first, "promoted")
        together.wait(60)
        operation = kit.begin(database, "2", model=model)
        try:
            kit.begin(database, "2", model=model)
        except LockedError as error:
            refusals[model] = str(error)
        together.wait(60)
        kit.canary(database, operation)
        kit.promote(database, operation)
        together.wait(60)
        kit.end(database, operation, "promoted")

    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(all_the_way, models))
    assert [kit.route(database, model).stable for model in models] == ["2"] * len(models)
    for model in models:
        assert re.search(f"locked by promotion of {model} 2 by os:.* since 20.*Z", refusals[model])
    assert kit.verdict(database).faults == []
