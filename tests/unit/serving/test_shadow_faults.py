"""A shadow copy whose answer is like no other."""

from __future__ import annotations

import asyncio

import pytest

from serving.compute import engine
from serving.traffic.routing import Route
from serving.traffic.shadow import Comparison, offer
from tests.unit.serving.helpers import Arrays, close, double, load, row, until

SHADOWED = Route("m", 5, "1", "2", 0.0, shadow=True, watch=True, slow_threshold_seconds=1000.0)


def test_an_answer_that_cannot_be_compared_is_an_error_and_the_candidate_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(expected: Arrays, got: Arrays) -> Comparison:
        raise ValueError("like no other")

    async def scenario() -> None:
        stable, candidate = load(), load(version="2")
        counts = candidate.counts_for(SHADOWED)
        with monkeypatch.context() as patched:
            patched.setattr(engine, "compare", fail)
            assert offer(SHADOWED, stable, candidate, row(1, 2), None, double(row(1, 2)))
            async with asyncio.timeout(10):
                await until(lambda: counts.shadow_requests)
        assert counts.shadow_errors == 1 and "cannot be compared" in caplog.text and "like no other" in caplog.text
        assert offer(SHADOWED, stable, candidate, row(1, 2), None, double(row(1, 2)))
        async with asyncio.timeout(10):
            await until(lambda: counts.shadow_requests == 2)
        assert counts.shadow_errors == 1
        close(stable, candidate)

    asyncio.run(scenario())
