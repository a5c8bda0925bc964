"""What is counted about a version: cumulative counts for the judge and for /metrics, with one latency histogram."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serving.figures.clusters import KEYS_KEPT, Clusters
from serving.process.rows import Rows

if TYPE_CHECKING:
    from serving.text.counts import TextCounts


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
latency_rows = Rows(_BUCKETS)
"""Where the histograms are: they outlive the versions that they are of."""
_NAMES = (*(f"{bound:.4g}" for bound in LATENCY_BOUNDS_SECONDS), "inf")


class WatchCounts:
    """Cumulative counts of one version, in one window. Written on the event loop only.

    `requests` are answered requests, good or bad; `errors` those that the version failed; `slow` those above the
    route's threshold. The shadow_* counts are of copies: `shadow_requests` computed, `shadow_errors` failed,
    `shadow_slow` above the threshold, `shadow_disagreements` where the top class differs from the stable's (where there
    are no classes: a value beyond tolerance), `shadow_differences` with a value beyond tolerance, `shadow_inexact` not
    equal to the bit, `shadow_dropped` not computed because there was live work to do. The clusters say which of the bad
    requests have one cause.
    """

    __slots__ = (
        "error_clusters",
        "error_seconds_total",
        "errors",
        "latency",
        "latency_seconds_total",
        "requests",
        "shadow_differences",
        "shadow_disagreements",
        "shadow_dropped",
        "shadow_errors",
        "shadow_inexact",
        "shadow_requests",
        "shadow_slow",
        "slow",
        "slow_clusters",
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
        self.shadow_inexact = 0
        self.shadow_dropped = 0
        self.latency_seconds_total = 0.0
        self.error_seconds_total = 0.0
        """What `latency_seconds_total` has of bad requests. For statistics; the judge does not ask."""
        self.latency = latency_rows.take()
        self.error_clusters = Clusters()
        self.slow_clusters = Clusters()

    def record(
        self, latency_seconds: float, *, error: bool, slow: bool, batch: int = 0, key: int | None = None
    ) -> None:
        """Count an answered request, of an executed batch (0: none that is known) and of a client's key."""
        self.requests += 1
        self.latency[bisect_left(LATENCY_BOUNDS_SECONDS, latency_seconds)] += 1
        self.latency_seconds_total += latency_seconds
        if error:
            self.record_error(batch, key)
            self.error_seconds_total += latency_seconds
        if slow:
            self.slow += 1
            self.slow_clusters.add(batch, key)

    def record_error(self, batch: int, key: int | None) -> None:
        """Count the error of a request that is counted already, or is being counted."""
        self.errors += 1
        self.error_clusters.add(batch, key)

    def record_copy(self, *, error: bool, slow: bool, disagrees: bool, differs: bool, inexact: bool) -> None:
        self.shadow_requests += 1
        self.shadow_errors += error
        self.shadow_slow += slow
        self.shadow_disagreements += disagrees
        self.shadow_differences += differs
        self.shadow_inexact += inexact

    def summary(self) -> dict[str, Any]:
        """What a person asks first: requests, errors, mean latency, and the bound in seconds that 95 % were within.

        Absent is what nothing was measured of; `p95_seconds` is None as well where it lies beyond the last bound.
        """
        if not self.requests:
            return {"requests": 0, "errors": 0, "mean_seconds": None, "p95_seconds": None}
        wanted, seen, p95 = 0.95 * self.requests, 0, None
        for bound, count in zip(LATENCY_BOUNDS_SECONDS, self.latency, strict=False):
            seen += count
            if seen >= wanted:
                p95 = bound
                break
        mean = round(self.latency_seconds_total / self.requests, 9)
        return {"requests": self.requests, "errors": self.errors, "mean_seconds": mean, "p95_seconds": p95}

    def as_dict(self) -> dict[str, Any]:
        """JSON-able. `latency` is sparse, {upper bound in seconds as text: count}, the last bound being "inf"."""
        counts: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        counts["latency_seconds_total"] = round(self.latency_seconds_total, 6)
        counts["latency"] = {_NAMES[k]: count for k, count in enumerate(self.latency) if count}
        return {**counts, **self.error_clusters.as_dict("error"), **self.slow_clusters.as_dict("slow")}


