"""Moments as people type them: ISO 8601, "2d ago", "yesterday 03:12", "03:12 last Tuesday". What can mean two things is refused."""

from __future__ import annotations

import datetime as dt
import re

from registry import clock
from registry.errors import UsageError

EXAMPLES = '2026-03-10T03:12:00Z, "2026-03-10 03:12", "2d ago", "yesterday 03:12", "03:12 last Tuesday", now'

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_AGO = re.compile(
    r"(\d+(?:\.\d+)?)\s*(s|secs?|seconds?|m|mins?|minutes?|h|hours?|d|days?|w|weeks?)(?:\s+ago)?", re.IGNORECASE
)
_TIME = re.compile(
    r"([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d)(?:\.(\d{1,6}))?)?\s*(z|utc|[+-]\d\d:?\d\d)?", re.IGNORECASE
)
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def parse(text: str, *, now: dt.datetime | None = None, local: bool = False) -> dt.datetime:
    """The moment that `text` means, in UTC. Without an offset it is read as UTC, with `local` as this machine's zone.

    A weekday is the last day of that name before today, with or without "last". Raises UsageError, with examples, for what
    is not understood, what could mean two days (03:12 alone, 10/11/2025), and what lies in the future.
    """
    zone = (now or clock.now()).astimezone().tzinfo if local else dt.UTC
    present = (now or clock.now()).astimezone(zone)
    words = " ".join(text.split())
    found = _ago(words, present) or _iso(words, zone, local) or _named_day(words, present)
    if found is None:
        raise UsageError(f"{text!r} is not a time that is understood here; {_hint(words)}: {EXAMPLES}")
    moment = found.astimezone(dt.UTC)
    if moment > present + dt.timedelta(seconds=1):
        raise UsageError(f"{text!r} is {clock.text(moment)}, and that lies in the future")
    return moment


def _ago(words: str, present: dt.datetime) -> dt.datetime | None:
    if words.lower() == "now":
        return present
    match = _AGO.fullmatch(words)
    if match is None:
        return None
    try:
        return present - dt.timedelta(seconds=float(match[1]) * _UNITS[match[2][0].lower()])
    except OverflowError as error:
        raise UsageError(f"{words!r} is longer ago than a calendar goes") from error


def _iso(words: str, zone: dt.tzinfo | None, local: bool) -> dt.datetime | None:
    if not re.match(r"\d{4}-\d\d-\d\d", words):
        return None
    try:
        moment = dt.datetime.fromisoformat(words.upper().replace(" UTC", "+00:00").replace(" Z", "Z"))
    except ValueError:
        return None
    if moment.tzinfo is not None:
        return moment
    # A local time is given the offset that held on its own day, not today's.
    return moment.astimezone() if local else moment.replace(tzinfo=zone)


def _named_day(words: str, present: dt.datetime) -> dt.datetime | None:
    """today, yesterday, [last] WEEKDAY; with a time of day before or behind it, else from its first second."""
    time = next(_TIME.finditer(words), None)
    day = (words if time is None else words[: time.start()] + words[time.end() :]).lower().replace(" at", "").strip()
    day = day.removeprefix("on ").removeprefix("last ").strip()
    if day == "today":
        back = 0
    elif day == "yesterday":
        back = 1
    elif day in _DAYS:
        back = (present.weekday() - _DAYS.index(day)) % 7 or 7
    else:
        return None
    date = present.date() - dt.timedelta(days=back)
    hour, minute, second, part = (int(time[1]), int(time[2]), int(time[3] or 0), time[4]) if time else (0, 0, 0, None)
    moment = dt.datetime.combine(date, dt.time(hour, minute, second, int((part or "0").ljust(6, "0"))))
    if time is not None and time[5]:
        offset = time[5].upper()
        return moment.replace(tzinfo=dt.UTC if offset in ("Z", "UTC") else _offset(offset))
    return moment.astimezone() if present.tzinfo is not dt.UTC else moment.replace(tzinfo=dt.UTC)


def _offset(text: str) -> dt.timezone:
    sign = -1 if text[0] == "-" else 1
    return dt.timezone(sign * dt.timedelta(hours=int(text[1:3]), minutes=int(text[-2:])))


def _hint(words: str) -> str:
    if _TIME.fullmatch(words):
        return "on which day? For example"
    if re.fullmatch(r"[\d./-]+", words) and not words.startswith("20"):
        return "day and month could be swapped, or it is a bare number; write it as"
    return "write it as"
