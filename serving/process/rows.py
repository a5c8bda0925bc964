"""Rows of counts in memory of their own, apart from the heap that runtimes take their models from: what lives for an hour
among what lives for seconds keeps a page of it each."""

from __future__ import annotations

import mmap
import threading
import weakref
from functools import partial

ROWS_AT_ONCE = 256
_BYTES = 8


class Rows:
    """Rows of `width` counts (signed, 64 bits), all 0 when they are taken. Pages are touched as they are first used, and used again.

    A row goes back when nobody holds it any more, on whatever thread that is: taking and giving back are one step of a list each.
    """

    def __init__(self, width: int, at_once: int = ROWS_AT_ONCE) -> None:
        self._width, self._at_once = width, at_once
        self._nothing = memoryview(bytes(_BYTES * width)).cast("q")
        self._blocks: list[memoryview] = []
        self._free: list[int] = []
        self._taken: list[weakref.ref[memoryview] | None] = []
        self._growing = threading.Lock()

    def take(self) -> memoryview:
        """A row of its own. Raises OSError where the system has no memory left."""
        while True:
            try:
                number = self._free.pop()
            except IndexError:
                self._grow()
            else:
                break
        block, place = divmod(number, self._at_once)
        row = self._blocks[block][place * self._width : (place + 1) * self._width]
        row[:] = self._nothing
        self._taken[number] = weakref.ref(row, partial(self._give_back, number))
        return row

    def _grow(self) -> None:
        with self._growing:
            if self._free:
                return
            first = len(self._taken)
            block = memoryview(mmap.mmap(-1, _BYTES * self._width * self._at_once)).cast("q")
            self._blocks.append(block)
            self._taken.extend([None] * self._at_once)
            self._free.extend(range(first + self._at_once - 1, first - 1, -1))

    def _give_back(self, number: int, _: object) -> None:
        self._free.append(number)
