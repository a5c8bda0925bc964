"""Sticky routing: a key gets the same version everywhere, keeps it as the share grows, and other promotions draw others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.traffic.routing import Route, choose, mark_of, position_of
from tests.unit.serving.helpers import close, load, serve

ROUTE = Route("m", 4, "1", "2", 0.25, watch=True, promotion="p1")


def chosen(route: Route, key: bytes) -> str:
    return choose(route, lambda: position_of(mark_of(route, key)))


@given(key=st.binary(min_size=1, max_size=200), low=st.floats(0, 1), high=st.floats(0, 1), generation=st.integers(1))
def test_who_had_the_candidate_keeps_it_while_the_share_grows(
    key: bytes, low: float, high: float, generation: int
) -> None:
    low, high = sorted((low, high))
    before = replace(ROUTE, weight=low)
    after = replace(ROUTE, weight=high, generation=generation)
    if chosen(before, key) == "2":
        assert chosen(after, key) == "2"


@given(key=st.binary(min_size=1, max_size=200))
def test_a_position_lies_in_the_unit_interval_and_does_not_depend_on_the_process(key: bytes) -> None:
    position = position_of(mark_of(ROUTE, key))
    assert 0 <= position < 1
    assert position == position_of(mark_of(Route("m", 9, "1", "2", promotion="p1"), key))


def test_the_position_of_a_known_key_is_written_down() -> None:
    """Servers of different releases must choose alike while one is replaced by the other."""
    assert mark_of(ROUTE, b"user-1") == int.from_bytes(bytes.fromhex("ff9a8cead3e9343c"), "big")


@pytest.mark.parametrize("weight", [0.01, 0.05, 0.25, 0.5, 0.99])
def test_keys_spread_evenly(weight: float) -> None:
    route, n = replace(ROUTE, weight=weight), 20_000
    drawn = Counter(chosen(route, b"user-%d" % k) for k in range(n))
    assert drawn["2"] == pytest.approx(weight * n, abs=4 * (n * weight * (1 - weight)) ** 0.5)


def test_another_promotion_and_another_model_draw_other_keys() -> None:
    def first(route: Route) -> set[int]:
        return {k for k in range(4000) if chosen(route, b"user-%d" % k) == "2"}

    mine = first(ROUTE)
    for other in (replace(ROUTE, promotion="p2"), replace(ROUTE, model="n"), replace(ROUTE, promotion=None)):
        both = len(mine & first(other))
        assert both == pytest.approx(4000 / 16, abs=75)


def test_a_key_is_sticky_and_without_one_the_draw_is_random() -> None:
    stable, candidate = load(version="1"), load(version="2")
    serving = serve(stable, candidate, route=ROUTE, random=lambda: 0.9).serving
    sticky = next(b"%d" % k for k in range(100) if position_of(mark_of(ROUTE, b"%d" % k)) < 0.25)
    for _ in range(3):
        admitted, _, mark = serving.admit("m", None, sticky)
        assert admitted is candidate and mark == mark_of(ROUTE, sticky)
        admitted.release()
    admitted, _, mark = serving.admit("m", None)
    assert admitted is stable and mark is None
    close(stable, candidate)
