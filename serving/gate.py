"""Requests of a model that has no version for the moment wait here: see serving.swap."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from registry.errors import UnavailableError
from serving.statuses import BusyError


class Gate:
    """Holds back the requests of models that have no version for the moment. On the event loop only."""

    def __init__(self) -> None:
        self.closed: dict[str, asyncio.Event] = {}
        self.most_waiting = 128
        """Of all models together: those that wait hold places that other models could use."""
        self.waiting = 0
        self.waited = 0
        """Requests that were held back, since the start."""
        self.waited_seconds = 0.0
        self.longest_seconds = 0.0
        self.turned_away = 0

    def close(self, models: Iterable[str]) -> None:
        for model in models:
            self.closed.setdefault(model, asyncio.Event())

    def open(self, models: Iterable[str]) -> None:
        for model in models:
            event = self.closed.pop(model, None)
            if event is not None:
                event.set()

    async def wait(self, model: str, timeout_seconds: float) -> None:
        """Until the model has a version again. Raises BusyError where too many wait, UnavailableError where it takes too long."""
        event = self.closed.get(model)
        if event is None:
            return
        if self.waiting >= self.most_waiting:
            self.turned_away += 1
            raise BusyError(
                f"{self.waiting} requests wait for versions that are being exchanged, the most that may; try again later"
            )
        began = time.perf_counter()
        self.waiting += 1
        self.waited += 1
        try:
            async with asyncio.timeout(timeout_seconds):
                while event is not None:
                    await event.wait()
                    event = self.closed.get(model)
        except TimeoutError:
            self.turned_away += 1
            raise UnavailableError(
                f"model '{model}' is being exchanged for a version that does not fit the memory beside it, which took longer than "
                f"{timeout_seconds:g} s; try again later"
            ) from None
        finally:
            self.waiting -= 1
            seconds = time.perf_counter() - began
            self.waited_seconds += seconds
            self.longest_seconds = max(self.longest_seconds, seconds)

    def as_dict(self) -> dict[str, Any]:
        """What model-info tells."""
        return {
            "models": sorted(self.closed),
            "waiting": self.waiting,
            "waited": self.waited,
            "waited_seconds": round(self.waited_seconds, 3),
            "longest_seconds": round(self.longest_seconds, 3),
            "turned_away": self.turned_away,
        }
