"""How many rows of a version are computed together: as many as the settings say, the memory allowed so far, and its pressure lets."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from enum import StrEnum

REMEMBERED = 256
_RUNS_BEFORE_GROWTH = 32
_MOST_RUNS_BEFORE_GROWTH = 4096


class Pressure(StrEnum):
    """How much of the memory is in use. NONE: there is nothing to measure."""

    NONE = "none"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


def pressure_of(utilisation: float) -> Pressure:
    """Above 95 % critical, above 85 % high, above 70 % medium (`utilisation` is 0 to 1)."""
    if utilisation > 0.95:
        return Pressure.CRITICAL
    if utilisation > 0.85:
        return Pressure.HIGH
    return Pressure.MEDIUM if utilisation > 0.70 else Pressure.LOW


def optimize_batch_size(pressure: Pressure, base: int = 1, *, most: int = 32) -> int:
    """The batch for that pressure: a quarter or half of `base` (1 at least), `base` itself, or twice as much up to `most`.

    Low pressure never makes it smaller, also where `base` is above `most`.
    """
    if pressure is Pressure.CRITICAL:
        return max(1, base // 4)
    if pressure is Pressure.HIGH:
        return max(1, base // 2)
    return max(base, min(base * 2, most)) if pressure is Pressure.LOW else base


class BatchLimit:
    """The limit of one version. `rows` is what the worker goes by; nothing here takes a lock.

    The worker calls `ran_out` and `succeeded`, whoever looks at the memory `press`.
    """

    __slots__ = ("_failed", "_fitted", "_pressed", "_runs", "_wanted", "learnt", "most", "rows")

    def __init__(self, most: int) -> None:
        self.most = most
        self.rows = most
        self.learnt: int | None = None
        """Rows that fitted when more did not; None while nothing is known against more. It bounds single requests too."""
        self._failed = 0
        self._fitted = False
        self._pressed = most
        self._runs = 0
        self._wanted = _RUNS_BEFORE_GROWTH

    def ran_out(self, rows: int) -> None:
        """So many rows did not fit: half of them is the limit, and each time it takes more runs before a larger one is tried.

        One shortage counts once, however often the rows are halved until they fit.
        """
        half = max(1, rows // 2)
        if self.learnt is not None:
            if self._fitted:
                self._wanted = min(self._wanted * 2, _MOST_RUNS_BEFORE_GROWTH)
            half = min(half, self.learnt)
        self.learnt, self._failed, self._runs, self._fitted = half, max(rows, 1), 0, False
        self._set()

    def succeeded(self, rows: int) -> None:
        """So many rows fitted; to be told while something is learnt. Runs at the limit let it grow by an eighth."""
        learnt = self.learnt
        if learnt is None or rows < min(learnt, self.rows):
            return
        self._runs += 1
        self._fitted = True
        if self._runs < self._wanted:
            return
        self._runs = 0
        if (
            rows < learnt
        ):  # the pressure, or the settings, keep it below what was learnt: nothing is found out about more
            return
        learnt += max(1, learnt // 8)
        # Beyond what once failed there is more room than there was then.
        self.learnt = None if learnt > self._failed and learnt >= self.most else learnt
        if self.learnt is None:
            self._wanted = _RUNS_BEFORE_GROWTH
        self._set()

    def press(self, pressure: Pressure) -> None:
        """Smaller under pressure at once, and twice as large as now for every look at low pressure."""
        wanted = optimize_batch_size(pressure, self.most, most=self.most)
        if wanted < self.most:
            self._pressed = min(self._pressed, wanted)
        elif pressure in (Pressure.LOW, Pressure.NONE):
            self._pressed = optimize_batch_size(Pressure.LOW, self._pressed, most=self.most)
        self._set()

    def _set(self) -> None:
        learnt = self.learnt
        self.rows = min(self.most, self._pressed) if learnt is None else max(1, min(self.most, self._pressed, learnt))


class BatchLimits:
    """The limits of this process by version: what was learnt is kept when a version goes and comes again. For any thread."""

    def __init__(self) -> None:
        self._limits: OrderedDict[str, BatchLimit] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._limits)

    def of(self, digest: str, most: int) -> BatchLimit:
        """The one of this version; a new one where the settings, or its metadata, now say another most."""
        with self._lock:
            limit = self._limits.pop(digest, None)
            if limit is None or limit.most != most:
                limit = BatchLimit(most)
            self._limits[digest] = limit
            while len(self._limits) > REMEMBERED:
                self._limits.popitem(last=False)
        return limit

    def forget_all_but(self, digests: Collection[str]) -> None:
        """The others' too, where nothing was learnt."""
        with self._lock:
            for digest in [d for d, limit in self._limits.items() if limit.learnt is None and d not in digests]:
                del self._limits[digest]

    def press(self, pressure: Pressure) -> None:
        with self._lock:
            limits = tuple(self._limits.values())
        for limit in limits:
            limit.press(pressure)
