"""The threads beside the event loop are all there from the start, and stay as many."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from registry.errors import UnavailableError
from serving.process import threads


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


def test_where_the_system_lets_no_more_start_that_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if of("few") == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="5 threads are needed here and 3 could be started"):
        threads.full(5, "few")
    assert time.monotonic() - began < threads._START_SECONDS / 2
    deadline = time.monotonic() + 5
    while of("few") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert of("few") == 0, "those that had started wait for nobody"
