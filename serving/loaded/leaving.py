"""Versions on their way out: they finish what they have, then their memory goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from serving.compute.engine import LoadedVersion
from serving.device.devices import give_back
from serving.loaded.caretaker import Caretaker

log = logging.getLogger("modelkeep.reconcile")

_JOIN_SECONDS, _JOIN_HUNG_SECONDS = 10.0, 1.0


class Leaving:
    """One a process. On the event loop only."""

    def __init__(self, caretaker: Caretaker, *, drain_seconds: float) -> None:
        self.versions: set[LoadedVersion] = set()
        self.left_behind: Callable[[LoadedVersion], object] = lambda version: None
        """Told of one that still computes when nobody waits for it any more."""
        self._caretaker, self._drain_seconds = caretaker, drain_seconds
        self._drains: set[asyncio.Task[None]] = set()

    def let_go(self, unneeded: Iterable[LoadedVersion], loaded: Collection[tuple[str, str]]) -> None:
        """They are out of what is served, which is `loaded`: drain and close them in the background."""
        for old in unneeded:
            self._caretaker.leaving(old, replaced=(old.model, old.version) in loaded)
            self.versions.add(old)
            task = asyncio.create_task(self.drain(old))
            self._drains.add(task)
            task.add_done_callback(self._drains.discard)

    async def drain(self, version: LoadedVersion) -> None:
        """Until its requests have ended (at most the time that a stop gives them) and its memory is free."""
        if not await version.drain(self._drain_seconds):
            log.error("%s %s still had requests after %g s", version.model, version.version, self._drain_seconds)
        version.close()
        if not await asyncio.to_thread(version.join, _JOIN_SECONDS if version.hung is None else _JOIN_HUNG_SECONDS):
            log.error("%s %s still computes: its memory is not free yet", version.model, version.version)
            self.left_behind(version)
        self.versions.discard(version)
        self._caretaker.gone(version)
        # What its allocations leave between others is held by the C library, on every thread that ever had any: more with each version.
        await asyncio.to_thread(give_back)

    async def wait(self, timeout_seconds: float | None = None) -> None:
        """Until all that is on its way out now is gone."""
        if self._drains:
            await asyncio.wait(self._drains, timeout=timeout_seconds)
