"""Versions on their way out: they finish what they have, then their memory goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from serving.compute.engine import LoadedVersion
from serving.device.devices import give_back_surplus
from serving.loaded.caretaker import Caretaker
from serving.text.version import TextVersion

log = logging.getLogger("modelkeep.reconcile")

_JOIN_SECONDS, _JOIN_HUNG_SECONDS = 10.0, 1.0


class Leaving:
    """One a process. On the event loop only."""

    def __init__(self, caretaker: Caretaker, *, drain_seconds: float, text_seconds: float) -> None:
        """A stop gives requests `drain_seconds`; `text_seconds` is the longest that one text may take."""
        self.versions: set[LoadedVersion] = set()
        self.left_behind: Callable[[LoadedVersion], object] = lambda version: None
        """Told of one that still computes when nobody waits for it any more."""
        self._caretaker, self._drain_seconds = caretaker, drain_seconds
        self._patience_seconds = max(0.0, text_seconds - drain_seconds)
        self._drains: set[asyncio.Task[None]] = set()
        self._needed = asyncio.Event()
        """Set once, when somebody waits for those that are on their way out then; another takes its place for those that come later."""

    def let_go(self, unneeded: Iterable[LoadedVersion], loaded: Collection[tuple[str, str]]) -> None:
        """They are out of what is served, which is `loaded`: drain and close them in the background.

        A text that another version has taken the place of has all its time, until somebody waits for the memory.
        """
        served = {model for model, _ in loaded}
        for old in unneeded:
            self._caretaker.leaving(old, replaced=(old.model, old.version) in loaded)
            self.versions.add(old)
            patient = isinstance(old, TextVersion) and old.model in served
            task = asyncio.create_task(self.drain(old, self._needed if patient else None))
            self._drains.add(task)
            task.add_done_callback(self._drains.discard)

    async def drain(self, version: LoadedVersion, needed: asyncio.Event | None = None) -> None:
        """Until its requests have ended and its memory is free. They have the time that a stop gives them, counted from when the memory is
        `needed` (now, where there is no such event), and no more than a text may take.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        if needed is not None:
            await self._until_needed(version, needed)
        if not await version.drain(self._drain_seconds):
            log.error("%s %s still had requests after %.3g s", version.model, version.version, loop.time() - began)
        version.close()
        if not await asyncio.to_thread(version.join, _JOIN_SECONDS if version.hung is None else _JOIN_HUNG_SECONDS):
            log.error("%s %s still computes: its memory is not free yet", version.model, version.version)
            self.left_behind(version)
        self.versions.discard(version)
        self._caretaker.gone(version)
        # What its allocations leave between others is held by the C library.
        await asyncio.to_thread(give_back_surplus)

    def hurry(self) -> None:
        """Somebody needs the memory of those that are on their way out now: their texts have no more than the time that a stop gives."""
        self._needed.set()
        self._needed = asyncio.Event()

    async def wait(self, timeout_seconds: float | None = None) -> None:
        """Until all that is on its way out now is gone: somebody needs that memory. `timeout_seconds` are for their requests; who computes on
        then has a moment more to end.
        """
        self.hurry()
        if self._drains:
            await asyncio.wait(
                self._drains, timeout=None if timeout_seconds is None else timeout_seconds + _JOIN_SECONDS
            )

    async def _until_needed(self, version: LoadedVersion, needed: asyncio.Event) -> None:
        """Until its requests have ended, somebody waits for the memory, or there is no more time than a stop gives."""
        ends = {
            asyncio.create_task(version.drain(self._patience_seconds)),
            asyncio.create_task(needed.wait()),
        }
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
