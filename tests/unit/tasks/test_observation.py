"""What the judge is given: clusters over replicas and boots, verdicts as a stream, agreement, and what cannot be judged."""

from __future__ import annotations

from typing import Any, cast

import pytest

from registry import feedback, replicas
from registry.clock import now
from registry.database import Database
from registry.feedback import Verdict
from registry.promotions import Operation
from tasks import observation
from tasks.judgement import StreamCounts, Window, judge
from tests.unit.registry import kit
from tests.unit.registry.conftest import database, engine, template  # noqa: F401  (fixtures)
from tests.unit.registry.kit import ENVIRONMENT, MODEL, POLICY, add_version, begin, canary, stable_by


class _Asked:
    """As much of an operation as the streams need."""

    def __init__(self, threshold: float | None = 0.01) -> None:
        self.progress = {"slow_threshold_seconds": threshold}


def asked(threshold: float | None = 0.01) -> Operation:
    return cast(Operation, _Asked(threshold))


def row(requests: int, errors: int = 0, **more: Any) -> dict[str, Any]:
    return {"requests": requests, "errors": errors, "slow": 0, "latency": {}, **more}


def test_rows_of_the_release_before_count_each_failure_for_itself() -> None:
    assert observation.live([row(100, 4)])["error"] == StreamCounts(100, 4)


def test_clusters_add_up_over_replicas_by_batch_or_by_key_whichever_says_more() -> None:
    rows = [row(100, 8, error_batched=56, error_keyed=0), row(100, 4, error_batched=12, error_keyed=2)]
    found = observation.live(rows)["error"]
    assert found == StreamCounts(200, 12, 68)
    assert found.events == pytest.approx(144 / 80)


def test_a_key_that_fails_on_several_servers_and_after_a_restart_is_one_event() -> None:
    rows = [row(50, 1, error_keyed=0, error_keys={"ab": 1}) for _ in range(5)]
    assert observation.live(rows)["error"].events == pytest.approx(1)
    rows = [row(50, 3, error_keyed=6, error_keys={"ab": 3}), row(50, 2, error_keyed=2, error_keys={"ab": 2})]
    assert observation.live(rows)["error"].events == pytest.approx(1)
    others = [row(50, 1, error_keys={f"{k}": 1}) for k in range(5)]
    assert observation.live(others)["error"].events == pytest.approx(5)


def test_a_scorer_that_counts_is_a_stream_and_none_is_nothing() -> None:
    assert "quality" not in observation.live([row(10)])
    found = observation.live([row(10, quality_requests=4, quality_bad=1), row(10)])
    assert found["quality"] == StreamCounts(4, 1)


def window(candidate: int, stable: int, stream: str = "feedback") -> Window:
    return Window("25 %", 0.25, {stream: StreamCounts(candidate, 0)}, {stream: StreamCounts(stable, 0)})


@pytest.mark.parametrize("stream", ["feedback", "quality"])
def test_verdicts_are_judged_where_both_sides_have_enough_and_else_it_is_said_why_not(stream: str) -> None:
    assert observation.judged_streams(asked()) == ("error", "slow")
    assert stream in observation.judged_streams(asked(), [window(20, 20, stream)])
    few = observation.not_judged(asked(), [window(50, 19, stream)])[stream]
    assert "50" in few and "19 on the stable version" in few
    gone = [Window("soak", 1.0, {stream: StreamCounts(30, 1)})]
    assert stream not in observation.judged_streams(asked(), gone)
    assert stream in observation.judged_streams(asked(), gone, {stream: StreamCounts(40, 1)})
    assert "there are no" in observation.not_judged(asked())[stream]


def test_without_a_frozen_p95_slowness_is_not_judged() -> None:
    assert observation.judged_streams(asked(None)) == ("error",)
    assert observation.not_judged(asked(None))["slow"] == "there is no frozen p95"


def test_posted_verdicts_reach_the_judge_with_the_window_that_they_are_from(
    database: Database,  # noqa: F811
) -> None:
    for version in ("1", "2"):
        add_version(database, version)
    stable_by(database, "1")
    operation = begin(database, "2")
    epoch, generation = canary(database, operation, 0.25)
    for version, requests in (("1", 3000), ("2", 1000)):
        report = replicas.Report(
            id="r1", environment=ENVIRONMENT, address="a", boot_id="b", epoch=epoch, generation=generation, serving={},
            started_at=now(), counts=(
                {"model": MODEL, "version": version, "epoch": epoch, "generation": generation, **row(requests)},
            ),
        )  # fmt: skip
        replicas.report(database, report)
    said = [
        Verdict(f"r1.abcdef.{generation}.{version}.{n}", version, generation, bad=n < bad)
        for version, total, bad in (("1", 300, 6), ("2", 100, 60))
        for n in range(total)
    ]
    feedback.record(database, ENVIRONMENT, said, observer="replica:r1")
    windows = observation.canary_windows(database, operation)
    assert windows[-1].candidate["feedback"] == StreamCounts(100, 60)
    frozen = observation.frozen_counts(database, operation, windows)
    streams = observation.judged_streams(operation, windows, frozen)
    assert "feedback" in streams
    judgement = judge(
        windows, frozen, POLICY, stage_seconds=1, streams=streams,
        not_judged=observation.not_judged(operation, windows, frozen),
    )  # fmt: skip
    assert judgement.verdict == "withdraw"
    assert "bad verdicts 60/100 (60.0%) against the stable's 6/300 (2.0%)" in judgement.reason
    assert f"generation {generation} of epoch {epoch}" in judgement.reason
    figures = judgement.as_dict()
    assert figures["not_judged"].keys() == {"slow", "quality"}
    evidence = next(item for item in figures["evidence"] if item["stream"] == "feedback")
    assert (evidence["epoch"], evidence["generations"], evidence["margin"]) == (epoch, [generation], POLICY.margin)
    assert evidence["e_value"] > evidence["threshold"] == POLICY.evidence * len(streams)


def test_agreement_is_counted_in_all_three_ways_and_not_for_servers_that_do_not_tell_it(
    database: Database,  # noqa: F811
) -> None:
    for version in ("1", "2"):
        add_version(database, version)
    stable_by(database, "1")
    operation = begin(database, "2")
    epoch, generation = kit.shadow(database, operation)
    seen = {"shadow_requests": 100, "shadow_errors": 2, "shadow_disagreements": 1, "shadow_differences": 5}
    for replica, counted in (("r1", {**seen, "shadow_inexact": 40}), ("old", seen)):
        report = replicas.Report(
            id=replica, environment=ENVIRONMENT, address="a", boot_id="b", epoch=epoch, generation=generation,
            serving={}, started_at=now(), counts=(
                {"model": MODEL, "version": "2", "epoch": epoch, "generation": generation, **row(0), **counted},
            ),
        )  # fmt: skip
        replicas.report(database, report)
    assert observation.agreement(database, operation, "top") == StreamCounts(196, 2)
    assert observation.agreement(database, operation, "tolerance") == StreamCounts(196, 10)
    assert observation.agreement(database, operation, "exact") == StreamCounts(98, 40)
