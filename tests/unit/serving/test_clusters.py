"""Bad requests with one cause count once: those of one executed batch, those of one client's key."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from registry.errors import UnavailableError
from serving.compute.engine import LoadedVersion
from serving.figures.clusters import KEYS_KEPT, KEYS_REPORTED, Clusters
from serving.traffic.routing import Route
from tests.unit.serving.helpers import Arrays, PythonRuntime, close, double, load, row, until

WATCHED = Route("m", 5, "1", "2", 0.5, watch=True, slow_threshold_seconds=1000.0)


def excess(sizes: Sequence[int]) -> int:
    return sum(size * size - size for size in sizes)


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([None, 1, 2, 3])), max_size=60))
def test_the_sums_are_those_of_the_clusters(bad: list[tuple[int, int | None]]) -> None:
    bad = sorted(bad, key=lambda item: item[0])  # a batch is delivered at once
    clusters = Clusters()
    for batch, key in bad:
        clusters.add(batch, key)
    batches = [[key for at, key in bad if at == batch] for batch in {batch for batch, _ in bad}]
    assert clusters.batched == excess([len(batch) for batch in batches])
    keyed = [sum(key == mine for _, key in bad) for mine in {key for _, key in bad if key is not None}]
    assert clusters.keys == {key: sum(key == mine for _, mine in bad) for key in {k for _, k in bad if k is not None}}
    if all(key is not None for _, key in bad):
        assert clusters.keyed == excess(keyed)
    if all(key is None for _, key in bad):
        assert clusters.keyed == clusters.batched and clusters.events == len(batches)


def test_a_key_that_keeps_failing_is_one_event_and_others_are_their_own() -> None:
    clusters = Clusters()
    for batch in range(1, 101):
        clusters.add(batch, 7)
    assert (clusters.events, clusters.keyed, clusters.batched) == (1, 9900, 0)
    clusters.add(101, 8)
    assert clusters.events == 2


def test_keys_are_bounded_and_beyond_the_bound_each_batch_is_an_event() -> None:
    clusters = Clusters()
    for key in range(KEYS_KEPT + 50):
        clusters.add(key + 1, key)
        clusters.add(key + 1_000_000, key)
    assert len(clusters.keys) == KEYS_KEPT
    assert clusters.events == KEYS_KEPT + 100
    told = clusters.as_dict("error")
    assert len(told["error_keys"]) == KEYS_REPORTED
    assert set(told["error_keys"].values()) == {2}


def refuse_negative(inputs: Arrays) -> dict[str, NDArray[Any]]:
    if (inputs["x"] < 0).any():
        raise ValueError("negative")
    return double(inputs)


async def fail(version: LoadedVersion, runtime: PythonRuntime, marks: Sequence[int | None]) -> None:
    """One executed batch of failing requests with these keys' marks."""
    runtime.gate.clear()
    runtime.entered.clear()
    first = version.submit(row(0, 0), None)
    await until(runtime.entered.is_set)
    works = [version.submit(row(-1, 0), None, WATCHED, mark) for mark in marks]
    runtime.gate.set()
    await first.future
    await asyncio.gather(*(work.future for work in works), return_exceptions=True)


def test_the_failures_of_one_executed_batch_are_one_event_although_each_is_computed_again() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime(refuse_negative)
        version = load(runtime)
        await fail(version, runtime, [None] * 4)
        counts = version.counts_for(WATCHED)
        assert (counts.errors, counts.error_clusters.events, counts.error_clusters.batched) == (4, 1, 12)
        await fail(version, runtime, [None] * 2)
        assert (counts.errors, counts.error_clusters.events, counts.error_clusters.batched) == (6, 2, 14)
        assert version.telemetry.total.error_clusters.events == 2
        close(version)

    asyncio.run(scenario())


def test_a_key_counts_once_over_batches_and_singly_computed_failures_are_their_own_events() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime(refuse_negative)
        version = load(runtime, rows_independent=False)
        await fail(version, runtime, [None, None, None])
        counts = version.counts_for(WATCHED)
        assert (counts.errors, counts.error_clusters.events) == (3, 3)
        await fail(version, runtime, [11, 11, 12])
        assert (counts.errors, counts.error_clusters.events) == (6, 5)
        assert counts.as_dict()["error_keys"] == {"b": 2, "c": 1}
        close(version)

    asyncio.run(scenario())


def test_all_that_runs_out_of_time_behind_one_computation_is_one_event() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime, rows_independent=False)
        runtime.gate.clear()
        works = [version.submit(row(0, 0), None, WATCHED) for _ in range(5)]
        await until(runtime.entered.is_set)
        for work in works:
            version.withdraw(work, UnavailableError("late"), count_as_error=True)
        counts = version.counts_for(WATCHED)
        assert (counts.errors, counts.error_clusters.events) == (5, 1)
        runtime.gate.set()
        await asyncio.gather(*(work.future for work in works), return_exceptions=True)
        close(version)

    asyncio.run(scenario())


def test_slow_answers_of_one_batch_are_one_event() -> None:
    async def scenario() -> None:
        route = Route("m", 5, "1", "2", 0.5, watch=True, slow_threshold_seconds=0.0)
        runtime = PythonRuntime()
        version = load(runtime)
        runtime.gate.clear()
        first = version.submit(row(0, 0), None)
        await until(runtime.entered.is_set)
        works = [version.submit({"x": np.ones((1, 2), np.float32)}, None, route) for _ in range(5)]
        runtime.gate.set()
        await asyncio.gather(first.future, *(work.future for work in works))
        counts = version.counts_for(route)
        assert (counts.slow, counts.slow_clusters.events, counts.slow_clusters.batched) == (5, 1, 20)
        close(version)

    asyncio.run(scenario())
