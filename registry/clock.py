"""Wall time, in one place: UTC, timezone-aware, replaceable in tests. Nothing decides by it but deadlines."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_OF_DATABASE = {
    "sqlite": "SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')",
    "mysql": "SELECT UTC_TIMESTAMP(6)",
    "mariadb": "SELECT UTC_TIMESTAMP(6)",
    "postgresql": "SELECT clock_timestamp() AT TIME ZONE 'UTC'",
}


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def text(moment: dt.datetime) -> str:
    """ISO 8601 with microseconds and Z, so that texts sort as times do."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def of_database(session: Session) -> dt.datetime:
    """The time by the database's clock, which all processes share: deadlines go by it."""
    from sqlalchemy import text as sql

    found = session.execute(sql(_OF_DATABASE[session.get_bind().dialect.name])).scalar_one()
    moment = dt.datetime.fromisoformat(found) if isinstance(found, str) else found
    return moment.replace(tzinfo=dt.UTC)
