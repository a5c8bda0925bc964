"""Alembic's environment: migrations run on the engine that registry.migrate hands over, in one write transaction."""

from __future__ import annotations

from alembic import context

from registry import ddl
from registry.schema import Base


def run() -> None:
    writer = context.config.attributes["writer"]
    with writer.connect() as connection, connection.begin(), ddl.alone(connection):
        # The transaction is ours: on SQLite it began as IMMEDIATE, so that of two processes one waits for the other.
        context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
        context.run_migrations()


run()
