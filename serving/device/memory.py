"""The memory that models compute in: looked at now and then, cleaned up when that is worth it, and the batch sizes that follow from it.

It works by the figures of a device (serving.device.devices), whether that is a CUDA device or the budget of the CPU. MB are 2**20 bytes.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.errors import UnavailableError
from registry.profiles import MEBIBYTE
from registry.settings import Settings
from serving.device.devices import Device, Figures, open_device
from serving.device.loads import beside_torch
from serving.device.memory_limits import BatchLimits, Pressure, pressure_of
from serving.process.rings import Ring

if TYPE_CHECKING:
    from serving.state import Serving

log = logging.getLogger("modelkeep.memory")

HISTORY = 720
CLEAN_UPS_KEPT = 100
LOOKS_FOR_PREDICTION = 3
WORTH_UTILISATION = 0.70
WORTH_FRAGMENTATION = 0.30
_LEAST_SECONDS_BETWEEN_CLEAN_UPS = 1.0
_LOOKS_FOR_TREND = 12
_WORTH_FREED = 0.05
_FIRST_PAUSE_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """One look at the memory. `timestamp` is UTC in seconds since 1970; the sizes are in MB of 2**20 bytes."""

    total_mb: float
    allocated_mb: float
    reserved_mb: float
    free_mb: float
    fragmentation_ratio: float
    timestamp: float
    pressure_level: Pressure
    utilisation: float

    @classmethod
    def of(cls, figures: Figures, timestamp: float, budget_bytes: int | None) -> MemoryProfile:
        """The pressure is that on the device or, where it is greater, that of our own use on the budget for models."""
        used = figures.utilisation
        if budget_bytes:
            used = max(used, figures.allocated / budget_bytes)
        return cls(
            total_mb=figures.total / MEBIBYTE,
            allocated_mb=figures.allocated / MEBIBYTE,
            reserved_mb=figures.reserved / MEBIBYTE,
            free_mb=figures.free / MEBIBYTE,
            fragmentation_ratio=figures.fragmentation_ratio,
            timestamp=timestamp,
            pressure_level=pressure_of(used),
            utilisation=used,
        )

    @classmethod
    def of_row(cls, row: Sequence[float | None]) -> MemoryProfile:
        total, allocated, reserved, free, ratio, timestamp, utilisation = (value or 0.0 for value in row)
        return cls(total, allocated, reserved, free, ratio, timestamp, pressure_of(utilisation), utilisation)

    def row(self) -> tuple[float, ...]:
        return (
            self.total_mb, self.allocated_mb, self.reserved_mb, self.free_mb, self.fragmentation_ratio, self.timestamp,
            self.utilisation,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return {
            "total_mb": round(self.total_mb, 1),
            "allocated_mb": round(self.allocated_mb, 1),
            "reserved_mb": round(self.reserved_mb, 1),
            "free_mb": round(self.free_mb, 1),
            "fragmentation_ratio": round(self.fragmentation_ratio, 4),
            "timestamp": round(self.timestamp, 3),
            "pressure_level": self.pressure_level.value,
        }


NO_DEVICE: dict[str, Any] = {
    **dict.fromkeys(("total_mb", "allocated_mb", "reserved_mb", "free_mb", "fragmentation_ratio"), 0),
    "timestamp": None,
    "pressure_level": Pressure.NONE.value,
}
"""The profile of a device that is not there: shown beside `device: null` only."""


@dataclass(frozen=True, slots=True)
class CleanUp:
    """What a clean-up gave back, in reserved MB: what is in use by nobody but was held counts, and nothing else can be freed."""

    timestamp: float
    reason: str
    before_mb: float
    after_mb: float
    seconds: float

    @property
    def freed_mb(self) -> float:
        return max(self.before_mb - self.after_mb, 0.0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "timestamp": round(self.timestamp, 3),
            "reason": self.reason,
            "freed_mb": round(self.freed_mb, 1),
            "before_mb": round(self.before_mb, 1),
            "after_mb": round(self.after_mb, 1),
            "seconds": round(self.seconds, 4),
        }


class MemoryOptimizer:
    """One a process. Any thread may call it; only one cleans up at a time, and nobody waits for another's lock to look."""

    def __init__(
        self,
        device: Device,
        *,
        budget_bytes: int | None = None,
        warning_threshold: float = 0.8,
        history: int = HISTORY,
        collect: Callable[[], object] = gc.collect,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`warning_threshold`: from that share of the memory on it is said once, in the log and in the report."""
        self.device = device
        self.budget_bytes = budget_bytes
        self.warning_threshold = warning_threshold
        self.limits = BatchLimits()
        self.history = Ring(history, 7, MemoryProfile.of_row)
        self.clean_ups: deque[CleanUp] = deque(maxlen=CLEAN_UPS_KEPT)
        self.clean_up_count = 0
        self.freed_mb_total = 0.0
        self.out_of_memory_count = 0
        self.warned = False
        self.fragmentation_max = 0.0
        self._fragmentation_sum = 0.0
        self.looks = 0
        self._collect, self._clock, self._monotonic = collect, clock, monotonic
        self._recording = threading.Lock()
        self._cleaning = threading.Lock()
        self._cleaned_at: float | None = None
        self._pause_seconds = 0.0
        self._not_before = 0.0

    @property
    def fragmentation_mean(self) -> float | None:
        """Over all looks since the process began; None before the first."""
        return self._fragmentation_sum / self.looks if self.looks else None

    @property
    def newest(self) -> MemoryProfile | None:
        with self._recording:
            return next(iter(self.history.last(1)), None)

    def profile(self) -> MemoryProfile:
        """Look at the memory now, and remember it. Raises UnavailableError where the device does not answer."""
        found = MemoryProfile.of(self.device.figures(), self._clock(), self.budget_bytes)
        with self._recording:
            self.history.append(found.row())
            self.looks += 1
            self._fragmentation_sum += found.fragmentation_ratio
            self.fragmentation_max = max(self.fragmentation_max, found.fragmentation_ratio)
            crossed = (found.utilisation > self.warning_threshold) != self.warned
            self.warned = found.utilisation > self.warning_threshold
        if crossed:
            level = logging.WARNING if self.warned else logging.INFO
            log.log(level, "%.0f %% of the memory for models is in use", 100 * found.utilisation)
        self.limits.press(found.pressure_level)
        return found

    def predict_cleanup_need(self) -> bool:
        """Whether a clean-up is worth it: use has not fallen over three looks, is above 70 %, and more than 30 % of what is held is not in use.

        Not for a while after one that gave hardly anything back, twice as long each time, up to ten minutes.
        """
        if self._monotonic() < self._not_before:
            return False
        with self._recording:
            last = self.history.last(LOOKS_FOR_PREDICTION)
        if len(last) < LOOKS_FOR_PREDICTION:
            return False
        rising = all(a.allocated_mb <= b.allocated_mb for a, b in itertools.pairwise(last))
        newest = last[-1]
        return rising and newest.utilisation > WORTH_UTILISATION and newest.fragmentation_ratio > WORTH_FRAGMENTATION

    def clean_up(self, reason: str, *, now: bool = False) -> CleanUp | None:
        """Python's garbage first, since it holds tensors, then what the allocators hold without using it, measured in reserved bytes.

        None where another is under way, or ended less than a second ago: it has done what there is to do. With `now` the
        allocators are asked all the same. Raises UnavailableError where the device does not answer.
        """
        if not self._cleaning.acquire(blocking=now):
            return None
        try:
            started = self._monotonic()
            lately = self._cleaned_at is not None and started - self._cleaned_at < _LEAST_SECONDS_BETWEEN_CLEAN_UPS
            if lately and not now:
                return None
            before = self.device.figures().reserved
            if not lately:
                self._collect()
            self.device.release()
            after = self.device.figures().reserved
            ended = self._cleaned_at = self._monotonic()
            done = CleanUp(self._clock(), reason, before / MEBIBYTE, after / MEBIBYTE, ended - started)
            with self._recording:
                self.clean_ups.append(done)
                self.clean_up_count += 1
                self.freed_mb_total += done.freed_mb
            if (
                done.freed_mb < _WORTH_FREED * done.before_mb
            ):  # what is held cannot be given back: try less and less often
                self._pause_seconds = min(max(2 * self._pause_seconds, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
                self._not_before = ended + self._pause_seconds
            else:
                self._pause_seconds = self._not_before = 0.0
        finally:
            self._cleaning.release()
        log.info("memory cleaned up (%s): %.1f MB given back in %.3f s", reason, done.freed_mb, done.seconds)
        return done

    def before_large_work(self, what: str, needed_bytes: int = 0) -> None:
        """Clean up where one is predicted, or `needed_bytes` are more than can be had. A device that does not answer is logged."""
        try:
            found = self.profile()
            room = found.free_mb
            if (
                self.device.kind == "cpu"
            ):  # one allocator for all: what it holds without using it is had without a clean-up
                room += found.reserved_mb - found.allocated_mb
            if self.predict_cleanup_need() or needed_bytes > room * MEBIBYTE:
                self.clean_up(f"before {what}")
        except UnavailableError as error:
            log.warning("the memory before %s is not known: %s", what, error)

    def ran_out(self, who: str) -> None:
        """A computation ran out of memory: clean up, so that the next one has all that can be had. Called on its worker thread."""
        with self._recording:
            self.out_of_memory_count += 1
        try:
            self.clean_up(f"{who} ran out of memory", now=True)
        except UnavailableError as error:
            log.warning("no clean-up after %s ran out of memory: %s", who, error)

    def recent_clean_ups(self) -> int:
        """How many there were within the last hour, as far as they are kept."""
        since = self._clock() - 3600
        with self._recording:
            return sum(event.timestamp >= since for event in self.clean_ups)

    def trend(self) -> dict[str, Any] | None:
        """Where the use goes, by the median of the slopes between the last looks; None before there are three."""
        with self._recording:
            last = self.history.last(_LOOKS_FOR_TREND)
        slopes = sorted(
            (b.allocated_mb - a.allocated_mb) / (b.timestamp - a.timestamp) * 60
            for number, a in enumerate(last)
            for b in last[number + 1 :]
            if b.timestamp > a.timestamp
        )
        if len(last) < LOOKS_FOR_PREDICTION or not slopes:
            return None
        middle = slopes[len(slopes) // 2]
        noise = 0.001 * last[-1].total_mb
        direction = "rising" if middle > noise else "falling" if middle < -noise else "steady"
        return {"direction": direction, "mb_per_minute": round(middle, 3), "looks": len(last)}

    async def watch(
        self,
        every_seconds: float = 5.0,
        *,
        measure: Callable[[], object] = lambda: None,
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Look again and again, and clean up where that is predicted. On a thread, since drivers may take their time, as `measure`
        is called; `then` follows on the event loop.
        """
        told = False
        while True:
            try:
                await asyncio.to_thread(self._look, measure)
                told = False
            except UnavailableError as error:
                if not told:
                    log.warning("the memory is not known: %s", error)
                told = True
            except Exception:  # a framework on a device in trouble raises what it likes: not to end with it
                if not told:
                    log.exception("looking at the memory failed")
                told = True
            then()
            await asyncio.sleep(every_seconds)

    def _look(self, measure: Callable[[], object]) -> None:
        measure()
        self.profile()
        if self.predict_cleanup_need():
            self.clean_up("more than 30 % of what is held is not in use")


def of_this_machine(settings: Settings, serving: Serving, budget_bytes: int | None) -> MemoryOptimizer:
    """The optimizer of the place where this process computes; `budget_bytes` is what loaded versions may take of it."""

    def models() -> int:  # of any thread: `install` puts another dictionary in the place of this one
        loaded = serving.loaded.values()
        on_device = serving.memory is not None and serving.memory.device.kind == "cuda"
        return sum(beside_torch(v.runtime) if on_device else v.runtime.memory_bytes for v in loaded)

    device = open_device(settings, models=models, budget_bytes=budget_bytes)
    serving.memory = MemoryOptimizer(
        device, budget_bytes=budget_bytes, warning_threshold=settings.alerts.gpu_memory_warning_percent / 100
    )
    return serving.memory
