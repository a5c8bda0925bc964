"""Texts in a shadow: the candidate is asked what the stable version has answered, with the same seed, and says nothing to anybody."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from serving.text.agreement import compare_texts, said
from serving.text.sequences import Piece, TextSequence, Wanted
from serving.traffic.shadow import AGREES

if TYPE_CHECKING:
    from serving.figures.telemetry import WatchCounts
    from serving.text.version import TextVersion
    from serving.traffic.routing import Route

WAITING = 16
"""Copies that wait; what comes on top is dropped. One is generated at a time, and none while a client waits for the candidate."""


class CopiedText:
    """One text for the candidate to repeat, with the stable version's tokens. Used on the event loop only."""

    __slots__ = (
        "counts",
        "done",
        "expected",
        "most_seconds",
        "slow_threshold_seconds",
        "stable",
        "stable_steps",
        "text",
    )

    def __init__(
        self,
        candidate: TextVersion,
        stable: TextVersion,
        wanted: Wanted,
        expected: tuple[int, ...],
        counts: WatchCounts | None,
        slow_threshold_seconds: float | None,
        most_seconds: float,
    ) -> None:
        self.text = TextSequence(wanted, candidate.words, candidate.text.end_ids, owner=self)
        self.stable, self.stable_steps = stable, 0
        """`stable_steps`: how many steps it had made when this one began."""
        self.expected = expected
        self.counts = counts
        self.slow_threshold_seconds = slow_threshold_seconds
        self.most_seconds = most_seconds
        self.done = False


class Copies:
    """Those of one candidate."""

    def __init__(self, version: TextVersion) -> None:
        self._version = version
        self._waiting: deque[CopiedText] = deque()
        self._running: CopiedText | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting) + (self._running is not None)

    def offer(
        self, route: Route, stable: TextVersion, wanted: Wanted, expected: tuple[int, ...], most_seconds: float
    ) -> bool:
        """Queue a copy; drop it, and count that, where anybody waits for either version, or the queue is full.

        It is given up after `most_seconds`, which counts as dropped too: what so long a text would have said is not known.
        """
        version = self._version
        counts = version.counts_for(route) if route.watch else None
        copy = CopiedText(version, stable, wanted, expected, counts, route.slow_threshold_seconds, most_seconds)
        if len(wanted.prompt) + wanted.max_tokens > version.text.context_length or not wanted.prompt:
            self._count(copy, None, error=True)  # the candidate cannot do what the stable version did
            return False
        if stable.queue_length or version.has_clients or not version.takes_texts or len(self._waiting) >= WAITING:
            self.drop(copy)
            return False
        self._waiting.append(copy)
        self._next()
        return True

    def take(self, copy: CopiedText, piece: Piece) -> None:
        """What a step gained of one."""
        if copy.done or not piece.last:
            return
        text = copy.text
        seconds = None
        if text.started is not None and text.finished is not None and copy.stable.batcher.steps == copy.stable_steps:
            seconds = text.finished - text.started  # else the two shared the machine: its time says nothing about it
        tokens = said(text.ids[len(text.wanted.prompt) :], piece.reason)
        self._count(copy, seconds, error=piece.error is not None, tokens=tokens)
        self._over(copy)

    def end(self) -> None:
        """None of them is generated any further."""
        waiting, self._waiting = self._waiting, deque()
        for copy in waiting:
            self.drop(copy)
        if self._running is not None:
            self._give_up(self._running)

    def drop(self, copy: CopiedText) -> None:
        copy.done = copy.text.cancelled = True
        for counts in (self._version.telemetry.total, copy.counts):
            if counts is not None:
                counts.shadow_dropped += 1

    def _next(self) -> None:
        if self._running is not None or not self._waiting:
            return
        copy = self._running = self._waiting.popleft()
        copy.stable_steps = copy.stable.batcher.steps
        self._deadline = asyncio.get_running_loop().call_later(copy.most_seconds, self._give_up, copy)
        self._version.put_text(copy.text)

    def _give_up(self, copy: CopiedText) -> None:
        if not copy.done:
            self.drop(copy)
            self._version.leave_text(copy.text)
            self._over(copy)

    def _over(self, copy: CopiedText) -> None:
        copy.done = True
        if self._deadline is not None:
            self._deadline.cancel()
        self._running = self._deadline = None
        self._next()

    def _count(self, copy: CopiedText, seconds: float | None, *, error: bool, tokens: tuple[int, ...] = ()) -> None:
        threshold = copy.slow_threshold_seconds
        slow = seconds is not None and threshold is not None and seconds > threshold
        found = AGREES if error else compare_texts(copy.expected, tokens)
        for counts in (self._version.telemetry.total, copy.counts):
            if counts is not None:
                counts.record_copy(
                    error=error, slow=slow, disagrees=found.disagrees, differs=found.differs, inexact=found.inexact
                )
