"""What is counted about the texts of a version: tokens, speed, time to the first token, streams, and how texts ended."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

from serving.figures.telemetry import LATENCY_BOUNDS_SECONDS

RATE_SECONDS = 10
"""The speed is that of so many whole seconds before now."""


class TextCounts:
    """Cumulative, but for the open streams and the speed. Written on the event loop only."""

    __slots__ = (
        "_clock",
        "_seconds",
        "_tokens",
        "completion_tokens",
        "computed_again",
        "cut",
        "endings",
        "errors",
        "first_token",
        "first_token_seconds_total",
        "prompt_tokens",
        "stream_seconds_total",
        "stream_tokens",
        "streams",
        "streams_open",
    )

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = [-1] * (RATE_SECONDS + 1)
        self._tokens = [0] * (RATE_SECONDS + 1)
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.endings: dict[str, int] = {}
        """Texts by how they ended: stop, length, error, cancelled (the client left)."""
        self.errors: dict[str, int] = {}
        """Failed texts by kind: not_finite, memory, shape, model, deadline, closed."""
        self.first_token = [0] * (len(LATENCY_BOUNDS_SECONDS) + 1)
        self.first_token_seconds_total = 0.0
        self.computed_again = 0
        """How often a text gave its cache up for others, and was computed again later."""
        self.cut = 0
        """Texts that ended, as length, because the memory held no more of them."""
        self.streams_open = 0
        self.streams = 0
        self.stream_seconds_total = 0.0
        self.stream_tokens = 0

    def generated(self, tokens: int) -> None:
        self.completion_tokens += tokens
        second = int(self._clock())
        slot = second % len(self._seconds)
        if self._seconds[slot] != second:
            self._seconds[slot], self._tokens[slot] = second, 0
        self._tokens[slot] += tokens

    def tokens_per_second(self) -> float:
        """Over the last RATE_SECONDS whole seconds; the one that is running does not count."""
        now = int(self._clock())
        recent = (
            tokens
            for second, tokens in zip(self._seconds, self._tokens, strict=True)
            if now - RATE_SECONDS <= second < now
        )
        return sum(recent) / RATE_SECONDS

    def first(self, seconds: float) -> None:
        self.first_token[bisect_left(LATENCY_BOUNDS_SECONDS, seconds)] += 1
        self.first_token_seconds_total += seconds

    def ended(self, how: str, kind: str | None = None) -> None:
        self.endings[how] = self.endings.get(how, 0) + 1
        if kind is not None:
            self.errors[kind] = self.errors.get(kind, 0) + 1

    def stream_closed(self, seconds: float, tokens: int) -> None:
        self.streams_open -= 1
        self.streams += 1
        self.stream_seconds_total += seconds
        self.stream_tokens += tokens
