"""The judgement of a canary: what the counts of a candidate and its stable version say, as pure functions.

No clock, no database, no server: counts in, a verdict out. docs/PROMOTION.md explains the statistics and their limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from registry.policy import PromotionPolicy
from tasks.evalues import (
    binomial_tail,
    log_e_of_windows,
    log_e_one_sample,
    log_e_two_sample,
    p0,
    upper_rate_bound,
)
from tasks.figures import Evidence, Judgement, StreamCounts, Verdict, Window

__all__ = [
    "Evidence",
    "Judgement",
    "StreamCounts",
    "Verdict",
    "Window",
    "disagreement",
    "judge",
    "judge_replay",
    "judge_shadow",
    "judge_soak",
]

STREAMS: tuple[str, ...] = ("error", "slow")
"""The streams of bad requests that are judged. Each pays for the others: the threshold is `evidence` x their number."""

NEGLIGIBLE_RATE = 0.001
"""A rate of bad requests below this holds nobody up: it is the error budget of the default objective, 99.9 %."""

NOISE_LEVEL = 0.25
"""Above the margin but with a tail probability of at least this, a stage's figures are noise and do not hold it up."""

SUSPICION = 10.0
"""From this e-value on, in any stream, a stage is not passed even though the evidence is not enough to withdraw."""

TIMED = frozenset({"slow"})
"""Streams whose bad events come in clusters, because the whole machine stalls now and then. Beside a stable version that has
traffic this does no harm (a stall hits both by their shares); where there is none, at weight 1, their unit is the time slice."""

SLICE_SECONDS = 1.0
"""The shortest time slice of a stream in TIMED at weight 1."""

STALLED_SHARE = 0.25
"""Share of the time slices that may be bad because of the machine and not of the version."""

BAD_SLICE_LEVEL = 0.05
"""A slice is bad where so many bad requests in it have at most this probability at the rate that the margin allows."""

OPTIONAL = frozenset({"feedback", "quality"})
"""Streams that exist only where somebody posts verdicts or a scorer is installed. A stage that has none is not held up."""

VERDICTS_LEAST = 20
"""A stream in OPTIONAL is judged from this many verdicts on each side."""

AGREEMENT_COPIES_LEAST = 20
"""From this many copies on, the end of a shadow stage may refuse a candidate for disagreeing."""

AGREEMENT_LEVEL = 0.01
"""At the end of the shadow: the probability of so many disagreements at the agreement that is asked for."""

SUDDEN_EVENTS = 5.0
"""A sudden failure is of at least so many events: one failed batch, or one user who always fails, is none."""

SUDDEN_RATIO = 2.0
"""A sudden failure is the candidate's where its share of bad requests is at least this many times the stable version's."""


def judge(
    windows: Sequence[Window],
    frozen: Mapping[str, StreamCounts],
    policy: PromotionPolicy,
    *,
    stage_seconds: float,
    recent: Window | None = None,
    streams: Sequence[str] = STREAMS,
    not_judged: Mapping[str, str] | None = None,
) -> Judgement:
    """Judge a canary stage; the last window is the current one and its `stage` the current stage.

    Args:
        windows: every window since the canary began, oldest first, the current one as counted now.
        frozen: the stable version's counts from before it lost its traffic, for windows of weight 1.
        policy: margin, evidence, dwell and minimum numbers.
        stage_seconds: how long the current stage has lasted.
        recent: what the current window gained lately (`Window.since`), so that a sudden failure shows in a long window.
        streams: which streams to judge.
        not_judged: streams that cannot be judged, with the reason; it is put on record with the decision.

    Returns: "withdraw" on evidence or a sudden failure; "advance" once the stage lasted, was busy enough, and no stream
    stands above the margin; else "continue", with the reason that holds it.
    """
    current, unjudged = _current(windows), dict(not_judged or {})
    evidence = _weigh(windows, frozen, policy, streams)
    bad_news = _found_bad(evidence, current, recent, policy)
    if bad_news:
        return Judgement("withdraw", bad_news, evidence, unjudged)
    requests = sum(w.candidate_requests for w in windows if w.stage == current.stage)
    if stage_seconds < policy.dwell_seconds:
        return Judgement(
            "continue",
            f"{current.stage}: {stage_seconds:.0f} s of at least {policy.dwell_seconds:.0f} s, "
            f"{requests} requests; {_summary(evidence)}.",
            evidence,
            unjudged,
        )
    if requests < policy.minimum_requests:
        return Judgement(
            "continue",
            f"{current.stage}: the candidate has answered {requests} requests of at least {policy.minimum_requests}; "
            f"{_summary(evidence)}.",
            evidence,
            unjudged,
        )
    doubts = [doubt for item in evidence if (doubt := _doubt(item))]
    if doubts:
        return Judgement("continue", f"{current.stage}: {'; '.join(doubts)}.", evidence, unjudged)
    return Judgement(
        "advance",
        f"{current.stage} passed with {requests} requests in {stage_seconds:.0f} s: {_summary(evidence)}. {_highest(evidence)}"
        + _unjudged(unjudged),
        evidence,
        unjudged,
    )


