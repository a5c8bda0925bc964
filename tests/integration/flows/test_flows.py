"""The flows against a real Prefect server, a real inference server and real traffic: the states that they end in, and their pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry import leases, promotions
from registry.policy import PromotionPolicy
from tasks import lease
from tests.e2e.harness import LEASE_SECONDS, MODEL, Box, box, build, wait_for, write_golden
from tests.prefect_server import ask, newest_page

QUIET = "quiet"
"""A model that nobody asks."""


@pytest.fixture(scope="module")
def world(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A server with two models at version 1; one has traffic."""
    with box(tmp_path_factory.mktemp("box")) as made:
        made.first("1")
        made.register("1", build(made.folder / "quiet-1.onnx", seed=31), model=QUIET)
        made.settle_by_hand("1", model=QUIET)
        made.models["1"] = made.folder / "v1.onnx"
        made.serve(MODELKEEP_CAPTURE__SHARE="1")
        made.start_traffic(rate=120)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in made.environment.items():
                if name.startswith("MODELKEEP_"):
                    patch.setenv(name, value)
            yield made


def promote(model: str, version: str, **request: Any) -> Any:
    from flows.promote import PromoteModel, promote_model

    return promote_model(PromoteModel(model=model, version=version, **request), return_state=True)


def roll_back(model: str, **request: Any) -> Any:
    from flows.rollback import RollbackModel, rollback_model

    return rollback_model(RollbackModel(model=model, **request), return_state=True)


def recorded(world: Box) -> list[dict[str, Any]]:
    with world.database.read() as session:
        return promotions.listed(session, model=MODEL)


def run_state(api: str, state: Any) -> tuple[str, str]:
    """(type, name) of a run's state as Prefect has it on record."""
    answer = ask("GET", f"{api}/flow_runs/{state.state_details.flow_run_id}")
    return answer["state"]["type"], answer["state"]["name"]


def test_a_better_version_ends_promoted_and_a_rollback_takes_it_back(world: Box, prefect_api: str) -> None:
    path = build(world.folder / "v2.onnx", seed=2)
    world.register("2", path, golden=write_golden(world.folder / "golden-2.npz", path))
    state = promote(MODEL, "2")
    assert (state.name, run_state(prefect_api, state)) == ("Promoted", ("COMPLETED", "Promoted")), state.message
    assert world.stable() == "2"
    text = newest_page(prefect_api, "promotion-digits-2")
    for part in ("# digits 2: promoted", "answers 25% of the requests", "## Validation", "## Evidence", "## Policy"):
        assert part in text
    row = world.promotion("2")
    assert row is not None and row["flow_run_id"] == str(state.state_details.flow_run_id)

    back = roll_back(MODEL, reason="to see it")
    assert (back.name, run_state(prefect_api, back)) == ("RolledBack", ("COMPLETED", "RolledBack")), back.message
    assert world.stable() == "1"
    assert "digits is back from 2 to 1 in production; 1 server(s) answer by it" in newest_page(
        prefect_api, "rollback-digits"
    )
    assert world.infer().headers["x-model-version"] == "1"


def test_a_gradual_rollback_moves_the_traffic_by_steps_and_is_on_record_among_the_promotions(
    world: Box, prefect_api: str
) -> None:
    state = roll_back(MODEL, to="2", strategy="gradual", reason="slowly")
    assert (state.name, run_state(prefect_api, state)) == ("RolledBack", ("COMPLETED", "RolledBack")), state.message
    row = next(row for row in recorded(world) if row["strategy"] == "rollback")
    with world.database.read() as session:
        titles = [step["title"] for step in promotions.story(session, row["id"])]
    assert titles == ["25% of the requests go back to 2", "50% of the requests go back to 2", "Rolled back by steps"]
    found = state.data.result
    assert (found["to"], found["behind"], len(found["seconds"])) == ("2", {}, 1)
    assert world.infer().headers["x-model-version"] == "2"
    refused = roll_back(MODEL, to="2", strategy="gradual")
    assert refused.name == "Refused", refused.message
    assert roll_back(MODEL, to="1").name == "RolledBack" and world.stable() == "1"
    assert world.held_leases() == []


