"""What the registry wants of a server: the routes of its environment, and the versions that they name."""

from __future__ import annotations

from registry import replicas
from registry.database import Database
from registry.errors import UnavailableError
from serving.backstop import wanted_of
from serving.laststate import LastState
from serving.routing import Route


def desired(database: Database, environment: str) -> LastState:
    """Raises UnavailableError where the registry does not answer, or knows nothing of the environment any more."""
    with database.read() as session:
        pulse = replicas.pulse(session, environment)
        if pulse is None:
            raise UnavailableError(f"environment {environment} vanished from the registry")
        rows, versions = replicas.desired(session, environment)
        routes = [
            Route(
                model=row.model,
                generation=row.generation,
                stable=row.stable,
                candidate=row.candidate,
                weight=row.weight,
                shadow=row.shadow,
                slow_threshold_seconds=row.slow_threshold_seconds,
                watch=row.watch,
                shadow_share=1.0 if row.shadow_share is None else row.shadow_share,
                promotion=row.promotion,
            )
            for row in rows
        ]
        # Read in one snapshot on SQLite; elsewhere a change in between shows as a newer generation at the next poll.
        return LastState(pulse.epoch, pulse.generation, tuple(routes), tuple(wanted_of(row) for row in versions))
