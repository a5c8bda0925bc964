"""Texts that share a batch, and their key/value cache: put together, taken apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.text.sequences import TextSequence


class Group:
    """Texts that are computed together. `cache` holds [texts, heads, width, size] each; text i has its tokens at the right end."""

    __slots__ = ("cache", "rows", "width")

    def __init__(self, rows: list[TextSequence], cache: list[NDArray[Any]], width: int) -> None:
        self.rows, self.cache, self.width = rows, cache, width

    def select(self, indices: Sequence[int]) -> Group:
        """Some of its texts, without the padding that only the others needed."""
        rows = [self.rows[i] for i in indices]
        width = max((row.fed for row in rows), default=0)
        begin = self.width - width
        cache = [np.ascontiguousarray(part[list(indices), :, begin:, :]) for part in self.cache]
        return Group(rows, cache, width)

    @classmethod
    def joined(cls, groups: Sequence[Group]) -> Group:
        if len(groups) == 1:
            return groups[0]
        rows = [row for group in groups for row in group.rows]
        width = max(group.width for group in groups)
        cache = []
        for number in range(len(groups[0].cache)):
            parts = [group.cache[number] for group in groups]
            _, heads, _, size = parts[0].shape
            together = np.zeros((len(rows), heads, width, size), dtype=parts[0].dtype)
            at = 0
            for part in parts:
                together[at : at + len(part), :, width - part.shape[2] :, :] = part
                at += len(part)
            cache.append(together)
        return cls(rows, cache, width)


def kept(group: Group, stays: Callable[[TextSequence], bool]) -> Group | None:
    """Those of its texts that stay; None where none does."""
    staying = [number for number, text in enumerate(group.rows) if stays(text)]
    if len(staying) == len(group.rows):
        return group
    return group.select(staying) if staying else None


def halves(group: Group) -> list[Group]:
    """Of two texts or more."""
    count = len(group.rows)
    return [group.select(range(count // 2)), group.select(range(count // 2, count))]
