"""The health of loaded versions, from their own figures of the last minute. What is done about it is serving.follow.reconcile's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from serving.compute.engine import LoadedVersion

Key = tuple[str, str]
MEBIBYTE = 2**20


class HealthStatus(StrEnum):
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"
    """Too few requests to say."""


class HealthLimits(Protocol):
    """The section `health` of the settings."""

    @property
    def max_memory_mb(self) -> int: ...
    @property
    def response_seconds(self) -> float: ...
    @property
    def error_rate(self) -> float: ...
    @property
    def window_seconds(self) -> float: ...
    @property
    def minimum_requests(self) -> int: ...


@dataclass(frozen=True, slots=True)
class HealthResult:
    """`requests`, `error_rate` and `response_seconds` are those of the window; absent where nothing was asked.

    Requests that the cache answered are among the requests, since clients had them answered; they took none of its time.
    """

    status: HealthStatus
    reasons: tuple[str, ...]
    requests: int
    error_rate: float | None
    response_seconds: float | None
    memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "status": self.status.value,
            "reasons": list(self.reasons),
            "window_requests": self.requests,
            "error_rate": self.error_rate,
            "response_seconds": self.response_seconds,
        }


@dataclass(frozen=True, slots=True)
class _Sample:
    """`requests` are those that were computed, `hits` those that the cache answered in its place."""

    at: float
    requests: int
    errors: int
    seconds: float
    hits: int
    changes: int
    errors_by_key: dict[str, int]


def _sample(at: float, version: LoadedVersion) -> _Sample:
    total, cache = version.telemetry.total, version.telemetry.cache
    hits = cache.l1 + cache.l2 + cache.shared
    askers = version.telemetry.askers
    return _Sample(
        at,
        total.requests,
        total.errors,
        total.latency_seconds_total,
        hits,
        askers.changes,
        dict(askers.errors),
    )


def _of_one_client(oldest: _Sample, newest: _Sample, requests: int, limit: float) -> int:
    """How many of the errors are those of one API key, where other clients asked too and had no more than their share; else 0."""
    if newest.changes == oldest.changes:
        return 0  # it asks alone: nobody else says that the version is well
    gained = (count - oldest.errors_by_key.get(key, 0) for key, count in newest.errors_by_key.items())
    worst = max(gained, default=0)
    rest, errors = requests - worst, newest.errors - oldest.errors - worst
    return worst if rest > 0 and errors <= limit * rest else 0


class ModelHealth:
    """Looks at the cumulative counts of every loaded version now and then, and judges what a sliding window gained."""

    def __init__(self, limits: HealthLimits, monotonic: Callable[[], float]) -> None:
        self._limits = limits
        self._monotonic = monotonic
        self._samples: dict[Key, deque[_Sample]] = {}

    def look(self, loaded: Mapping[Key, LoadedVersion]) -> dict[Key, HealthResult]:
        """Take a sample of each version, and judge all. Versions that are gone are forgotten."""
        now = self._monotonic()
        for key in self._samples.keys() - loaded.keys():
            del self._samples[key]
        for key, version in loaded.items():
            samples = self._samples.setdefault(key, deque())
            if not samples or now - samples[-1].at >= self._limits.window_seconds / 30:
                samples.append(_sample(now, version))
            while len(samples) > 1 and now - samples[1].at >= self._limits.window_seconds:
                samples.popleft()
        return {key: self.judge(key, version) for key, version in loaded.items()}

    def judge(self, key: Key, version: LoadedVersion) -> HealthResult:
        """By the limits of the settings: memory, errors and a computation without end make a version unhealthy, slow answers degraded.

        Errors of one client while others are answered make it degraded too: else whoever may ask could have any version taken out.
        """
        limits, newest = self._limits, _sample(0.0, version)
        samples = self._samples.get(key)
        oldest = samples[0] if samples else newest
        computed, errors = newest.requests - oldest.requests, newest.errors - oldest.errors
        # A hit is a request that did not fail: without it a few errors of the few that are computed would weigh too much.
        requests = computed + newest.hits - oldest.hits
        rate = errors / requests if requests else None
        mean = (newest.seconds - oldest.seconds) / computed if computed else None
        memory = version.runtime.memory_bytes
        reasons, status = [], HealthStatus.HEALTHY
        if version.hung is not None:
            status = HealthStatus.UNHEALTHY
            reasons.append(f"hangs: {version.hung}")
        enough = requests >= limits.minimum_requests
        if mean is not None and computed >= limits.minimum_requests and mean > limits.response_seconds:
            status = HealthStatus.DEGRADED if status is HealthStatus.HEALTHY else status
            reasons.append(f"answers take {mean:.2f} s on average, more than {limits.response_seconds:g} s")
        if rate is not None and enough and rate > limits.error_rate:
            reason = f"{errors} of {requests} requests failed, more than {limits.error_rate:.1%}"
            if worst := _of_one_client(oldest, newest, requests, limits.error_rate):
                status = HealthStatus.DEGRADED if status is HealthStatus.HEALTHY else status
                reason += f"; {worst} of them with one key, and of the others no more than that"
            else:
                status = HealthStatus.UNHEALTHY
            reasons.append(reason)
        if memory is not None and memory > limits.max_memory_mb * MEBIBYTE:
            status = HealthStatus.UNHEALTHY
            reasons.append(f"takes {memory / MEBIBYTE:.0f} MB, more than {limits.max_memory_mb} MB")
        if status is HealthStatus.HEALTHY and not enough:
            status = HealthStatus.UNKNOWN
        return HealthResult(status, tuple(reasons), requests, rate, mean, memory)

    def begin_anew(self, key: Key) -> None:
        """What was counted before no longer counts: the version was loaded again."""
        self._samples.pop(key, None)
