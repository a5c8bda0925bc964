"""How a promotion reads its counts: percentiles over replicas, time slices at full weight, the soak cut into windows."""

from __future__ import annotations

import pytest

from tasks.judgement import StreamCounts, Window
from tasks.observation import calm_percentile, percentile
from tasks.slices import Parts, Sliced


def total(requests: int, slow: int, *, weight: float = 1.0) -> Window:
    return Window("soak", weight, {"slow": StreamCounts(requests, slow), "error": StreamCounts(requests, 0)})


def test_a_percentile_is_taken_over_the_histograms_of_all_replicas() -> None:
    rows = [{"latency": {"0.001": 90, "0.01": 5}}, {"latency": {"0.001": 4, "0.1": 1}}]
    assert percentile(rows, 0.5) == 0.001
    assert percentile(rows, 0.95) == 0.01
    assert percentile(rows, 1.0) == 0.1


def test_a_percentile_beyond_the_histogram_or_without_requests_is_unknown() -> None:
    assert percentile([{"latency": {"inf": 3}}], 0.95) is None
    assert percentile([], 0.95) is None


def test_slices_hold_what_each_second_brought_and_nothing_twice() -> None:
    sliced = Sliced()
    seen = Window("soak", 1.0)
    for elapsed, requests, slow in ((0.4, 40, 1), (1.0, 100, 3), (1.5, 150, 3), (2.1, 220, 90)):
        seen = sliced.look(total(requests, slow), elapsed)
    assert [piece["slow"] for piece in seen.slices] == [StreamCounts(100, 3), StreamCounts(120, 87)]
    assert seen.candidate["slow"] == StreamCounts(220, 90)


def test_below_full_weight_nothing_is_sliced() -> None:
    window = total(100, 3, weight=0.5)
    assert Sliced().look(window, 5.0) is window


@pytest.mark.parametrize(("dwell", "length"), [(60.0, 60), (1.0, 10)])
def test_the_soak_is_cut_into_windows_that_add_up(dwell: float, length: int) -> None:
    parts = Parts(dwell)
    windows: list[Window] = []
    for second in range(1, 3 * length + 1):
        windows = parts.look(total(10 * second, second), float(second))
    assert len(windows) == 3
    assert sum((w.candidate["slow"] for w in windows), StreamCounts()) == StreamCounts(30 * length, 3 * length)
    assert [len(w.slices) for w in windows] == [length] * 3


def looks(*slices: dict[str, int]) -> list[list[dict[str, dict[str, int]]]]:
    """Cumulative counts of one replica after each slice."""
    total: dict[str, int] = {}
    found = []
    for piece in slices:
        total = {bound: total.get(bound, 0) + piece.get(bound, 0) for bound in {**total, **piece}}
        found.append([{"latency": dict(total)}])
    return found


def test_a_stall_in_one_slice_does_not_move_the_frozen_percentile() -> None:
    calm, stall = {"0.001": 97, "0.002": 3}, {"0.001": 20, "0.5": 80}
    seen = looks(calm, calm, stall, calm, calm)
    assert percentile(seen[-1], 0.95) == 0.5
    assert calm_percentile(seen, 0.95) == 0.001


def test_slices_with_few_requests_are_joined_and_too_few_in_all_give_the_whole() -> None:
    assert calm_percentile(looks({"0.001": 12}, {"0.001": 12}, {"0.01": 5}), 0.95) == 0.001
    assert calm_percentile(looks({"0.001": 3}, {"0.01": 5}), 0.95) == 0.01
