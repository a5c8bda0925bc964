"""A loaded version: batches of what is queued, failures that stay alone, bounds, counts, drain and close."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from registry.errors import UnavailableError, UsageError
from registry.signature import Signature, TensorSpec
from serving.compute.engine import LoadedVersion, ModelError, QueueFullError
from serving.compute.work import Work
from serving.traffic.routing import Route
from serving.traffic.shadow import Copy, offer
from tests.unit.serving.helpers import ROWS, Arrays, PythonRuntime, close, double, load, row, until

WATCHED = Route("m", 5, "1", "2", 0.5, watch=True, slow_threshold_seconds=1000.0)


def refuse_negative(inputs: Arrays) -> dict[str, NDArray[Any]]:
    if (inputs["x"] < 0).any():
        raise ValueError("negative\nand a second line")
    return double(inputs)


async def outcome(work: Work) -> object:
    try:
        await work.future
    except Exception as error:
        return error
    return work.answer["y"].tolist()


async def behind_a_busy_model(version: LoadedVersion, runtime: PythonRuntime, *inputs: Arrays) -> list[object]:
    """The outcomes of requests that were all queued while the model computed another one."""
    runtime.gate.clear()
    first = version.submit(row(0, 0), None)
    await until(runtime.entered.is_set)
    works = [version.submit(x, None) for x in inputs]
    runtime.gate.set()
    await first.future
    return [await outcome(work) for work in works]


def test_a_request_is_computed_and_its_times_are_known() -> None:
    async def scenario() -> None:
        version = load()
        work = version.submit(row(1, 2), None)
        await work.future
        assert work.answer["y"].tolist() == [[2, 4]]
        assert work.enqueued <= work.started <= work.finished
        close(version)

    asyncio.run(scenario())


def test_what_is_queued_is_computed_together_up_to_the_most_rows() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime, max_batch=3)
        answers = await behind_a_busy_model(version, runtime, *(row(k, k) for k in range(5)))
        assert answers == [[[2 * k, 2 * k]] for k in range(5)]
        assert [len(call["x"]) for call in runtime.calls] == [1, 3, 2]
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "signature",
    [
        Signature(ROWS.inputs, (TensorSpec("y", "FP32", (1, 2)),)),
        Signature((TensorSpec("x", "FP32", (1, 2)),), ROWS.outputs),
        Signature(ROWS.inputs, (TensorSpec("y", "FP32", ()),)),
    ],
)
def test_a_fixed_first_dimension_is_never_batched(signature: Signature) -> None:
    async def scenario() -> None:
        scalar = not signature.outputs[0].shape
        runtime = PythonRuntime(lambda inputs: {"y": inputs["x"].sum()} if scalar else double(inputs), signature)
        version = load(runtime)
        await behind_a_busy_model(version, runtime, row(1, 1), row(2, 2))
        assert [len(call["x"]) for call in runtime.calls] == [1, 1, 1]
        close(version)

    asyncio.run(scenario())


def test_dependent_rows_are_never_batched() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime, rows_independent=False)
        await behind_a_busy_model(version, runtime, row(1, 1), row(2, 2))
        assert [len(call["x"]) for call in runtime.calls] == [1, 1, 1]
        close(version)

    asyncio.run(scenario())


def test_only_equal_shapes_share_a_batch() -> None:
    async def scenario() -> None:
        spec = TensorSpec("x", "FP32", (-1, -1))
        runtime = PythonRuntime(signature=Signature((spec,), (TensorSpec("y", "FP32", (-1, -1)),)))
        version = load(runtime)
        await behind_a_busy_model(version, runtime, row(1), row(2), row(1, 2), row(3))
        assert [call["x"].shape for call in runtime.calls] == [(1, 2), (2, 1), (1, 2), (1, 1)]
        close(version)

    asyncio.run(scenario())


def test_a_request_with_an_optional_input_is_computed_alone_and_the_others_together() -> None:
    async def scenario() -> None:
        factor = TensorSpec("factor", "FP32", (1,), optional=True)
        runtime = PythonRuntime(
            signature=Signature((*PythonRuntime().signature.inputs, factor), PythonRuntime().signature.outputs)
        )
        version = load(runtime)
        own = {**row(3, 3), "factor": np.array([2], np.float32)}
        await behind_a_busy_model(version, runtime, row(1, 1), row(2, 2), own)
        assert [(len(call["x"]), "factor" in call) for call in runtime.calls] == [(1, False), (2, False), (1, True)]
        close(version)

    asyncio.run(scenario())


def test_a_bad_input_fails_alone_and_without_its_stack_trace() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime(refuse_negative)
        version = load(runtime)
        good, bad, other = await behind_a_busy_model(version, runtime, row(1, 1), row(-1, 1), row(2, 2))
        assert (good, other) == ([[2, 2]], [[4, 4]])
        assert isinstance(bad, ModelError)
        assert str(bad) == "model 'm' version '1' failed on this input: negative"
        assert (version.telemetry.total.requests, version.telemetry.total.errors) == (4, 1)
        close(version)

    asyncio.run(scenario())


def test_a_model_that_answers_other_rows_is_computed_singly_from_then_on() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime(lambda inputs: {"y": inputs["x"].sum(axis=0, keepdims=True)})
        version = load(runtime)
        assert await behind_a_busy_model(version, runtime, row(1, 1), row(2, 2)) == [[[1, 1]], [[2, 2]]]
        assert not version.batching
        close(version)

    asyncio.run(scenario())


def test_an_input_that_the_runtime_cannot_carry_counts_for_nobody() -> None:
    def refuse(inputs: Arrays) -> dict[str, NDArray[Any]]:
        raise UsageError("not UTF-8")

    async def scenario() -> None:
        version = load(PythonRuntime(refuse))
        assert isinstance(await outcome(version.submit(row(1, 1), None, WATCHED)), UsageError)
        assert version.counts_for(WATCHED).requests == 0
        close(version)

    asyncio.run(scenario())


def test_a_full_queue_refuses() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime, queue_size=1)
        runtime.gate.clear()
        first = version.submit(row(0, 0), None)
        await until(runtime.entered.is_set)
        second = version.submit(row(0, 0), None)
        with pytest.raises(QueueFullError, match="model 'm' version '1' has 1 requests waiting"):
            version.submit(row(0, 0), None)
        runtime.gate.set()
        await asyncio.gather(first.future, second.future)
        close(version)

    asyncio.run(scenario())


def test_a_request_given_up_in_the_queue_is_not_computed_and_makes_room() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime, queue_size=1)
        runtime.gate.clear()
        first = version.submit(row(0, 0), None, WATCHED)
        await until(runtime.entered.is_set)
        second = version.submit(row(7, 7), None, WATCHED)
        version.withdraw(second, UnavailableError("gone"), count_as_error=False)
        third = version.submit(row(1, 1), None, WATCHED)
        runtime.gate.set()
        assert isinstance(await outcome(second), UnavailableError)
        await asyncio.gather(first.future, third.future)
        assert len(runtime.calls) == 2
        counts = version.counts_for(WATCHED)
        assert (counts.requests, counts.errors) == (2, 0)
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize("timed_out", [True, False])
def test_a_request_given_up_while_it_is_computed_counts_once(timed_out: bool) -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime)
        runtime.gate.clear()
        work = version.submit(row(0, 0), None, WATCHED)
        await until(runtime.entered.is_set)
        version.withdraw(work, UnavailableError("gone"), count_as_error=timed_out)
        assert isinstance(await outcome(work), UnavailableError)
        runtime.gate.set()
        await version.submit(row(1, 1), None).future
        counts = version.counts_for(WATCHED)
        assert (counts.requests, counts.errors) == (1, int(timed_out))
        close(version)

    asyncio.run(scenario())


def test_counts_are_kept_by_the_generation_of_the_route_that_chose() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime(refuse_negative)
        version = load(runtime)
        later = Route("m", 6, "1", "2", 1.0, watch=True, slow_threshold_seconds=0.0)
        unwatched = Route("m", 7, "1")
        works = [
            version.submit(row(1, 1), None, WATCHED),
            version.submit(row(-1, 1), None, later),
            version.submit(row(1, 1), None, later),
            version.submit(row(1, 1), None, unwatched),
            version.submit(row(1, 1), None),
        ]
        for work in works:
            await outcome(work)
        first, second = version.counts_for(WATCHED).as_dict(), version.counts_for(later).as_dict()
        assert (first["requests"], first["errors"], first["slow"]) == (1, 0, 0)
        assert (second["requests"], second["errors"], second["slow"]) == (2, 1, 2)
        assert sum(second["latency"].values()) == 2
        assert version.watch.keys() == {5, 6}
        assert version.telemetry.total.requests == 5
        close(version)

    asyncio.run(scenario())


def test_drain_waits_for_everyone_who_holds_the_version() -> None:
    async def scenario() -> None:
        version = load()
        assert await version.drain(0)
        version.acquire()
        version.acquire()
        waiting = asyncio.create_task(version.drain(30))
        await asyncio.sleep(0)
        version.release()
        await asyncio.sleep(0)
        assert not waiting.done()
        version.release()
        assert await waiting
        version.acquire()
        assert not await version.drain(0.001)
        close(version)

    asyncio.run(scenario())


def test_close_fails_what_is_queued_finishes_what_is_computed_and_closes_the_runtime() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime)
        runtime.gate.clear()
        computed = version.submit(row(1, 1), None)
        await until(runtime.entered.is_set)
        queued = version.submit(row(2, 2), None)
        version.close()
        runtime.gate.set()
        assert await outcome(computed) == [[2, 2]]
        assert isinstance(await outcome(queued), UnavailableError)
        with pytest.raises(UnavailableError, match="is closed"):
            version.submit(row(1, 1), None)
        assert version.join(10) and runtime.closed.is_set()

    asyncio.run(scenario())


def test_the_mark_surrounds_every_computation() -> None:
    async def scenario() -> None:
        marks: list[bool] = []
        version = load(PythonRuntime(refuse_negative), mark=marks.append)
        await outcome(version.submit(row(1, 1), None))
        await outcome(version.submit(row(-1, 1), None))
        assert marks == [True, False, True, False]
        close(version)

    asyncio.run(scenario())


SHADOWED = Route("m", 5, "1", "2", 0.0, shadow=True, watch=True, slow_threshold_seconds=1000.0)


async def shadow(candidate: LoadedVersion, stable: LoadedVersion, route: Route = SHADOWED) -> bool:
    return offer(route, stable, candidate, row(1, 2), None, double(row(1, 2)))


@pytest.mark.parametrize(
    ("function", "errors", "disagreements", "differences"),
    [
        (double, 0, 0, 0),
        (lambda inputs: {"y": inputs["x"] * 3}, 0, 0, 1),
        (lambda inputs: {"y": inputs["x"][:, ::-1]}, 0, 1, 1),
        (lambda inputs: {"z": inputs["x"]}, 0, 1, 1),
        (lambda inputs: 1 / 0, 1, 0, 0),
    ],
)
def test_a_copy_is_computed_and_compared(function: Any, errors: int, disagreements: int, differences: int) -> None:
    async def scenario() -> None:
        stable, candidate = load(), load(PythonRuntime(function), "2")
        assert await shadow(candidate, stable)
        counts = candidate.counts_for(SHADOWED)
        await until(lambda: counts.shadow_requests)
        assert (counts.shadow_errors, counts.shadow_disagreements, counts.shadow_differences) == (
            errors,
            disagreements,
            differences,
        )
        assert (counts.requests, counts.shadow_dropped, counts.shadow_slow) == (0, 0, 0)
        close(stable, candidate)

    asyncio.run(scenario())


@pytest.mark.parametrize("busy", ["stable", "candidate"])
def test_a_copy_is_dropped_while_live_work_waits(busy: str) -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        versions = {
            "stable": load(runtime if busy == "stable" else None, "1"),
            "candidate": load(runtime if busy == "candidate" else None, "2"),
        }
        runtime.gate.clear()
        works = [versions[busy].submit(row(0, 0), None)]
        await until(runtime.entered.is_set)
        works.append(versions[busy].submit(row(0, 0), None))
        assert not await shadow(versions["candidate"], versions["stable"])
        assert versions["candidate"].counts_for(SHADOWED).shadow_dropped == 1
        runtime.gate.set()
        await asyncio.gather(*(work.future for work in works))
        close(*versions.values())

    asyncio.run(scenario())


def test_live_work_goes_before_copies_and_a_full_copy_queue_drops() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        stable, candidate = load(), load(runtime, "2", shadow_queue_size=1)
        runtime.gate.clear()
        assert await shadow(candidate, stable)  # this one is being computed
        await until(runtime.entered.is_set)
        assert await shadow(candidate, stable)
        assert not await shadow(candidate, stable)
        live = candidate.submit(row(9, 9), None)
        runtime.gate.set()
        await live.future
        counts = candidate.counts_for(SHADOWED)
        await until(lambda: counts.shadow_requests == 2)
        assert [call["x"][0, 0] for call in runtime.calls] == [1, 9, 1]
        assert counts.shadow_dropped == 1
        close(stable, candidate)

    asyncio.run(scenario())


def test_copies_left_at_a_close_are_dropped_and_counted() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        stable, candidate = load(), load(runtime, "2")
        runtime.gate.clear()
        assert await shadow(candidate, stable)
        await until(runtime.entered.is_set)
        assert await shadow(candidate, stable)
        candidate.close()
        runtime.gate.set()
        counts = candidate.counts_for(SHADOWED)
        await until(lambda: counts.shadow_requests == 1)
        assert counts.shadow_dropped == 1
        assert not candidate.offer(Copy({}, None, {}, stable, None, None))
        close(stable, candidate)

    asyncio.run(scenario())


def test_a_thousand_requests_from_many_tasks_each_get_their_own_answer() -> None:
    async def ask(version: LoadedVersion, k: int) -> bool:
        work = version.submit({"x": np.full((1 + k % 3, 2), k, np.float32)}, None)
        await work.future
        return work.answer["y"].shape == (1 + k % 3, 2) and bool((work.answer["y"] == 2 * k).all())

    async def scenario() -> None:
        version = load(queue_size=1000)
        asked: list[Awaitable[bool]] = [ask(version, k) for k in range(1000)]
        assert all(await asyncio.gather(*asked))
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (double, (0, 0, 0)),
        (lambda inputs: {"y": inputs["x"] * np.float32(2 + 1e-6)}, (0, 0, 1)),
        (lambda inputs: {"y": inputs["x"] * 3}, (0, 1, 1)),
        (lambda inputs: {"y": inputs["x"][:, ::-1]}, (1, 1, 1)),
    ],
)
def test_copies_are_compared_by_top_class_by_tolerance_and_to_the_bit(
    function: Any, expected: tuple[int, int, int]
) -> None:
    async def scenario() -> None:
        stable, candidate = load(), load(PythonRuntime(function), "2")
        assert await shadow(candidate, stable)
        counts = candidate.counts_for(SHADOWED)
        await until(lambda: counts.shadow_requests)
        assert (counts.shadow_disagreements, counts.shadow_differences, counts.shadow_inexact) == expected
        close(stable, candidate)

    asyncio.run(scenario())
