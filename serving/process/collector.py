"""When Python's garbage collector runs: seldom while requests are answered, and often enough that nothing piles up between."""

from __future__ import annotations

import asyncio
import gc
import time

_YOUNG_OBJECTS = 5000
"""Containers made and still there, before the collector looks by itself for those that only hold each other."""
COLLECT_SECONDS = 5.0
_SHARE = 0.001
"""Of the time that may be spent collecting: where there is much to walk through, it is done less often."""


def freeze_startup_objects() -> None:
    """Take everything that exists now out of the collector's sight. Call once, when the server is built.

    A full collection walks all that the imported packages have made (60,000 containers) while every request waits: it
    was the p99 of 50 ms at 64 connections, which is 8 ms without. What is created later is collected as ever, but only when
    there is more of it than many requests at once have: 64 of them made the collector look at each of them several times, and
    a request leaves nothing behind that it would find.
    """
    gc.collect()
    gc.freeze()
    # It remembers how much lived at its last full run, and has none before a quarter of that is new: of what is frozen, that is hours.
    gc.collect()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])


async def collect(seconds: float = COLLECT_SECONDS) -> None:
    """Collect again and again, until it is cancelled.

    A poll of the registry leaves some containers that hold each other, and so does a client that waits long. Where there are
    few requests the collector comes by once in minutes, and the heap is as high as what has piled up by then: over hours that
    was 1 MB more and looked like a leak. The two thousand containers of a server with ONNX models take less than a millisecond.
    """
    while True:
        await asyncio.sleep(seconds)
        began = time.perf_counter()
        gc.collect()
        await asyncio.sleep((time.perf_counter() - began) / _SHARE)
