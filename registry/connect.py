"""The registry's database as the settings describe it. In one place, so that every program opens it alike."""

from __future__ import annotations

from registry.database import Database
from registry.settings import Settings


def open_database(settings: Settings) -> Database:
    """Not connected yet, and its schema not looked at: see `Database.prepare`."""
    pool = settings.database
    return Database(
        settings.database_url,
        anchors=settings.home / "audit.anchors",
        pool={
            "pool_size": pool.pool_size,
            "max_overflow": pool.max_overflow,
            "pool_timeout": pool.pool_timeout_seconds,
            "pool_recycle": int(pool.pool_recycle_seconds),
        },
    )
