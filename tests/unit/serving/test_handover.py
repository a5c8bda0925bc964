"""Waking a worker, and what it hands back: nothing is lost or done twice, whoever is quicker; no descriptor is left."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections import deque
from pathlib import Path

import pytest
import uvloop

from serving.compute.handover import Bell, Deliveries, deliveries_of

LOOPS = (asyncio.new_event_loop, uvloop.new_event_loop)
PATIENCE_SECONDS = 60


@pytest.mark.parametrize("new_loop", LOOPS)
@pytest.mark.parametrize("workers", [1, 3])
def test_everything_put_in_front_of_a_worker_comes_back_once_and_in_its_order(new_loop: object, workers: int) -> None:
    queues: list[deque[int]] = [deque() for _ in range(workers)]
    bells = [Bell() for _ in range(workers)]
    back: list[list[int]] = [[] for _ in range(workers)]
    count = 3000

    def work(number: int, loop: asyncio.AbstractEventLoop) -> None:
        queue, bell, done = queues[number], bells[number], back[number]
        while True:
            if queue:
                item = queue.popleft()
                deliveries_of(loop).put(done.append, (item,))
                if item == count:
                    return
            else:
                bell.wait()

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        threads = [threading.Thread(target=work, args=(number, loop)) for number in range(workers)]
        for thread in threads:
            thread.start()
        for item in range(1, count + 1):
            for queue, bell in zip(queues, bells, strict=True):
                queue.append(item)
                bell.pull(loop)
            if item % 7 == 0:
                await asyncio.sleep(0)
            if item % 500 == 0:  # until the workers sleep: what comes next has to wake them
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while any(len(done) < item for done in back):
                        await asyncio.sleep(0.001)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while any(len(done) < count for done in back):
                await asyncio.sleep(0.001)
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()

    with asyncio.Runner(loop_factory=new_loop) as runner:  # type: ignore[arg-type]
        runner.run(ask())
    assert back == [list(range(1, count + 1))] * workers
    for bell in bells:
        bell.close()


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_delivery_that_fails_is_logged_and_those_behind_it_are_made(
    new_loop: object, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[str] = []

    def fails() -> None:
        raise ValueError("on purpose")

    async def ask() -> None:
        found = deliveries_of(asyncio.get_running_loop())
        arrived = asyncio.Event()
        found.put(made.append, ("before",))
        found.put(fails, ())
        found.put(made.append, ("behind",))
        found.put(arrived.set, ())
        async with asyncio.timeout(PATIENCE_SECONDS):
            await arrived.wait()

    with (
        caplog.at_level(logging.ERROR, logger="serving.compute.engine"),
        asyncio.Runner(loop_factory=new_loop) as runner,
    ):  # type: ignore[arg-type]
        runner.run(ask())
    assert made == ["before", "behind"]
    assert "on purpose" in caplog.text


def test_a_bell_that_is_closed_rings_for_nobody() -> None:
    bell = Bell()
    bell.ring()
    bell.wait()  # it has rung: this returns at once
    bell.close()
    bell.close()
    bell.ring()


@pytest.mark.parametrize("new_loop", LOOPS)
def test_one_loop_has_one_descriptor_for_all_workers_and_takes_it_along(new_loop: object) -> None:
    def eventfds() -> int:
        gc.collect()
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum("eventfd" in str(link.readlink()) for link in links)

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        assert deliveries_of(loop) is deliveries_of(loop)
        await asyncio.sleep(0)

    before = eventfds()
    for _ in range(3):
        with asyncio.Runner(loop_factory=new_loop) as runner:  # type: ignore[arg-type]
            runner.run(ask())
        del runner
    assert eventfds() <= before


def test_who_delivers_to_a_loop_that_is_closed_is_told() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError):
        Deliveries(loop)