def test_a_rollback_whose_first_answer_is_lost_is_done_once_and_goes_no_further(
    world: Box, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry import rollbacks
    from registry.errors import UnavailableError

    assert roll_back(MODEL, to="2").name == "RolledBack"
    real, lost = rollbacks.roll_back, [UnavailableError("it went away while a change was committed")]

    def answered(*arguments: Any, **options: Any) -> dict[str, Any]:
        done = real(*arguments, **options)
        if lost:
            raise lost.pop()
        return done

    monkeypatch.setattr(rollbacks, "roll_back", answered)
    state = roll_back(MODEL)
    assert (state.name, state.data.result["to"], lost) == ("RolledBack", "1", [])
    assert world.stable() == "1" and world.held_leases() == []


def test_a_worse_version_ends_rejected_with_the_figures_of_both(world: Box, prefect_api: str) -> None:
    golden = write_golden(world.folder / "golden-1.npz", world.models["1"])
    world.register("3", build(world.folder / "v3.onnx", seed=3), golden=golden)
    state = promote(MODEL, "3")
    assert (state.name, run_state(prefect_api, state)) == ("Rejected", ("FAILED", "Rejected"))
    assert "accuracy" in state.message
    assert "# digits 3: rejected" in newest_page(prefect_api, "promotion-digits-3")
    assert world.stable() == "1"


def test_a_version_that_fails_on_live_requests_ends_rolled_back(world: Box, prefect_api: str) -> None:
    path = build(world.folder / "v4.onnx", seed=1, broken=True)
    world.register("4", path, golden=write_golden(world.folder / "golden-4.npz", path))
    state = promote(MODEL, "4")
    assert (state.name, run_state(prefect_api, state)) == ("RolledBack", ("FAILED", "RolledBack")), state.message
    text = newest_page(prefect_api, "promotion-digits-4")
    assert "# digits 4: withdrawn" in text and "error" in text
    assert world.stable() == "1"


def test_a_version_that_nobody_asks_ends_held(world: Box, prefect_api: str) -> None:
    world.register("2", build(world.folder / "quiet-2.onnx", seed=32), model=QUIET)
    world.models["2"] = world.folder / "v2.onnx"
    state = promote(QUIET, "2", policy=PromotionPolicy(**{**world.policy, "deadline_seconds": 1.0}))
    assert (state.name, run_state(prefect_api, state)) == ("Held", ("FAILED", "Held")), state.message
    assert "no decision within 1 s" in newest_page(prefect_api, "promotion-quiet-2")
    assert world.stable(QUIET) == "1"


def test_a_version_that_nobody_asks_is_promoted_by_a_replay_of_its_golden_cases(world: Box, prefect_api: str) -> None:
    path = build(world.folder / "quiet-4.onnx", seed=31)
    world.register("4", path, model=QUIET, golden=write_golden(world.folder / "golden-quiet.npz", path))
    world.models["4"] = path
    state = promote(QUIET, "4", strategy="replay", changes={"soak_seconds": 1.0, "shadow_agreement": 0.9})
    assert (state.name, run_state(prefect_api, state)) == ("Promoted", ("COMPLETED", "Promoted")), state.message
    assert world.stable(QUIET) == "4"
    text = newest_page(prefect_api, "promotion-quiet-4")
    assert "replay passed" in text and "the replay is passed" in text and "canary at" not in text
    assert roll_back(QUIET).name == "RolledBack" and world.stable(QUIET) == "1"


def test_a_replay_sends_the_requests_that_the_server_has_captured(world: Box, prefect_api: str) -> None:
    path = build(world.folder / "v8.onnx", seed=1)
    world.register("8", path, golden=write_golden(world.folder / "golden-8.npz", path))
    wait_for("enough captured requests", lambda: captured(world) >= 40)
    state = promote(MODEL, "8", strategy="replay", changes={"soak_seconds": 1.0, "shadow_agreement": 0.9})
    assert (state.name, run_state(prefect_api, state)) == ("Promoted", ("COMPLETED", "Promoted")), state.message
    assert "requests captured by" in newest_page(prefect_api, "promotion-digits-8")
    assert roll_back(MODEL).name == "RolledBack" and world.stable() == "1"
    other = build(world.folder / "v9.onnx", seed=9)  # another network: other answers to the same requests
    world.register("9", other, golden=write_golden(world.folder / "golden-9.npz", other))
    worse = promote(MODEL, "9", strategy="replay", changes={"shadow_agreement": 0.9})
    assert worse.name == "RolledBack" and "the answers agree in" in worse.message
    assert world.stable() == "1"


def captured(world: Box) -> int:
    found = httpx.get(f"{world.url}/api/v2/captured", timeout=10).raise_for_status().json()["models"]
    return int(found.get(MODEL, {"requests": 0})["requests"])


def test_a_version_that_was_to_see_copies_only_ends_shadowed_and_the_stable_one_stays(
    world: Box, prefect_api: str
) -> None:
    path = build(world.folder / "v7.onnx", seed=1)
    world.register("7", path, golden=write_golden(world.folder / "golden-7.npz", path))
    state = promote(MODEL, "7", strategy="shadow")
    assert (state.name, run_state(prefect_api, state)) == ("Shadowed", ("COMPLETED", "Shadowed")), state.message
    assert world.stable() == "1"
    assert "# digits 7: shadowed" in newest_page(prefect_api, "promotion-digits-7")
    assert world.held_leases() == []


def test_a_model_that_another_run_holds_ends_locked_at_once_while_that_run_lives(world: Box, prefect_api: str) -> None:
    world.register("3", build(world.folder / "quiet-3.onnx", seed=33), model=QUIET)
    with world.database.write() as transaction:
        held = leases.acquire(
            transaction, leases.subject_of("production", QUIET), "production", holder="another run",
            ttl_seconds=LEASE_SECONDS, promotion=None,
        )  # fmt: skip
    with lease.kept(world.database, held):
        state = promote(QUIET, "3")
        assert (state.name, run_state(prefect_api, state)) == ("Locked", ("FAILED", "Locked"))
        assert "is locked by another run" in state.message
        assert roll_back(QUIET, to="1").name == "Locked"
    wait_for("the end of the lease that nobody keeps", lambda: not world.held_leases())
    assert world.promotion("3", model=QUIET) is None


def test_a_first_version_is_promoted_without_comparison_and_says_so(world: Box, prefect_api: str) -> None:
    world.register("1", build(world.folder / "fresh.onnx", seed=40), model="fresh")
    world.models["1"] = world.folder / "v1.onnx"
    state = promote("fresh", "1")
    assert state.name == "Promoted", state.message
    assert "there is nothing to compare it with" in newest_page(prefect_api, "promotion-fresh-1")
    assert world.infer(model="fresh").headers["x-model-version"] == "1"


def test_a_forced_promotion_needs_a_reason_and_puts_it_on_record(world: Box, prefect_api: str) -> None:
    golden = write_golden(world.folder / "golden-1.npz", world.models["1"])
    world.register("5", build(world.folder / "v5.onnx", seed=5), golden=golden)
    refused = promote(MODEL, "5", force=True)
    assert (refused.name, run_state(prefect_api, refused)) == ("Refused", ("FAILED", "Refused"))
    assert "needs a reason" in refused.message
    state = promote(MODEL, "5", force=True, reason="the old one is worse than its figures")
    assert state.name == "Promoted", state.message
    assert "the old one is worse than its figures" in newest_page(prefect_api, "promotion-digits-5")
    assert roll_back(MODEL).name == "RolledBack"
    assert world.stable() == "1"


def test_an_unknown_version_ends_refused_with_what_there_is(world: Box, prefect_api: str) -> None:
    state = promote(MODEL, "99")
    assert (state.name, run_state(prefect_api, state)) == ("Refused", ("FAILED", "Refused"))
    assert "digits has no version '99'" in state.message
    assert world.held_leases() == []


def test_versions_in_traffic_are_checked_and_one_whose_bytes_rotted_is_named(world: Box, prefect_api: str) -> None:
    from flows.validate import ValidateModels, validate_models
    from registry import versions

    state = validate_models(ValidateModels(), return_state=True)
    assert state.is_completed(), state.message
    assert "| digits 1 | stable | passed |" in newest_page(prefect_api, "validation-production")
    with world.database.read() as session:
        digest = versions.get(session, QUIET, "1").digest
    path = world.home / "artifacts" / digest[:2] / digest
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(good[:-1] + b"x")
    try:
        state = validate_models(ValidateModels(model=QUIET), return_state=True)
    finally:
        path.write_bytes(good)
    assert state.is_failed()
    assert "quiet 1" in state.message
    assert "is corrupt" in newest_page(prefect_api, "validation-production")


def test_after_all_that_the_audit_chain_holds_and_nothing_is_locked(world: Box) -> None:
    assert world.audit_faults() == []
    assert world.held_leases() == []


def test_the_error_of_a_step_closes_the_promotion_and_leaves_its_page(
    world: Box, prefect_api: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The artifact is gone: nothing that a retry would mend."""
    from registry import versions

    world.register("6", build(tmp_path / "v6.onnx", seed=6))
    with world.database.read() as session:
        digest = versions.get(session, MODEL, "6").digest
    (world.home / "artifacts" / digest[:2] / digest).unlink()
    state = promote(MODEL, "6")
    assert state.is_failed()
    row = world.promotion("6")
    assert row is not None and row["state"] == "failed"
    assert "restore it from a backup" in newest_page(prefect_api, "promotion-digits-6")
    assert world.held_leases() == []
