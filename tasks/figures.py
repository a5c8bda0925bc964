"""What a judgement is made of: counts of a stream, windows of counts, the evidence of a stream, the verdict. Plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["continue", "advance", "withdraw"]


@dataclass(frozen=True, slots=True)
class StreamCounts:
    """Requests that a version answered and how many of them were bad in one stream (cumulative within a window).

    `clustered` tells how they came: over the clusters of bad requests (of one executed batch, or one sticky key) the sum of
    size x size - size. 0: each came alone.
    """

    requests: int = 0
    bad: int = 0
    clustered: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.bad <= self.requests:
            raise ValueError(f"{self.bad} bad of {self.requests} requests: counts must satisfy 0 <= bad <= requests")
        if self.clustered < 0:
            raise ValueError(
                f"clustered = {self.clustered}: a sum of size x size - size over clusters is never negative"
            )

    @property
    def independence(self) -> float:
        """What one bad request is worth as evidence: 1 where each came alone, 1/k where they came in clusters of k (Kish)."""
        return self.bad / (self.bad + self.clustered) if self.bad else 1.0

    @property
    def events(self) -> float:
        """How many independent bad events these are worth."""
        return self.bad * self.independence

    @property
    def rate(self) -> float | None:
        return self.bad / self.requests if self.requests else None

    def __add__(self, other: StreamCounts) -> StreamCounts:
        return StreamCounts(self.requests + other.requests, self.bad + other.bad, self.clustered + other.clustered)

    def __sub__(self, earlier: StreamCounts) -> StreamCounts:
        """What came after `earlier`, taken to be as clustered as the whole: clusters may reach over the cut."""
        bad = self.bad - earlier.bad
        clustered = math.ceil(bad * self.clustered / self.bad) if self.bad else 0
        return StreamCounts(self.requests - earlier.requests, bad, clustered)


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
    epoch: str | None = None
    generation: int | None = None
    """Of the route's change that opened the window, where it is known."""

    def since(self, earlier: Window) -> Window:
        """What this window gained after `earlier`, a look at the same window: a stage cut into two windows."""
        return Window(
            self.stage,
            self.weight,
            {s: n - earlier.candidate.get(s, StreamCounts()) for s, n in self.candidate.items()},
            {s: n - earlier.stable.get(s, StreamCounts()) for s, n in self.stable.items()},
            epoch=self.epoch,
            generation=self.generation,
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
    epoch: str | None = None
    generations: tuple[int, ...] = ()
    """Of the current stage: with the epoch, the window that the counts are from."""

    @property
    def e_value(self) -> float:
        return math.exp(min(self.log_e, 700.0))

    def as_dict(self) -> dict[str, Any]:
        candidate = {**asdict(self.candidate), "events": round(self.candidate.events, 3)}
        stable = {**asdict(self.stable), "events": round(self.stable.events, 3)}
        return {
            **asdict(self),
            "candidate": candidate,
            "stable": stable,
            "generations": list(self.generations),
            "e_value": self.e_value,
        }


@dataclass(frozen=True, slots=True)
class Judgement:
    """What to do now, why in one sentence, and the figures behind it."""

    verdict: Verdict
    reason: str
    evidence: list[Evidence]
    not_judged: Mapping[str, str] = field(default_factory=dict)
    """Streams that could not be judged, and why."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "not_judged": dict(self.not_judged),
            "evidence": [item.as_dict() for item in self.evidence],
        }
