"""The order of a queue that several keys wait in: one request of each in turn, whoever sent how many."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from operator import attrgetter
from typing import Protocol, TypeVar

_ROUND = attrgetter("round")


class Asked(Protocol):
    """What waits. `round` is 0 until it does."""

    asker: str
    round: int


A = TypeVar("A", bound=Asked)


class Turns:
    """Puts requests into a queue, on the event loop, while its worker takes them from the left.

    A request stands in the round after that of its key's last one; a key that had nothing waiting begins in the round that is being
    served. The worker may take some in between: then a request stands so many places later, and none is lost.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def put(self, live: deque[A], work: A) -> None:
        last, asker = self._last, work.asker
        if not asker and not last:  # nobody sends keys: nothing to put in order
            live.append(work)
            return
        try:
            now, latest = live[0].round, live[-1].round
        except IndexError:
            last.clear()
            now = latest = 0
        work.round = last[asker] = max(now, last.get(asker, now - 1) + 1)
        if work.round >= latest:
            live.append(work)
        else:
            live.insert(bisect_right(tuple(live), work.round, key=_ROUND), work)
