"""Approvals of runs that no worker can suspend: the process of the command waits, or another goes on for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from registry import approvals, leases, promotions
from registry.actor import Who
from registry.errors import ConflictError
from registry.policy import PromotionPolicy
from registry.schema import Promotion
from tasks.approval import Carrier, go_on, start
from tests.e2e.harness import Box, box, build, mark_validated, wait_for
from tests.prefect_server import ask
from tests.unit.registry.kit import Clock

ANN = Who("os:ann")


@pytest.fixture(scope="module")
def world(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A registry without a server: first versions take all of the traffic as soon as they may."""
    with box(tmp_path_factory.mktemp("box")) as made, pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            if name.startswith("MODELKEEP_"):
                patch.setenv(name, value)
        yield made


@pytest.fixture
def model(world: Box, request: pytest.FixtureRequest) -> str:
    name = str(request.node.name).replace("[", "-").strip("]")[:100]
    world.register("1", build(world.folder / f"{name}.onnx"), model=name)
    return name


def promote(model: str, **request: Any) -> Any:
    from flows.promote import PromoteModel, promote_model

    return promote_model(PromoteModel(model=model, version="1", **request), return_state=True)


def meanwhile(world: Box, model: str, act: Callable[[str], Any]) -> threading.Thread:
    """Do something as soon as the promotion of the model waits."""

    def work() -> None:
        wait_for("the question", lambda: (row := world.promotion("1", model=model)) and row["state"] == "awaiting")
        row = world.promotion("1", model=model)
        assert row is not None
        act(row["id"])

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def asked(world: Box, model: str, **policy: Any) -> promotions.Operation:
    """A promotion that waits, whose process is gone."""
    operation = promotions.begin(
        world.database, environment="production", model=model, version="1", policy=PromotionPolicy(approval=True, **policy),
        strategy="canary", ttl_seconds=2.0, flow_run_id=None,
    )  # fmt: skip
    mark_validated(world.database, operation)
    approvals.ask(world.database, operation, deadline_seconds=60.0)
    return operation


def post(api: str, path: str, body: dict[str, Any]) -> Any:
    return ask("POST", f"{api}{path}", body)


def deployment(api: str) -> str:
    """The deployment that `modelkeep deploy` writes, as far as these tests need it."""
    flow = post(api, "/flows/", {"name": "promote-model"})
    return str(post(api, "/deployments/", {"name": "promote-model", "flow_id": flow["id"]})["id"])


def run_in_state(api: str, world: Box, operation: promotions.Operation, state: dict[str, Any]) -> str:
    """A run of the promotion, in a state that a worker or a person left it in."""
    run = post(api, f"/deployments/{deployment(api)}/create_flow_run", {"parameters": {}})["id"]
    for each in ({"type": "RUNNING"}, state):
        post(api, f"/flow_runs/{run}/set_state", {"state": each, "force": True})
    with world.database.write(actor="test") as transaction:
        transaction.session.get_one(Promotion, operation.id).flow_run_id = run
    return str(run)


def state_of_run(api: str, run: str) -> str:
    return str(ask("GET", f"{api}/flow_runs/{run}")["state"]["type"])


def test_the_process_of_a_command_waits_and_goes_on_when_it_is_approved(world: Box, model: str) -> None:
    beats: list[int] = []

    def approve(identity: str) -> None:
        def beaten() -> bool:
            with world.database.read() as session:
                beats.extend(one.beat.heartbeat for one in approvals.waiting(session) if one.beat is not None)
            return max(beats) > 0

        wait_for("a sign of who waits", beaten)
        approvals.give(world.database, identity, verdict="approve", who=ANN, note="")

    thread = meanwhile(world, model, approve)
    state = promote(model, approval=True)
    thread.join()
    assert state.name == "Promoted", state.message
    assert world.stable(model) == "1"
    row = world.promotion("1", model=model)
    assert row is not None
    with world.database.read() as session:
        titles = [step["title"] for step in promotions.story(session, row["id"])]
    assert titles.index("waits for an approval") < titles.index("approved by os:ann")


def test_a_rejection_ends_the_run_that_waits(world: Box, model: str) -> None:
    thread = meanwhile(
        world, model, lambda identity: approvals.give(world.database, identity, verdict="reject", who=ANN, note="no")
    )
    state = promote(model, policy=PromotionPolicy(approval=True))
    thread.join()
    assert state.name == "Rejected" and "rejected by os:ann" in state.message
    assert world.stable(model) is None


