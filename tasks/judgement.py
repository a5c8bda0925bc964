"""The judgement of a canary: what the counts of a candidate and its stable version say, as pure functions.

No clock, no database, no server: counts in, a verdict out. docs/PROMOTION.md explains the statistics and their limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

from registry.policy import PromotionPolicy

STREAMS: tuple[str, ...] = ("error", "slow")
"""The streams of bad requests that are judged. Each pays for the others: the threshold is `evidence` x their number."""

BOUND_CONFIDENCE = 0.99
"""Confidence of the upper bound on the stable version's frozen rate, for when it has no traffic to compare with."""

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

SUDDEN_RATIO = 2.0
"""A sudden failure is the candidate's where its share of bad requests is at least this many times the stable version's."""

Verdict = Literal["continue", "advance", "withdraw"]


@dataclass(frozen=True, slots=True)
class StreamCounts:
    """Requests that a version answered and how many of them were bad in one stream (cumulative within a window)."""

    requests: int = 0
    bad: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.bad <= self.requests:
            raise ValueError(f"{self.bad} bad of {self.requests} requests: counts must satisfy 0 <= bad <= requests")

    @property
    def rate(self) -> float | None:
        return self.bad / self.requests if self.requests else None

    def __add__(self, other: StreamCounts) -> StreamCounts:
        return StreamCounts(self.requests + other.requests, self.bad + other.bad)

    def __sub__(self, earlier: StreamCounts) -> StreamCounts:
        return StreamCounts(self.requests - earlier.requests, self.bad - earlier.bad)


@dataclass(frozen=True, slots=True)
class Window:
    """Counts under constant weights. A stage is one window, or several where weights or generations changed within it.

    `weight` is the share that the route gives the candidate; the test itself uses the share that it really had.
    """

    stage: str
    weight: float
    candidate: Mapping[str, StreamCounts] = field(default_factory=dict)
    stable: Mapping[str, StreamCounts] = field(default_factory=dict)
    slices: Sequence[Mapping[str, StreamCounts]] = ()
    """At weight 1: what the candidate gained in each slice of at least SLICE_SECONDS, for the streams in TIMED."""

    def since(self, earlier: Window) -> Window:
        """What this window gained after `earlier`, a look at the same window: a stage cut into two windows."""
        return Window(
            self.stage,
            self.weight,
            {s: n - earlier.candidate.get(s, StreamCounts()) for s, n in self.candidate.items()},
            {s: n - earlier.stable.get(s, StreamCounts()) for s, n in self.stable.items()},
        )

    @property
    def candidate_requests(self) -> int:
        return max((counts.requests for counts in self.candidate.values()), default=0)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One stream's figures in the current stage, and its e-value over all windows so far."""

    stream: str
    candidate: StreamCounts
    stable: StreamCounts
    rate_candidate: float | None
    rate_stable: float | None
    compared_with: Literal["stable", "frozen", "nothing"]
    log_e: float
    threshold: float
    windows: int
    margin: float
    tail_probability: float | None

    @property
    def e_value(self) -> float:
        return math.exp(min(self.log_e, 700.0))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "e_value": self.e_value}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What to do now, why in one sentence, and the figures behind it."""

    verdict: Verdict
    reason: str
    evidence: list[Evidence]

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "evidence": [item.as_dict() for item in self.evidence],
        }


# --- the beta distribution, in logarithms -----------------------------------------------------------------------------


def log_beta(a: float, b: float) -> float:
    """Natural logarithm of the beta function B(a, b)."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def log_beta_tails(x: float, a: float, b: float) -> tuple[float, float]:
    """(ln I_x(a, b), ln(1 - I_x(a, b))) of the regularised incomplete beta function, both to full relative precision.

    The smaller tail comes from the continued fraction DLMF 8.17.22, evaluated by Lentz's method as modified by Thompson
    and Barnett; the other is its complement, which loses nothing because it is not small.
    """
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise ValueError(f"I_x(a, b) needs a, b > 0 and 0 <= x <= 1, not x={x}, a={a}, b={b}")
    if x == 0:
        return -math.inf, 0.0
    if x == 1:
        return 0.0, -math.inf
    front = a * math.log(x) + b * math.log1p(-x) - log_beta(a, b)
    if x <= (a + 1) / (a + b + 2):
        small = min(front - math.log(a) + math.log(_continued_fraction(x, a, b)), 0.0)
        return small, _log_complement(small)
    small = min(front - math.log(b) + math.log(_continued_fraction(1 - x, b, a)), 0.0)
    return _log_complement(small), small