def judge_shadow(
    windows: Sequence[Window],
    policy: PromotionPolicy,
    *,
    stage_seconds: float,
    streams: Sequence[str] = STREAMS,
    agreement: StreamCounts | None = None,
    not_judged: Mapping[str, str] | None = None,
) -> Judgement:
    """Judge the shadow stage: the candidate's copies against the stable's own requests, by their realised shares.

    Nobody is hurt by a shadow, so few copies delay nothing; they are named in the reason. With `shadow_gate` off it
    reports and never withdraws. `agreement` holds the compared copies, bad where the two answers do not agree by the
    policy's `agreement`; it is held against the candidate where the policy has `shadow_agreement`.
    """
    current = _current(windows)
    unjudged = dict(not_judged or {})
    evidence = _weigh(windows, {}, policy, streams)
    bad_news = _found_bad(evidence, current, None, policy)
    if bad_news and policy.shadow_gate:
        return Judgement("withdraw", bad_news, evidence, unjudged)
    over = stage_seconds >= policy.shadow_seconds
    if agreement is not None and policy.shadow_agreement is not None:
        refuted = disagreement(agreement, policy.shadow_agreement, policy.evidence, final=over)
        if refuted:
            return Judgement("withdraw", f"{current.stage}: {refuted}", evidence, unjudged)
        if over and agreement.requests < AGREEMENT_COPIES_LEAST:
            unjudged["agreement"] = (
                f"{agreement.requests} copies were compared, at least {AGREEMENT_COPIES_LEAST} are needed"
            )
    requests = sum(w.candidate_requests for w in windows if w.stage == current.stage)
    few = f", fewer than the {policy.shadow_requests} wanted" if requests < policy.shadow_requests else ""
    ungated = f" Reported only, the shadow gate is off: {bad_news}" if bad_news else ""
    verdict: Verdict = "advance" if over else "continue"
    return Judgement(
        verdict,
        f"{current.stage}: {requests} copies in {stage_seconds:.0f} s{few}; {_summary(evidence)}.{ungated}"
        + _unjudged(unjudged),
        evidence,
        unjudged,
    )


def judge_replay(
    window: Window, policy: PromotionPolicy, *, streams: Sequence[str], agreement: StreamCounts
) -> Judgement:
    """Judge a replay: the same requests through both versions, looked at once, at the end. Judged as a shadow is."""
    evidence = _weigh([window], {}, policy, streams)
    refuted = None
    if policy.shadow_agreement is not None:
        refuted = disagreement(agreement, policy.shadow_agreement, policy.evidence, final=True)
    bad_news = _found_bad(evidence, window, None, policy) or (f"{window.stage}: {refuted}" if refuted else None)
    if bad_news:
        return Judgement("withdraw", bad_news, evidence, {})
    requests = window.candidate_requests
    return Judgement("advance", f"{window.stage}: {requests} requests; {_summary(evidence)}.", evidence, {})


def disagreement(compared: StreamCounts, required: float, evidence: float, *, final: bool) -> str | None:
    """Why the answers agree less often than `required` (a share), None where that is not shown.

    At any look by the one-sample e-value against a share of 1 - `required` of disagreements; with `final`, which is one look
    only, also by the exact binomial test at AGREEMENT_LEVEL, from AGREEMENT_COPIES_LEAST copies on. Three copies never do.
    What is asked beyond 1 - NEGLIGIBLE_RATE is judged as that.
    """
    allowed = max(1 - required, NEGLIGIBLE_RATE)
    e = log_e_one_sample(compared.bad, compared.requests - compared.bad, allowed)
    enough = final and compared.requests >= AGREEMENT_COPIES_LEAST
    tail = binomial_tail(compared.bad, compared.requests, allowed) if enough else 1.0
    if e < math.log(evidence) and tail > AGREEMENT_LEVEL:
        return None
    share = 1 - compared.bad / compared.requests
    how = (
        f"on evidence of {_number(math.exp(min(e, 700.0)))} against a threshold of {evidence:g}"
        if e >= math.log(evidence)
        else f"and as few have a probability of {tail:.2g} where {required:.1%} agree"
    )
    return f"the answers agree in {share:.1%} of {compared.requests} copies, {required:.1%} are asked for, {how}."


