"""What holds itself is collected soon, however little is made meanwhile."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from serving.process.collector import collect


class Ring:
    def __init__(self) -> None:
        self.itself = self


def test_what_only_holds_itself_goes_without_anything_being_made() -> None:
    async def story() -> None:
        collecting = asyncio.create_task(collect(0.01))
        gone = weakref.ref(Ring())
        deadline = asyncio.get_running_loop().time() + 30
        while gone() is not None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        assert gone() is None
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting

    before = gc.get_threshold()
    gc.set_threshold(1_000_000, *before[1:])
    try:
        asyncio.run(story())
    finally:
        gc.set_threshold(*before)
