"""Moments as people type them. What could mean two moments is refused, with examples."""

from __future__ import annotations

import datetime as dt

import pytest

from registry import moments
from registry.errors import UsageError

NOW = dt.datetime(2026, 3, 12, 15, 30, tzinfo=dt.UTC)  # a Thursday


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("2026-03-10T03:12:00Z", "2026-03-10T03:12:00"),
        ("2026-03-10T03:12:00.250Z", "2026-03-10T03:12:00.250000"),
        ("2026-03-10 03:12", "2026-03-10T03:12:00"),
        ("2026-03-10 03:12 UTC", "2026-03-10T03:12:00"),
        ("2026-03-10T03:12+02:00", "2026-03-10T01:12:00"),
        ("2026-03-10", "2026-03-10T00:00:00"),
        ("2d ago", "2026-03-10T15:30:00"),
        ("2d", "2026-03-10T15:30:00"),
        ("90 minutes ago", "2026-03-12T14:00:00"),
        ("1.5h", "2026-03-12T14:00:00"),
        ("3 weeks ago", "2026-02-19T15:30:00"),
        ("now", "2026-03-12T15:30:00"),
        ("yesterday 03:12", "2026-03-11T03:12:00"),
        ("03:12 yesterday", "2026-03-11T03:12:00"),
        ("today at 15:29:59", "2026-03-12T15:29:59"),
        ("yesterday", "2026-03-11T00:00:00"),
        ("03:12 last Tuesday", "2026-03-10T03:12:00"),
        ("last tuesday 03:12", "2026-03-10T03:12:00"),
        ("Tuesday 03:12", "2026-03-10T03:12:00"),
        ("last Thursday 3:12", "2026-03-05T03:12:00"),
        ("03:12+01:00 last Tuesday", "2026-03-10T02:12:00"),
    ],
)
def test_what_people_type_is_understood(text: str, meant: str) -> None:
    assert moments.parse(text, now=NOW) == dt.datetime.fromisoformat(meant).replace(tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("03:12", "on which day"),
        ("10/11/2025", "could be swapped"),
        ("10.11.2025", "could be swapped"),
        ("5", "could be swapped, or it is a bare number"),
        ("march", "write it as"),
        ("", "write it as"),
        ("2026-13-01", "write it as"),
        ("2026-02-30 10:00", "write it as"),
        ("25:00 yesterday", "write it as"),
        ("next Tuesday", "write it as"),
        ("last year", "write it as"),
        ("-2d", "write it as"),
        ("yesterday 03:12 and a bit", "write it as"),
        ("today 15:31", "in the future"),
        ("2999-01-01", "in the future"),
        ("99999999999w ago", "longer ago"),
    ],
)
def test_what_is_not_clear_is_refused_with_examples(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        moments.parse(text, now=NOW)
    assert said != "write it as" or "yesterday 03:12" in str(caught.value)


def test_a_local_time_is_read_in_the_zone_of_the_machine_and_of_its_own_day(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        summer = dt.datetime(2026, 7, 1, 12, 0, tzinfo=dt.UTC)
        assert moments.parse("2026-01-10 03:12", now=summer, local=True).hour == 2
        assert moments.parse("2026-06-10 03:12", now=summer, local=True).hour == 1
        assert moments.parse("yesterday 03:12", now=summer, local=True).hour == 1
        assert moments.parse("2026-06-10 03:12", now=summer).hour == 3
        assert moments.parse("2026-06-10T03:12Z", now=summer, local=True).hour == 3
    finally:
        monkeypatch.undo()
        time.tzset()
