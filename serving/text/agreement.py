"""Whether two versions say the same: by the tokens of what they answered to one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.text.sequences import Reason
from serving.traffic.shadow import AGREES, Comparison

TOKENS = "tokens"
"""The one tensor of a text's answer, as replays compare it."""
ENDED = -1
"""Stands behind the tokens of a text that came to its own end."""
WITHIN = 0.5
"""Texts agree within tolerance where so much of the longer one is the same from its beginning on."""

Arrays = Mapping[str, NDArray[Any]]


def said(ids: Sequence[int], reason: Reason | None) -> tuple[int, ...]:
    """The tokens of an answer, and that it came to its end."""
    return (*ids, ENDED) if reason == "stop" else tuple(ids)


def answer(ids: Sequence[int], reason: Reason | None) -> dict[str, NDArray[Any]]:
    return {TOKENS: np.array(said(ids, reason), dtype=np.int64)}


def compare_texts(expected: Sequence[int], got: Sequence[int]) -> Comparison:
    """By `said` of both. The first token is what texts have for a top class; after the first other token they go their own ways."""
    if len(expected) == len(got) and all(a == b for a, b in zip(expected, got, strict=True)):
        return AGREES
    same = next(
        (n for n, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got))
    )
    return Comparison(same == 0, same < WITHIN * max(len(expected), len(got)), True)
