"""The registry's database as the settings describe it. In one place, so that every program opens it alike."""

from __future__ import annotations

from typing import Any

from registry.database import ANSWER_SECONDS, Database
from registry.settings import Settings


def open_database(
    settings: Settings, *, answer_seconds: float = ANSWER_SECONDS, statement_seconds: float | None = None
) -> Database:
    """Not connected yet, and its schema not looked at: see `Database.prepare`."""
    pool = settings.database
    database = Database(
        settings.database_url,
        anchors=settings.home / "audit.anchors",
        pool={
            "pool_size": pool.pool_size,
            "max_overflow": pool.max_overflow,
            "pool_timeout": pool.pool_timeout_seconds,
            "pool_recycle": int(pool.pool_recycle_seconds),
        },
        answer_seconds=answer_seconds,
        statement_seconds=statement_seconds,
    )
    database.facts = facts_of(settings)
    return database


def facts_of(settings: Settings) -> dict[str, Any]:
    """What is kept of the settings with a rollback point: how versions were served then. No secrets."""
    return {
        "profile": settings.profile,
        "poll_seconds": settings.poll_seconds,
        "threads": settings.server.threads,
        "request_timeout_seconds": settings.server.request_timeout_seconds,
        "max_body_bytes": settings.server.max_body_bytes,
        "batch_size": settings.performance.batch_size,
        "queue_size": settings.performance.queue_size,
        "max_concurrent_requests": settings.performance.max_concurrent_requests,
    }
