"""Versions on their way out: a text runs to its end while nobody needs the memory, and as long as a stop gives it where somebody does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from registry.settings import Settings
from serving.loaded.caretaker import Caretaker
from serving.loaded.leaving import Leaving
from serving.text.exchange import end_texts
from serving.text.version import TextVersion
from tests.unit.serving.helpers import Answer, Server, load, until
from tests.unit.serving.texting import GENERATE, asked, events, held, serve, text_version

DRAIN_SECONDS = 0.05
LONG = 60.0


class Exchanged:
    """Version 1 of a model generates a text for a client, and version 2 takes its place."""

    def __init__(self, folder: Path, text_seconds: float) -> None:
        self.leaving = Leaving(
            Caretaker(folder, Settings(home=folder).health), drain_seconds=DRAIN_SECONDS, text_seconds=text_seconds
        )
        self.old, self.gate = held("1")
        self.new = text_version(version="2")
        self.server: Server = serve(self.old)
        self.stream: asyncio.Task[Answer]

    async def begin(self) -> None:
        """A stream of the old version, which goes on when the gate is released."""
        self.gate.release(2)
        self.stream = asyncio.create_task(self.server.post(GENERATE, asked(stream=True, max_tokens=10)))
        await until(lambda: self.old.text_counts.completion_tokens >= 2)

    async def replace(self, *versions: TextVersion) -> None:
        await self.begin()
        serving, loaded = self.server.serving, {(version.model, version.version): version for version in versions}
        self.leaving.let_go(serving.install(serving.routes, loaded, "epoch", 2), loaded)

    async def last(self) -> Any:
        """The last event of the stream."""
        return events((await self.stream).body)[-1]


Test = Callable[[Exchanged], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def whole(test: Test, text_seconds: float = LONG) -> None:
        async def scenario() -> None:
            box = Exchanged(tmp_path, text_seconds)
            try:
                await test(box)
            finally:
                box.gate.release(100)
                box.old.close()
                box.new.close()
                await box.leaving.wait()

        asyncio.run(scenario())

    return whole


def test_a_text_of_a_replaced_version_runs_to_its_end(run: Run) -> None:
    async def test(box: Exchanged) -> None:
        await box.replace(box.new)
        await asyncio.sleep(4 * DRAIN_SECONDS)
        assert not box.stream.done() and box.old in box.leaving.versions
        box.gate.release(20)
        assert (await box.last())["finish_reason"] == "length"
        await until(lambda: not box.leaving.versions)
        assert box.old.ended

    run(test)


def test_it_has_no_more_time_than_a_text_may_take(run: Run) -> None:
    async def test(box: Exchanged) -> None:
        await box.replace(box.new)
        await asyncio.sleep(2 * DRAIN_SECONDS)
        assert not box.stream.done()
        last = await box.last()
        assert last["status"] == 503 and "taken out of service" in last["error"]

    run(test, 6 * DRAIN_SECONDS)


def test_who_waits_for_the_memory_gives_it_as_long_as_a_stop_does_from_then_on(run: Run) -> None:
    async def test(box: Exchanged) -> None:
        await box.replace(box.new)
        await asyncio.sleep(2 * DRAIN_SECONDS)
        threading.Timer(6 * DRAIN_SECONDS, box.gate.release, [20]).start()  # its worker sees late that it was closed
        began = time.monotonic()
        await box.leaving.wait(DRAIN_SECONDS)
        assert time.monotonic() - began >= DRAIN_SECONDS
        assert box.old.ended and not box.leaving.versions, "the memory is free when the wait is over"
        assert (await box.last())["status"] == 503

    run(test)


def test_who_needs_the_memory_and_does_not_wait_for_it_shortens_their_time_too(run: Run) -> None:
    """An emergency: it loads at once, beside what is still on its way out."""

    async def test(box: Exchanged) -> None:
        await box.replace(box.new)
        await asyncio.sleep(2 * DRAIN_SECONDS)
        assert not box.stream.done()
        box.leaving.hurry()
        async with asyncio.timeout(10):
            assert (await box.last())["status"] == 503
        box.gate.release(20)

    run(test)


def test_what_goes_after_somebody_has_waited_has_its_whole_time_again(run: Run) -> None:
    async def test(box: Exchanged) -> None:
        await box.leaving.wait(DRAIN_SECONDS)
        await box.replace(box.new)
        await asyncio.sleep(4 * DRAIN_SECONDS)
        assert not box.stream.done()
        box.gate.release(20)
        assert (await box.last())["finish_reason"] == "length"

    run(test)


def test_one_of_a_model_that_is_not_served_any_more_is_let_go_as_before(run: Run) -> None:
    """It was unloaded, or others needed its memory."""

    async def test(box: Exchanged) -> None:
        await box.replace()
        async with asyncio.timeout(10):
            assert (await box.last())["status"] == 503

    run(test)


def test_an_exchange_that_waits_for_this_one_drains_it_as_before(run: Run) -> None:
    async def test(box: Exchanged) -> None:
        await box.begin()
        async with asyncio.timeout(10):
            draining = asyncio.create_task(box.leaving.drain(box.old))
            assert (await box.last())["status"] == 503
            box.gate.release(20)
            await draining

    run(test)


def test_one_that_generates_no_text_has_as_long_as_a_stop_gives_it(run: Run) -> None:
    async def test(box: Exchanged) -> None:
        plain = load()
        plain.acquire()
        box.leaving.let_go([plain], [("m", "2")])
        async with asyncio.timeout(10):
            await until(lambda: plain.ended)

    run(test)


def test_a_stop_ends_the_streams_of_a_version_on_its_way_out_with_a_last_event(run: Run) -> None:
    async def test(box: Exchanged) -> None:
        await box.replace(box.new)
        end_texts(box.server.serving)
        async with asyncio.timeout(10):
            last = await box.last()
        assert last["status"] == 503 and "stopping" in last["error"]
        assert box.old.telemetry.total.errors == 0

    run(test)
