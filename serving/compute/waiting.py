"""Requests that wait for their version: each for as long as its client is there and its time lasts, and no longer."""

from __future__ import annotations

import asyncio
import time

from starlette.types import Receive

from serving.compute.engine import LoadedVersion
from serving.compute.work import Work
from serving.statuses import ClientGoneError, DeadlineError

WATCH_AFTER_SECONDS = 0.05
"""A request that waits longer than this is looked after: is its client still there, has it run out of time?"""
AMPLE_SECONDS = 1.0
"""A client's deadline from here on counts against a version whose route has no measure of slow: any model that is fit to
serve answers within it, so a version that hangs shows, and clients in a hurry bring no version down."""


class _Waiting:
    """A request that waits for its version."""

    __slots__ = ("loaded", "receive", "spent", "watcher", "work")

    def __init__(self, work: Work, loaded: LoadedVersion, receive: Receive, spent: float) -> None:
        self.work = work
        self.loaded = loaded
        self.receive = receive
        self.spent = spent
        self.watcher: asyncio.Task[None] | None = None


class Waits:
    """Those of one server. Used on the event loop only."""

    def __init__(self, timeout_seconds: float) -> None:
        """`timeout_seconds`: the longest that any request may take."""
        self._timeout_seconds = timeout_seconds
        self._waiting: set[_Waiting] = set()
        self._sweeping = False

    def check(self, loaded: LoadedVersion, timeout_seconds: float, spent: float) -> None:
        """Raises DeadlineError where all its time went before it came to the version, whose fault that is not."""
        given = min(timeout_seconds or self._timeout_seconds, self._timeout_seconds)
        if spent >= given:
            raise DeadlineError(
                f"model '{loaded.model}' version '{loaded.version}' was not asked: the request had waited for {spent:.3g} seconds "
                f"before its turn came, and has {given:g}"
            )

    async def wait(
        self, work: Work, loaded: LoadedVersion, receive: Receive, timeout_seconds: float, spent: float
    ) -> None:
        """Until the version has answered, for as long as the client gives it where that is not 0; `spent` of that is gone already.

        Raises ModelError, DeadlineError, ClientGoneError, UnavailableError.
        """
        deadline = None
        if timeout_seconds and timeout_seconds < self._timeout_seconds:
            # At its deadline it leaves the queue: it is not computed for nobody.
            loop = asyncio.get_running_loop()
            deadline = loop.call_later(max(0.0, timeout_seconds - spent), _expire, work, loaded, timeout_seconds, spent)
        waiting = _Waiting(work, loaded, receive, spent)
        self._waiting.add(waiting)
        if not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, self._sweep)
        try:
            await work.future
        finally:
            self._waiting.discard(waiting)
            if waiting.watcher is not None:
                waiting.watcher.cancel()
            if deadline is not None:
                deadline.cancel()

    def _sweep(self) -> None:
        """One timer for all requests: a timer or a task for each would cost more than the rest of the dispatch."""
        now = time.perf_counter()
        for waiting in tuple(self._waiting):
            waited = now - waiting.work.enqueued
            if waited + waiting.spent > self._timeout_seconds:
                loaded = waiting.loaded
                who = f"model '{loaded.model}' version '{loaded.version}'"
                error = DeadlineError(f"{who} did not answer within {self._timeout_seconds:g} seconds")
                # What was spent before the version was there is no fault of the version.
                loaded.withdraw(waiting.work, error, count_as_error=not waiting.spent or waited >= AMPLE_SECONDS)
            elif waiting.watcher is None and waited > WATCH_AFTER_SECONDS / 2:
                waiting.watcher = asyncio.create_task(self._watch(waiting))
        self._sweeping = bool(self._waiting)
        if self._sweeping:
            asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, self._sweep)

    async def _watch(self, waiting: _Waiting) -> None:
        message = await waiting.receive()
        if message["type"] == "http.disconnect":
            waiting.loaded.withdraw(waiting.work, ClientGoneError("the client went"), count_as_error=False)


def _expire(work: Work, loaded: LoadedVersion, timeout_seconds: float, spent: float) -> None:
    """The client's own deadline has come. The version's error only where it was slow by the measure of its route as well,
    or by AMPLE_SECONDS where the route has none: a client that gives a microsecond proves nothing against a version.
    """
    who = f"model '{loaded.model}' version '{loaded.version}'"
    error = DeadlineError(f"{who} did not answer within the {timeout_seconds:g} seconds of the parameter 'timeout'")
    threshold = work.slow_threshold_seconds
    had = timeout_seconds - spent
    slow = had >= AMPLE_SECONDS if threshold is None else had > threshold
    loaded.withdraw(work, error, count_as_error=slow)
