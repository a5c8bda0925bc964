"""How the server does: memory, processor, latency, throughput, errors and temperature, each measured, held against thresholds and a baseline."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from typing import Any, Protocol

from registry.errors import UnavailableError
from registry.profiles import MEBIBYTE
from serving.device.devices import Device
from serving.device.memory_limits import Pressure
from serving.figures.telemetry import LATENCY_BOUNDS_SECONDS, VersionTelemetry, latency_rows
from serving.process.rings import Ring

WINDOW_SECONDS = 60.0
HISTORY = 720
BASELINE_REQUESTS = 100
"""The first window with so many requests is what later ones are compared with."""
WORSE = 2.0
"""So many times the baseline's latency is worth saying."""
_LEAST_REQUESTS = 20
"""Fewer in a window say nothing about latency or errors."""


class Status(StrEnum):
    HEALTHY = "healthy"
    WARNING = "warning"
    CRITICAL = "critical"


class Thresholds(Protocol):
    """The section `alerts` of the settings, as far as it is used here."""

    @property
    def gpu_memory_warning_percent(self) -> float: ...
    @property
    def gpu_memory_critical_percent(self) -> float: ...
    @property
    def gpu_temperature_advise_celsius(self) -> float: ...
    @property
    def gpu_temperature_critical_celsius(self) -> float: ...
    @property
    def cpu_advise_percent(self) -> float: ...
    @property
    def api_latency_p95_warning_seconds(self) -> float: ...
    @property
    def error_rate_critical_percent(self) -> float: ...


@dataclass(frozen=True, slots=True)
class PerformanceSample:
    """One look, over the last minute. What could not be measured, or was not asked for, is None.

    `gpu_memory_usage_mb` is what models use of the memory that they compute in (MB of 2**20 bytes), `gpu_memory_percent` its share in
    use by whomever; `cpu_usage_percent` is of the machine since the last look; `response_seconds` is the mean of the
    requests that were computed and `response_p95_seconds` the bound that 95 % of them were within.
    """

    timestamp: float
    gpu_memory_usage_mb: float | None
    gpu_memory_percent: float | None
    gpu_temperature_celsius: float | None
    gpu_busy_percent: float | None
    cpu_usage_percent: float
    requests: int
    response_seconds: float | None
    response_p95_seconds: float | None
    throughput_per_minute: float
    error_rate: float | None
    out_of_memory: int

    @classmethod
    def of_row(cls, row: Sequence[float | None]) -> PerformanceSample:
        """The sample whose `astuple` this was, as numbers."""
        counts = {"requests", "out_of_memory"}
        names = (field.name for field in fields(cls))
        values: dict[str, Any] = {
            name: int(value or 0) if name in counts else value for name, value in zip(names, row, strict=True)
        }
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class Analysis:
    status: Status
    issues: tuple[str, ...]
    recommendations: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "status": self.status.value,
            "issues": list(self.issues),
            "recommendations": list(self.recommendations),
        }


@dataclass(frozen=True, slots=True)
class _Counts:
    """Cumulative, over all versions of the process."""

    at: float
    requests: int = 0
    errors: int = 0
    seconds: float = 0.0
    out_of_memory: int = 0
    latency: Sequence[int] = ()


def counts_of(telemetry: Iterable[VersionTelemetry], at: float) -> _Counts:
    """What all versions have counted until now."""
    every = list(telemetry)
    latency = latency_rows.take()
    for place, counts in enumerate(zip(*(one.total.latency for one in every), strict=True)):
        latency[place] = sum(counts)
    return _Counts(
        at,
        sum(one.total.requests for one in every),
        sum(one.total.errors for one in every),
        sum(one.total.latency_seconds_total for one in every),
        sum(one.out_of_memory for one in every),
        latency,
    )


