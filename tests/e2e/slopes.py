"""How fast a figure grows, with how sure that is: a straight line through the means of blocks, since neighbouring samples are alike.

Blocks may be alike, too. Memory of a process is taken in steps that stay (an allocator's page, touched at a rare moment), so it wanders;
a line through something that wanders without growing has an error by its scatter that is far too small (Granger and Newbold, "Spurious
regressions in econometrics", 1974): by it one step of 50 kB in two hours is growth, always. So the error is the larger of two: by the
scatter around the line, and by that of the steps from block to block, whose mean is the growth of what wanders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

BLOCKS = 20


@dataclass(frozen=True, slots=True)
class Slope:
    """Per hour, with the bounds between which it lies with 95 % confidence."""

    per_hour: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.per_hour:+.2f} ({self.low:+.2f} to {self.high:+.2f})"

    @property
    def is_flat(self) -> bool:
        """Zero within error. One that falls does no harm."""
        return self.low <= 0


def slope(seconds: Sequence[float], values: Sequence[float]) -> Slope:
    """Raises ValueError for fewer samples than two a block."""
    if len(values) < 2 * BLOCKS or len(seconds) != len(values):
        raise ValueError(f"{len(values)} samples at {len(seconds)} moments: at least {2 * BLOCKS} are needed")
    hours = np.array([block.mean() for block in np.array_split(np.asarray(seconds, dtype=float) / 3600, BLOCKS)])
    means = np.array([block.mean() for block in np.array_split(np.asarray(values, dtype=float), BLOCKS)])
    if np.ptp(means) == 0:
        return Slope(0.0, 0.0, 0.0)  # a line without any scatter has no error that could be computed
    fit = stats.linregress(hours, means)
    steps = np.diff(means) / np.diff(hours)
    error = max(float(fit.stderr), float(steps.std(ddof=1)) / math.sqrt(len(steps)))
    margin = float(stats.t.ppf(0.975, BLOCKS - 2)) * error
    return Slope(float(fit.slope), float(fit.slope) - margin, float(fit.slope) + margin)