def test_a_forced_promotion_waits_too_and_ends_when_nobody_approves(world: Box, model: str) -> None:
    policy = PromotionPolicy(approval=True, approval_deadline_seconds=0.5)
    state = promote(model, policy=policy, force=True, reason="hot fix")
    assert state.name == "Rejected" and "nobody approved it in time" in state.message
    assert world.stable(model) is None
    assert world.held_leases() == []


def test_another_run_goes_on_with_what_was_approved_after_its_process_was_gone(world: Box, model: str) -> None:
    operation = asked(world, model)
    approvals.give(world.database, operation.id, verdict="approve", who=ANN, note="")
    state = promote(model, carry_on=operation.id)
    assert state.name == "Promoted", state.message
    assert world.stable(model) == "1"
    with pytest.raises(ConflictError):
        approvals.carry_on(world.database, operation.id, ttl_seconds=2.0, flow_run_id=None)


def test_a_run_that_is_to_go_on_with_another_version_is_refused(world: Box, model: str) -> None:
    operation = asked(world, model)
    from flows.promote import PromoteModel, promote_model

    state = promote_model(PromoteModel(model=model, version="7", carry_on=operation.id), return_state=True)
    assert state.name == "Refused" and f"promotion {operation.id} is of {model} 1" in state.message
    approvals.withdraw(world.database, operation.id, reason="end of the test")


def test_the_loop_starts_one_run_for_what_was_approved_and_left_lying(world: Box, model: str, prefect_api: str) -> None:
    deployment(prefect_api)
    operation, clock = asked(world, model), Clock()
    carrier = Carrier(world.database, prefect_api, monotonic=clock)
    assert carrier.look() == []
    approvals.give(world.database, operation.id, verdict="approve", who=ANN, note="")
    assert go_on(world.database, prefect_api, operation.id) is None  # no run of its own to wake
    assert carrier.look() == []
    with world.database.read() as session:
        (token,) = [one.beat.token for one in approvals.waiting(session) if one.beat is not None]
    clock.seconds = 1.5
    leases.beat_waiting(world.database, operation.held.subject, token)  # somebody is there
    assert carrier.look() == []
    clock.seconds = 3.0
    assert carrier.look() == []
    clock.seconds = 3.6
    (line,) = carrier.look()
    assert operation.id in line and "left lying" in line
    clock.seconds = 60.0
    assert carrier.look() == []  # that run is on its way
    query = {"flow_runs": {"tags": {"all_": [f"promotion:{operation.id}"]}}}
    (run,) = ask("POST", f"{prefect_api}/flow_runs/filter", query)
    assert run["parameters"] == {
        "request": {"model": model, "version": "1", "environment": "production", "carry_on": operation.id}
    }
    with world.database.read() as session:
        assert start(prefect_api, approvals.state_of(session, operation.id)) is None
    approvals.withdraw(world.database, operation.id, reason="end of the test")


def test_a_promotion_whose_run_was_cancelled_while_it_waited_is_withdrawn(
    world: Box, model: str, prefect_api: str
) -> None:
    operation = asked(world, model)
    run_in_state(prefect_api, world, operation, {"type": "CANCELLED"})
    (line,) = Carrier(world.database, prefect_api).look()
    assert operation.id in line and "cancelled" in line
    row = world.promotion("1", model=model)
    assert row is not None and row["state"] == "withdrawn"
    assert world.held_leases() == []


@pytest.mark.parametrize("verdict", ["approve", "reject"])
def test_a_suspended_run_is_woken_by_the_answer_whoever_gave_it(
    world: Box, model: str, prefect_api: str, verdict: Any
) -> None:
    operation = asked(world, model)
    paused = {"type": "PAUSED", "name": "Suspended", "state_details": {"pause_reschedule": True, "pause_key": "1"}}
    run = run_in_state(prefect_api, world, operation, paused)
    carrier = Carrier(world.database, prefect_api)
    assert carrier.look() == []
    assert state_of_run(prefect_api, run) == "PAUSED"
    approvals.give(world.database, operation.id, verdict=verdict, who=ANN, note="")
    (line,) = carrier.look()
    assert "goes on" in line or "its promotion is rejected" in line
    assert state_of_run(prefect_api, run) == "SCHEDULED"
    approvals.withdraw(world.database, operation.id, reason="end of the test")
