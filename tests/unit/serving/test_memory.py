"""The memory optimizer on a small allocator that really runs out, and on this process."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from registry.errors import UnavailableError
from serving.device.devices import CpuDevice, Figures
from serving.device.memory import CLEAN_UPS_KEPT, NO_DEVICE, MemoryOptimizer
from serving.device.memory_limits import Pressure
from tests.unit.serving.helpers import until
from tests.unit.serving.limited import Pool

MEBIBYTE = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def optimizer_of(pool: Any, **options: Any) -> tuple[MemoryOptimizer, Clock]:
    clock = Clock()
    return MemoryOptimizer(pool, clock=clock, monotonic=clock, **options), clock


def fill(pool: Pool, stack: ExitStack, *sizes: int) -> None:
    for size in sizes:
        stack.enter_context(pool.buffer(size * MEBIBYTE))


def keep(pool: Pool, size: int) -> None:
    """Have the pool hold a block that nobody uses."""
    with pool.buffer(size * MEBIBYTE):
        pass


def test_a_profile_says_what_is_in_use_held_and_free() -> None:
    pool = Pool(100 * MEBIBYTE)
    optimizer, _ = optimizer_of(pool)
    with ExitStack() as stack:
        fill(pool, stack, 30, 20)
        keep(pool, 25)
        found = optimizer.profile()
    assert found.as_dict() == {
        "total_mb": 100.0,
        "allocated_mb": 50.0,
        "reserved_mb": 75.0,
        "free_mb": 25.0,
        "fragmentation_ratio": round(25 / 75, 4),
        "timestamp": 1000.0,
        "pressure_level": "low",
    }


def test_the_memory_of_others_counts_as_pressure_too() -> None:
    figures = Figures(total=100, allocated=10, reserved=20, free=3)  # 77 are somebody else's
    assert figures.utilisation == pytest.approx(0.87)
    assert Figures(0, 0, 0, 0).utilisation == 0.0 and Figures(0, 0, 0, 0).fragmentation_ratio == 0.0


def test_use_beyond_the_budget_is_pressure_although_the_device_has_room() -> None:
    pool = Pool(1000 * MEBIBYTE)
    optimizer, _ = optimizer_of(pool, budget_bytes=100 * MEBIBYTE)
    with ExitStack() as stack:
        fill(pool, stack, 96)
        assert optimizer.profile().pressure_level is Pressure.CRITICAL


def test_fragmentation_has_a_running_maximum_and_mean_and_the_history_is_bounded() -> None:
    pool = Pool(100 * MEBIBYTE)
    optimizer, _ = optimizer_of(pool, history=5)
    assert optimizer.fragmentation_mean is None
    with ExitStack() as stack:
        fill(pool, stack, 10)
        optimizer.profile()
        keep(pool, 30)
        optimizer.profile()
        pool.release()
        for _ in range(8):
            optimizer.profile()
    assert (len(optimizer.history), optimizer.looks, optimizer.fragmentation_max) == (5, 10, 0.75)
    assert optimizer.fragmentation_mean == pytest.approx(0.075)


def test_a_clean_up_is_predicted_from_three_looks_at_full_and_scattered_memory() -> None:
    pool = Pool(100 * MEBIBYTE)
    optimizer, _ = optimizer_of(pool, budget_bytes=50 * MEBIBYTE)
    with ExitStack() as stack:
        fill(pool, stack, 40)
        keep(pool, 30)
        assert [optimizer.profile() and optimizer.predict_cleanup_need() for _ in range(3)] == [False, False, True]
        optimizer.clean_up("test")
        optimizer.profile()
        assert not optimizer.predict_cleanup_need()  # nothing is held that is not in use


def test_no_clean_up_is_predicted_while_use_falls_or_is_low() -> None:
    pool = Pool(100 * MEBIBYTE)
    optimizer, _ = optimizer_of(pool, budget_bytes=50 * MEBIBYTE)
    with ExitStack() as outer:
        fill(pool, outer, 37)
        with ExitStack() as inner:
            fill(pool, inner, 3)
            keep(pool, 30)
            optimizer.profile()
            optimizer.profile()
        optimizer.profile()
        assert not optimizer.predict_cleanup_need()
    low, _ = optimizer_of(pool)
    for _ in range(3):
        low.profile()
    assert not low.predict_cleanup_need()


def test_clean_ups_that_give_nothing_back_are_predicted_less_and_less_often() -> None:
    class Stuck(Pool):
        def release(self) -> None:
            """Its blocks are scattered: none can be given back."""

    pool = Stuck(100 * MEBIBYTE)
    optimizer, clock = optimizer_of(pool, budget_bytes=50 * MEBIBYTE, collect=int)
    with ExitStack() as stack:
        fill(pool, stack, 40)
        keep(pool, 30)
        done: list[float] = []
        while len(done) < 8:
            clock.now += 5
            optimizer.profile()
            if optimizer.predict_cleanup_need():
                optimizer.clean_up("test")
                done.append(clock.now)
        assert [after - before for before, after in itertools.pairwise(done)] == [10, 20, 40, 80, 160, 320, 600]
        Pool.release(pool)
        keep(pool, 29)
        pool.release = lambda: Pool.release(pool)  # type: ignore[method-assign]
        clock.now += 600
        optimizer.profile()
        assert optimizer.predict_cleanup_need() and optimizer.clean_up("test") is not None
        keep(pool, 30)
        clock.now += 5
        for _ in range(3):
            optimizer.profile()
        assert optimizer.predict_cleanup_need()


def test_a_clean_up_collects_garbage_first_then_empties_the_allocator_and_counts_reserved_bytes() -> None:
    pool = Pool(100 * MEBIBYTE)
    optimizer, clock = optimizer_of(pool, collect=lambda: pool.order.append("collect"))
    with ExitStack() as stack:
        fill(pool, stack, 20)
        keep(pool, 30)
        done = optimizer.clean_up("test")
    assert done is not None and done.as_dict() == {
        **{
            "timestamp": 1000.0,
            "reason": "test",
            "freed_mb": 30.0,
            "before_mb": 50.0,
            "after_mb": 20.0,
            "seconds": 0.0,
        },
    }
    assert pool.order == ["collect", "release"]
    assert (optimizer.clean_up_count, optimizer.freed_mb_total, optimizer.recent_clean_ups()) == (1, 30.0, 1)
    clock.now += 3601
    assert optimizer.recent_clean_ups() == 0


def test_clean_ups_do_not_follow_each_other_within_a_second_but_for_memory_that_ran_out() -> None:
    pool = Pool(100 * MEBIBYTE)
    optimizer, clock = optimizer_of(pool, collect=lambda: pool.order.append("collect"))
    assert optimizer.clean_up("one") is not None and optimizer.clean_up("two") is None
    optimizer.ran_out("m 1")
    assert pool.order == ["collect", "release", "release"] and optimizer.out_of_memory_count == 1
    clock.now += 2
    assert optimizer.clean_up("three") is not None


def test_the_events_are_bounded_and_the_counts_are_not() -> None:
    pool = Pool(100)
    optimizer, clock = optimizer_of(pool, collect=int)
    for _ in range(CLEAN_UPS_KEPT + 20):
        clock.now += 2
        optimizer.clean_up("again")
    assert (len(optimizer.clean_ups), optimizer.clean_up_count) == (CLEAN_UPS_KEPT, CLEAN_UPS_KEPT + 20)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_large_work_that_needs_more_than_can_be_had_begins_with_a_clean_up(kind: str) -> None:
    pool = Pool(100 * MEBIBYTE)
    pool.kind = kind
    optimizer, _ = optimizer_of(pool, collect=int)
    with ExitStack() as stack:
        fill(pool, stack, 10)
        keep(pool, 60)
        optimizer.before_large_work("loading m 1", 30 * MEBIBYTE)
        assert optimizer.clean_up_count == 0
        # On the CPU what is held can be used by whoever comes next; on a device only by its own framework.
        optimizer.before_large_work("loading m 2", 50 * MEBIBYTE)
        assert [event.reason for event in optimizer.clean_ups] == (["before loading m 2"] if kind == "cuda" else [])
        optimizer.before_large_work("loading m 3", 95 * MEBIBYTE)
    assert optimizer.clean_up_count == 1 and optimizer.freed_mb_total == 60.0


def test_the_threshold_is_said_once_each_way(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(100 * MEBIBYTE)
    optimizer, _ = optimizer_of(pool, warning_threshold=0.8)
    with caplog.at_level(logging.INFO, "modelkeep.memory"):
        with ExitStack() as stack:
            fill(pool, stack, 81)
            optimizer.profile()
            optimizer.profile()
            assert optimizer.warned
        optimizer.profile()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"] and not optimizer.warned


def test_pressure_reaches_the_batches_of_every_version() -> None:
    pool = Pool(100 * MEBIBYTE)
    optimizer, _ = optimizer_of(pool)
    limit = optimizer.limits.of("digest", 32)
    with ExitStack() as stack:
        fill(pool, stack, 90)
        optimizer.profile()
        assert limit.rows == 16
    optimizer.profile()
    assert limit.rows == 32


def test_the_trend_is_the_median_slope() -> None:
    pool = Pool(1000 * MEBIBYTE)
    optimizer, clock = optimizer_of(pool)
    with ExitStack() as stack:
        for expected in (None, None, "rising"):
            fill(pool, stack, 10)
            clock.now += 30
            optimizer.profile()
            found = optimizer.trend()
            assert (found and found["direction"]) == expected
        assert found == {"direction": "rising", "mb_per_minute": 20.0, "looks": 3}
    for _ in range(12):
        clock.now += 30
        optimizer.profile()
    found = optimizer.trend()
    assert found is not None and found["direction"] == "steady"


def test_a_device_that_does_not_answer_is_said_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Gone(Pool):
        def figures(self) -> Figures:
            raise UnavailableError("fell off the bus")

    optimizer, _ = optimizer_of(Gone(1), collect=int)
    optimizer.before_large_work("loading m 1")
    optimizer.ran_out("m 1")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert optimizer.newest is None

    async def scenario() -> None:
        looks: list[int] = []
        watching = asyncio.create_task(optimizer.watch(0.001, then=lambda: looks.append(1)))
        await until(lambda: len(looks) >= 3)
        watching.cancel()

    asyncio.run(scenario())
    assert sum("the memory is not known" in record.message for record in caplog.records) == 1


def test_whatever_a_framework_raises_is_no_end_of_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Pool):
        def figures(self) -> Figures:
            raise RuntimeError("CUDA error: unspecified launch failure")

    optimizer, _ = optimizer_of(Broken(1), collect=int)

    async def scenario() -> None:
        looks: list[int] = []
        watching = asyncio.create_task(optimizer.watch(0.001, then=lambda: looks.append(1)))
        await until(lambda: len(looks) >= 3 or watching.done())
        assert not watching.done()
        watching.cancel()

    asyncio.run(scenario())
    assert sum("looking at the memory failed" in record.message for record in caplog.records) == 1


def test_the_watch_looks_and_cleans_up_where_that_is_predicted() -> None:
    pool = Pool(100 * MEBIBYTE)
    optimizer = MemoryOptimizer(pool, budget_bytes=50 * MEBIBYTE, collect=int)
    with ExitStack() as stack:
        fill(pool, stack, 40)
        keep(pool, 30)

        async def scenario() -> None:
            watching = asyncio.create_task(optimizer.watch(0.001))
            await until(lambda: optimizer.clean_up_count)
            watching.cancel()

        asyncio.run(scenario())
    assert optimizer.freed_mb_total == 30.0


FILLED = """
import json
import numpy as np
from serving.device.devices import CpuDevice
from serving.device.memory import MemoryOptimizer

