"""Windows of weight 1 cut by time, so that the judge sees when something was bad; as plain data, so that another process goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tasks import judgement
from tasks.judgement import StreamCounts, Window

MOST_SLICES = 60
"""Of one window. Where there would be more, neighbours are put together and the next slices are twice as long."""

MOST_PARTS = 20
"""Of a soak that are over. Where there would be more, the two oldest become one."""

Counts = Mapping[str, StreamCounts]


class Sliced:
    """Cuts a window of weight 1 into time slices, look by look; into no more than `most`, where that is given."""

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._slices: list[Counts] = []
        self._length = judgement.SLICE_SECONDS
        self._at, self._before = 0.0, Window("", 1.0)

    def look(self, window: Window, elapsed: float) -> Window:
        if window.weight < 1:
            return window
        if elapsed - self._at >= self._length:
            self._slices.append(window.since(self._before).candidate)
            self._at, self._before = elapsed, window
            while self._most is not None and len(self._slices) > self._most:
                self._slices, self._length = _coarser(self._slices), 2 * self._length
        return replace(window, slices=tuple(self._slices))

    def as_dict(self) -> dict[str, Any]:
        return {
            "slices": [_packed(piece) for piece in self._slices],
            "length": self._length,
            "at": self._at,
            "before": _packed(self._before.candidate),
        }

    @classmethod
    def of(cls, kept: Mapping[str, Any], most: int | None = None) -> Sliced:
        found = cls(most)
        found._slices = [_unpacked(piece) for piece in kept["slices"]]
        found._length, found._at = kept["length"], kept["at"]
        found._before = Window("", 1.0, _unpacked(kept["before"]))
        return found


class Parts:
    """Cuts the soak into windows of a dwell, so that a version that turns bad late is not covered by its good time before."""

    def __init__(self, dwell_seconds: float) -> None:
        self._length = max(dwell_seconds, 10 * judgement.SLICE_SECONDS)
        self._done: list[Window] = []
        self._at, self._total, self._sliced = 0.0, Window("soak", 1.0), Sliced(MOST_SLICES)

    def look(self, total: Window, elapsed: float) -> list[Window]:
        current = self._sliced.look(total.since(self._total), elapsed - self._at)
        if elapsed - self._at < self._length:
            return [*self._done, current]
        self._done.append(current)
        if len(self._done) > MOST_PARTS:
            self._done[:2] = [_joined(self._done[0], self._done[1])]
        self._at, self._total, self._sliced = elapsed, total, Sliced(MOST_SLICES)
        return list(self._done)

    def as_dict(self) -> dict[str, Any]:
        """What another process needs to go on: some kilobytes, however long the soak."""
        return {
            "done": [
                {"candidate": _packed(part.candidate), "slices": [_packed(piece) for piece in part.slices]}
                for part in self._done
            ],
            "at": self._at,
            "total": _packed(self._total.candidate),
            "sliced": self._sliced.as_dict(),
        }

    @classmethod
    def of(cls, dwell_seconds: float, kept: Mapping[str, Any]) -> Parts:
        found = cls(dwell_seconds)
        found._done = [
            Window("soak", 1.0, _unpacked(part["candidate"]), slices=tuple(map(_unpacked, part["slices"])))
            for part in kept["done"]
        ]
        found._at, found._total = kept["at"], Window("soak", 1.0, _unpacked(kept["total"]))
        found._sliced = Sliced.of(kept["sliced"], MOST_SLICES)
        return found


def _joined(first: Window, second: Window) -> Window:
    slices: list[Counts] = [*first.slices, *second.slices]
    while len(slices) > MOST_SLICES:
        slices = _coarser(slices)
    return replace(first, candidate=_sum(first.candidate, second.candidate), slices=tuple(slices))


def _coarser(slices: list[Counts]) -> list[Counts]:
    pairs = [_sum(a, b) for a, b in zip(slices[::2], slices[1::2], strict=False)]
    return pairs + ([slices[-1]] if len(slices) % 2 else [])


def _sum(first: Counts, second: Counts) -> dict[str, StreamCounts]:
    none = StreamCounts()
    return {stream: first.get(stream, none) + second.get(stream, none) for stream in {**first, **second}}


def _packed(counts: Counts) -> dict[str, list[int]]:
    return {stream: [found.requests, found.bad, found.clustered] for stream, found in counts.items()}


def _unpacked(counts: Mapping[str, list[int]]) -> dict[str, StreamCounts]:
    return {stream: StreamCounts(*pair) for stream, pair in counts.items()}
