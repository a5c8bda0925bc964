"""A version whose memory runs out: batches are halved, requests divided, everybody is answered, and the limit is learnt."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.signature import Signature, TensorSpec
from serving.compute.engine import LoadedVersion, ModelError
from serving.compute.portions import in_portions
from serving.device.memory import MemoryOptimizer
from serving.device.memory_limits import BatchLimit
from serving.statuses import OutOfMemoryError, status_of
from tests.unit.serving.helpers import ROWS, Arrays, close, double, load, row, until
from tests.unit.serving.limited import Pool, PoolRuntime
from tests.unit.serving.test_engine import outcome

KILOBYTE = 1 << 10


def rows_of(count: int) -> dict[str, Any]:
    return {"x": np.arange(2 * count, dtype=np.float32).reshape(count, 2)}


def made(pool: Pool, *, per_row: int = KILOBYTE, max_batch: int = 16, **options: Any) -> tuple[LoadedVersion, Any]:
    runtime = PoolRuntime(pool, per_row, options.pop("function", double), options.pop("signature", ROWS))
    optimizer = MemoryOptimizer(pool, collect=lambda: pool.order.append("collect"))
    limit = options.pop("limit", None) or BatchLimit(max_batch)
    version = load(runtime, max_batch=max_batch, limit=limit, clean_up=optimizer.ran_out, **options)  # type: ignore[arg-type]
    return version, runtime


async def together(version: LoadedVersion, runtime: PoolRuntime, *inputs: Arrays) -> list[object]:
    """The outcomes of requests that were all queued while the model was at another one."""
    runtime.gate.clear()
    first = version.submit(row(0, 0), None)
    await until(runtime.entered.is_set)
    works = [version.submit(x, None) for x in inputs]
    runtime.gate.set()
    await first.future
    return [await outcome(work) for work in works]


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_every_request_is_answered() -> None:
    async def scenario() -> None:
        pool = Pool(5 * KILOBYTE)
        version, runtime = made(pool)
        answers = await together(version, runtime, *(row(k, k) for k in range(16)))
        assert answers == [[[2 * k, 2 * k]] for k in range(16)]
        assert runtime.refused[0] == 16 and max(runtime.fitted) <= 5
        assert version.limit.learnt is not None and version.limit.learnt <= 4
        await until(lambda: version.telemetry.out_of_memory == len(runtime.refused))
        total = version.telemetry.total
        assert (total.requests, total.errors, version.telemetry.out_of_memory_failed) == (17, 0, 0)
        close(version)

    asyncio.run(scenario())


def test_what_was_learnt_keeps_the_next_batches_small() -> None:
    async def scenario() -> None:
        version, runtime = made(Pool(5 * KILOBYTE))
        await together(version, runtime, *(row(k, k) for k in range(16)))
        refused, limit = len(runtime.refused), version.limit.rows
        runtime.entered.clear()
        answers = await together(version, runtime, *(row(k, k) for k in range(12)))
        assert answers == [[[2 * k, 2 * k]] for k in range(12)]
        assert max(runtime.fitted[-4:]) <= limit
        # A block kept by its size may still be in the way once; the whole batch is not tried again.
        assert 12 not in runtime.refused[refused:]
        close(version)

    asyncio.run(scenario())


def test_a_large_request_of_independent_rows_is_divided_and_put_together_again() -> None:
    async def scenario() -> None:
        version, runtime = made(Pool(10 * KILOBYTE), max_batch=1)
        work = version.submit(rows_of(100), None)
        await work.future
        assert np.array_equal(work.answer["y"], rows_of(100)["x"] * 2)
        assert runtime.refused[0] == 100 and sum(runtime.fitted) == 100
        # The next one is divided from the start.
        refused = len(runtime.refused)
        work = version.submit(rows_of(100), None)
        await work.future
        assert np.array_equal(work.answer["y"], rows_of(100)["x"] * 2) and 100 not in runtime.refused[refused:]
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize("dependent", ["by the validation", "by the shape"])
def test_a_request_that_cannot_be_divided_fails_with_the_reason_and_the_next_one_is_answered(dependent: str) -> None:
    async def scenario() -> None:
        whole = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (4, 2)),))
        options: dict[str, Any] = (
            {"rows_independent": False} if dependent == "by the validation" else {"signature": whole}
        )
        version, runtime = made(Pool(5 * KILOBYTE), **options)
        error = await outcome(version.submit(rows_of(6), None))
        assert isinstance(error, OutOfMemoryError) and error.requested_bytes == 6 * KILOBYTE
        assert status_of(error) == 507 and "model 'm' version '1'" in str(error)
        assert "does not fit the memory" in str(error)
        assert runtime.refused == [6, 6]  # once more, after the clean-up
        assert await outcome(version.submit(rows_of(4), None)) == (rows_of(4)["x"] * 2).tolist()
        assert version.limit.learnt is None  # it says nothing about how many rows fit
        telemetry = version.telemetry
        await until(lambda: telemetry.out_of_memory == 2)
        assert (telemetry.out_of_memory_failed, telemetry.total.errors, telemetry.total.requests) == (1, 1, 2)
        close(version)

    asyncio.run(scenario())


def test_one_row_that_does_not_fit_fails_alone() -> None:
    def heavy(inputs: Arrays) -> dict[str, Any]:
        if (inputs["x"] == 13).any():
            raise OutOfMemoryError("no room for 13", 13)
        return double(inputs)

    async def scenario() -> None:
        version, runtime = made(Pool(100 * KILOBYTE), function=heavy)
        answers = await together(version, runtime, *(row(k, k) for k in (1, 2, 13, 4)))
        assert [isinstance(answer, OutOfMemoryError) for answer in answers] == [False, False, True, False]
        assert version.telemetry.total.errors == 1
        close(version)

    asyncio.run(scenario())


def test_an_error_of_the_model_in_a_half_stays_with_the_request_that_causes_it() -> None:
    def picky(inputs: Arrays) -> dict[str, Any]:
        if (inputs["x"] < 0).any():
            raise ValueError("negative")
        return double(inputs)

    async def scenario() -> None:
        version, runtime = made(Pool(4 * KILOBYTE), function=picky)
        answers = await together(version, runtime, *(row(k, k) for k in (1, 2, -3, 4, 5, 6)))
        assert [type(answer) for answer in answers] == [list, list, ModelError, list, list, list]
        close(version)

    asyncio.run(scenario())


def test_a_model_that_does_not_answer_a_row_for_a_row_is_not_put_together_from_parts() -> None:
    def summed(inputs: Arrays) -> dict[str, Any]:
        return {"y": inputs["x"].sum(axis=0, keepdims=True)}

    async def scenario() -> None:
        version, _ = made(Pool(4 * KILOBYTE), function=summed)
        error = await outcome(version.submit(rows_of(8), None))
        assert isinstance(error, ModelError) and "does not answer a row for every row" in str(error)
        close(version)

    asyncio.run(scenario())


def test_a_request_whose_client_has_gone_is_not_computed_to_its_end() -> None:
    async def scenario() -> None:
        version, runtime = made(Pool(4 * KILOBYTE))
        version.limit.ran_out(2)  # one row at a time
        runtime.gate.clear()
        work = version.submit(rows_of(50), None)
        await until(runtime.entered.is_set)
        version.withdraw(work, ModelError("gone"), count_as_error=False)
        runtime.gate.set()
        with pytest.raises(ModelError, match="gone"):
            await work.future
        assert await outcome(version.submit(row(1, 1), None)) == [[2, 2]]
        assert len(runtime.fitted) < 50
        close(version)

    asyncio.run(scenario())


def test_the_clean_up_makes_room_that_kept_blocks_had_taken() -> None:
    async def scenario() -> None:
        pool = Pool(6 * KILOBYTE)
        version, runtime = made(pool, rows_independent=False)
        assert await outcome(version.submit(rows_of(4), None)) == (rows_of(4)["x"] * 2).tolist()
        # Four kilobytes are kept for the next four rows; five rows fit only once they are given back.
        assert await outcome(version.submit(rows_of(5), None)) == (rows_of(5)["x"] * 2).tolist()
        assert (runtime.refused, pool.order) == ([5], ["collect", "release"])
        close(version)

    asyncio.run(scenario())


def test_a_clean_up_that_fails_ends_neither_the_requests_nor_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    def broken(who: str) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    async def scenario() -> None:
        runtime = PoolRuntime(Pool(5 * KILOBYTE), KILOBYTE)
        version = load(runtime, max_batch=16, limit=BatchLimit(16), clean_up=broken)  # type: ignore[arg-type]
        answers = await together(version, runtime, *(row(k, k) for k in range(8)))
        # Blocks of other sizes stay in the way here, so some may fail: all of them are told.
        assert len(answers) == 8 and all(isinstance(answer, list | OutOfMemoryError) for answer in answers)
        assert version._thread.is_alive()
        close(version)

    asyncio.run(scenario())
    assert "the clean-up after memory ran out failed" in caplog.text


def test_what_fails_beside_the_model_fails_its_requests_and_not_the_worker() -> None:
    """A thread that ends unnoticed leaves a version that takes requests and never answers."""

    async def scenario() -> None:
        version, runtime = made(Pool(5 * KILOBYTE))

        def fail() -> None:
            raise MemoryError("there as well")

        runtime.trim = fail
        answers = await together(version, runtime, *(row(k, k) for k in range(16)))
        assert all(isinstance(answer, ModelError) and "there as well" in str(answer) for answer in answers)
        assert version.telemetry.total.errors == 16
        async with asyncio.timeout(30):
            assert await outcome(version.submit(row(1, 2), None)) == [[2, 4]]
        close(version)

    asyncio.run(scenario())


def test_a_single_row_is_tried_once_more_after_the_clean_up_also_where_it_was_a_part() -> None:
    sizes: list[int] = []

    def run(inputs: Arrays, outputs: Any) -> dict[str, Any]:
        sizes.append(len(inputs["x"]))
        if len(sizes) == 1:
            raise OutOfMemoryError("not now", 1)
        return double(inputs)

    limit = BatchLimit(8)
    limit.ran_out(2)
    answer, runs = in_portions(
        run, rows_of(2), None, 2, limit, ran_out=lambda rows, error: None, gone=lambda: False, tried=True
    )
    assert (sizes, runs) == ([1, 1, 1], 3) and np.array_equal(answer["y"], rows_of(2)["x"] * 2)


def test_who_gave_up_before_its_half_was_computed_counts_for_nothing() -> None:
    async def scenario() -> None:
        entered, held = threading.Event(), threading.Event()

        class Slow(PoolRuntime):
            def run(self, inputs: Arrays, outputs: Any) -> dict[str, Any]:
                if len(inputs["x"]) == 4:
                    entered.set()
                    held.wait(30)
                return super().run(inputs, outputs)

        pool = Pool(3 * KILOBYTE)
        runtime = Slow(pool, KILOBYTE)
        optimizer = MemoryOptimizer(pool, collect=int)
        version = load(runtime, max_batch=4, limit=BatchLimit(4), clean_up=optimizer.ran_out)  # type: ignore[arg-type]
        runtime.gate.clear()
        first = version.submit(row(0, 0), None)
        await until(runtime.entered.is_set)
        works = [version.submit(row(k, k), None) for k in range(4)]
        runtime.gate.set()
        await first.future
        await until(entered.is_set)
        version.withdraw(works[3], ModelError("gone"), count_as_error=False)
        held.set()
        outcomes = [await outcome(work) for work in works]
        assert outcomes[:3] == [[[2 * k, 2 * k]] for k in range(3)] and isinstance(outcomes[3], ModelError)
        telemetry = version.telemetry
        assert (telemetry.total.requests, telemetry.total.errors, telemetry.rows) == (4, 0, 4)
        close(version)

    asyncio.run(scenario())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    room=st.integers(1, 50),
    most=st.integers(1, 64),
    shared=st.booleans(),
)
def test_every_request_is_answered_rightly_whatever_fits(sizes: list[int], room: int, most: int, shared: bool) -> None:
    async def scenario() -> None:
        pool = Pool(room * KILOBYTE)
        version, runtime = made(pool, max_batch=most, rows_independent=shared)
        # Others come and take a part of the memory away; one row always fits beside them.
        with pool.buffer((room - 1) // 3 * KILOBYTE):
            answers = await together(version, runtime, *(rows_of(size) for size in sizes))
        left = room - (room - 1) // 3
        for size, answer in zip(sizes, answers, strict=True):
            if shared or size <= left:
                assert answer == (rows_of(size)["x"] * 2).tolist()
            else:
                assert isinstance(answer, OutOfMemoryError)
        assert version.telemetry.total.requests == len(sizes) + 1
        close(version)

    asyncio.run(scenario())
