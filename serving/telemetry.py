"""What is counted about a version: cumulative counts for the judge and for /metrics, with one latency histogram."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any


def _bounds() -> tuple[float, ...]:
    """Log-spaced, about 5 % a step, through every 1, 2 and 5 so that the coarse buckets of /metrics fall on bounds."""
    steps = ((1.0, 2.0, 14), (2.0, 5.0, 19), (5.0, 10.0, 14))
    bounds: list[float] = []
    for decade in range(-5, 3):
        for low, high, count in steps:
            bounds += [float(f"{10.0**decade * low * (high / low) ** (k / count):.4g}") for k in range(count)]
    return (*(b for b in bounds if 50e-6 <= b < 120.0), 120.0)


LATENCY_BOUNDS_SECONDS: tuple[float, ...] = _bounds()
"""Upper bounds of the latency buckets in seconds, 50 us to 120 s; one more bucket holds what is slower."""

METRIC_BUCKETS_SECONDS: tuple[float, ...] = (
    *(float(f"{digit}e{exponent}") for exponent in range(-4, 2) for digit in (1, 2, 5)),
    100.0,
    120.0,
)
"""The coarse buckets of the Prometheus histogram; each is one of LATENCY_BOUNDS_SECONDS."""

_BUCKETS = len(LATENCY_BOUNDS_SECONDS) + 1
_NAMES = (*(f"{bound:.4g}" for bound in LATENCY_BOUNDS_SECONDS), "inf")


class WatchCounts:
    """Cumulative counts of one version, in one window. Written on the event loop only.

    `requests` are answered requests, good or bad; `errors` those that the version failed; `slow` those above the
    route's threshold. The shadow_* counts are of copies: `shadow_requests` computed, `shadow_errors` failed,
    `shadow_slow` above the threshold, `shadow_disagreements` where the top class differs from the stable's (where there
    are no classes: a value beyond tolerance), `shadow_differences` with a value beyond tolerance, `shadow_dropped` not
    computed because there was live work to do.
    """

    __slots__ = (
        "errors",
        "latency",
        "latency_seconds_total",
        "requests",
        "shadow_differences",
        "shadow_disagreements",
        "shadow_dropped",
        "shadow_errors",
        "shadow_requests",
        "shadow_slow",
        "slow",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.slow = 0
        self.shadow_requests = 0
        self.shadow_errors = 0
        self.shadow_slow = 0
        self.shadow_disagreements = 0
        self.shadow_differences = 0
        self.shadow_dropped = 0
        self.latency_seconds_total = 0.0
        self.latency = [0] * _BUCKETS

    def record(self, latency_seconds: float, *, error: bool, slow: bool) -> None:
        self.requests += 1
        self.latency[bisect_left(LATENCY_BOUNDS_SECONDS, latency_seconds)] += 1
        self.latency_seconds_total += latency_seconds
        if error:
            self.errors += 1
        if slow:
            self.slow += 1

    def record_copy(self, *, error: bool, slow: bool, disagrees: bool, differs: bool) -> None:
        self.shadow_requests += 1
        self.shadow_errors += error
        self.shadow_slow += slow
        self.shadow_disagreements += disagrees
        self.shadow_differences += differs

    def as_dict(self) -> dict[str, Any]:
        """JSON-able. `latency` is sparse, {upper bound in seconds as text: count}, the last bound being "inf"."""
        counts: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__ if name != "latency"}
        counts["latency_seconds_total"] = round(self.latency_seconds_total, 6)
        counts["latency"] = {_NAMES[k]: count for k, count in enumerate(self.latency) if count}
        return counts


class VersionTelemetry:
    """Everything that /metrics and /stats say about a version since this process first loaded it."""

    __slots__ = ("batches", "codes", "last_inference_unix_seconds", "model_seconds", "queue_seconds", "rows", "total")

    def __init__(self) -> None:
        self.total = WatchCounts()
        self.codes: dict[int, int] = {}
        self.batches = 0
        self.rows = 0
        self.queue_seconds = 0.0
        self.model_seconds = 0.0
        self.last_inference_unix_seconds: float | None = None

    def answered(self, code: int) -> None:
        self.codes[code] = self.codes.get(code, 0) + 1


def cumulative_buckets(latency: list[int]) -> list[tuple[str, float]]:
    """The histogram in the coarse buckets of /metrics, as (le, cumulative count), "+Inf" last."""
    buckets: list[tuple[str, float]] = []
    done = total = 0
    for bound in METRIC_BUCKETS_SECONDS:
        upto = bisect_left(LATENCY_BOUNDS_SECONDS, bound) + 1
        total += sum(latency[done:upto])
        done = upto
        buckets.append((str(bound), float(total)))
    buckets.append(("+Inf", float(total + sum(latency[done:]))))
    return buckets
