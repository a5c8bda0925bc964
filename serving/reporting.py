"""What this server tells the registry: its row, its counts, its switches, the verdicts of its clients, and what it could not load."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from registry import feedback, replicas, unfit
from registry.database import Database
from serving.routing import Route
from serving.state import Serving

Key = tuple[str, str]

_HEARTBEAT_SECONDS = 10.0
_COUNTS_KEPT_SECONDS = 60.0
_REACHED_KEPT = 1000
_FEEDBACK_BATCH, _FEEDBACK_BATCHES = 500, 20


class InThread(Protocol):
    """Runs work on the registry's thread."""

    def __call__(self, work: Callable[[], Any]) -> Awaitable[Any]: ...


@dataclass(frozen=True, slots=True)
class Said:
    """What the reconciler says of this server."""

    address: str
    started_at: dt.datetime
    serving: dict[str, Any]
    errors: Mapping[Key, str]


class Reporter:
    """Keeps what has been told, so that only news are. Used by the reconciler, one call at a time."""

    def __init__(self, serving: Serving, database: Database, *, monotonic: Callable[[], float]) -> None:
        self._serving, self._database, self._monotonic = serving, database, monotonic
        self._at = float("-inf")
        self._counts: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._state: tuple[Any, ...] | None = None
        self._errors: set[tuple[Key, str]] = set()
        self._reached: deque[replicas.Reached] = deque(maxlen=_REACHED_KEPT)  # switches that no report has told of yet
        self._superseded: dict[tuple[str, int], float] = {}  # (model, generation) no longer routed -> since when

    def reached(self, switch: replicas.Reached) -> None:
        """The routes were switched; the next report says when."""
        self._reached.append(switch)

    def supersede(self, routes: Mapping[str, Route]) -> None:
        """The routes will be these: the counts of the generations before are kept until they have been told and judged."""
        now = self._monotonic()
        for name, route in self._serving.routes.items():
            fresh = routes.get(name)
            if fresh is None or fresh.generation != route.generation:
                self._superseded[name, route.generation] = now

    async def report(self, in_thread: InThread, said: Callable[[], Said]) -> None:
        """Tell the registry: at once when something changed or is being counted, else now and then. Raises ModelkeepError."""
        await self._tell(in_thread, said)
        await self._send_feedback(in_thread)

    async def _tell(self, in_thread: InThread, said: Callable[[], Said]) -> None:
        serving, now_said = self._serving, said()
        counts = serving.watch_counts()
        fresh = [row for row in counts if self._counts.get(_count_key(row)) != row]
        state = (serving.epoch, serving.generation, tuple(sorted(now_said.errors.items())))
        due = self._monotonic() - self._at >= _HEARTBEAT_SECONDS
        if not (fresh or due or self._reached or state != self._state):
            return
        what = replicas.Report(
            id=serving.replica_id,
            environment=serving.environment,
            address=now_said.address,
            boot_id=serving.boot_id,
            epoch=serving.epoch,
            generation=serving.generation,
            serving=now_said.serving,
            started_at=now_said.started_at,
            counts=tuple(fresh),
            reached=tuple(self._reached),
        )
        await in_thread(lambda: replicas.report(self._database, what))
        for told in what.reached:
            with contextlib.suppress(ValueError):  # pushed out by newer ones meanwhile
                self._reached.remove(told)
        self._at, self._state = self._monotonic(), state
        self._counts = {_count_key(row): row for row in counts}
        self._forget()
        await self._tell_errors(in_thread, dict(now_said.errors))

    def _forget(self) -> None:
        now = self._monotonic()
        for (model, generation), since in list(self._superseded.items()):
            if now - since > _COUNTS_KEPT_SECONDS:
                self._serving.forget_counts(model, [generation])
                del self._superseded[model, generation]

    async def _send_feedback(self, in_thread: InThread) -> None:
        """The verdicts that clients posted wait in the inbox until the registry has them; an id that it has counts once."""
        inbox = self._serving.feedback
        observer = f"replica:{self._serving.replica_id}"
        for _ in range(_FEEDBACK_BATCHES):
            batch = inbox.peek(_FEEDBACK_BATCH)
            if not batch:
                return
            environment = self._serving.environment
            record = partial(feedback.record, self._database, environment, batch, observer=observer)
            written = await in_thread(record)
            inbox.done(len(batch), written.outcome())

    async def _tell_errors(self, in_thread: InThread, errors: dict[Key, str]) -> None:
        """What could not be loaded goes on record, once for each version and reason."""
        self._errors &= set(errors.items())
        environment, observer = self._serving.environment, f"replica:{self._serving.replica_id}"
        for key, error in errors.items():
            if (key, error) not in self._errors:
                await in_thread(
                    partial(unfit.note_unloadable, self._database, environment, *key, observer=observer, error=error)
                )
                self._errors.add((key, error))


def _count_key(row: dict[str, Any]) -> tuple[str, str, int]:
    return (row["model"], row["version"], row["generation"])
