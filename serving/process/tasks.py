"""Tasks of the event loop: together until the last, and ended for certain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable
from typing import Any

log = logging.getLogger("modelkeep.tasks")

_AGAIN_SECONDS = 1.0


async def all_of(awaitables: Iterable[Awaitable[Any]]) -> None:
    """Wait until each has ended. Raises the first error of any, in their order.

    `asyncio.gather` by itself ends with the first error, and the others go on: outside of the caller's time-out, each with what it
    holds. And a cancellation of the caller that comes between such an error and the turn in which it is told is lost.
    """
    for answer in await asyncio.gather(*awaitables, return_exceptions=True):
        if isinstance(answer, BaseException):
            raise answer


async def ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended. One that swallows a cancellation, as `asyncio.wait_for` may before Python 3.12, gets another
    after a second. An error that a task ended with is logged.
    """
    tasks = set(tasks)
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_SECONDS)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task ended with an error: %r", task, exc_info=error)
