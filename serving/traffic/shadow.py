"""Shadow copies: the candidate sees what the stable version has answered, when nobody is waiting, and is compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from serving.compute.engine import LoadedVersion
    from serving.figures.telemetry import WatchCounts
    from serving.traffic.routing import Route

RELATIVE_TOLERANCE = 1e-4
ABSOLUTE_TOLERANCE = 1e-5

Arrays = Mapping[str, NDArray[Any]]


class Copy:
    """One request for the candidate to repeat, with the stable version's answer."""

    __slots__ = ("counts", "expected", "inputs", "outputs", "slow_threshold_seconds", "stable")

    def __init__(
        self,
        inputs: Arrays,
        outputs: tuple[str, ...] | None,
        expected: Arrays,
        stable: LoadedVersion,
        counts: WatchCounts | None,
        slow_threshold_seconds: float | None,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.expected = expected
        self.stable = stable
        self.counts = counts
        self.slow_threshold_seconds = slow_threshold_seconds


def offer(
    route: Route,
    stable: LoadedVersion,
    candidate: LoadedVersion,
    inputs: Arrays,
    outputs: tuple[str, ...] | None,
    expected: Arrays,
) -> bool:
    """Hand a copy to the candidate's worker; drop it, and count that, where live work waits or the queue is full."""
    counts = candidate.counts_for(route) if route.watch else None
    copy = Copy(inputs, outputs, expected, stable, counts, route.slow_threshold_seconds)
    if stable.queue_length or not candidate.offer(copy):
        candidate.count_dropped(copy)
        return False
    return True


class Comparison(NamedTuple):
    """How two answers to one request stand to each other; the three ways to agree of the policy's `agreement`."""

    disagrees: bool
    """Another top class on the last axis of the first output ("top")."""
    differs: bool
    """A value beyond tolerance somewhere ("tolerance")."""
    inexact: bool
    """Not equal to the bit ("exact")."""


AGREES = Comparison(False, False, False)


def compare(expected: Arrays, got: Arrays) -> Comparison:
    """Where the first output has no classes (a last axis of fewer than two, or no floats), `disagrees` is `differs`."""
    if all(name in got and _same(want, got[name]) for name, want in expected.items()):
        return AGREES
    differs = any(name not in got or not _close(want, got[name]) for name, want in expected.items())
    first = next(iter(expected), None)
    if first is None or first not in got:
        return Comparison(differs, differs, True)
    want, have = expected[first], got[first]
    if want.shape != have.shape or want.dtype.kind != "f" or want.ndim == 0 or want.shape[-1] < 2 or want.size == 0:
        return Comparison(differs, differs, True)
    return Comparison(bool((want.argmax(axis=-1) != have.argmax(axis=-1)).any()), differs, True)


def _same(want: NDArray[Any], have: NDArray[Any]) -> bool:
    if want.shape != have.shape or want.dtype != have.dtype:
        return False
    if want.dtype.kind == "O":
        return bool(np.array_equal(want, have))
    return want.tobytes() == have.tobytes()


def _close(want: NDArray[Any], have: NDArray[Any]) -> bool:
    if want.shape != have.shape:
        return False
    if want.dtype.kind == "f" and have.dtype.kind == "f":
        return bool(np.allclose(have, want, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE, equal_nan=True))
    return bool(np.array_equal(want, have))
