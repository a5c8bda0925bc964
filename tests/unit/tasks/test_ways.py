"""Shadow only and replay: how each ends, on record, with a probe that answers as it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry import promotions, routes, states
from registry.database import Database
from registry.errors import ConflictError, FencedError
from registry.policy import PromotionPolicy
from registry.promotions import STAGING, Operation
from registry.schema import AuditEvent
from registry.store import DirectoryStore
from tasks import judgement, promotion, ways
from tasks.captured import Gathered
from tasks.lease import Keeper
from tasks.probe import ProbeResult
from tasks.promoting import Ended, Promoting
from tests.unit.registry import kit


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = kit.prepared(tmp_path)
    for version in ("1", "2"):
        kit.add_version(made, version)
    kit.stable_by(made, "1")
    return made


def working(database: Database, tmp_path: Path, operation: Operation) -> Promoting:
    return Promoting(database, None, tmp_path, operation, Keeper(operation.held), sleep=lambda _: None)


def counts(
    *, requests: int = 200, errors: int = 0, slow: int | None = 0, disagreed: int = 0, stable_slow: int = 0
) -> dict[str, Any]:
    def side(bad: int, late: int | None) -> dict[str, Any]:
        return {"errors": bad, "slow": late, "first_error": None, "p50_seconds": 0.001, "p95_seconds": 0.002}

    return {
        "problem": None, "requests": requests, "of": requests, "inputs": "golden", "stable_p95_seconds": 0.002,
        "slow_threshold_seconds": None if slow is None else 0.0025, "candidate": side(errors, slow),
        "stable": side(0, None if slow is None else stable_slow), "compared": requests - errors,
        "disagreements": {"top": disagreed, "tolerance": disagreed, "exact": requests - errors},
    }  # fmt: skip


def replayed(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: ProbeResult, **policy: Any
) -> Operation:
    operation = kit.begin(database, "2", strategy="replay", policy=PromotionPolicy(**policy))
    job = ways.probe.ProbeJob(None, replay=operation.policy.replay_requests)  # type: ignore[arg-type]
    monkeypatch.setattr(ways, "_job", lambda work, folder: (job, "its golden inputs"))
    monkeypatch.setattr(ways.probe, "run_probe", lambda job, **_: result)
    ways.replay(working(database, tmp_path, operation))
    return operation


def ended(database: Database, identity: str) -> tuple[str, str]:
    with database.read() as session:
        row = promotions.get(session, identity)
        last = promotions.story(session, identity)[-1]
        return row.state, str(last["detail"])


def test_a_version_that_answers_as_the_stable_one_passes_the_replay_and_staging(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = replayed(database, tmp_path, monkeypatch, ProbeResult("done", replay=counts(slow=6, stable_slow=5)))
    with database.read() as session:
        place = states.placement(session, kit.MODEL, "2", STAGING)
        step = promotions.story(session, operation.id)[-1]
    assert place is not None and place.status == "passed"
    assert "The requests: 200 of its golden inputs." in step["detail"]
    assert operation.progress["replayed"] is True
    kit.promote(database, operation)
    with database.read() as session:
        route = routes.read(session, kit.ENVIRONMENT, kit.MODEL)
        assert route is not None and route.stable == "2"


@pytest.mark.parametrize(
    ("found", "policy", "why"),
    [
        (counts(errors=60), {}, "errors 60/200"),
        (counts(slow=150, stable_slow=10), {}, "slow answers"),
        (counts(disagreed=60), {"shadow_agreement": 0.95}, "the answers agree in 70.0% of 200"),
    ],
)
def test_a_version_that_fails_is_slow_or_disagrees_is_withdrawn(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Any, policy: dict[str, Any], why: str
) -> None:
    with pytest.raises(Ended) as caught:
        replayed(database, tmp_path, monkeypatch, ProbeResult("done", replay=found), **policy)
    assert caught.value.outcome == "withdrawn"
    assert why in caught.value.reason
    with database.read() as session:
        place = states.placement(session, kit.MODEL, "2", STAGING)
        assert place is not None and place.status == "withdrawn"


def test_disagreement_is_reported_only_where_no_share_is_asked_for(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = replayed(database, tmp_path, monkeypatch, ProbeResult("done", replay=counts(disagreed=60)))
    with database.read() as session:
        assert "top 70.0%" in promotions.story(session, operation.id)[-1]["detail"]


@pytest.mark.parametrize(
    ("result", "outcome", "why"),
    [
        (ProbeResult("done", replay=counts(requests=5)), "held", "5 requests are too few"),
        (ProbeResult("refused", "golden cases: none"), "held", "golden cases: none"),
        (ProbeResult("timeout", "stopped after 9 s", "replaying through the stable version"), "held", "after 9 s"),
        (ProbeResult("crashed", "ended by SIGSEGV", "replaying through the candidate"), "withdrawn", "SIGSEGV"),
        (ProbeResult("crashed", "ended by SIGSEGV", "replaying through the stable version"), "held", "SIGSEGV"),
        (ProbeResult("done", replay={"problem": "the candidate does not load: x"}), "withdrawn", "does not load"),
    ],
)
def test_without_enough_to_judge_by_it_is_held_and_only_what_the_candidate_did_counts_against_it(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: ProbeResult, outcome: str, why: str
) -> None:
    with pytest.raises(Ended) as caught:
        replayed(database, tmp_path, monkeypatch, result)
    assert caught.value.outcome == outcome
    assert why in caught.value.reason


def test_what_clients_sent_lies_below_the_cache_of_the_promotion_while_it_is_replayed(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []
    operation = kit.begin(database, "2", strategy="replay")
    job = ways.probe.ProbeJob(None, replay=100)  # type: ignore[arg-type]
    monkeypatch.setattr(ways, "_job", lambda work, folder: (places.append(folder), (job, "captured ones"))[1])
    monkeypatch.setattr(ways.probe, "run_probe", lambda job, **_: ProbeResult("done", replay=counts()))
    ways.replay(working(database, tmp_path, operation))
    assert places[0].is_relative_to(tmp_path / "replays") and not places[0].exists()


def test_a_replay_that_is_on_record_is_not_made_again(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = replayed(database, tmp_path, monkeypatch, ProbeResult("done", replay=counts()))
    monkeypatch.setattr(ways.probe, "run_probe", lambda job, **_: pytest.fail("it ran again"))
    ways.replay(working(database, tmp_path, operation))


def chosen(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Gathered, *, golden: bool, inputs: str
) -> tuple[ways.probe.ProbeJob, str]:
    """The job that a replay would give to the probe, with so many captured requests at the servers."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"model")
    store = DirectoryStore(tmp_path / "artifacts")
    operation = kit.begin(database, "2", strategy="replay", policy=PromotionPolicy(replay_inputs=inputs))  # type: ignore[arg-type]
    work = Promoting(database, store, tmp_path, operation, Keeper(operation.held), sleep=lambda _: None)
    monkeypatch.setattr(ways.captured, "gather", lambda *_, **__: found)
    monkeypatch.setattr(ways.promotion, "probe_model", lambda *_: ways.probe.ProbeModel(path, "onnx"))
    monkeypatch.setattr(ways.versions, "golden_for", lambda *_: store.put(path).digest if golden else None)
    return ways._job(work, tmp_path / "captured")