def _log_complement(log_p: float) -> float:
    if log_p >= 0:
        return -math.inf
    return math.log(-math.expm1(log_p)) if log_p > -math.log(2) else math.log1p(-math.exp(log_p))


def _continued_fraction(x: float, a: float, b: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    value = d
    # Near the mean it takes about sqrt(max(a, b)) steps, elsewhere a few dozen.
    for m in range(1, 1000 + int(10 * math.sqrt(max(a, b)))):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + numerator * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + numerator / c
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            return value
    raise ArithmeticError(f"the continued fraction of I_x(a, b) does not converge at x={x}, a={a}, b={b}")


def binomial_tail(bad: int, total: int, p: float) -> float:
    """P(X >= bad) for X binomial(total, p)."""
    if bad <= 0:
        return 1.0
    return math.exp(log_beta_tails(p, bad, total - bad + 1)[0])


@lru_cache(maxsize=256)
def upper_rate_bound(bad: int, total: int, confidence: float = BOUND_CONFIDENCE) -> float:
    """One-sided upper confidence bound on a rate (Clopper and Pearson 1934): exact, never too low; 1 without data."""
    if total <= 0 or bad >= total:
        return 1.0
    target = math.log(1 - confidence)
    low, high = bad / total, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if log_beta_tails(middle, bad + 1, total - bad)[1] > target:  # P(X <= bad) still above 1 - confidence
            low = middle
        else:
            high = middle
    return high


# --- e-values ---------------------------------------------------------------------------------------------------------


def p0(weight: float, margin: float) -> float:
    """The most probable that a bad event is the candidate's, while its rate is at most (1 + margin) x the stable's.

    `weight` is the candidate's realised share of the requests in the window.
    """
    favoured = weight * (1 + margin)
    return favoured / (favoured + 1 - weight)


def _log_e(candidate_events: int, other_events: int, null: float) -> float:
    """ln of the mixture likelihood ratio against p <= null, mixed over Beta(1, (1 - null) / null) cut to p > null."""
    if not 0 < null < 1 or candidate_events + other_events == 0:
        return 0.0
    a, b = 1.0, (1 - null) / null
    after_a, after_b = a + candidate_events, b + other_events
    return (
        log_beta(after_a, after_b)
        + log_beta_tails(null, after_a, after_b)[1]
        - log_beta(a, b)
        - log_beta_tails(null, a, b)[1]
        - candidate_events * math.log(null)
        - other_events * math.log1p(-null)
    )


def log_e_two_sample(candidate_bad: int, stable_bad: int, weight: float, margin: float) -> float:
    """ln e of one window for "the candidate's rate of bad requests is at most (1 + margin) x the stable's".

    `weight` is the realised share. Where only one of the two had requests there is nothing to compare: 0 (e = 1).
    """
    return _log_e(candidate_bad, stable_bad, p0(weight, margin))


def log_e_one_sample(bad: int, good: int, p0: float) -> float:
    """ln e of one window for "the candidate's rate of bad requests is at most p0"; 0 (e = 1) where p0 is 1 or more."""
    return _log_e(bad, good, p0)


def log_e_of_windows(logs: Sequence[float]) -> float:
    """ln e over successive windows: the products of their e-values, mixed over the window from which trouble may date.

    A plain product would charge a candidate that turns bad late with all the good windows before; so product k leaves
    out the windows before k, and has the weight 1 / (k (k + 1)). These sum to 1, with what is left on the constant 1
    (windows that are still to come), so the mixture is an e-value at every look, like the product, and is
    never below 1 / (number of windows + 1).
    """
    n = len(logs)
    terms, product = [-math.log(n + 1)], 0.0
    for k in range(n, 0, -1):
        product += logs[k - 1]
        terms.append(product - math.log(k * (k + 1)))
    top = max(terms)
    return top + math.log(sum(math.exp(term - top) for term in terms))


# --- verdicts ---------------------------------------------------------------------------------------------------------


def judge(
    windows: Sequence[Window],
    frozen: Mapping[str, StreamCounts],
    policy: PromotionPolicy,
    *,
    stage_seconds: float,
    recent: Window | None = None,
    streams: Sequence[str] = STREAMS,
) -> Judgement:
    """Judge a canary stage; the last window is the current one and its `stage` the current stage.

    Args:
        windows: every window since the canary began, oldest first, the current one as counted now.
        frozen: the stable version's counts from before it lost its traffic, for windows of weight 1.
        policy: margin, evidence, dwell and minimum numbers.
        stage_seconds: how long the current stage has lasted.
        recent: what the current window gained lately (`Window.since`), so that a sudden failure shows in a long window.
        streams: which streams to judge.

    Returns: "withdraw" on evidence or a sudden failure; "advance" once the stage lasted, was busy enough, and no stream
    stands above the margin; else "continue", with the reason that holds it.
    """
    current = _current(windows)
    evidence = _weigh(windows, frozen, policy, streams)
    bad_news = _found_bad(evidence, current, recent, policy)
    if bad_news:
        return Judgement("withdraw", bad_news, evidence)
    requests = sum(w.candidate_requests for w in windows if w.stage == current.stage)
    if stage_seconds < policy.dwell_seconds:
        return Judgement(
            "continue",
            f"{current.stage}: {stage_seconds:.0f} s of at least {policy.dwell_seconds:.0f} s, "
            f"{requests} requests; {_summary(evidence)}.",
            evidence,
        )
    if requests < policy.minimum_requests:
        return Judgement(
            "continue",
            f"{current.stage}: the candidate has answered {requests} requests of at least {policy.minimum_requests}; "
            f"{_summary(evidence)}.",
            evidence,
        )
    doubts = [doubt for item in evidence if (doubt := _doubt(item))]
    if doubts:
        return Judgement("continue", f"{current.stage}: {'; '.join(doubts)}.", evidence)
    return Judgement(
        "advance",
        f"{current.stage} passed with {requests} requests in {stage_seconds:.0f} s: {_summary(evidence)}.",
        evidence,
    )


def judge_shadow(
    windows: Sequence[Window],
    policy: PromotionPolicy,
    *,
    stage_seconds: float,
    streams: Sequence[str] = STREAMS,
) -> Judgement:
    """Judge the shadow stage: the candidate's copies against the stable's own requests, by their realised shares.

    Nobody is hurt by a shadow, so few copies delay nothing; they are named in the reason. With `shadow_gate` off it
    reports and never withdraws.
    """
    current = _current(windows)
    evidence = _weigh(windows, {}, policy, streams)
    bad_news = _found_bad(evidence, current, None, policy)
    if bad_news and policy.shadow_gate:
        return Judgement("withdraw", bad_news, evidence)
    requests = sum(w.candidate_requests for w in windows if w.stage == current.stage)
    few = f", fewer than the {policy.shadow_requests} wanted" if requests < policy.shadow_requests else ""
    ungated = f" Reported only, the shadow gate is off: {bad_news}" if bad_news else ""
    verdict: Verdict = "continue" if stage_seconds < policy.shadow_seconds else "advance"
    return Judgement(
        verdict,
        f"{current.stage}: {requests} copies in {stage_seconds:.0f} s{few}; {_summary(evidence)}.{ungated}",
        evidence,
    )


def judge_soak(
    windows: Sequence[Window],
    frozen: Mapping[str, StreamCounts],
    policy: PromotionPolicy,
    *,
    stage_seconds: float,
    recent: Window | None = None,
    streams: Sequence[str] = STREAMS,
) -> Judgement:
    """Judge the soak: the promoted version against the frozen rates of the one before; "advance" means it is over.

    `windows` may go on from the canary's or hold the soak's alone. Without traffic it ends by time, and says so.
    """
    current = _current(windows)
    evidence = _weigh(windows, frozen, policy, streams)
    bad_news = _found_bad(evidence, current, recent, policy)
    if bad_news:
        return Judgement("withdraw", bad_news, evidence)
    requests = sum(w.candidate_requests for w in windows if w.stage == current.stage)
    seen = f"{requests} requests in {stage_seconds:.0f} s" if requests else f"no requests in {stage_seconds:.0f} s"
    verdict: Verdict = "continue" if stage_seconds < policy.soak_seconds else "advance"
    return Judgement(verdict, f"{current.stage}: {seen}; {_summary(evidence)}.", evidence)


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
    ceiling = min((1 + policy.margin) * upper_rate_bound(frozen.bad, frozen.requests), 1.0)
    none = StreamCounts()
    logs = []
    for window in windows:
        candidate, stable = window.candidate.get(stream, none), window.stable.get(stream, none)
        if window.weight >= 1 and stream in TIMED:
            bad, good = _bad_slices(window, stream, ceiling)
            logs.append(log_e_one_sample(bad, good, STALLED_SHARE))
        elif window.weight >= 1:
            logs.append(log_e_one_sample(candidate.bad, candidate.requests - candidate.bad, ceiling))
        elif candidate.requests and stable.requests:
            share = candidate.requests / (candidate.requests + stable.requests)
            logs.append(log_e_two_sample(candidate.bad, stable.bad, share, policy.margin))
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
            tail = binomial_tail(candidate.bad, candidate.requests, ceiling)
    else:
        stable, compared_with = sum((w.stable.get(stream, none) for w in stage), none), "stable"
        if stable.requests and candidate.requests:
            share = candidate.requests / (candidate.requests + stable.requests)
            tail = binomial_tail(candidate.bad, candidate.bad + stable.bad, p0(share, policy.margin))
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
    )


