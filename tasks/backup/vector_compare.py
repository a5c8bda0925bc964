"""When two vectors, and two lists of neighbours, count as the same. Where they come from: vectors."""

from __future__ import annotations

import base64
from typing import Any

COSINE = 5e-7
"""How far two vectors may be apart that went through an index and back."""
FARTHER = 0.2
"""The share of neighbours that an index which was made anew may find farther away than the one before."""


def near(first: str, second: str) -> bool:
    """Whether two vectors (base64 of little-endian float32) point the same way and are as long."""
    import numpy as np

    if first == second:
        return True
    one, other = (np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64) for text in (first, second))
    if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
        return False
    lengths = float(np.linalg.norm(one)), float(np.linalg.norm(other))
    if not all(lengths):
        return lengths[0] == lengths[1]
    return bool(
        1 - float(one @ other) / (lengths[0] * lengths[1]) <= COSINE
        and abs(lengths[0] - lengths[1]) <= 1e-5 * lengths[0]
    )


def compare_neighbours(name: str, found: list[dict[str, Any]], due: list[dict[str, Any]]) -> list[str]:
    """An index that was made anew may find others, but hardly any that are farther away."""
    by_id = {one["of"]: one for one in found}
    farther = total = 0
    for one in due:
        answer = by_id.get(one["of"])
        if answer is None or len(answer["distances"]) < len(one["distances"]):
            return [f"{name} finds fewer neighbours of {one['of']!r} than it did"]
        for distance, then in zip(answer["distances"], one["distances"], strict=False):
            total += 1
            farther += distance > then * (1 + 1e-4) + 1e-6
    if farther > FARTHER * total:
        return [f"{name} finds {farther} of {total} neighbours farther away than it did"]
    return []
