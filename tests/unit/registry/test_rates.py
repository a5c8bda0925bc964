"""Rates as people write them."""

from __future__ import annotations

import pytest

from registry import rates
from registry.errors import UsageError
from registry.rates import Rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("60/minute", Rate(60, 60)),
        (" 5 / second ", Rate(5, 1)),
        ("100/HOUR", Rate(100, 3600)),
        ("1/day", Rate(1, 86400)),
        ("none", None),
    ],
)
def test_a_rate_is_a_number_and_a_unit_or_none(text: str, rate: Rate | None) -> None:
    assert rates.parse(text) == rate
    assert rates.parse(rates.written(text)) == rate


@pytest.mark.parametrize(
    "text", ["", "60", "0/minute", "-1/minute", "1.5/second", "60/week", "60/minutes", "9" * 30 + "/day"]
)
def test_what_is_no_rate_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(UsageError, match="60/minute"):
        rates.parse(text)