def _bad_slices(window: Window, stream: str, ceiling: float) -> tuple[int, int]:
    """(bad, good) time slices of a window of weight 1; slices without requests say nothing."""
    counts = [piece[stream] for piece in window.slices if stream in piece and piece[stream].requests]
    bad = sum(binomial_tail(c.bad, c.requests, ceiling) <= BAD_SLICE_LEVEL for c in counts)
    return bad, len(counts) - bad


def _found_bad(
    evidence: Sequence[Evidence], current: Window, recent: Window | None, policy: PromotionPolicy
) -> str | None:
    for item in evidence:
        if item.log_e >= math.log(item.threshold):
            return (
                f"{current.stage}: {_figures(item)}, more than {1 + item.margin:g} times as many, "
                f"on evidence of {_number(item.e_value)} against a threshold of {item.threshold:g}."
            )
    for window in (current, recent) if recent else (current,):
        for item in evidence:
            if window.weight >= 1 and item.stream in TIMED:
                continue  # a short stall would do
            candidate = window.candidate.get(item.stream, StreamCounts())
            stable = window.stable.get(item.stream, StreamCounts())
            if candidate.requests < policy.sudden_requests or candidate.bad < policy.sudden_share * candidate.requests:
                continue
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


def _figures(item: Evidence) -> str:
    whom = "the stable's frozen" if item.compared_with == "frozen" else "the stable's"
    against = f"{whom} {_share(item.stable)}" if item.stable.requests else "nothing to compare with"
    return f"{_label(item.stream)} {_share(item.candidate)} against {against}"


def _label(stream: str) -> str:
    return {"error": "errors", "slow": "slow answers"}.get(stream, stream)


def _share(counts: StreamCounts) -> str:
    return f"{counts.bad}/{counts.requests} ({counts.rate:.1%})" if counts.rate is not None else "0/0"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1e6 else "over a million"
