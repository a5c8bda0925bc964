"""Notices a version whose worker is at one computation for far too long, and when what that leaves behind asks for a new process.

What is done about the version is serving.loaded.caretaker's and serving.follow.reconcile's. The thread cannot be ended from outside: a runtime that
can be told to give up is told so (`interrupt`), else the thread stays until the process ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from registry.errors import UnavailableError
from registry.settings import Settings
from serving.compute.engine import LoadedVersion
from serving.state import Serving

log = logging.getLogger("modelkeep.watchdog")

STUCK_MOST = 2
"""With so many workers that cannot be ended the process is replaced: each holds its model's memory, and may hold a core."""

FORGIVEN_SECONDS = 5.0
"""A version whose worker came to its end after all, and that nobody has replaced for so long, is asked again."""

_LOOK_SECONDS = 0.5
_STEP_MOST = 2.0
_END_SECONDS = 20.0
"""Beyond its time to drain, how long a process that is to be replaced has to end by itself."""


@dataclass(slots=True)
class _Watched:
    """`run` is the computation that was under way at the last look; `seconds` for how long we have seen it."""

    run: int = 0
    seconds: float = 0.0


class Watchdog:
    """One a process; on the event loop only. Only time in which it could look counts: a process that was stopped has not hung."""

    def __init__(
        self,
        hang_seconds: float,
        *,
        drain_seconds: float = 10.0,
        budget_bytes: int | None = None,
        there: Callable[[], Iterable[LoadedVersion]] = tuple,
        restart: Callable[[float], None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`there` are the versions that take memory beside the stuck ones; None for a budget that is not known.
        `restart` ends the process in good order.
        """
        self.hang_seconds = hang_seconds
        self.stuck: list[LoadedVersion] = []
        """Versions that nobody needs any more, and whose worker still computes."""
        self.hangs = 0
        """Since the start."""
        self.abandoned: Callable[[], Collection[tuple[str, int]]] = tuple
        """(name, bytes) of what hangs while it loads, and nobody wants any more."""
        self.restarting = False
        self._drain_seconds = drain_seconds
        self._budget_bytes = budget_bytes
        self._there = there
        self._restart = restart or _end_this_process
        self._monotonic = monotonic
        self._looked: float | None = None
        self._watched: dict[int, _Watched] = {}

    @classmethod
    def of(
        cls, settings: Settings, serving: Serving, leaving: Collection[LoadedVersion], budget_bytes: int | None
    ) -> Watchdog:
        """`leaving` are on their way out, and take memory until they are gone."""
        return cls(
            settings.hang_seconds,
            drain_seconds=settings.server.drain_seconds,
            budget_bytes=budget_bytes,
            there=lambda: (*serving.loaded.values(), *leaving),
        )

    @property
    def look_seconds(self) -> float:
        """How often it looks: ten times within the limit, and at least each half second."""
        return min(_LOOK_SECONDS, self.hang_seconds / 10)

    async def run(self, loaded: Callable[[], Collection[LoadedVersion]]) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(self.look_seconds)
            try:
                self.look(loaded())
            except Exception:  # whatever it is, it shall not be the end of looking
                log.exception("the watchdog could not look; trying again")

    def look(self, loaded: Iterable[LoadedVersion]) -> list[LoadedVersion]:
        """Returns the versions that are found to hang now; they refuse requests from here on."""
        now = self._monotonic()
        step = 0.0 if self._looked is None else min(now - self._looked, _STEP_MOST * self.look_seconds)
        self._looked = now
        versions = list(loaded)
        known = {id(version): self._watched.get(id(version), _Watched()) for version in versions}
        self._watched = known
        found = []
        for version in versions:
            watched, run = known[id(version)], version.computing
            watched.seconds = watched.seconds + step if run == watched.run else 0.0
            watched.run = run
            if run and version.hung is None and watched.seconds >= self.hang_seconds:
                self._found(version, watched.seconds)
                found.append(version)
            elif not run and version.hung is not None and watched.seconds >= FORGIVEN_SECONDS:
                log.warning("%r has come to the end of its computation, and is asked again", version)
                version.answers_again()
        self.stuck = [version for version in self.stuck if not version.join(0)]
        left = len(self.stuck) + len(self.abandoned())
        if left >= STUCK_MOST:
            self.replace_process(f"{left} workers hang that cannot be ended")
        elif left and not self._fits(0):
            self.replace_process("a worker that hangs and cannot be ended holds memory that the others need")
        return found

    def left_behind(self, version: LoadedVersion) -> None:
        """Its worker did not end when nobody needed it any more."""
        self.stuck.append(version)

    def fits_again(self, version: LoadedVersion | None) -> bool:
        """Whether a version may be loaded once more beside itself; where it hangs and may not, the process is replaced, which frees all."""
        if version is None or version.hung is None or self._fits(version.claim_bytes):
            return True
        self.replace_process(f"{version!r} hangs, and the memory does not hold another copy of it beside that one")
        return False

    def _fits(self, more_bytes: int) -> bool:
        there = {id(version): version for version in (*self._there(), *self.stuck)}.values()
        taken = sum(version.claim_bytes for version in there) + sum(size for _, size in self.abandoned())
        return self._budget_bytes is None or taken + more_bytes <= self._budget_bytes

    def replace_process(self, reason: str) -> None:
        """End this process in good order, so that its parent starts another: connections wait in the socket meanwhile. Once."""
        if self.restarting:
            return
        self.restarting = True
        log.error("this server ends, to be started again: %s", reason)
        self._restart(self._drain_seconds + _END_SECONDS)

    def leave(self, loaded: Iterable[LoadedVersion], *, loading: bool = False) -> None:
        """The last step of a process: where a worker still hangs, or something is being loaded, end here and now, for a library's own
        clean-up would wait for it.
        """
        if not loading and not any(version.computing and not version.join(0) for version in (*self.stuck, *loaded)):
            return
        log.warning("a worker still computes or loads: the process ends without waiting for it")
        logging.shutdown()
        os._exit(0)

    def as_dict(self) -> dict[str, Any]:
        """What model-info tells."""
        stuck = [f"{version.model}/{version.version}" for version in self.stuck]
        return {"hangs": self.hangs, "stuck": [*stuck, *(name for name, _ in self.abandoned())]}

    def _found(self, version: LoadedVersion, seconds: float) -> None:
        self.hangs += 1
        reason = f"one computation has taken {seconds:.0f} s, more than health.hang_seconds = {self.hang_seconds:g}"
        log.error("%r hangs: %s", version, reason)
        who = f"model '{version.model}' version '{version.version}'"
        version.declare_hung(reason, UnavailableError(f"{who} hangs ({reason}); try again later"))


def _end_this_process(patience_seconds: float) -> None:
    """As a stop does; and for sure, should that not come to its end."""
    timer = threading.Timer(patience_seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
    os.kill(os.getpid(), signal.SIGTERM)
