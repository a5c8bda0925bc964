"""Two versions on the same cases: the statistics of paired proportions and of paired losses. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.evalues import binomial_tail, log_beta_tails


@dataclass(frozen=True, slots=True)
class Paired:
    """Two versions on the same cases; `low` and `high` bound candidate minus stable at 95 %."""

    cases: int
    candidate: float
    stable: float
    only_candidate: int
    only_stable: int
    difference: float
    low: float
    high: float
    p_value: float

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def compare_pairs(candidate: list[int], stable: list[int]) -> Paired:
    """Difference of two paired proportions, with an interval and a one-sided p for "the candidate is no worse".

    Interval: square-and-add on Wilson's, with the correlation of the pairs (Newcombe, Statistics in Medicine 17, 1998,
    2635-2650, method 10). p: McNemar's test in its exact binomial form on the cases that only one of them gets right.
    """
    n = min(len(candidate), len(stable))
    pairs = list(zip(candidate[:n], stable[:n], strict=True))
    both = sum(c and s for c, s in pairs)
    only_candidate = sum(c and not s for c, s in pairs)
    only_stable = sum(s and not c for c, s in pairs)
    neither = n - both - only_candidate - only_stable
    p1, p2 = (both + only_candidate) / n, (both + only_stable) / n
    low1, high1 = wilson(both + only_candidate, n)
    low2, high2 = wilson(both + only_stable, n)
    product = (both + only_candidate) * (only_stable + neither) * (both + only_stable) * (only_candidate + neither)
    covariance = float(both * neither - only_candidate * only_stable)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)
    phi = covariance / math.sqrt(product) if product else 0.0

    def spread(one: float, two: float) -> float:
        return math.sqrt(max(one * one - 2 * phi * one * two + two * two, 0.0))

    difference = p1 - p2
    return Paired(
        cases=n,
        candidate=p1,
        stable=p2,
        only_candidate=only_candidate,
        only_stable=only_stable,
        difference=difference,
        low=difference - spread(p1 - low1, high2 - p2),
        high=difference + spread(high1 - p1, p2 - low2),
        p_value=binomial_tail(only_stable, only_candidate + only_stable, 0.5),
    )


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default."""
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


@dataclass(frozen=True, slots=True)
class Losses:
    """The mean losses of two versions on the same cases; `low` and `high` bound candidate minus stable at 95 %."""

    cases: int
    candidate: float
    stable: float
    difference: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def compare_losses(candidate: Sequence[float], stable: Sequence[float]) -> Losses:
    """Difference of two means of paired losses, with Student's interval for the mean of the differences (Student, The
    probable error of a mean. Biometrika 6, 1908, 1-25). Raises ValueError for fewer than two pairs.

    Exact for differences that are normal; for skewed ones it is as good as the number of cases makes their mean normal.
    """
    pairs = list(zip(candidate, stable, strict=True))
    n = len(pairs)
    if n < 2:
        raise ValueError(f"an interval of paired losses needs two cases at least, not {n}")
    apart = [c - s for c, s in pairs]
    mean = math.fsum(apart) / n
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in apart) / (n - 1))
    half = student_quantile(0.975, n - 1) * deviation / math.sqrt(n)
    return Losses(
        n, math.fsum(c for c, _ in pairs) / n, math.fsum(s for _, s in pairs) / n, mean, mean - half, mean + half
    )


def student_quantile(p: float, degrees: int) -> float:
    """The quantile of Student's t for p above 1/2, by bisection on P(T > t) = I_x(d/2, 1/2)/2, x = d/(d + t^2)
    (DLMF 8.17.22 for the beta function). Good to 1e-9 of its size."""
    if not 0.5 < p < 1 or degrees < 1:
        raise ValueError(f"Student's t needs 1/2 < p < 1 and a degree of freedom, not p={p}, {degrees}")

    def above(t: float) -> float:
        return 0.5 * math.exp(log_beta_tails(degrees / (degrees + t * t), degrees / 2, 0.5)[0])

    low, high = 0.0, 1.0
    while above(high) > 1 - p:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) > 1 - p else (low, middle)
    return (low + high) / 2
