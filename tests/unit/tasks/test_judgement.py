"""The canary's judgement: its formulas against scipy, its rules one by one, and its error rates by simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.judgement_simulation import CANDIDATES, CORRELATED, MISCOUNTED, run_canary
from registry.policy import PromotionPolicy
from tasks.evalues import (
    binomial_tail,
    log_beta_tails,
    log_e_of_windows,
    log_e_one_sample,
    log_e_two_sample,
    p0,
    upper_rate_bound,
)
from tasks.judgement import (
    STREAMS,
    Judgement,
    StreamCounts,
    Window,
    disagreement,
    judge,
    judge_shadow,
    judge_soak,
)

POLICY = PromotionPolicy()


def window(
    candidate: tuple[int, int, int],
    stable: tuple[int, int, int],
    *,
    weight: float = 0.25,
    stage: str = "25 %",
) -> Window:
    """Counts as (requests, errors, slow)."""

    def streams(counts: tuple[int, int, int]) -> dict[str, StreamCounts]:
        requests, errors, slow = counts
        return {"error": StreamCounts(requests, errors), "slow": StreamCounts(requests, slow)}

    return Window(stage, weight, streams(candidate), streams(stable))


def judged(*windows: Window, seconds: float = 1e6, frozen: tuple[int, int, int] = (0, 0, 0)) -> Judgement:
    return judge(list(windows), window(frozen, (0, 0, 0)).candidate, POLICY, stage_seconds=seconds)


# --- formulas


def test_both_tails_of_the_incomplete_beta_agree_with_scipy_from_the_middle_to_the_extremes() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(1)
    for _ in range(500):
        a, b = 10 ** random.uniform(0, 5, size=2)
        x = float(np.clip(a / (a + b) * 10 ** random.normal(0, 0.3), 1e-9, 1 - 1e-9))
        lower, upper = log_beta_tails(x, a, b)
        for mine, reference in ((lower, stats.beta.logcdf(x, a, b)), (upper, stats.beta.logsf(x, a, b))):
            if reference > -600:  # below that scipy's own logarithm underflows
                assert mine == pytest.approx(reference, rel=1e-8, abs=1e-8)


def test_the_complement_stays_accurate_where_one_minus_i_would_be_zero() -> None:
    # With a = 1 the complement is (1 - x)^b in closed form; 1 - I computed by subtraction is 0 long before.
    lower, upper = log_beta_tails(0.4, 1.0, 10_000.0)
    assert lower == pytest.approx(0.0, abs=1e-300)
    assert upper == pytest.approx(10_000 * math.log1p(-0.4), rel=1e-12)


def test_the_incomplete_beta_refuses_arguments_outside_its_domain() -> None:
    with pytest.raises(ValueError, match=r"x=1\.5"):
        log_beta_tails(1.5, 1, 1)


def test_the_e_value_is_the_integral_that_it_stands_for() -> None:
    weight, margin, bad, good = 0.3, 0.25, 9, 11
    null = p0(weight, margin)
    p = np.linspace(null, 1, 400_001)
    prior = (1 - p) ** ((1 - null) / null - 1)
    ratio = (p / null) ** bad * ((1 - p) / (1 - null)) ** good
    expected = np.trapezoid(prior * ratio, p) / np.trapezoid(prior, p)
    assert math.exp(log_e_two_sample(bad, good, weight, margin)) == pytest.approx(expected, rel=1e-5)


def test_the_e_value_of_one_more_event_averages_one_at_the_null() -> None:
    null = p0(0.05, 0.25)
    for candidate_bad, stable_bad in ((0, 0), (3, 20), (40, 400)):
        now = math.exp(log_e_two_sample(candidate_bad, stable_bad, 0.05, 0.25))
        up = math.exp(log_e_two_sample(candidate_bad + 1, stable_bad, 0.05, 0.25))
        down = math.exp(log_e_two_sample(candidate_bad, stable_bad + 1, 0.05, 0.25))
        assert null * up + (1 - null) * down == pytest.approx(now, rel=1e-9)


def test_a_window_with_all_or_none_of_the_requests_says_nothing() -> None:
    assert log_e_two_sample(50, 0, 1.0, 0.25) == 0
    assert log_e_two_sample(0, 50, 0.0, 0.25) == 0
    assert log_e_one_sample(50, 0, 1.0) == 0


def test_near_weight_one_the_two_sample_form_is_blind_and_the_one_sample_form_sees() -> None:
    assert math.exp(log_e_two_sample(50, 0, 0.99, 0.0)) < 2
    assert log_e_one_sample(50, 0, 0.02) > math.log(1e6)


def test_the_upper_bound_on_a_rate_is_the_one_of_clopper_and_pearson() -> None:
    stats = pytest.importorskip("scipy.stats")
    for bad, total in ((0, 500), (5, 100), (99, 100), (300, 6000)):
        assert upper_rate_bound(bad, total) == pytest.approx(stats.beta.ppf(0.99, bad + 1, total - bad), rel=1e-9)
    assert upper_rate_bound(0, 0) == 1.0
    assert upper_rate_bound(7, 7) == 1.0


def test_the_binomial_tail_is_a_sum_of_probabilities() -> None:
    expected = sum(math.comb(20, k) * 0.1**k * 0.9 ** (20 - k) for k in range(5, 21))
    assert binomial_tail(5, 20, 0.1) == pytest.approx(expected, rel=1e-10)
    assert binomial_tail(0, 20, 0.1) == 1.0


def test_windows_are_mixed_with_weights_that_sum_to_one() -> None:
    assert log_e_of_windows([]) == 0
    assert log_e_of_windows([0.0] * 7) == pytest.approx(0, abs=1e-12)
    two = math.log(math.exp(3 - 1) / 2 + math.exp(-1) / 6 + 1 / 3)
    assert log_e_of_windows([3.0, -1.0]) == pytest.approx(two)


def test_good_windows_do_not_pay_for_a_bad_one_later() -> None:
    good_then_bad = log_e_of_windows([-30.0, -30.0, 10.0])
    assert good_then_bad == pytest.approx(10 - math.log(12), abs=1e-2)


# --- rules


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bad of 4"):
        StreamCounts(4, 5)
    with pytest.raises(ValueError, match="at least the current window"):
        judge([], {}, POLICY, stage_seconds=0)


def test_a_window_since_an_earlier_look_is_the_difference() -> None:
    recent = window((50, 3, 4), (90, 0, 5)).since(window((20, 0, 1), (60, 0, 4)))
    assert recent.candidate == {"error": StreamCounts(30, 3), "slow": StreamCounts(30, 3)}
    assert recent.stable["slow"] == StreamCounts(30, 1)


def test_an_equal_candidate_advances_after_dwell_and_enough_requests() -> None:
    same = window((300, 3, 15), (900, 9, 45))
    assert judged(same).verdict == "advance"
    waiting = judged(same, seconds=10)
    assert waiting.verdict == "continue"
    assert "10 s of at least 60 s" in waiting.reason
    few = judged(window((299, 3, 15), (900, 9, 45)))
    assert few.verdict == "continue"
    assert "299 requests of at least 300" in few.reason


def test_requests_of_earlier_stages_do_not_count_for_this_one_but_windows_of_the_same_stage_add_up() -> None:
    earlier = window((5000, 50, 250), (9000, 90, 450), stage="5 %", weight=0.05)
    half = window((150, 1, 7), (450, 4, 22))
    assert judged(earlier, half).verdict == "continue"
    assert judged(earlier, half, half).verdict == "advance"


def test_evidence_of_more_errors_withdraws_and_the_reason_has_the_figures() -> None:
    judgement = judged(window((300, 30, 15), (900, 9, 45)), seconds=5)
    assert judgement.verdict == "withdraw"
    assert "errors 30/300 (10.0%) against the stable's 9/900 (1.0%)" in judgement.reason
    assert "threshold of 200" in judgement.reason


def test_many_more_slow_answers_withdraw() -> None:
    judgement = judged(window((300, 0, 60), (900, 0, 45)))
    assert judgement.verdict == "withdraw"
    assert "slow answers" in judgement.reason


def test_the_threshold_is_paid_by_every_stream() -> None:
    evidence = judged(window((10, 0, 0), (30, 0, 0))).evidence
    assert [item.stream for item in evidence] == list(STREAMS)
    assert {item.threshold for item in evidence} == {POLICY.evidence * len(STREAMS)}


def test_a_sudden_failure_stops_at_once_without_waiting_for_evidence() -> None:
    judgement = judged(window((20, 10, 0), (2000, 10, 100), weight=0.9), seconds=1)
    assert judgement.verdict == "withdraw"
    few = judged(window((19, 10, 0), (20, 8, 0), weight=0.5), seconds=1)
    assert few.verdict == "continue"


def test_a_sudden_failure_late_in_a_long_window_shows_in_what_is_recent() -> None:
    before = window((5000, 0, 250), (0, 0, 0), weight=1.0)
    now = window((5025, 25, 250), (0, 0, 0), weight=1.0)
    frozen = window((3000, 30, 150), (0, 0, 0)).candidate
    assert judge([now], frozen, POLICY, stage_seconds=10).verdict == "continue"
    judgement = judge([now], frozen, POLICY, stage_seconds=10, recent=now.since(before))
    assert judgement.verdict == "withdraw"
    assert "stopped at once" in judgement.reason


def test_what_hits_both_versions_alike_is_not_the_candidates_doing() -> None:
    stalled = window((40, 0, 30), (120, 0, 90))
    assert judged(stalled, seconds=5).verdict == "continue"


def test_a_point_estimate_above_the_margin_waits_unless_it_is_noise() -> None:
    noise = judged(window((300, 3, 20), (900, 9, 45)))  # 6.7 % against 5 %: one in three samples of an equal one
    assert noise.verdict == "advance"
    doubtful = judged(window((300, 3, 28), (900, 9, 45)))
    assert doubtful.verdict == "continue"
    assert "above the 6.25% that the margin allows" in doubtful.reason


def test_a_stable_version_without_errors_does_not_hold_a_candidate_up_for_ever() -> None:
    one_error = window((850, 1, 42), (16_000, 0, 800), weight=0.05)
    assert judged(one_error).verdict == "advance"
    thirty = window((850, 30, 42), (16_000, 0, 800), weight=0.05)
    assert judged(thirty).verdict == "withdraw"


def test_suspicion_short_of_the_threshold_does_not_pass() -> None:
    earlier = window((300, 18, 15), (5700, 95, 285), weight=0.05, stage="5 %")
    now = window((300, 3, 15), (900, 9, 45))
    judgement = judged(earlier, now)
    assert judgement.verdict == "continue"
    assert "too much to go on" in judgement.reason


def test_at_full_weight_the_frozen_rates_take_the_stables_place() -> None:
    full = {"weight": 1.0, "stage": "100 %"}
    frozen = (3000, 30, 150)
    assert judged(window((400, 4, 20), (0, 0, 0), **full), frozen=frozen).verdict == "advance"
    bad = judged(window((400, 40, 20), (0, 0, 0), **full), frozen=frozen)
    assert bad.verdict == "withdraw"
    assert "the stable's frozen 30/3000" in bad.reason
    nothing = judged(window((400, 0, 20), (0, 0, 0), **full))
    assert nothing.verdict == "continue"
    assert "nothing to compare with yet" in nothing.reason


def test_no_stable_traffic_holds_a_weighted_stage() -> None:
    judgement = judged(window((400, 0, 20), (0, 0, 0)))
    assert judgement.verdict == "continue"
    assert judgement.evidence[0].compared_with == "nothing"


def test_the_shadow_gate_withdraws_on_copies_and_reports_only_when_it_is_off() -> None:
    bad = [window((300, 40, 15), (300, 3, 15), weight=0.0, stage="shadow")]
    assert judge_shadow(bad, POLICY, stage_seconds=5).verdict == "withdraw"
    ungated = judge_shadow(bad, POLICY.model_copy(update={"shadow_gate": False}), stage_seconds=60)
    assert ungated.verdict == "advance"
    assert "Reported only" in ungated.reason


def test_few_copies_are_named_and_do_not_hold_the_shadow_stage() -> None:
    quiet = judge_shadow([window((12, 0, 0), (12, 0, 1), weight=0.0, stage="shadow")], POLICY, stage_seconds=60)
    assert quiet.verdict == "advance"
    assert "fewer than the 300 wanted" in quiet.reason


def test_the_soak_ends_by_time_and_takes_back_what_turns_bad() -> None:
    frozen = window((3000, 30, 150), (0, 0, 0)).candidate
    good = window((2000, 20, 100), (0, 0, 0), weight=1.0, stage="soak")
    assert judge_soak([good], frozen, POLICY, stage_seconds=299).verdict == "continue"
    assert judge_soak([good], frozen, POLICY, stage_seconds=300).verdict == "advance"
    late = window((400, 40, 20), (0, 0, 0), weight=1.0, stage="soak")
    assert judge_soak([good, good, good, late], frozen, POLICY, stage_seconds=150).verdict == "withdraw"
    silent = judge_soak([window((0, 0, 0), (0, 0, 0), weight=1.0, stage="soak")], frozen, POLICY, stage_seconds=300)
    assert silent.verdict == "advance"
    assert "no requests in 300 s" in silent.reason


def test_a_sudden_failure_that_the_stable_version_half_shares_is_the_machines() -> None:
    both = window((25, 0, 16), (483, 0, 232), weight=0.05, stage="5 %")
    assert judged(both).verdict == "continue"
    alone = window((25, 0, 16), (483, 0, 30), weight=0.05, stage="5 %")
    assert judged(alone).verdict == "withdraw"


def soaking(*slow: int, requests: int = 100) -> Window:
    """A soak window of weight 1 in slices of a second, each of so many requests with so many slow ones."""
    slices = [{"slow": StreamCounts(requests, bad)} for bad in slow]
    total = window((requests * len(slow), 0, sum(slow)), (0, 0, 0), weight=1.0, stage="soak")
    return Window(total.stage, total.weight, total.candidate, total.stable, slices)


def test_a_second_in_which_the_machine_stalls_withdraws_nobody_at_full_weight() -> None:
    frozen = window((3000, 30, 150), (0, 0, 0)).candidate
    judgement = judge_soak([soaking(4, 5, 98, 97, 6, 3, 5)], frozen, POLICY, stage_seconds=7)
    assert judgement.verdict == "continue"
    first = judge_soak([soaking(98)], frozen, POLICY, stage_seconds=1)
    assert first.verdict == "continue"


def test_a_version_that_stays_slow_at_full_weight_is_withdrawn_within_ten_seconds() -> None:
    frozen = window((3000, 30, 150), (0, 0, 0)).candidate
    verdicts = [judge_soak([soaking(*[30] * n)], frozen, POLICY, stage_seconds=n).verdict for n in range(1, 11)]
    assert verdicts[0] == "continue"
    assert verdicts[-1] == "withdraw"


def test_stalls_in_every_tenth_second_are_not_taken_for_the_version() -> None:
    frozen = window((3000, 30, 150), (0, 0, 0)).candidate
    random = np.random.default_rng(16)
    withdrawn = 0
    for _ in range(200):
        slow = [int(random.binomial(100, 0.9 if random.random() < 0.1 else 0.05)) for _ in range(120)]
        looks = range(5, 121, 5)
        withdrawn += any(
            judge_soak([soaking(*slow[:n])], frozen, POLICY, stage_seconds=n).verdict == "withdraw" for n in looks
        )
    assert withdrawn <= 2


def test_a_judgement_can_be_written_as_json() -> None:
    import json

    assert json.loads(json.dumps(judged(window((300, 3, 15), (900, 9, 45))).as_dict(), allow_nan=False))


# --- correlated failures


def test_bad_requests_of_one_cluster_are_worth_one_event() -> None:
    assert StreamCounts(100, 16, 16 * 15).events == pytest.approx(1)
    assert StreamCounts(100, 16).events == 16
    assert StreamCounts(100, 0).independence == 1
    both = StreamCounts(100, 16, 16 * 15) + StreamCounts(100, 4)
    assert both == StreamCounts(200, 20, 240)
    assert both.events == pytest.approx(400 / 260)


def test_what_came_after_a_cut_is_as_clustered_as_the_whole_and_never_less_than_nothing() -> None:
    before, after = StreamCounts(100, 8, 56), StreamCounts(200, 12, 132)
    assert after - before == StreamCounts(100, 4, 44)
    assert after - after == StreamCounts(0, 0, 0)
    with pytest.raises(ValueError, match="never negative"):
        StreamCounts(4, 2, -1)


def clustered(window: Window, candidate: int, stable: int = 0) -> Window:
    """The window with the errors of each version in clusters of so many (0: each alone)."""

    def grouped(counts: Mapping[str, StreamCounts], size: int) -> dict[str, StreamCounts]:
        error = counts["error"]
        return {**counts, "error": StreamCounts(error.requests, error.bad, error.bad * max(size - 1, 0))}

    return Window(window.stage, window.weight, grouped(window.candidate, candidate), grouped(window.stable, stable))


def test_one_failed_batch_is_no_evidence_and_twenty_are() -> None:
    one = window((100, 16, 5), (1900, 10, 95), weight=0.05, stage="5 %")
    assert judged(one, seconds=5).verdict == "withdraw"
    assert judged(clustered(one, 16), seconds=5).verdict == "continue"
    many = window((2000, 320, 100), (38_000, 400, 1900), weight=0.05, stage="5 %")
    withdrawn = judged(clustered(many, 16))
    assert withdrawn.verdict == "withdraw"
    assert "320/2000 (16.0%, worth 20 events)" in withdrawn.reason
    assert withdrawn.as_dict()["evidence"][0]["candidate"]["events"] == pytest.approx(20)


def test_larger_batches_of_the_stable_version_do_not_make_the_candidate_look_worse() -> None:
    # Both fail 5 % of their requests. Counted by batch alone, the stable version would have an eighth of its failures.
    unlike = clustered(window((400, 20, 0), (3600, 180, 0), weight=0.1, stage="10 %"), 1, 8)
    evidence = judged(unlike).evidence[0]
    assert evidence.e_value < 1.5
    assert log_e_two_sample(20, 180 / 8, 0.1, 0.25) > math.log(100)


def test_one_failed_batch_or_one_user_is_no_sudden_failure() -> None:
    alone = window((24, 16, 0), (200, 2, 10), weight=0.05, stage="5 %")
    assert judged(alone, seconds=1).verdict == "withdraw"
    assert judged(clustered(alone, 16), seconds=1).verdict == "continue"
    batches = judged(clustered(window((48, 48, 0), (0, 0, 0), weight=0.05), 8), seconds=1)
    assert batches.verdict == "withdraw" and "stopped at once" in batches.reason


def test_at_full_weight_a_rate_known_from_few_clusters_is_known_less_well() -> None:
    full = window((1000, 30, 50), (0, 0, 0), weight=1.0, stage="100 %")
    frozen = {"error": StreamCounts(3000, 45), "slow": StreamCounts(3000, 150)}
    few = {**frozen, "error": StreamCounts(3000, 45, 45 * 14)}
    known = judge([full], frozen, POLICY, stage_seconds=1e6).evidence[0]
    unsure = judge([full], few, POLICY, stage_seconds=1e6).evidence[0]
    assert unsure.log_e < known.log_e


# --- agreement of shadow copies


def agreeing(copies: int, bad: int, required: float | None, seconds: float) -> Judgement:
    policy = POLICY.model_copy(update={"shadow_agreement": required})
    seen = [window((copies, 0, 0), (copies, 0, 0), weight=0.0, stage="shadow")]
    return judge_shadow(seen, policy, stage_seconds=seconds, agreement=StreamCounts(copies, bad))


@pytest.mark.parametrize("required", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("seconds", [1.0, 60.0])
def test_three_copies_withdraw_nobody_for_disagreeing(required: float, seconds: float) -> None:
    assert agreeing(3, 3, required, seconds).verdict != "withdraw"


def test_a_candidate_that_disagrees_too_often_is_withdrawn_on_evidence_at_any_look() -> None:
    judgement = agreeing(200, 30, 0.95, 1.0)
    assert judgement.verdict == "withdraw"
    assert "the answers agree in 85.0% of 200 copies, 95.0% are asked for" in judgement.reason
    assert agreeing(200, 30, None, 60.0).verdict == "advance"
    assert agreeing(200, 30, 0.8, 60.0).verdict == "advance"


def test_at_the_end_of_the_shadow_the_exact_test_decides_and_before_it_does_not() -> None:
    # 12 of 100 at 5 % allowed: a probability of 0.4 %, an e-value far below 100.
    assert agreeing(100, 12, 0.95, 30.0).verdict == "continue"
    end = agreeing(100, 12, 0.95, 60.0)
    assert end.verdict == "withdraw" and "have a probability of" in end.reason
    assert agreeing(100, 7, 0.95, 60.0).verdict == "advance"


def test_too_few_compared_copies_are_said_to_be_no_judgement() -> None:
    quiet = agreeing(3, 3, 0.9, 60.0)
    assert quiet.verdict == "advance"
    assert quiet.not_judged == {"agreement": "3 copies were compared, at least 20 are needed"}
    assert "Not judged: agreement" in quiet.reason


def test_a_candidate_that_agrees_as_often_as_asked_is_seldom_withdrawn_although_every_second_is_a_look() -> None:
    random = np.random.default_rng(3)
    withdrawn = 0
    for _ in range(400):
        bad = np.cumsum(random.random(300) < 0.05)
        counts = [StreamCounts(n, int(bad[n - 1])) for n in range(5, 301, 5)]
        withdrawn += any(disagreement(seen, 0.95, 100, final=seen.requests == 300) for seen in counts)
    assert withdrawn <= 12  # at most 1 % by evidence and 1 % by the end's test


# --- streams that need somebody to speak


def test_a_stage_without_verdicts_is_not_held_up_by_a_stream_of_verdicts() -> None:
    earlier = Window("5 %", 0.05, {"feedback": StreamCounts(50, 1)}, {"feedback": StreamCounts(500, 10)})
    now = window((300, 3, 15), (900, 9, 45))
    judgement = judge([earlier, now], {}, POLICY, stage_seconds=1e6, streams=(*STREAMS, "feedback"))
    assert judgement.verdict == "advance"
    assert {item.threshold for item in judgement.evidence} == {3 * POLICY.evidence}


def test_a_decision_names_its_evidence() -> None:
    seen = replace(window((300, 3, 15), (900, 9, 45)), epoch="e1", generation=7)
    judgement = judge([seen], {}, POLICY, stage_seconds=1e6, not_judged={"feedback": "there are no verdicts"})
    assert judgement.verdict == "advance"
    assert "errors 3/300 (1.0%) against the stable's 9/900 (1.0%)" in judgement.reason
    assert "of the 200 that withdraw, with a margin of 25%, in generation 7 of epoch e1." in judgement.reason
    assert judgement.reason.endswith("Not judged: bad verdicts, there are no verdicts.")


# --- error rates, by simulation with a fixed seed


@pytest.mark.parametrize("name", [name for name in CORRELATED if name.startswith("as good")])
def test_a_good_candidate_whose_failures_come_in_clusters_is_not_withdrawn(name: str) -> None:
    candidate, clusters = CORRELATED[name]
    random = np.random.default_rng(12)
    ends = [run_canary(candidate, 50, POLICY, random, clusters=clusters, look_seconds=10).end for _ in range(20)]
    assert ends.count("withdrawn") == 0


def test_without_counting_clusters_once_they_would_be() -> None:
    candidate, clusters = MISCOUNTED["as good, clusters of 16, each failure an event"]
    random = np.random.default_rng(12)
    ends = [run_canary(candidate, 50, POLICY, random, clusters=clusters, look_seconds=10).end for _ in range(8)]
    assert ends.count("withdrawn") >= 5


def test_a_good_candidate_is_withdrawn_far_less_than_once_in_a_hundred_although_every_look_may_stop() -> None:
    random = np.random.default_rng(11)
    policy = POLICY.model_copy(update={"minimum_requests": 100})
    outcomes = [run_canary({"error": 0.01, "slow": 0.05}, 20, policy, random) for _ in range(120)]
    assert sum(o.end == "withdrawn" for o in outcomes) == 0
    assert sum(o.end == "promoted" for o in outcomes) >= 117


def test_a_candidate_exactly_at_the_margin_is_withdrawn_less_often_than_promised() -> None:
    random = np.random.default_rng(12)
    policy = POLICY.model_copy(update={"minimum_requests": 100})
    outcomes = [run_canary({"error": 0.0125, "slow": 0.0625}, 20, policy, random) for _ in range(120)]
    assert sum(o.end == "withdrawn" for o in outcomes) <= 2  # promised: 1.2 of 120 at the most, on average


def test_five_times_the_errors_at_a_quarter_of_ten_requests_a_second_are_found_in_a_few_minutes() -> None:
    random = np.random.default_rng(13)
    policy = PromotionPolicy(stages=[0.25, 1.0], minimum_requests=100_000)  # stay in the first stage
    outcomes = [run_canary(CANDIDATES["errors 1 -> 5 %"], 10, policy, random, look_seconds=2) for _ in range(80)]
    assert {o.end for o in outcomes} == {"withdrawn"}
    assert 110 <= np.median([o.seconds for o in outcomes]) <= 210


def test_one_and_a_half_times_the_latency_is_found_in_the_first_stage() -> None:
    random = np.random.default_rng(14)
    outcomes = [run_canary(CANDIDATES["p95 x 1.5 (20 % slow)"], 10, POLICY, random) for _ in range(60)]
    assert {o.end for o in outcomes} == {"withdrawn"}
    assert sum(o.stage == "5%" for o in outcomes) >= 57
    assert np.median([o.candidate_bad for o in outcomes]) <= 30


def test_a_candidate_that_turns_bad_in_the_soak_is_found_although_it_was_good_before() -> None:
    random = np.random.default_rng(15)
    good = [
        window((n, int(random.binomial(n, 0.01)), int(random.binomial(n, 0.05))), (3000, 30, 150)) for n in (300, 600)
    ]
    frozen = window((6000, 60, 300), (0, 0, 0)).candidate
    full = window((6000, 60, 300), (0, 0, 0), weight=1.0, stage="100 %")
    slices = [window((600, 6, 30), (0, 0, 0), weight=1.0, stage="soak") for _ in range(4)]
    turned = window((150, 15, 8), (0, 0, 0), weight=1.0, stage="soak")
    judgement = judge_soak([*good, full, *slices, turned], frozen, POLICY, stage_seconds=250)
    assert judgement.verdict == "withdraw"