def judge_soak(
    windows: Sequence[Window],
    frozen: Mapping[str, StreamCounts],
    policy: PromotionPolicy,
    *,
    stage_seconds: float,
    recent: Window | None = None,
    streams: Sequence[str] = STREAMS,
    not_judged: Mapping[str, str] | None = None,
) -> Judgement:
    """Judge the soak: the promoted version against the frozen rates of the one before; "advance" means it is over.

    `windows` may go on from the canary's or hold the soak's alone. Without traffic it ends by time, and says so.
    """
    current, unjudged = _current(windows), dict(not_judged or {})
    evidence = _weigh(windows, frozen, policy, streams)
    bad_news = _found_bad(evidence, current, recent, policy)
    if bad_news:
        return Judgement("withdraw", bad_news, evidence, unjudged)
    requests = sum(w.candidate_requests for w in windows if w.stage == current.stage)
    seen = f"{requests} requests in {stage_seconds:.0f} s" if requests else f"no requests in {stage_seconds:.0f} s"
    verdict: Verdict = "continue" if stage_seconds < policy.soak_seconds else "advance"
    reason = f"{current.stage}: {seen}; {_summary(evidence)}. {_highest(evidence)}" + _unjudged(unjudged)
    return Judgement(verdict, reason, evidence, unjudged)


def _current(windows: Sequence[Window]) -> Window:
    if not windows:
        raise ValueError("nothing to judge: pass at least the current window, empty if it has no requests yet")
    return windows[-1]


def _weigh(
    windows: Sequence[Window], frozen: Mapping[str, StreamCounts], policy: PromotionPolicy, streams: Sequence[str]
) -> list[Evidence]:
    return [_evidence(stream, windows, frozen.get(stream, StreamCounts()), policy, len(streams)) for stream in streams]


def _evidence(
    stream: str, windows: Sequence[Window], frozen: StreamCounts, policy: PromotionPolicy, streams: int
) -> Evidence:
    known = frozen.independence  # a rate that is known from few clusters is known less well
    ceiling = min((1 + policy.margin) * upper_rate_bound(known * frozen.bad, known * frozen.requests), 1.0)
    none = StreamCounts()
    worth = _worth(stream, windows, frozen)
    logs = []
    for window in windows:
        candidate, stable = window.candidate.get(stream, none), window.stable.get(stream, none)
        if window.weight >= 1 and stream in TIMED:
            bad, good = _bad_slices(window, stream, ceiling)
            logs.append(log_e_one_sample(bad, good, STALLED_SHARE))
        elif window.weight >= 1:
            logs.append(log_e_one_sample(worth * candidate.bad, worth * (candidate.requests - candidate.bad), ceiling))
        elif candidate.requests and stable.requests:
            share = candidate.requests / (candidate.requests + stable.requests)
            logs.append(log_e_two_sample(worth * candidate.bad, worth * stable.bad, share, policy.margin))
        else:
            logs.append(0.0)
    stage = [w for w in windows if w.stage == windows[-1].stage]
    candidate = sum((w.candidate.get(stream, none) for w in stage), none)
    compared_with: Literal["stable", "frozen", "nothing"]
    tail = None
    if windows[-1].weight >= 1:
        stable, compared_with = frozen, "frozen"
        if stream in TIMED:
            slices = [_bad_slices(w, stream, ceiling) for w in stage]
            bad, good = sum(s[0] for s in slices), sum(s[1] for s in slices)
            tail = binomial_tail(bad, bad + good, STALLED_SHARE) if bad > STALLED_SHARE * (bad + good) else 1.0
        elif frozen.requests and candidate.requests:
            tail = binomial_tail(worth * candidate.bad, worth * candidate.requests, ceiling)
    else:
        stable, compared_with = sum((w.stable.get(stream, none) for w in stage), none), "stable"
        if stable.requests and candidate.requests:
            share = candidate.requests / (candidate.requests + stable.requests)
            tail = binomial_tail(worth * candidate.bad, worth * (candidate.bad + stable.bad), p0(share, policy.margin))
    return Evidence(
        stream=stream,
        candidate=candidate,
        stable=stable,
        rate_candidate=candidate.rate,
        rate_stable=stable.rate,
        compared_with=compared_with if stable.requests else "nothing",
        log_e=log_e_of_windows(logs),
        threshold=policy.evidence * streams,
        windows=len(windows),
        margin=policy.margin,
        tail_probability=tail,
        epoch=windows[-1].epoch,
        generations=tuple(dict.fromkeys(w.generation for w in stage if w.generation is not None)),
    )


def _worth(stream: str, windows: Sequence[Window], frozen: StreamCounts) -> float:
    """What one bad request is worth as evidence, by the version whose bad requests are the more clustered so far.

    One factor for both versions, so that the share of bad requests is what is compared, whoever's batches are the larger.
    """
    none = StreamCounts()
    candidate = sum((w.candidate.get(stream, none) for w in windows), none)
    stable = sum((w.stable.get(stream, none) for w in windows), none)
    return min(candidate.independence, stable.independence, frozen.independence)


