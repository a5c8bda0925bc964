"""Triton's classification extension: the largest numbers of an output as texts, "value:index", the largest first."""

from __future__ import annotations

import math

import numpy as np

from serving.tensors import Array, InputError

UNFIT = frozenset({"BOOL", "BYTES"})
"""Datatypes that have no order worth the name."""
MOST_TEXTS = 100_000
"""Of one output: the server makes them one by one, and answers nobody else meanwhile."""


def classify(array: Array, count: int, *, batched: bool) -> Array:
    """The `count` largest numbers of every row where `batched`, else of the whole tensor; BYTES of shape [rows, count] or [count].
    A tensor of one dimension is one row.

    Floats have six decimals, as Triton writes them. Of equal numbers the first comes first, and NaN comes last.
    Raises InputError where they would be more than MOST_TEXTS.
    """
    rows = batched and array.ndim > 1
    classes = math.prod(array.shape[1:] if rows else array.shape)
    table = array.reshape(array.shape[0] if rows else 1, classes)
    count = min(count, classes)
    if len(table) * count > MOST_TEXTS:
        raise InputError(
            f"the parameter 'classification' asks for {len(table) * count} texts of one output ({len(table)} rows of "
            f"{count}), the limit is {MOST_TEXTS}; ask for fewer, or send fewer rows"
        )
    template = "%f:%d" if array.dtype.kind == "f" else "%d:%d"
    texts = np.empty((len(table), count), dtype=object)
    for number, row in enumerate(table):
        order = largest(row, count)
        texts[number] = [
            (template % (value, index)).encode()
            for value, index in zip(row[order].tolist(), order.tolist(), strict=True)
        ]
    return texts if rows else texts[0]


def largest(row: Array, count: int) -> Array:
    """Indices of the `count` largest, the largest first."""
    if row.dtype.kind == "f":
        row = np.where(np.isnan(row), -np.inf, row)
    if not count:
        return np.empty(0, np.intp)
    among = np.arange(len(row))
    if count * 8 < len(row):  # do not sort what nobody asks for
        among = np.flatnonzero(row >= np.partition(row, len(row) - count)[len(row) - count])
    # A stable sort of the reverse, reversed: of equal numbers the first comes first, for unsigned numbers too.
    backwards = among[::-1]
    order: Array = backwards[np.argsort(row[backwards], kind="stable")][::-1][:count]
    return order
