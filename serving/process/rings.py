"""The newest rows of figures, in memory that is taken once: what fills for an hour would look like something that leaks for an hour."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
_NAN = float("nan")


class Ring(Generic[T]):
    """At most `length` rows of `width` numbers; the newest pushes out the oldest. Not for several threads at once."""

    def __init__(self, length: int, width: int, make: Callable[[Sequence[float | None]], T]) -> None:
        """`make` builds an entry from its row again, in which None stays None."""
        self._length, self._width, self._make = length, width, make
        self._rows = array("d", bytes(8 * length * width))
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, self._length)

    def append(self, row: Sequence[float | None]) -> None:
        """Raises ValueError for a row of another width."""
        if len(row) != self._width:
            raise ValueError(f"a row of {len(row)} numbers, not {self._width}")
        start = self._added % self._length * self._width
        for number, value in enumerate(row):
            self._rows[start + number] = _NAN if value is None else value
        self._added += 1

    def last(self, count: int) -> list[T]:
        """The newest entries, as many as there are of `count`, the oldest of them first."""
        return [self._entry(number) for number in range(self._added - min(count, len(self)), self._added)]

    def __iter__(self) -> Iterator[T]:
        """All entries, the oldest first."""
        return iter(self.last(self._length))

    def _entry(self, number: int) -> T:
        start = number % self._length * self._width
        row = self._rows[start : start + self._width]
        return self._make([None if value != value else value for value in row])
