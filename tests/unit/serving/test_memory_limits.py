"""How many rows are computed together: pressure, what was learnt, and how it grows again."""

from __future__ import annotations

import pytest

from serving.device.memory_limits import REMEMBERED, BatchLimit, BatchLimits, Pressure, optimize_batch_size, pressure_of


@pytest.mark.parametrize(
    ("utilisation", "level"),
    [
        *((0.0, Pressure.LOW), (0.70, Pressure.LOW), (0.701, Pressure.MEDIUM), (0.85, Pressure.MEDIUM)),
        *((0.851, Pressure.HIGH), (0.95, Pressure.HIGH), (0.951, Pressure.CRITICAL), (1.2, Pressure.CRITICAL)),
    ],
)
def test_pressure_has_four_levels(utilisation: float, level: Pressure) -> None:
    assert pressure_of(utilisation) is level


@pytest.mark.parametrize(
    ("level", "base", "size"),
    [
        *((Pressure.CRITICAL, 32, 8), (Pressure.CRITICAL, 3, 1), (Pressure.CRITICAL, 1, 1)),
        *((Pressure.HIGH, 32, 16), (Pressure.HIGH, 1, 1), (Pressure.MEDIUM, 7, 7)),
        *((Pressure.LOW, 1, 2), (Pressure.LOW, 20, 32), (Pressure.LOW, 64, 64), (Pressure.NONE, 5, 5)),
    ],
)
def test_the_batch_follows_the_pressure(level: Pressure, base: int, size: int) -> None:
    assert optimize_batch_size(level, base) == size


def test_pressure_makes_batches_small_at_once_and_they_grow_again_by_doubling() -> None:
    limit, sizes = BatchLimit(32), []
    for level in (Pressure.HIGH, Pressure.CRITICAL, Pressure.HIGH, Pressure.MEDIUM, *[Pressure.LOW] * 4):
        limit.press(level)
        sizes.append(limit.rows)
    assert sizes == [16, 8, 8, 8, 16, 32, 32, 32]


def test_a_profile_without_batches_stays_without_them() -> None:
    limit = BatchLimit(1)
    for level in Pressure:
        limit.press(level)
        assert limit.rows == 1


def test_what_ran_out_is_halved_and_grows_only_after_many_runs_at_the_limit() -> None:
    limit = BatchLimit(32)
    limit.ran_out(32)
    assert (limit.rows, limit.learnt) == (16, 16)
    for _ in range(1000):
        limit.succeeded(15)  # says nothing about 16
    assert limit.rows == 16
    for _ in range(32):
        limit.succeeded(16)
    assert limit.rows == 18


def test_the_limit_is_forgotten_once_more_fits_than_ever_failed() -> None:
    limit = BatchLimit(32)
    limit.ran_out(32)
    runs = 0
    while limit.learnt is not None:
        limit.succeeded(limit.rows)
        runs += 1
    assert limit.rows == 32 and 100 < runs < 1000


def test_each_time_it_runs_out_again_it_takes_twice_as_many_runs() -> None:
    def runs_until_it_grows(limit: BatchLimit) -> int:
        before, runs = limit.rows, 0
        while limit.rows == before:
            limit.succeeded(limit.rows)
            runs += 1
        return runs

    limit = BatchLimit(64)
    limit.ran_out(64)
    waits = [runs_until_it_grows(limit)]
    for _ in range(3):
        limit.ran_out(limit.rows)
        waits.append(runs_until_it_grows(limit))
    assert waits == [32, 64, 128, 256]


def test_one_shortage_counts_once_however_often_it_was_halved() -> None:
    limit = BatchLimit(1024)
    while limit.rows > 1:
        limit.ran_out(limit.rows)
    runs = 0
    while limit.rows == 1:
        limit.succeeded(1)
        runs += 1
    assert runs == 32


def test_the_limit_is_one_row_at_least() -> None:
    limit = BatchLimit(8)
    for _ in range(10):
        limit.ran_out(limit.rows)
    assert limit.rows == 1


def test_pressure_and_what_was_learnt_both_bound_it() -> None:
    limit = BatchLimit(32)
    limit.ran_out(32)
    limit.press(Pressure.CRITICAL)
    assert (limit.rows, limit.learnt) == (8, 16)
    for _ in range(500):
        limit.succeeded(8)
    assert limit.learnt == 16  # eight rows say nothing about seventeen
    for _ in range(4):
        limit.press(Pressure.LOW)
    assert limit.rows == 16


def test_a_large_single_request_is_bounded_and_batches_are_not() -> None:
    limit = BatchLimit(32)
    limit.ran_out(1000)
    assert (limit.rows, limit.learnt) == (32, 500)


def test_what_a_version_learnt_outlives_it_and_old_versions_are_forgotten() -> None:
    limits = BatchLimits()
    limits.of("a", 32).ran_out(32)
    assert limits.of("a", 32).rows == 16
    assert limits.of("a", 64).rows == 64  # another setting
    limits.of("a", 64).ran_out(64)
    limits.press(Pressure.CRITICAL)
    assert limits.of("a", 64).rows == 16
    for number in range(REMEMBERED):
        limits.of(str(number), 8)
    assert limits.of("a", 64).rows == 64
