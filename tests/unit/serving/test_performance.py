"""Samples of how the server does, each figure measured, held against thresholds and a baseline."""

from __future__ import annotations

from typing import Any

import pytest

from registry.errors import UnavailableError
from registry.sections import AlertsSection
from serving.device.devices import Figures
from serving.device.memory_limits import Pressure
from serving.figures.performance import Analysis, Performance, PerformanceSample, Status, advice, analyse
from serving.figures.telemetry import VersionTelemetry
from tests.unit.serving.limited import Pool

MEBIBYTE = 1 << 20
LIMITS = AlertsSection()


class Hot(Pool):
    def temperature_celsius(self) -> float | None:
        return 78.0

    def utilisation_percent(self) -> float | None:
        return 55.0


class Clock:
    def __init__(self) -> None:
        self.now = 500.0

    def __call__(self) -> float:
        return self.now


def made(device: Pool | None = None, **options: Any) -> tuple[Performance, VersionTelemetry, Clock]:
    clock, telemetry = Clock(), VersionTelemetry()
    taker = Performance(
        device or Pool(100 * MEBIBYTE),
        LIMITS,
        lambda: [telemetry],
        cpu_percent=lambda: 12.5,
        monotonic=clock,
        clock=clock,
        **options,
    )
    return taker, telemetry, clock


def answer(telemetry: VersionTelemetry, count: int, seconds: float, *, error: bool = False) -> None:
    for _ in range(count):
        telemetry.total.record(seconds, error=error, slow=False)


def test_every_figure_of_a_sample_is_measured() -> None:
    device = Hot(100 * MEBIBYTE)
    taker, telemetry, clock = made(device)
    with device.buffer(40 * MEBIBYTE):
        taker.measure()
    answer(telemetry, 90, 0.010)
    answer(telemetry, 10, 0.200, error=True)
    telemetry.out_of_memory += 3
    clock.now += 30
    found = taker.sample()
    assert (found.gpu_memory_usage_mb, found.gpu_memory_percent) == (40.0, 40.0)
    assert (found.gpu_temperature_celsius, found.gpu_busy_percent, found.cpu_usage_percent) == (78.0, 55.0, 12.5)
    assert (found.requests, found.throughput_per_minute, found.error_rate) == (100, 200.0, 0.1)
    assert found.response_seconds == pytest.approx(0.029) and found.out_of_memory == 3
    assert found.response_p95_seconds == pytest.approx(0.2, rel=0.06)


def test_what_was_not_asked_for_or_cannot_be_measured_is_absent() -> None:
    class Lost(Pool):
        def figures(self) -> Figures:
            raise UnavailableError("lost")

    taker, _, clock = made(Lost(1))
    taker.measure()
    clock.now += 1
    found = taker.sample()
    assert (found.gpu_memory_usage_mb, found.gpu_memory_percent, found.gpu_temperature_celsius) == (None, None, None)
    assert (found.response_seconds, found.response_p95_seconds, found.error_rate) == (None, None, None)
    assert (found.requests, found.throughput_per_minute) == (0, 0.0)
    assert analyse(found, LIMITS) == Analysis(Status.HEALTHY, (), ())


def test_the_window_is_the_last_minute() -> None:
    taker, telemetry, clock = made()
    answer(telemetry, 50, 1.0)
    for _ in range(14):
        clock.now += 5
        newest = taker.sample()
    assert newest.requests == 0
    answer(telemetry, 6, 0.1)
    clock.now += 5
    newest = taker.sample()
    assert newest.requests == 6 and newest.throughput_per_minute == pytest.approx(6, rel=0.1)
    assert newest.response_seconds == pytest.approx(0.1)


def test_counts_that_were_dropped_make_nothing_negative() -> None:
    versions = [VersionTelemetry(), VersionTelemetry()]
    answer(versions[0], 50, 0.1, error=True)
    clock = Clock()
    taker = Performance(Pool(1), LIMITS, lambda: versions, cpu_percent=float, monotonic=clock, clock=clock)
    clock.now += 5
    taker.sample()
    versions.pop(0)
    clock.now += 70
    taker.sample()
    clock.now += 70
    found = taker.sample()
    assert (found.requests, found.error_rate, found.response_p95_seconds) == (0, None, None)


