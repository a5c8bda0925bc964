"""The health of versions that the cache answers for: what a hit counts for, and what not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from serving.compute.engine import LoadedVersion
from serving.compute.work import Work
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


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ([("evil", 30, 30), ("good", 40, 0)], HealthStatus.DEGRADED),
        ([("good", 40, 1), ("evil", 30, 30)], HealthStatus.DEGRADED),
        ([("evil", 30, 30), ("good", 40, 3)], HealthStatus.UNHEALTHY),
        ([("evil", 30, 30), ("good", 2, 2)], HealthStatus.UNHEALTHY),
        ([("evil", 30, 30)], HealthStatus.UNHEALTHY),
        ([("", 30, 30), ("good", 40, 0)], HealthStatus.UNHEALTHY),
    ],
    ids=["one of two", "one of two, late", "both", "both, few", "it asks alone", "anybody"],
)
def test_the_errors_of_one_client_among_others_have_no_version_taken_out(
    asked: list[tuple[str, int, int]], status: HealthStatus
) -> None:
    version, clock = load(), Clock()
    health = ModelHealth(LIMITS, clock)
    health.look({KEY: version})
    for asker, requests, errors in asked:
        for number in range(requests):
            work = Work({}, None, 1, None, None, 0.0, None, None)  # type: ignore[arg-type]
            work.asker = asker
            version._count(work, 0.1, error=number < errors)
    result = health.look({KEY: version})[KEY]
    version.close()
    assert result.status is status, result.reasons
    assert any("failed" in reason for reason in result.reasons)
    assert any("with one key" in reason for reason in result.reasons) == (status is HealthStatus.DEGRADED)


def test_a_client_that_fails_alone_for_a_whole_window_is_heard() -> None:
    """Others asked before it: they say nothing of now."""
    version, clock = load(), Clock()
    health = ModelHealth(LIMITS, clock)

    def ask(asker: str, requests: int, *, error: bool) -> HealthStatus:
        for _ in range(requests):
            work = Work({}, None, 1, None, None, 0.0, None, None)  # type: ignore[arg-type]
            work.asker = asker
            version._count(work, 0.1, error=error)
        return health.look({KEY: version})[KEY].status

    health.look({KEY: version})
    ask("other", 50, error=False)
    found = []
    for second in range(10, 200, 10):
        clock.seconds = float(second)
        found.append(ask("only", 10, error=True))
    version.close()
    assert found[-1] is HealthStatus.UNHEALTHY and HealthStatus.DEGRADED in found
