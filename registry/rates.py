"""Rates as people write them: `60/minute`, or `none`. Who keeps to them is serving.access.rates."""

from __future__ import annotations

import re
from dataclasses import dataclass

from registry.errors import UsageError

NONE = "none"
"""No limit."""
UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
"""Seconds of each unit."""
MOST = 1_000_000_000
_FORM = re.compile(r"([0-9]{1,10})\s*/\s*(second|minute|hour|day)")


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` requests in `unit_seconds`; as many may come at once."""

    count: int
    unit_seconds: int

    @property
    def per_second(self) -> float:
        return self.count / self.unit_seconds

    def __str__(self) -> str:
        return f"{self.count}/{next(name for name, seconds in UNITS.items() if seconds == self.unit_seconds)}"


def parse(text: str) -> Rate | None:
    """A rate; None for `none`. Raises UsageError, which shows the form."""
    plain = text.strip().lower()
    if plain == NONE:
        return None
    match = _FORM.fullmatch(plain)
    if match is None or not 0 < int(match[1]) <= MOST:
        raise UsageError(
            f"{text!r} is no rate: a number above 0 and a unit, as in 60/minute (second, minute, hour or day), or none"
        )
    return Rate(int(match[1]), UNITS[match[2]])


def written(text: str) -> str:
    """The one form in which a rate is kept. Raises UsageError."""
    rate = parse(text)
    return NONE if rate is None else str(rate)
