"""The threads for work beside the event loop: all there from the start, so that their number says whether any leak.

A pool of the standard library starts a thread whenever work comes while every other is busy, and never ends it: over days it grows
to its most, by a thread and its part of the C library's heap at a time, and looks like a leak until then.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait

from registry.errors import UnavailableError

_START_SECONDS = 30.0


def beside_the_loop() -> ThreadPoolExecutor:
    """For `asyncio.to_thread`: as many as the event loop would have taken at most."""
    return full(min(32, (os.cpu_count() or 1) + 4), "beside")


def full(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads are all started. Raises UnavailableError where the system lets no more of them start."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    together = threading.Barrier(threads)
    started = []
    try:
        for _ in range(threads):
            started.append(pool.submit(together.wait, _START_SECONDS))
    except RuntimeError as error:
        together.abort()  # those that are there wait for the others
        pool.shutdown(wait=False)
        raise UnavailableError(
            f"{threads} threads are needed here and {len(started)} could be started ({error}): raise the limit of processes "
            "(ulimit -u, TasksMax of the service, the container's pids limit)"
        ) from error
    for one in wait(started).done:
        one.result()
    return pool
