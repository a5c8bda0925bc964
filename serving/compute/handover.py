"""Between the event loop and the worker threads of versions: how a worker is woken, and how what it has done comes back.

Who wakes a thread while he holds the interpreter's lock wakes it to wait for that lock: two switches between threads for nothing. A
write to an eventfd lets go of the lock, so the other side finds it free.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

logger = logging.getLogger("serving.compute.engine")


class Bell:
    """Wakes one worker. It rings at the end of the event loop's turn, for all that came in it, and however often it was pulled once."""

    __slots__ = ("_fd", "_pulled")

    def __init__(self) -> None:
        self._fd = os.eventfd(0)
        self._pulled = False

    def pull(self, loop: asyncio.AbstractEventLoop) -> None:
        """There is something to do. On the event loop."""
        if not self._pulled:
            self._pulled = True
            loop.call_soon(self.ring)

    def ring(self) -> None:
        """At once. On the event loop, or where none has ever pulled it."""
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    def wait(self) -> None:
        """Until it rings, or has rung since the last time. Look for work after it, not before: then no pull is missed."""
        os.eventfd_read(self._fd)
        self._pulled = False

    def close(self) -> None:
        """Once its worker waits for it no more. On the event loop, where it may be about to ring, if there is one."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class Deliveries:
    """Calls from any thread, made on one event loop in their order; those that came together are made together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raises RuntimeError where the loop is closed."""
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._told = False
        loop.call_soon_threadsafe(loop.add_reader, self._fd, self._make)

    def put(self, callback: Callable[..., None], values: tuple[Any, ...]) -> None:
        self._calls.append((callback, values))
        if not self._told:
            self._told = True
            os.eventfd_write(self._fd, 1)

    def _make(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        self._told = False  # before the look: who comes behind it tells again
        calls = self._calls
        while calls:
            callback, values = calls.popleft()
            try:
                callback(*values)
            except Exception:  # as an event loop does it: those behind it are made all the same
                logger.exception("a delivery of a worker failed")

    def __del__(self) -> None:
        os.close(self._fd)


_deliveries: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Deliveries] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def deliveries_of(loop: asyncio.AbstractEventLoop) -> Deliveries:
    """Those of an event loop: one descriptor for all workers. Raises RuntimeError where it is closed."""
    with _making:
        found = _deliveries.get(loop)
        if found is None:
            found = _deliveries[loop] = Deliveries(loop)
        return found