MANY = Gathered(500, ("box-1", "box-2"), ("box-3: has none",))
FEW = Gathered(7, ("box-1",), ())
NONE = Gathered(0, (), ("box-1: has none",))


@pytest.mark.parametrize(
    ("found", "inputs", "captured", "words"),
    [
        (MANY, "auto", True, "500 requests captured by box-1, box-2 (without box-3: has none)"),
        (FEW, "auto", False, "its golden inputs; 7 captured requests are fewer than the 20 that are needed"),
        (NONE, "auto", False, "its golden inputs; no captured requests: box-1: has none"),
        (FEW, "captured", True, "7 requests captured by box-1"),
        (MANY, "golden", False, "its golden inputs"),
    ],
)
def test_what_is_replayed_is_as_the_policy_says(
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    found: Gathered,
    inputs: str,
    captured: bool,
    words: str,
) -> None:
    job, where = chosen(database, tmp_path, monkeypatch, found, golden=True, inputs=inputs)
    assert (job.captured is not None, job.golden is None) == (captured, captured)
    assert where == words


@pytest.mark.parametrize(
    ("found", "golden", "inputs", "why"),
    [
        (NONE, False, "auto", "it has no golden cases; no captured requests: box-1: has none"),
        (NONE, True, "captured", "the policy wants captured ones (replay_inputs); no captured requests"),
        (FEW, False, "auto", "7 captured requests are fewer than the 20"),
        (MANY, False, "golden", "it has no golden cases; register it"),
    ],
)
def test_with_nothing_to_replay_it_is_held_and_says_what_to_do(
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    found: Gathered,
    golden: bool,
    inputs: str,
    why: str,
) -> None:
    with pytest.raises(Ended) as caught:
        chosen(database, tmp_path, monkeypatch, found, golden=golden, inputs=inputs)
    assert caught.value.outcome == "held"
    assert why in caught.value.reason and "capture.share" in caught.value.reason