def _bad_slices(window: Window, stream: str, ceiling: float) -> tuple[int, int]:
    """(bad, good) time slices of a window of weight 1; slices without requests say nothing."""
    counts = [piece[stream] for piece in window.slices if stream in piece and piece[stream].requests]
    bad = sum(
        binomial_tail(c.independence * c.bad, c.independence * c.requests, ceiling) <= BAD_SLICE_LEVEL for c in counts
    )
    return bad, len(counts) - bad


def _found_bad(
    evidence: Sequence[Evidence], current: Window, recent: Window | None, policy: PromotionPolicy
) -> str | None:
    for item in evidence:
        if item.log_e >= math.log(item.threshold):
            return (
                f"{current.stage}: {_figures(item)}, more than {1 + item.margin:g} times as many, "
                f"on evidence of {_number(item.e_value)} against a threshold of {item.threshold:g}{_where(item)}."
            )
    for window in (current, recent) if recent else (current,):
        for item in evidence:
            if window.weight >= 1 and item.stream in TIMED:
                continue  # a short stall would do
            candidate = window.candidate.get(item.stream, StreamCounts())
            stable = window.stable.get(item.stream, StreamCounts())
            if candidate.requests < policy.sudden_requests or candidate.bad < policy.sudden_share * candidate.requests:
                continue
            if candidate.events < min(SUDDEN_EVENTS, policy.sudden_share * policy.sudden_requests):
                continue  # one batch or one user
            # What hits both alike, say a stalled machine, is not the candidate's doing.
            share = candidate.bad / candidate.requests
            if stable.requests and share < SUDDEN_RATIO * stable.bad / stable.requests:
                continue
            against = f", {_share(stable)} of the stable's" if stable.requests else ""
            return (
                f"{current.stage}: {_label(item.stream)} are {_share(candidate)} of the candidate's requests{against}: "
                f"at or above {policy.sudden_share:.0%} it is stopped at once."
            )
    return None


def _doubt(item: Evidence) -> str | None:
    """Why this stream holds the stage up, or None."""
    if item.rate_candidate is None or item.rate_stable is None:
        if item.stream in OPTIONAL:
            return None
        return f"{_label(item.stream)}: nothing to compare with yet"
    if item.e_value >= SUSPICION:
        return f"{_figures(item)}: evidence of {_number(item.e_value)}, not enough to withdraw, too much to go on"
    allowed = (1 + item.margin) * max(item.rate_stable, NEGLIGIBLE_RATE)
    if item.rate_candidate <= allowed:
        return None
    if item.tail_probability is not None and item.tail_probability >= NOISE_LEVEL:
        return None
    return f"{_figures(item)}: above the {allowed:.2%} that the margin allows, and more than noise explains"


def _summary(evidence: Sequence[Evidence]) -> str:
    return "; ".join(_figures(item) for item in evidence)


def _highest(evidence: Sequence[Evidence]) -> str:
    """The strongest evidence against the candidate, and what it is measured by."""
    if not evidence:
        return ""
    item = max(evidence, key=lambda item: item.log_e)
    return (
        f"The highest e-value is {_number(item.e_value)} ({_label(item.stream)}) of the {item.threshold:g} that withdraw, "
        f"with a margin of {item.margin:.0%}{_where(item)}."
    )


def _where(item: Evidence) -> str:
    """The window, in words."""
    if not item.generations:
        return ""
    numbers = ", ".join(str(generation) for generation in item.generations)
    return f", in generation{'s' if len(item.generations) > 1 else ''} {numbers} of epoch {item.epoch}"


def _unjudged(streams: Mapping[str, str]) -> str:
    return "".join(f" Not judged: {_label(stream)}, {why}." for stream, why in streams.items())


def _figures(item: Evidence) -> str:
    whom = "the stable's frozen" if item.compared_with == "frozen" else "the stable's"
    against = f"{whom} {_share(item.stable)}" if item.stable.requests else "nothing to compare with"
    return f"{_label(item.stream)} {_share(item.candidate)} against {against}"


def _label(stream: str) -> str:
    return {
        "error": "errors",
        "slow": "slow answers",
        "feedback": "bad verdicts",
        "quality": "answers of low quality",
    }.get(stream, stream)


def _share(counts: StreamCounts) -> str:
    if counts.rate is None:
        return "0/0"
    alone = f", worth {counts.events:.3g} events" if counts.clustered else ""
    return f"{counts.bad}/{counts.requests} ({counts.rate:.1%}{alone})"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1e6 else "over a million"
