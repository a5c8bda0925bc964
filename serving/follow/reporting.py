"""What this server tells the registry: its row, its counts, its switches, the verdicts of its clients, and what it could not load.

What the registry does not take of it (a text that it refuses, say) is left out and said; the rest still arrives.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from sqlalchemy.exc import DBAPIError, StatementError

from registry import feedback, replicas, unfit
from registry.database import Database
from registry.errors import RefusedError, StorageError, UnavailableError
from serving.state import Serving
from serving.traffic.routing import Route

log = logging.getLogger("modelkeep.reporting")

Key = tuple[str, str]

_HEARTBEAT_SECONDS = 10.0
_COUNTS_KEPT_SECONDS = 60.0
_REACHED_KEPT = 1000
_FEEDBACK_BATCH, _FEEDBACK_BATCHES = 500, 20
_LONGEST_TEXT = 2000


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
        self._left_out: set[tuple[str, str, int]] = set()  # counts that the registry lacks as they are now
        self._batch = _FEEDBACK_BATCH
        self.refused: dict[str, str] = {}
        """What the registry did not take of the last reports, and why; for the errors in model-info."""

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
        """Tell the registry: at once when something changed or is being counted, else now and then. Raises ModelkeepError.

        A part that fails keeps none of the others: the first failure is raised when all had their turn.
        """
        now_said, failed = said(), list[Exception]()
        parts = (
            partial(self._tell, in_thread, now_said),
            partial(self._tell_errors, in_thread, dict(now_said.errors)),
            partial(self._send_feedback, in_thread),
        )
        for part in parts:
            try:
                await part()
            except (UnavailableError, StorageError):
                raise  # the others would fare no better
            except Exception as error:
                if failed:
                    log.error("%s", error)
                failed.append(error)
        if failed:
            raise failed[0]

    async def _tell(self, in_thread: InThread, now_said: Said) -> None:
        serving = self._serving
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
        self._left_out &= {_count_key(row) for row in counts}
        await self._write(in_thread, what)
        for told in what.reached:
            with contextlib.suppress(ValueError):  # pushed out by newer ones meanwhile
                self._reached.remove(told)
        self._at, self._state = self._monotonic(), state
        self._counts = {_count_key(row): row for row in counts}
        self._forget()

    async def _write(self, in_thread: InThread, what: replicas.Report) -> None:
        """Write a report; where the registry does not take it, without the pieces that it does not take."""

        async def taken(report: replicas.Report, reasons: list[str]) -> bool:
            try:
                await in_thread(partial(replicas.report, self._database, report))
            except Exception as error:
                reasons.append(_not_taken(error))
                return False
            return True

        reasons: list[str] = []
        if await taken(what, reasons):
            self._left_out -= {_count_key(counts) for counts in what.counts}
            if not self._left_out:
                self._note_taken("report")
            return
        last = what.reached[-1:]  # first: when the row's generation was reached is that of the newest
        bare = {"models": what.serving.get("models", {}), "loaded": [], "errors": {"report": reasons[0]}}
        row = replace(what, counts=(), reached=())
        for serving, reached in itertools.product((what.serving, _plain(what.serving), bare), (last, ())):
            if await taken(replace(row, serving=serving, reached=reached), reasons):
                row = replace(row, serving=serving)
                break
        else:
            raise RefusedError(f"the registry takes no report of this server: {reasons[-1]}")
        for one in what.reached[:-1]:
            await taken(replace(row, reached=(one,)), reasons)
        for counts in what.counts:
            if await taken(replace(row, counts=(counts,)), reasons):
                self._left_out.discard(_count_key(counts))
            else:
                self._left_out.add(_count_key(counts))
        self._note_refused("report", "a part of it was left out: " + reasons[-1])

    def _note_refused(self, part: str, text: str) -> None:
        if self.refused.get(part) != text:
            log.error("the registry did not take everything (%s): %s", part, text)
        self.refused[part] = text

    def _note_taken(self, part: str) -> None:
        self.refused.pop(part, None)

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
            batch = inbox.peek(self._batch)
            if not batch:
                return
            environment = self._serving.environment
            record = partial(feedback.record, self._database, environment, batch, observer=observer)
            try:
                written = await in_thread(record)
            except Exception as error:
                why = _not_taken(error)
                if len(batch) > 1:  # one among them: those before it go first, until it stands alone
                    self._batch = len(batch) // 2
                    continue
                self._note_refused("feedback", f"a verdict was left out: {why}")
                inbox.done(1, (("not_taken", 1),))
            else:
                inbox.done(len(batch), written.outcome())
                if self._batch == _FEEDBACK_BATCH:
                    self._note_taken("feedback")
            self._batch = min(_FEEDBACK_BATCH, 2 * self._batch)

    async def _tell_errors(self, in_thread: InThread, errors: dict[Key, str]) -> None:
        """What could not be loaded goes on record, once for each version and reason."""
        self._errors &= set(errors.items())
        if not errors:
            self._note_taken("unloadable")
        environment, observer = self._serving.environment, f"replica:{self._serving.replica_id}"
        for key, error in errors.items():
            if (key, error) in self._errors:
                continue
            why = ""
            for text in (error, _plain(error)):
                note = partial(unfit.note_unloadable, self._database, environment, *key, observer=observer, error=text)
                try:
                    await in_thread(note)
                except Exception as refused:
                    why = _not_taken(refused)
                else:
                    break
            else:
                self._note_refused("unloadable", f"{key[0]} {key[1]} is not on record: {why}")
            self._errors.add((key, error))


def _not_taken(error: Exception) -> str:
    """What a database or its driver says of a value that it does not take: too long, out of range, not to be encoded.

    Raises any other error again.
    """
    if isinstance(error, RefusedError):
        return str(_plain(str(error)))
    of_a_value = isinstance(error, StatementError) and not isinstance(error, DBAPIError)
    if not of_a_value and not isinstance(error, ValueError | TypeError | OverflowError):
        raise error
    return str(_plain(f"{type(error).__name__}: {error}"))


def _plain(value: Any) -> Any:
    """Of texts as much as every database takes: not too long, and without control characters and halves of characters."""
    if isinstance(value, str):
        return "".join(sign if sign.isprintable() else " " for sign in value[:_LONGEST_TEXT])
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _count_key(row: dict[str, Any]) -> tuple[str, str, int]:
    return (row["model"], row["version"], row["generation"])