device = CpuDevice(2048 << 20)
optimizer = MemoryOptimizer(device, budget_bytes=device.budget_bytes)
looks = [optimizer.profile()]
# Small blocks, of which a few at the end keep the heap from shrinking by itself.
blocks = [np.ones(8000) for _ in range(2000)]
looks.append(optimizer.profile())
held = blocks[::100]
del blocks
looks.append(optimizer.profile())
done = optimizer.clean_up("test")
print(json.dumps({"looks": [look.as_dict() for look in looks], "freed_mb": done.freed_mb}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="for want of: the C library's figures")
def test_on_the_cpu_the_figures_are_those_of_the_process_and_a_clean_up_gives_memory_back(repository: Path) -> None:
    # A process of its own: in this one, other tests take and give back memory.
    run = subprocess.run(
        [sys.executable, "-c", FILLED], cwd=repository, capture_output=True, text=True, timeout=60, check=True
    )
    found = json.loads(run.stdout)
    before, during, between = found["looks"]
    assert during["allocated_mb"] - before["allocated_mb"] > 100 and during["reserved_mb"] >= during["allocated_mb"]
    assert between["allocated_mb"] < during["allocated_mb"] - 80
    assert between["fragmentation_ratio"] > during["fragmentation_ratio"] and found["freed_mb"] > 40


def test_without_figures_of_the_c_library_the_models_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.device.devices._in_use_bytes", lambda: None)
    found = CpuDevice(100 * MEBIBYTE, models=lambda: 7 * MEBIBYTE).figures()
    assert (found.total, found.allocated) == (100 * MEBIBYTE, 7 * MEBIBYTE)
    assert found.reserved >= found.allocated


def test_the_profile_of_no_device_is_zeros_of_level_none() -> None:
    assert NO_DEVICE["pressure_level"] == "none" and NO_DEVICE["total_mb"] == 0 and NO_DEVICE["timestamp"] is None


def test_looking_and_cleaning_from_many_threads_keeps_count() -> None:
    from concurrent.futures import ThreadPoolExecutor

    pool = Pool(100 * MEBIBYTE)
    optimizer = MemoryOptimizer(pool, collect=int)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: optimizer.ran_out(f"m {n}") if n % 2 else optimizer.profile(), range(400)))
    assert (optimizer.looks, optimizer.out_of_memory_count, optimizer.clean_up_count) == (200, 200, 200)
