"""The threads beside the event loop are all there from the start, and stay as many."""

from __future__ import annotations

import asyncio
import threading
import time

from serving import threads


def of(name: str) -> int:
    return sum(one.name.startswith(f"{name}_") for one in threading.enumerate())


def test_a_pool_has_all_its_threads_before_there_is_work() -> None:
    with threads.full(5, "whole") as pool:
        assert of("whole") == 5
        assert sorted(pool.map(lambda number: number * 2, range(40))) == list(range(0, 80, 2))
        assert of("whole") == 5
    assert of("whole") == 0


def test_the_event_loop_takes_no_thread_more_however_much_comes_at_once() -> None:
    async def story() -> None:
        asyncio.get_running_loop().set_default_executor(threads.beside_the_loop())
        before = threading.active_count(), of("beside")
        await asyncio.gather(*[asyncio.to_thread(time.sleep, 0.001) for _ in range(100)])
        assert (threading.active_count(), of("beside")) == before

    asyncio.run(story())
    assert of("beside") == 0