def test_the_history_is_bounded_and_the_baseline_is_the_first_minute_that_says_something() -> None:
    taker, telemetry, clock = made(history=4)
    assert taker.report() == {"sample": None, "baseline": None, "samples": 0}
    answer(telemetry, 99, 0.01)
    for number in range(10):
        if number == 5:
            answer(telemetry, 100, 0.02)
        clock.now += 30
        taker.sample()
    assert len(taker.history) == 4 and taker.baseline is not None
    assert taker.baseline.response_seconds == pytest.approx(0.02, rel=0.05)
    answer(telemetry, 100, 0.09)
    clock.now += 70
    taker.sample()
    report = taker.report()
    assert report["status"] == "warning" and report["samples"] == 4
    assert any("times the" in issue and "baseline" in issue for issue in report["issues"])


def sample(**values: Any) -> PerformanceSample:
    usual: dict[str, Any] = {
        **{"timestamp": 0.0, "gpu_memory_usage_mb": 100.0, "gpu_memory_percent": 50.0, "gpu_temperature_celsius": 60.0},
        **{"gpu_busy_percent": 10.0, "cpu_usage_percent": 20.0, "requests": 100, "response_seconds": 0.1},
        **{"response_p95_seconds": 0.2, "throughput_per_minute": 100.0, "error_rate": 0.0, "out_of_memory": 0},
    }
    return PerformanceSample(**{**usual, **values})


@pytest.mark.parametrize(
    ("values", "status", "issue", "recommendation"),
    [
        ({}, Status.HEALTHY, None, None),
        ({"gpu_memory_percent": 86.0}, Status.WARNING, "86 % in use", "swapping"),
        ({"gpu_memory_percent": 96.0}, Status.CRITICAL, "96 % in use", "Unload models"),
        ({"gpu_temperature_celsius": 76.0}, Status.WARNING, "76 °C", "batch_size"),
        ({"gpu_temperature_celsius": 86.0}, Status.CRITICAL, "86 °C", "cooling"),
        ({"cpu_usage_percent": 81.0}, Status.WARNING, "81 % busy", "other work"),
        ({"error_rate": 0.06}, Status.CRITICAL, "6.0% of the requests failed", "roll the version back"),
        ({"error_rate": 1.0, "requests": 19}, Status.HEALTHY, None, None),
        ({"response_p95_seconds": 6.0}, Status.WARNING, "up to 6 s", "faster version"),
        ({"out_of_memory": 2}, Status.WARNING, "2 runs did not fit", "max_batch"),
    ],
)
def test_the_thresholds_say_what_is_wrong_and_what_helps(
    values: dict[str, Any], status: Status, issue: str | None, recommendation: str | None
) -> None:
    found = analyse(sample(**values), LIMITS)
    assert found.status is status
    assert [issue in text for text in found.issues if issue] == ([True] if issue else [])
    assert [recommendation in text for text in found.recommendations if recommendation] == ([True] if issue else [])
    assert len(found.issues) == (issue is not None)


def test_the_worst_of_several_counts() -> None:
    found = analyse(sample(gpu_memory_percent=90.0, gpu_temperature_celsius=90.0, cpu_usage_percent=99.0), LIMITS)
    assert found.status is Status.CRITICAL and len(found.issues) == 3


def test_advice_goes_by_pressure_fragmentation_and_clean_ups() -> None:
    assert advice(Pressure.LOW, 0.1, 0) == ["Memory is in good order"]
    assert "nearly full" in advice(Pressure.CRITICAL, 0.1, 0)[0] and "short" in advice(Pressure.HIGH, 0.1, 0)[0]
    found = advice(Pressure.MEDIUM, 0.6, 11, warned=True)
    assert ["threshold" in found[0], "not in use" in found[1], "frequent" in found[2]] == [True] * 3
