"""The health of versions that the cache answers for: what a hit counts for, and what not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from serving.compute.engine import LoadedVersion
from serving.loaded.health import HealthStatus, ModelHealth
from tests.unit.registry.kit import Clock
from tests.unit.serving.helpers import load

KEY = ("m", "1")
LIMITS = SimpleNamespace(
    max_memory_mb=1024, response_seconds=1.0, error_rate=0.05, window_seconds=60.0, minimum_requests=20
)


def computed(version: LoadedVersion, requests: int, *, errors: int = 0, seconds: float = 0.1) -> None:
    for number in range(requests):
        version.telemetry.total.record(seconds, error=number < errors, slow=False, batch=number)


def hit(version: LoadedVersion, hits: int) -> None:
    for number in range(hits):
        version.telemetry.cache.hit(("l1", "l2", "shared")[number % 3], 0.1)


@pytest.mark.parametrize(
    ("requests", "errors", "hits", "seconds", "status"),
    [
        (30, 2, 0, 0.1, HealthStatus.UNHEALTHY),
        (30, 2, 970, 0.1, HealthStatus.HEALTHY),
        (300, 200, 700, 0.1, HealthStatus.UNHEALTHY),
        (30, 0, 970, 2.0, HealthStatus.DEGRADED),
        (3, 0, 970, 2.0, HealthStatus.HEALTHY),
        (3, 0, 0, 0.1, HealthStatus.UNKNOWN),
    ],
)
def test_hits_are_requests_that_did_not_fail_and_take_no_part_in_the_mean_of_the_answers(
    requests: int, errors: int, hits: int, seconds: float, status: HealthStatus
) -> None:
    version, clock = load(), Clock()
    health = ModelHealth(LIMITS, clock)
    health.look({KEY: version})
    computed(version, requests, errors=errors, seconds=seconds)
    hit(version, hits)
    result = health.look({KEY: version})[KEY]
    version.close()
    assert result.status is status
    assert result.requests == requests + hits and result.error_rate == errors / (requests + hits)
    assert result.response_seconds == pytest.approx(seconds)


def test_hits_of_before_the_window_do_not_excuse_the_errors_of_now() -> None:
    version, clock = load(), Clock()
    health = ModelHealth(LIMITS, clock)
    hit(version, 970)
    for seconds in (0, 40, 80):
        clock.seconds = seconds
        health.look({KEY: version})
    computed(version, 30, errors=2)
    result = health.look({KEY: version})[KEY]
    version.close()
    assert result.status is HealthStatus.UNHEALTHY and result.requests == 30
