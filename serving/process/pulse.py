"""Whether the event loop of a server still turns, as its parent sees it: a count in memory that both have.

A library that computes without letting go of the interpreter (TorchScript does, while it loads) stops everything in the process, its
own watchdog as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

BEAT_SECONDS = 0.5
SLACK_SECONDS = 10.0
"""Beyond the limit of a load, so that what can be noticed inside the process is noticed there."""
_BYTES = 8
_STEP_MOST_SECONDS = 2.0


class Pulse:
    """The count. The parent makes it, and hands `descriptor` to its child, which opens it."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("modelkeep-pulse")
            os.ftruncate(descriptor, _BYTES)
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, _BYTES)

    @property
    def beats(self) -> int:
        return int.from_bytes(self._map[:], "little")

    async def beat(self) -> None:
        """Until cancelled."""
        while True:
            self._map[:] = (self.beats + 1).to_bytes(_BYTES, "little")
            await asyncio.sleep(BEAT_SECONDS)

    def close(self) -> None:
        self._map.close()
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


class Stillness:
    """For how long a child has had no beat, after its first one. Only time counts in which both could have run."""

    def __init__(self, pulse: Pulse, pid: int, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 0.0
        self._pulse, self._pid, self._monotonic = pulse, pid, monotonic
        self._seen, self._looked = 0, monotonic()

    def look(self) -> float:
        """Seconds until now."""
        now, beats = self._monotonic(), self._pulse.beats
        step, self._looked = min(now - self._looked, _STEP_MOST_SECONDS), now
        if beats != self._seen or not beats:
            self._seen, self.seconds = beats, 0.0
        elif not is_stopped(self._pid):
            self.seconds += step
        return self.seconds


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal or a debugger; one that is gone was not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False
