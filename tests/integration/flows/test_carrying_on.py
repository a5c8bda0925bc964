"""A promotion whose run has gone, taken up by another run; and a person's word, by form and to a run under way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from registry import commands, promotions
from registry.actor import Who
from registry.policy import PromotionPolicy
from tests.e2e.harness import POLICY, Box, box, mark_validated, wait_for
from tests.unit.registry import kit


@pytest.fixture(scope="module")
def world(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A server with a model at version 1, that has traffic."""
    with box(tmp_path_factory.mktemp("box"), policy={**POLICY, "soak_seconds": 1.0}) as made:
        made.first("1")
        made.serve()
        made.start_traffic(rate=100)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in made.environment.items():
                if name.startswith("MODELKEEP_"):
                    patch.setenv(name, value)
            yield made


def promote(version: str, **request: Any) -> Any:
    from flows.promote import PromoteModel, promote_model

    return promote_model(PromoteModel(model="digits", version=version, **request), return_state=True)


def tell(identity: str, command: str, **more: Any) -> Any:
    from flows.command import CommandPromotion, command_promotion

    return command_promotion(CommandPromotion(promotion=identity, command=command, **more), return_state=True)


def begun(world: Box, version: str) -> promotions.Operation:
    world.add(version)
    operation = kit.begin(world.database, version, policy=PromotionPolicy(**world.policy), ttl_seconds=60.0)
    mark_validated(world.database, operation)
    return operation


def test_another_run_carries_on_a_soak_whose_run_has_gone(world: Box) -> None:
    operation = begun(world, "2")
    kit.canary(world.database, operation, 0.5)
    kit.promote(world.database, operation)
    promotions.let_go(world.database, operation, "told to end")
    # Whoever is first carries it, this run or the box's watchman: the other is refused.
    state = promote("2", carry_on=operation.id)
    assert state.name in ("Promoted", "Locked", "Refused"), state.message
    row = wait_for("its end", lambda: (r := world.promotion("2")) and r["state"] not in promotions.ACTIVE and r)
    assert (row["id"], row["state"], world.stable()) == (operation.id, "promoted", "2")
    again = promote("2", carry_on=operation.id)
    assert again.name == "Refused" and "has ended already (promoted)" in again.message


def test_a_run_goes_on_with_nothing_but_what_the_form_says(world: Box) -> None:
    operation = begun(world, "3")
    state = promote("2", carry_on=operation.id)
    assert state.name == "Refused" and "is of digits 3 in production, not of digits 2" in state.message
    kit.end(world.database, operation, "withdrawn")


def test_the_form_tells_a_promotion_and_is_refused_where_it_makes_no_sense(world: Box) -> None:
    operation = begun(world, "4")
    kit.canary(world.database, operation)
    paused = tell(operation.id, "pause", reason="an incident", name="Ada")
    assert paused.name == "Told", paused.message
    refused = tell(operation.id, "pause")
    assert refused.name == "Refused" and "is paused already" in refused.message
    assert tell(operation.id, "stop").name == "Told"
    assert world.promotion("4")["state"] == "withdrawn"  # type: ignore[index]
    with world.database.read() as session:
        given = commands.listed(session, operation.id)
    assert [row["command"] for row in given] == ["pause", "stop"]


def test_a_run_under_way_ends_with_the_word_of_who_stopped_it(world: Box) -> None:
    world.add("5", seed=2)
    state: list[Any] = []

    def stop() -> None:
        wait_for("a share of the traffic", lambda: world.weighs("5"))
        row = world.promotion("5")
        assert row is not None
        commands.give(
            world.database, row["id"], command="stop", who=Who("key:ada", key_id="k", via="api"), reason="wrong file"
        )
        state.append(row["id"])

    stopping = threading.Thread(target=stop)
    stopping.start()
    ended = promote("5", policy=PromotionPolicy(**{**world.policy, "minimum_requests": 1_000_000}))
    stopping.join(60)
    assert state, "nobody stopped it"
    assert (ended.name, world.promotion("5")["state"]) == ("RolledBack", "withdrawn")  # type: ignore[index]
    assert "Stopped" in ended.message
    details = [step["detail"] for step in world.story("5")]
    assert details[-1].startswith("by key:ada: wrong file")
    assert world.held_leases() == [] and world.audit_faults() == []