_OTHERS = ("latency", "error_clusters", "error_seconds_total", "slow_clusters")
_PLAIN = tuple(name for name in WatchCounts.__slots__ if name not in _OTHERS)


class CacheCounts:
    """What became of requests to versions whose answers are kept. `saved_seconds` of the model were not spent on hits;
    `computed_seconds` were on requests whose answers could have been kept, each with its share of its batch.
    """

    __slots__ = ("bypassed", "computed_seconds", "l1", "l2", "misses", "saved_seconds", "shared")

    def __init__(self) -> None:
        self.l1 = 0
        self.l2 = 0
        self.shared = 0
        self.misses = 0
        self.bypassed = 0
        self.saved_seconds = 0.0
        self.computed_seconds = 0.0

    def hit(self, level: str, saved_seconds: float) -> None:
        """`level` is one of serving.caching.cache's: l1, l2, shared."""
        setattr(self, level, getattr(self, level) + 1)
        self.saved_seconds += saved_seconds

    def as_dict(self) -> dict[str, Any]:
        hits = self.l1 + self.l2 + self.shared
        asked = hits + self.misses
        seconds = self.saved_seconds + self.computed_seconds
        return {
            "hits": {"l1": self.l1, "l2": self.l2, "shared": self.shared},
            "misses": self.misses,
            "bypassed": self.bypassed,
            "hit_rate": round(hits / asked, 6) if asked else None,
            "saved_seconds": round(self.saved_seconds, 6),
            "computed_seconds": round(self.computed_seconds, 6),
            "saved_share": round(self.saved_seconds / seconds, 6) if seconds else None,
        }


class Askers:
    """Whose requests failed, by API key: what one client alone brings about says little of the version. On the event loop only."""

    __slots__ = ("changes", "errors", "last")

    def __init__(self) -> None:
        self.last: str | None = None
        self.changes = 0
        """How often a request came with another key than the one before it: none, and one client asks alone."""
        self.errors: dict[str, int] = {}

    def changed(self, asker: str) -> None:
        """A request of another key than `last`."""
        if self.last is not None:
            self.changes += 1
        self.last = asker

    def failed(self, asker: str) -> None:
        """Who comes without a key may be anybody, and is counted for nobody."""
        if asker and (asker in self.errors or len(self.errors) < KEYS_KEPT):
            self.errors[asker] = self.errors.get(asker, 0) + 1


class VersionTelemetry:
    """Everything that /metrics and /stats say about a version since this process first loaded it."""

    __slots__ = (
        "askers",
        "batches",
        "cache",
        "codes",
        "errors",
        "last_inference_unix_seconds",
        "model_seconds",
        "out_of_memory",
        "out_of_memory_failed",
        "queue_seconds",
        "rows",
        "text",
        "total",
    )

    def __init__(self) -> None:
        self.total = WatchCounts()
        self.cache = CacheCounts()
        self.askers = Askers()
        self.codes: dict[int, int] = {}
        self.errors: dict[str, int] = {}
        """Inference requests without the answer that they asked for, by `serving.statuses.kind_of`."""
        self.batches = 0
        self.rows = 0
        self.queue_seconds = 0.0
        self.model_seconds = 0.0
        self.out_of_memory = 0
        """Runs that did not fit the memory, and were tried again in smaller ones."""
        self.out_of_memory_failed = 0
        """Requests that did not fit by themselves either; they are among the errors."""
        self.last_inference_unix_seconds: float | None = None
        self.text: TextCounts | None = None
        """Of a version that generates text."""

    def answered(self, code: int) -> None:
        self.codes[code] = self.codes.get(code, 0) + 1


def cumulative_buckets(latency: Sequence[int]) -> list[tuple[str, float]]:
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
