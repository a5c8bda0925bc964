"""What the registry wants of a server: the routes of its environment, and the versions that they name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from registry import leases, promotions, replicas, unfit
from registry.database import Database
from registry.errors import UnavailableError
from serving.follow.backstop import wanted_of
from serving.follow.reporting import InThread
from serving.loaded.caretaker import Caretaker, Unfit
from serving.loaded.laststate import LastState
from serving.state import Serving
from serving.traffic.routing import Route

log = logging.getLogger("modelkeep.reconcile")


class Upstream:
    """The registry as one server follows it. What it raises where the registry does not answer is UnavailableError."""

    def __init__(
        self,
        database: Database,
        serving: Serving,
        caretaker: Caretaker,
        in_thread: InThread,
        *,
        monotonic: Callable[[], float],
    ) -> None:
        self.prepared = False
        self._database, self._serving, self._caretaker, self._in_thread = database, serving, caretaker, in_thread
        self._observer = leases.Observer(monotonic)
        self._who = f"replica:{serving.replica_id}"

    async def prepare(self, last: LastState | None) -> None:
        """Bring the registry to this release's schema. An empty one is made only where no other can have been lost."""
        if self.prepared:
            return
        path = self._database.url.database
        if self._database.sqlite and last is not None and path and not Path(path).exists():
            raise UnavailableError(
                f"the registry {path} is gone, and this server has served from it: restore it from a backup; to begin with an empty "
                "one instead: modelkeep db upgrade"
            )
        await self._in_thread(self._database.prepare)
        self.prepared = True

    async def pulse(self) -> replicas.Pulse | None:
        """The generation to be at. Ends leases that stand still on the way."""
        pulse: replicas.Pulse | None = await self._in_thread(self._pulse)
        for beat in self._observer.stale(pulse.beats if pulse else ()):
            ended = await self._in_thread(partial(self._expire, beat))
            if ended is not None:
                log.warning("withdrew promotion %s: its lease on %s stood still", ended, beat.subject)
                pulse = await self._in_thread(self._pulse)
        return pulse

    async def desired(self) -> LastState:
        found: LastState = await self._in_thread(partial(desired, self._database, self._serving.environment))
        return found

    async def take_out(self, what: Unfit) -> bool:
        """Have the registry take a version out of its route. False where it stays, since nothing else can serve."""
        environment, model, version = self._serving.environment, what.model, what.version
        done = await self._in_thread(
            lambda: unfit.take_out(self._database, environment, model, version, observer=self._who, reason=what.reason)
        )
        self._caretaker.told(what)
        if done is None:
            log.error("%s %s stays, for nothing else can serve: %s", model, version, what.reason)
            return False
        log.error("%s, for %s: %s", done, version, what.reason)
        return True

    def _expire(self, beat: leases.Beat) -> str | None:
        return promotions.expire(self._database, self._serving.environment, beat, observer=self._who)

    def _pulse(self) -> replicas.Pulse | None:
        with self._database.read() as session:
            return replicas.pulse(session, self._serving.environment)


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
