"""Wall time, in one place: UTC, timezone-aware, replaceable in tests. Nothing decides by it but deadlines."""

from __future__ import annotations

import datetime as dt


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def text(moment: dt.datetime) -> str:
    """ISO 8601 with microseconds and Z, so that texts sort as times do."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
