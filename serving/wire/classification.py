"""Triton's classification extension: the largest numbers of an output as texts, "value:index" or "value:index:label", the largest first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from serving.wire.tensors import Array, InputError

UNFIT = frozenset({"BOOL", "BYTES"})
"""Datatypes that have no order worth the name."""
MOST_TEXTS = 100_000
"""Of one output: each costs the interpreter a microsecond, and 30 bytes."""
INLINE_ELEMENTS = 16_384
"""Of an output: what has more is ranked by a thread (serving.api), so that the event loop goes on."""
_TOGETHER_ELEMENTS = 65_536
"""Rows are ranked so many numbers at a time: one by one, many short rows would take seconds."""


def classify(array: Array, count: int, *, batched: bool, labels: Sequence[str] = ()) -> Array:
    """The `count` largest numbers of every row where `batched`, else of the whole tensor; BYTES of shape [rows, count] or [count].
    A tensor of one dimension is one row. An index without a label (or an empty one) has none in its text.

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
    texts = np.empty((len(table), count), dtype=object)
    together = max(1, _TOGETHER_ELEMENTS // max(1, classes))
    for start in range(0, len(table) if count else 0, together):
        part = table[start : start + together]
        order = largest(part[0], count)[None] if len(part) == 1 else _largest_of_each(part, count)
        texts[start : start + len(part)] = _texts(np.take_along_axis(part, order, axis=1), order, labels)
    return texts if rows else texts[0]


def _texts(values: Array, order: Array, labels: Sequence[str]) -> Array:
    template = "%f:%d" if values.dtype.kind == "f" else "%d:%d"
    said = np.empty(order.size, dtype=object)
    named = [f":{label}" if label else "" for label in labels]
    named += [""] * (1 + int(order.max()) - len(named))
    said[:] = [
        f"{template % pair}{named[pair[1]]}".encode()
        for pair in zip(values.ravel().tolist(), order.ravel().tolist(), strict=True)
    ]
    return said.reshape(order.shape)


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


def _largest_of_each(table: Array, count: int) -> Array:
    """`largest` of every row, [rows, count]."""
    if table.dtype.kind == "f":
        table = np.where(np.isnan(table), -np.inf, table)
    # As in `largest`.
    order: Array = table.shape[1] - 1 - np.argsort(table[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :count]
    return order