def test_slowness_without_a_p95_is_not_judged() -> None:
    found = counts(slow=None)
    verdict = judgement.judge_replay(
        ways.window_of(found), PromotionPolicy(), streams=("error",), agreement=judgement.StreamCounts(200, 0)
    )
    assert verdict.verdict == "advance"
    assert [item.stream for item in verdict.evidence] == ["error"]


# --- shadow only


def test_a_shadow_only_ends_in_staging_with_the_stable_version_where_it_was(database: Database, tmp_path: Path) -> None:
    operation = kit.begin(database, "2", strategy="shadow")
    kit.shadow(database, operation)
    end = ways.shadowed(working(database, tmp_path, operation))
    assert end.outcome == "shadowed"
    state, detail = ended(database, operation.id)
    assert state == "shadowed" and "modelkeep promote digits 2" in detail
    with database.read() as session:
        route = routes.read(session, kit.ENVIRONMENT, kit.MODEL)
        place = states.placement(session, kit.MODEL, "2", STAGING)
        assert route is not None and (route.stable, route.candidate, route.watch) == ("1", None, False)
        assert place is not None and place.status == "passed"
        assert states.placement(session, kit.MODEL, "2", kit.ENVIRONMENT) is None
    again = kit.begin(database, "2")  # the promotion itself, later
    kit.canary(database, again)
    kit.promote(database, again)


def test_a_shadow_only_without_anybody_to_copy_is_held(database: Database, tmp_path: Path) -> None:
    operation = kit.begin(database, "2", strategy="shadow")
    end = ways.no_shadow(working(database, tmp_path, operation), "no server answers")
    assert end.outcome == "held" and "nothing was judged" in end.reason


def test_no_other_promotion_can_end_as_shadowed(database: Database) -> None:
    operation = kit.begin(database, "2")
    with pytest.raises(ConflictError, match="cannot end as shadowed"):
        kit.end(database, operation, "shadowed")


# --- the gate between environments


def test_a_version_is_a_candidate_in_production_only_after_staging(database: Database) -> None:
    operation = kit.begin(database, "2")
    kit.shadow(database, operation)
    with database.read() as session:
        place = states.placement(session, kit.MODEL, "2", STAGING)
        assert place is not None and place.status == "testing"
        assert states.placement(session, kit.MODEL, "2", kit.ENVIRONMENT) is None
    kit.weigh(database, operation)
    with database.read() as session:
        place = states.placement(session, kit.MODEL, "2", STAGING)
        assert place is not None and place.status == "passed"
        place = states.placement(session, kit.MODEL, "2", kit.ENVIRONMENT)
        assert place is not None and place.status == "candidate"


def test_where_each_field_of_the_policy_comes_from_is_in_the_audit_trail(database: Database) -> None:
    operation = kit.begin(database, "2", policy_from={"soak_seconds": "this run"})
    with database.read() as session:
        event = session.query(AuditEvent).filter_by(action="promotion.begun", subject=operation.subject).one()
        assert json.loads(event.text)["after"]["policy_from"] == {"soak_seconds": "this run"}


# --- waiting for servers


def test_a_promotion_that_loses_its_lease_while_it_waits_for_servers_waits_no_longer(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion.servers, "alive", lambda *_: {"r0": "http://127.0.0.1:1"})
    monkeypatch.setattr(promotion.servers, "nudge", lambda *_, **__: None)
    behind = {"epoch": "of before", "generation": 0, "errors": {}}
    monkeypatch.setattr(promotion.servers, "_look", lambda *_: (behind, False))
    work = working(database, tmp_path, kit.begin(database, "2"))
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert len(slept) < 10, "it waits on for servers that will never follow it"
        if len(slept) == 3:
            work.keeper.lost = "the registry was restored"

    work.sleep = sleep
    with pytest.raises(FencedError, match="restored"):
        promotion._followed(work, "e", 1)
    assert len(slept) == 3
