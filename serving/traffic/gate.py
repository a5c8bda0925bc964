"""Requests of a model that has no version for the moment wait here: see serving.loaded.swap (an exchange) and serving.loaded.residency (it sleeps)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from registry.errors import UnavailableError
from serving.statuses import BusyError, ClientGoneError

Receive = Callable[[], Awaitable[Any]]


class Gate:
    """Holds back the requests of models that have no version for the moment. On the event loop only."""

    def __init__(self) -> None:
        self.closed: dict[str, asyncio.Event] = {}
        self.knock: Callable[[str], None] | None = None
        """Told of every model that is waited for: one that sleeps is woken. Raises UnavailableError where waiting is of no use."""
        self.most_waiting: Callable[[], int] = lambda: 128
        """Of all models together: those that wait hold places that other models could use."""
        self.waiting = 0
        self.waited = 0
        """Requests that were held back, since the start."""
        self.waited_seconds = 0.0
        self.longest_seconds = 0.0
        self.turned_away = 0
        self.left = 0
        """Clients that went while they waited."""

    def close(self, models: Iterable[str]) -> None:
        for model in models:
            self.closed.setdefault(model, asyncio.Event())

    def open(self, models: Iterable[str]) -> None:
        for model in models:
            event = self.closed.pop(model, None)
            if event is not None:
                event.set()

    def look_again(self, models: Iterable[str]) -> None:
        """Have those who wait for these models, which stay closed, knock again: there may be nothing to wait for any more."""
        for model in models:
            event = self.closed.get(model)
            if event is not None:
                self.closed[model] = asyncio.Event()
                event.set()

    async def wait(self, model: str, timeout_seconds: float, receive: Receive | None = None) -> None:
        """Until the model has a version again. `receive` is the client's, whose body has been read: it tells when he goes.

        Raises BusyError where too many wait, UnavailableError where it takes too long or is of no use, ClientGoneError.
        """
        if model not in self.closed:
            return
        self._knock(model)
        if self.waiting >= self.most_waiting():
            self.turned_away += 1
            raise BusyError(
                f"{self.waiting} requests wait for versions that are on their way, the most that may; try again later"
            )
        began = time.perf_counter()
        self.waiting += 1
        self.waited += 1
        gone = None if receive is None else asyncio.create_task(client_gone(receive))
        try:
            async with asyncio.timeout(timeout_seconds):
                while (event := self.closed.get(model)) is not None:
                    self._knock(model)
                    await _either(event, gone)
        except TimeoutError:
            self.turned_away += 1
            raise UnavailableError(
                f"model '{model}' is being loaded or exchanged for another version, which took longer than {timeout_seconds:g} s; "
                "try again later"
            ) from None
        except UnavailableError:
            self.turned_away += 1
            raise
        except ClientGoneError:
            self.left += 1
            raise
        finally:
            if gone is not None and not gone.done():
                gone.cancel()
            self.waiting -= 1
            seconds = time.perf_counter() - began
            self.waited_seconds += seconds
            self.longest_seconds = max(self.longest_seconds, seconds)

    def _knock(self, model: str) -> None:
        if self.knock is not None:
            self.knock(model)

    def as_dict(self) -> dict[str, Any]:
        """What model-info tells."""
        return {
            "models": sorted(self.closed),
            "waiting": self.waiting,
            "waited": self.waited,
            "waited_seconds": round(self.waited_seconds, 3),
            "longest_seconds": round(self.longest_seconds, 3),
            "turned_away": self.turned_away,
            "left": self.left,
        }


async def client_gone(receive: Receive) -> None:
    """Returns when the client has gone. His body has been read, so nothing else can come."""
    if (await receive()).get("type") != "http.disconnect":
        await asyncio.Event().wait()


async def _set(event: asyncio.Event) -> None:
    await event.wait()


async def _either(event: asyncio.Event, gone: asyncio.Task[None] | None) -> None:
    """Until the event is set. Raises ClientGoneError where the client goes first."""
    if gone is None:
        await event.wait()
        return
    waiter = asyncio.create_task(_set(event))
    try:
        await asyncio.wait({waiter, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not waiter.done():
            waiter.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({waiter})
    if not event.is_set():
        raise ClientGoneError("the client went while it waited for the model")