class Performance:
    """Takes samples and keeps the last; `sample` is called on the event loop, where the counts are written."""

    def __init__(
        self,
        device: Device,
        thresholds: Thresholds,
        telemetry: Callable[[], Iterable[VersionTelemetry]],
        *,
        cpu_percent: Callable[[], float] | None = None,
        history: int = HISTORY,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._device, self._thresholds, self._telemetry = device, thresholds, telemetry
        self._cpu_percent = cpu_percent or _cpu_percent()
        self._monotonic, self._clock = monotonic, clock
        self._counts: deque[_Counts] = deque([_Counts(monotonic())])
        self.baseline: PerformanceSample | None = None
        self.history = Ring(history, len(fields(PerformanceSample)), PerformanceSample.of_row)
        self._lock = threading.Lock()
        self._figures: tuple[float | None, float | None, float | None, float | None] = (None, None, None, None)

    def measure(self) -> None:
        """Ask the device. It may take its time, so on a thread; the next sample has what it said."""
        used = percent = None
        try:
            figures = self._device.figures()
            used, percent = figures.allocated / MEBIBYTE, 100 * figures.utilisation
        except UnavailableError:  # said by serving.device.memory, which asks as often
            used = percent = None
        found = (used, percent, self._device.temperature_celsius(), self._device.utilisation_percent())
        with self._lock:
            self._figures = found

    def sample(self) -> PerformanceSample:
        """Take one from what the device said last and what was counted until now."""
        now = self._monotonic()
        newest = counts_of(self._telemetry(), now)
        self._counts.append(newest)
        while len(self._counts) > 2 and now - self._counts[1].at >= WINDOW_SECONDS:
            self._counts.popleft()
        oldest, seconds = self._counts[0], now - self._counts[0].at
        # Versions whose counts were dropped, long after they were unloaded, take theirs away again.
        requests, errors = max(newest.requests - oldest.requests, 0), max(newest.errors - oldest.errors, 0)
        spent = max(newest.seconds - oldest.seconds, 0.0)
        with self._lock:
            used, percent, temperature, busy = self._figures
        found = PerformanceSample(
            self._clock(),
            used,
            percent,
            temperature,
            busy,
            self._cpu_percent(),
            requests,
            spent / requests if requests else None,
            _p95(oldest.latency, newest.latency),
            requests / seconds * 60 if seconds > 0 else 0.0,
            errors / requests if requests else None,
            max(newest.out_of_memory - oldest.out_of_memory, 0),
        )
        self.history.append(astuple(found))
        if self.baseline is None and requests >= BASELINE_REQUESTS:
            self.baseline = found
        return found

    def report(self) -> dict[str, Any]:
        """The last sample, what is to be said about it, and the baseline. Absent before the first."""
        if not self.history:
            return {"sample": None, "baseline": None, "samples": 0}
        newest = self.history.last(1)[0]
        latencies = [one.response_seconds for one in self.history if one.response_seconds is not None]
        return {
            "sample": newest.as_dict(),
            "baseline": None if self.baseline is None else self.baseline.as_dict(),
            "samples": len(self.history),
            "response_seconds_median": round(statistics.median(latencies), 6) if latencies else None,
            **analyse(newest, self._thresholds, self.baseline).as_dict(),
        }


def analyse(sample: PerformanceSample, limits: Thresholds, baseline: PerformanceSample | None = None) -> Analysis:
    """What is wrong by the thresholds, and what helps. Nothing is said about what was not measured."""
    found: list[tuple[Status, str, str]] = []
    memory, temperature = sample.gpu_memory_percent, sample.gpu_temperature_celsius
    if memory is not None and memory > limits.gpu_memory_critical_percent:
        found.append(
            (
                Status.CRITICAL,
                f"memory for models: {memory:.0f} % in use, critical above {limits.gpu_memory_critical_percent:g} %",
                "Unload models that are not needed, or lower models.max_concurrent_models",
            )
        )
    elif memory is not None and memory > limits.gpu_memory_warning_percent:
        found.append(
            (
                Status.WARNING,
                f"memory for models: {memory:.0f} % in use, more than {limits.gpu_memory_warning_percent:g} %",
                "Enable model swapping (models.enable_model_swapping), or lower models.swap_threshold_mb",
            )
        )
    if temperature is not None and temperature > limits.gpu_temperature_critical_celsius:
        found.append(
            (
                Status.CRITICAL,
                f"device: {temperature:.0f} °C, critical above {limits.gpu_temperature_critical_celsius:g} °C",
                "Look after its cooling, and send less until it is below the limit",
            )
        )
    elif temperature is not None and temperature > limits.gpu_temperature_advise_celsius:
        found.append(
            (
                Status.WARNING,
                f"device: {temperature:.0f} °C, more than {limits.gpu_temperature_advise_celsius:g} °C",
                "Lower performance.batch_size, or look after its cooling",
            )
        )
    if sample.cpu_usage_percent > limits.cpu_advise_percent:
        found.append(
            (
                Status.WARNING,
                f"processor: {sample.cpu_usage_percent:.0f} % busy, more than {limits.cpu_advise_percent:g} %",
                "Move other work off this machine, or lower performance.max_concurrent_requests",
            )
        )
    if sample.requests >= _LEAST_REQUESTS:
        found += _of_requests(sample, limits, baseline)
    if sample.out_of_memory:
        found.append(
            (
                Status.WARNING,
                f"{sample.out_of_memory} runs did not fit the memory and were split",
                "Lower performance.batch_size, or max_batch of the model",
            )
        )
    worst = max((status for status, _, _ in found), key=list(Status).index, default=Status.HEALTHY)
    return Analysis(
        worst, tuple(issue for _, issue, _ in found), tuple(dict.fromkeys(advice for _, _, advice in found))
    )


def _of_requests(
    sample: PerformanceSample, limits: Thresholds, baseline: PerformanceSample | None
) -> list[tuple[Status, str, str]]:
    found: list[tuple[Status, str, str]] = []
    rate, p95, mean = sample.error_rate, sample.response_p95_seconds, sample.response_seconds
    if rate is not None and 100 * rate > limits.error_rate_critical_percent:
        issue = f"{rate:.1%} of the requests failed, critical above {limits.error_rate_critical_percent:g} %"
        found.append((Status.CRITICAL, issue, "Look at the log, and roll the version back that fails them"))
    target = limits.api_latency_p95_warning_seconds
    if p95 is not None and p95 > target:
        issue = f"95 % of the answers take up to {p95:.3g} s, more than {target:g} s"
        found.append((Status.WARNING, issue, "Send less at a time, or give the model a faster version"))
    before = baseline.response_seconds if baseline is not None else None
    if mean is not None and before is not None and before > 0 and mean > WORSE * before:
        issue = f"answers take {mean:.3g} s on average, {mean / before:.1f} times the {before:.3g} s of the baseline"
        found.append((Status.WARNING, issue, "Look at what has changed since the baseline: routes, load, memory"))
    return found


def advice(pressure: Pressure, fragmentation: float, clean_ups: int, *, warned: bool = False) -> list[str]:
    """What to do about the memory, in the order of urgency; one line that all is well where there is nothing."""
    found = []
    if pressure is Pressure.CRITICAL:
        found.append("Memory is nearly full: unload models or lower performance.batch_size now")
    elif pressure is Pressure.HIGH:
        found.append("Memory is short: lower performance.batch_size, or let fewer models be loaded at a time")
    elif warned:
        found.append("Memory use is above the warning threshold: look at the trend before loading more")
    if fragmentation > 0.5:
        found.append("More than half of what is held is not in use: fewer sizes of batches keep it together")
    if clean_ups > 10:
        found.append("Clean-ups are frequent: the models are too large for this memory, or too many")
    return found or ["Memory is in good order"]


def _p95(before: Sequence[int], now: Sequence[int]) -> float | None:
    """The bound that 95 % of the latencies between the two were within; None without any, or beyond the last bound."""
    gained = [new - (before[number] if number < len(before) else 0) for number, new in enumerate(now)]
    wanted, seen = 0.95 * sum(gained), 0
    if wanted <= 0:
        return None
    for bound, count in zip(LATENCY_BOUNDS_SECONDS, gained, strict=False):
        seen += count
        if seen >= wanted:
            return bound
    return None


def _cpu_percent() -> Callable[[], float]:
    """Asks psutil for the time since it was asked last."""
    import psutil

    psutil.cpu_percent(interval=None)
    return lambda: float(psutil.cpu_percent(interval=None))
