"""Tasks that are waited for together, and tasks that are ended."""

from __future__ import annotations

import asyncio
import logging

import pytest

from serving.process import tasks
from serving.process.tasks import all_of, ended


def test_the_first_error_is_told_once_all_have_ended() -> None:
    async def scenario() -> list[str]:
        seen: list[str] = []

        async def fails(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append(name)
            raise ValueError(name)

        async def works() -> None:
            await asyncio.sleep(0.02)
            seen.append("works")

        with pytest.raises(ValueError, match="second"):
            await all_of([works(), fails("second", 0.01), fails("third", 0)])
        return seen

    assert asyncio.run(scenario()) == ["third", "second", "works"]


def test_a_time_out_ends_those_beside_one_that_failed() -> None:
    async def scenario() -> None:
        ends = []

        async def stands_still() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ends.append("ended")

        async def fails() -> None:
            raise ConnectionError("gone")

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await all_of([fails(), stands_still(), stands_still()])
        assert ends == ["ended", "ended"]

    asyncio.run(scenario())


@pytest.mark.parametrize("turns", range(6))
def test_a_cancellation_counts_whenever_another_error_comes(turns: int) -> None:
    """`asyncio.gather` gives the error in its place where they come in one turn of the event loop."""

    async def scenario() -> None:
        first = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(all_of([first, asyncio.sleep(3600)]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.set_exception(ConnectionError("gone"))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting], timeout=30)
        assert waiting.cancelled()

    asyncio.run(scenario())


def test_what_swallows_a_cancellation_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_AGAIN_SECONDS", 0.01)

    async def scenario() -> None:
        async def deaf(times: int) -> None:
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    times -= 1
                    if times < 0:
                        raise

        several = [asyncio.create_task(deaf(times)) for times in range(4)]
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await ended(several)
        assert all(task.cancelled() for task in several)

    asyncio.run(scenario())


def test_what_had_ended_with_an_error_is_told_and_no_error_of_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async def fails() -> None:
            raise ValueError("long ago")

        failed = asyncio.create_task(fails())
        await asyncio.wait([failed])
        await ended([failed, asyncio.create_task(asyncio.sleep(3600))])
        await ended([])

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is not None
    assert str(caplog.records[0].exc_info[1]) == "long ago"
