"""Computing a request's rows in portions that fit the memory, put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.device.memory_limits import BatchLimit
from serving.statuses import OutOfMemoryError

Arrays = Mapping[str, NDArray[Any]]


def equal_rows(inputs: Arrays) -> int:
    """The rows of a request all of whose inputs have the same number of them; 0 where they have not."""
    rows = {array.shape[0] if array.shape else 0 for array in inputs.values()}
    return rows.pop() if len(rows) == 1 else 0


def in_portions(
    run: Callable[[Arrays, Sequence[str] | None], dict[str, NDArray[Any]]],
    inputs: Arrays,
    outputs: Sequence[str] | None,
    rows: int,
    limit: BatchLimit,
    *,
    ran_out: Callable[[int, OutOfMemoryError], None],
    gone: Callable[[], bool],
    tried: bool = False,
) -> tuple[dict[str, NDArray[Any]], int]:
    """The answer to independent rows computed in portions within the limit, and the number of runs that it took.

    A portion that does not fit is halved after `ran_out` was told its rows; a single one is tried once more after that.
    With fewer than two rows all of it is one portion; `tried` says that all of it together has failed once.
    Empty where `gone` says that nobody waits for it any more.
    Raises OutOfMemoryError where a single row does not fit either, ValueError for a model that does not answer a row for
    every row, and whatever the model raises.
    """
    parts: list[dict[str, NDArray[Any]]] = []
    whole = max(rows, 1)
    done, runs, again = 0, 0, tried and whole == 1
    while done < whole:
        if gone():
            return {}, runs
        size = min(limit.learnt or whole, whole - done)
        feed = inputs if size == whole else {name: array[done : done + size] for name, array in inputs.items()}
        runs += 1
        try:
            part = run(feed, outputs)
        except OutOfMemoryError as error:
            ran_out(size if rows else 0, error)
            if size == 1 or not rows:
                if again:
                    raise
                again = True
            continue
        if size < whole and any(not array.shape or array.shape[0] != size for array in part.values()):
            raise ValueError(
                "its rows were computed apart for want of memory, and it does not answer a row for every row"
            )
        limit.succeeded(size)
        parts.append(part)
        done, again = done + size, False
    return parts[0] if len(parts) == 1 else {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}, runs
