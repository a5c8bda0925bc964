"""The statistics of the judge: the incomplete beta function, exact bounds, and e-values, in logarithms and as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

BOUND_CONFIDENCE = 0.99
"""Confidence of the upper bound on the stable version's frozen rate, for when it has no traffic to compare with."""


# --- the beta distribution, in logarithms -----------------------------------------------------------------------------


def log_beta(a: float, b: float) -> float:
    """Natural logarithm of the beta function B(a, b)."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def log_beta_tails(x: float, a: float, b: float) -> tuple[float, float]:
    """(ln I_x(a, b), ln(1 - I_x(a, b))) of the regularised incomplete beta function, both to full relative precision.

    The smaller tail comes from the continued fraction DLMF 8.17.22, evaluated by Lentz's method as modified by Thompson
    and Barnett; the other is its complement, which loses nothing because it is not small.
    """
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise ValueError(f"I_x(a, b) needs a, b > 0 and 0 <= x <= 1, not x={x}, a={a}, b={b}")
    if x == 0:
        return -math.inf, 0.0
    if x == 1:
        return 0.0, -math.inf
    front = a * math.log(x) + b * math.log1p(-x) - log_beta(a, b)
    if x <= (a + 1) / (a + b + 2):
        small = min(front - math.log(a) + math.log(_continued_fraction(x, a, b)), 0.0)
        return small, _log_complement(small)
    small = min(front - math.log(b) + math.log(_continued_fraction(1 - x, b, a)), 0.0)
    return _log_complement(small), small


def _log_complement(log_p: float) -> float:
    if log_p >= 0:
        return -math.inf
    return math.log(-math.expm1(log_p)) if log_p > -math.log(2) else math.log1p(-math.exp(log_p))


def _continued_fraction(x: float, a: float, b: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    value = d
    # Near the mean it takes about sqrt(max(a, b)) steps, elsewhere a few dozen.
    for m in range(1, 1000 + int(10 * math.sqrt(max(a, b)))):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + numerator * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + numerator / c
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            return value
    raise ArithmeticError(f"the continued fraction of I_x(a, b) does not converge at x={x}, a={a}, b={b}")


def binomial_tail(bad: float, total: float, p: float) -> float:
    """P(X >= bad) for X binomial(total, p); by the incomplete beta function for effective numbers that are no integers."""
    if bad <= 0:
        return 1.0
    return math.exp(log_beta_tails(p, bad, total - bad + 1)[0])


@lru_cache(maxsize=256)
def upper_rate_bound(bad: float, total: float, confidence: float = BOUND_CONFIDENCE) -> float:
    """One-sided upper confidence bound on a rate (Clopper and Pearson 1934): exact, never too low; 1 without data."""
    if total <= 0 or bad >= total:
        return 1.0
    target = math.log(1 - confidence)
    low, high = bad / total, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if log_beta_tails(middle, bad + 1, total - bad)[1] > target:  # P(X <= bad) still above 1 - confidence
            low = middle
        else:
            high = middle
    return high


# --- e-values ---------------------------------------------------------------------------------------------------------


def p0(weight: float, margin: float) -> float:
    """The most probable that a bad event is the candidate's, while its rate is at most (1 + margin) x the stable's.

    `weight` is the candidate's realised share of the requests in the window.
    """
    favoured = weight * (1 + margin)
    return favoured / (favoured + 1 - weight)


def _log_e(candidate_events: float, other_events: float, null: float) -> float:
    """ln of the mixture likelihood ratio against p <= null, mixed over Beta(1, (1 - null) / null) cut to p > null."""
    if not 0 < null < 1 or candidate_events + other_events == 0:
        return 0.0
    a, b = 1.0, (1 - null) / null
    after_a, after_b = a + candidate_events, b + other_events
    return (
        log_beta(after_a, after_b)
        + log_beta_tails(null, after_a, after_b)[1]
        - log_beta(a, b)
        - log_beta_tails(null, a, b)[1]
        - candidate_events * math.log(null)
        - other_events * math.log1p(-null)
    )


def log_e_two_sample(candidate_bad: float, stable_bad: float, weight: float, margin: float) -> float:
    """ln e of one window for "the candidate's rate of bad requests is at most (1 + margin) x the stable's".

    `weight` is the realised share. Where only one of the two had requests there is nothing to compare: 0 (e = 1).
    """
    return _log_e(candidate_bad, stable_bad, p0(weight, margin))


def log_e_one_sample(bad: float, good: float, p0: float) -> float:
    """ln e of one window for "the candidate's rate of bad requests is at most p0"; 0 (e = 1) where p0 is 1 or more."""
    return _log_e(bad, good, p0)


def log_e_of_windows(logs: Sequence[float]) -> float:
    """ln e over successive windows: the products of their e-values, mixed over the window from which trouble may date.

    A plain product would charge a candidate that turns bad late with all the good windows before; so product k leaves
    out the windows before k, and has the weight 1 / (k (k + 1)). These sum to 1, with what is left on the constant 1
    (windows that are still to come), so the mixture is an e-value at every look, like the product, and is
    never below 1 / (number of windows + 1).
    """
    n = len(logs)
    terms, product = [-math.log(n + 1)], 0.0
    for k in range(n, 0, -1):
        product += logs[k - 1]
        terms.append(product - math.log(k * (k + 1)))
    top = max(terms)
    return top + math.log(sum(math.exp(term - top) for term in terms))
