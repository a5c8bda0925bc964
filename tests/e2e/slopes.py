"""How fast a figure grows, with how sure that is: a straight line through the means of blocks, since neighbouring samples are alike."""

from __future__ import annotations

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
    margin = float(stats.t.ppf(0.975, BLOCKS - 2)) * float(fit.stderr)
    return Slope(float(fit.slope), float(fit.slope) - margin, float(fit.slope) + margin)
