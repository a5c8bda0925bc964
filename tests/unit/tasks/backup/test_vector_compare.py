"""Vectors that went through an index are the same within its noise; neighbours, as long as they are as near."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from tasks.backup.vector_compare import compare_neighbours, near


def test_vectors_are_near_within_the_noise_of_an_index_and_not_beyond() -> None:
    def text(vector: Any) -> str:
        return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()

    one = np.random.default_rng(1).normal(size=64).astype("f4")
    assert near(text(one), text(one * (1 + 1e-7)))
    assert not near(text(one), text(one + 0.01))
    assert not near(text(one), text(one * 2))
    assert not near(text(one), text(one[:63]))
    assert not near(text(one), text(np.full(64, np.nan)))
    assert near(text(np.zeros(4)), text(-np.zeros(4)))


DUE = [{"of": "a", "ids": ["a", "b", "c", "d", "e"], "distances": [0.0, 0.1, 0.2, 0.3, 0.4]}]


@pytest.mark.parametrize(
    ("distances", "words"),
    [
        ([0.0, 0.1, 0.2, 0.3, 0.4], None),
        ([0.0, 0.1, 0.15, 0.2, 0.25], None),
        ([0.0, 0.1, 0.2, 0.3, 0.5], None),
        ([0.0, 0.1, 0.2, 0.4, 0.5], "finds 2 of 5 neighbours farther away"),
        ([0.0, 0.1, 0.2, 0.3], "finds fewer neighbours of 'a'"),
    ],
)
def test_neighbours_may_be_others_and_must_be_as_near(distances: list[float], words: str | None) -> None:
    found = compare_neighbours("prices", [{"of": "a", "ids": ["x"] * len(distances), "distances": distances}], DUE)
    assert [words in one for one in found if words] == ([True] if words else [])
    assert bool(found) == bool(words)


def test_a_record_that_is_gone_has_no_neighbours() -> None:
    assert compare_neighbours("prices", [], DUE) == ["prices finds fewer neighbours of 'a' than it did"]
