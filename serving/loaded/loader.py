"""Loads run here, each on a thread of its own: one that takes long lets the others pass, and one that never ends is told of and left.

A thread cannot be ended from outside: what hangs keeps it, and perhaps memory and a core, until the process ends. So a version that
hangs while it loads is not tried a second time beside itself; should it come to its end after all, it is taken.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Generic, TypeVar

from registry.errors import ModelkeepError, UnavailableError
from serving.compute.engine import LoadedVersion
from serving.device import loads
from serving.loaded.laststate import LastState, Wanted

log = logging.getLogger("modelkeep.reconcile")
T = TypeVar("T")
Key = tuple[str, str]

PATIENCE_SECONDS = 10.0
"""A load that takes longer is not waited for any more by those who could go on without it."""
_LOADING, _URGENT = "loading", "an urgent load"
_LOOK_SECONDS = 0.5
_STEP_MOST = 2.0


class StillLoadingError(ModelkeepError):
    """It is being loaded, takes longer than others shall wait, and is served when it is there. Nothing is wrong with it yet."""


class LoadHangsError(UnavailableError):
    """Loading it takes longer than it may."""


class Attempt(Generic[T]):
    """One thing that a thread does for a version. Changed on the event loop only."""

    def __init__(self, what: str, version: Wanted, limit_seconds: float, done: asyncio.Future[T]) -> None:
        self.what, self.version, self.limit_seconds, self.done = what, version, limit_seconds, done
        self.seconds = 0.0
        """For how long we have seen it at work, without what it waited for the turn of others."""
        self.hung: str | None = None
        """Why it counts as hanging."""
        self.left = False
        """Whether somebody went on without it."""
        self.thread: threading.Thread | None = None

    @property
    def key(self) -> Key:
        return self.version.model, self.version.version

    def words(self) -> str:
        return f"{self.what} goes on, for {self.seconds:.0f} s now"

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.version.model,
            "version": self.version.version,
            "what": self.what,
            "seconds": round(self.seconds, 1),
            "limit_seconds": self.limit_seconds,
            "hangs": self.hung,
        }


class Loader:
    """One a process; on the event loop only, but for the work itself."""

    def __init__(
        self,
        load: Callable[[Wanted], LoadedVersion],
        fetch: Callable[[Wanted], object],
        *,
        limit_seconds: Callable[[Wanted], float],
        patience_seconds: float = PATIENCE_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load, self._fetch = load, fetch
        self._limit_seconds, self.patience_seconds = limit_seconds, patience_seconds
        self._monotonic = monotonic
        self.attempts: list[Attempt[Any]] = []
        """Under way, or at their end and not asked for yet."""
        self.hangs = 0
        """Since the start."""
        self.patient = False
        """Whether the round under way waits for its loads however long they take."""
        self.changed: Callable[[], object] = lambda: None
        """Told when one that somebody went on without has come to its end."""
        self.found: Callable[[Wanted, str], object] = lambda version, why: None
        """Told of a version that hangs while it loads."""
        self._news = self._stopped = False
        self._watching: asyncio.Task[None] | None = None

    async def load(self, version: Wanted, *, patient: bool = True, urgent: bool = False) -> LoadedVersion:
        """The version, loaded. One that is being loaded already is waited for; `urgent`: it is loaded once more beside that.

        Raises StillLoadingError where it takes longer than `patience_seconds` and the caller is not `patient`, LoadHangsError, and
        what the load raises.
        """
        if urgent and (hung := self._hung(version)) is not None:
            raise LoadHangsError(hung)
        what = _URGENT if urgent else _LOADING
        return await self._wait(what, version, lambda: self._load(version), patient=patient)

    async def fetch(self, version: Wanted, *, patient: bool = True) -> None:
        """Have its files here. Raises what `load` does."""
        await self._wait("fetching its files", version, lambda: self._fetch(version), patient=patient)

    def take_news(self) -> bool:
        """Whether one that somebody went on without has come to its end, or hangs. True once for each time."""
        news, self._news = self._news, False
        return news

    def loaded(self, version: Wanted) -> bool:
        """Whether it is here, and nobody has taken it yet."""
        attempt = self._of(_LOADING, version)
        return attempt is not None and attempt.done.done()

    def hanging(self) -> dict[Key, str]:
        """The versions that hang while they load, each with its reason."""
        return {a.key: a.hung for a in self.attempts if a.hung is not None}

    def unclaimed(self, wanted: Collection[Wanted]) -> list[LoadedVersion]:
        """Take out what was loaded after all and is not among `wanted` any more; to be let go of."""
        keys = {(*_key(version), version.digest) for version in wanted}
        over = [
            a
            for a in self.attempts
            if a.left and a.done.done() and (a.what != _LOADING or (*a.key, a.version.digest) not in keys)
        ]
        for attempt in over:
            self.attempts.remove(attempt)
        return [
            a.done.result() for a in over if a.done.exception() is None and isinstance(a.done.result(), LoadedVersion)
        ]

    def abandoned(self, state: LastState | None, need: Callable[[Wanted], int]) -> list[tuple[str, int]]:
        """(name, bytes by `need`) of what hangs, and nobody wants any more: it is not in `state`."""
        keys = {(*_key(version), version.digest) for version in (() if state is None else state.versions)}
        hung = [a for a in self.attempts if a.hung is not None and (*a.key, a.version.digest) not in keys]
        return [("/".join(a.key), need(a.version)) for a in hung]

    def at_work(self) -> bool:
        """Whether a thread still works."""
        return any(not a.done.done() for a in self.attempts)

    def as_list(self) -> list[dict[str, Any]]:
        """What model-info tells."""
        return [attempt.as_dict() for attempt in self.attempts if not attempt.done.done()]

    def stop(self) -> None:
        """The process is at its end: what is here and nobody took is closed, and what comes later too."""
        self._stopped = True
        if self._watching is not None:
            self._watching.cancel()
        for attempt in self.attempts:
            if attempt.done.done() and attempt.done.exception() is None:
                _close(attempt.done.result())

    async def _wait(self, what: str, version: Wanted, work: Callable[[], T], *, patient: bool) -> T:
        # Two that are urgent are not to share a version: each lets go of what it does not serve.
        attempt = (None if what == _URGENT else self._of(what, version)) or self._begin(what, version, work)
        if not attempt.done.done():
            if attempt.hung is not None:
                raise LoadHangsError(attempt.hung)
            # Who was gone on without once is not waited for again, but by those who cannot do otherwise.
            if not patient and attempt.left:
                raise StillLoadingError(attempt.words())
            await self._until(attempt, None if patient else max(0.0, self.patience_seconds - attempt.seconds))
        if attempt.done.done():
            if attempt in self.attempts:
                self.attempts.remove(attempt)
            found: T = attempt.done.result()
            return found
        attempt.left = True
        if attempt.hung is not None:
            raise LoadHangsError(attempt.hung)
        log.warning("%s %s takes long (%s, %.1f s): going on without it", *attempt.key, attempt.what, attempt.seconds)
        raise StillLoadingError(attempt.words())

    async def _until(self, attempt: Attempt[T], patience_seconds: float | None) -> None:
        """Until it is at its end, counts as hanging, or patience is."""
        over = None if patience_seconds is None else self._monotonic() + patience_seconds
        try:
            while not attempt.done.done() and attempt.hung is None and (over is None or self._monotonic() < over):
                pause = self._look_seconds(attempt) if over is None else min(
                    self._look_seconds(attempt), max(0.0, over - self._monotonic())
                )  # fmt: skip
                await asyncio.wait({attempt.done}, timeout=pause)
        except asyncio.CancelledError:
            attempt.left = True
            raise

    def _of(self, what: str, version: Wanted) -> Attempt[Any] | None:
        key = (*_key(version), version.digest)
        return next((a for a in self.attempts if a.what == what and (*a.key, a.version.digest) == key), None)

    def _hung(self, version: Wanted) -> str | None:
        key = (*_key(version), version.digest)
        return next((a.hung for a in self.attempts if a.hung is not None and (*a.key, a.version.digest) == key), None)

    def _begin(self, what: str, version: Wanted, work: Callable[[], T]) -> Attempt[T]:
        loop = asyncio.get_running_loop()
        attempt: Attempt[T] = Attempt(what, version, self._limit_seconds(version), loop.create_future())

        def run() -> None:
            found: T | None = None
            try:
                found = work()
                told: Callable[[], None] = partial(self._came, attempt, found)
            except BaseException as error:  # it is raised again where it is waited for
                told = partial(self._failed, attempt, error)
            try:
                loop.call_soon_threadsafe(told)
            except RuntimeError:  # the loop is closed: nobody takes it
                _close(found)

        attempt.thread = threading.Thread(target=run, name=f"load {version.model}/{version.version}", daemon=True)
        attempt.thread.start()
        # Not before: where no thread can be started, there is nothing under way that others may wait for.
        self.attempts.append(attempt)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        return attempt

    def _came(self, attempt: Attempt[T], found: T) -> None:
        attempt.done.set_result(found)
        if self._stopped:
            _close(found)
        self._ended(attempt)

    def _failed(self, attempt: Attempt[Any], error: BaseException) -> None:
        # A future takes everything but that one.
        attempt.done.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)
        attempt.done.exception()  # it may be that nobody asks any more
        self._ended(attempt)

    def _ended(self, attempt: Attempt[Any]) -> None:
        if attempt.hung is not None:
            log.warning("%s %s has come to the end of %s after all", *attempt.key, attempt.what)
        if attempt.left:
            self._news = True
            self.changed()

    # The watch

    def _look_seconds(self, attempt: Attempt[Any]) -> float:
        return min(_LOOK_SECONDS, attempt.limit_seconds / 10, self.patience_seconds / 2)

    async def _watch(self) -> None:
        """While there is something under way: see how long it takes. Only time in which it could look counts."""
        looked = self._monotonic()
        while under_way := [a for a in self.attempts if not a.done.done()]:
            pause = min(map(self._look_seconds, under_way))
            await asyncio.sleep(pause)
            now = self._monotonic()
            step, looked = min(now - looked, _STEP_MOST * pause), now
            waiting = loads.waiting()
            for attempt in under_way:
                self._look(attempt, 0.0 if attempt.thread is None or attempt.thread.ident in waiting else step)

    def _look(self, attempt: Attempt[Any], step: float) -> None:
        if attempt.done.done():
            return
        attempt.seconds += step
        if attempt.seconds >= self.patience_seconds and attempt.thread is not None and attempt.thread.ident is not None:
            loads.let_pass(attempt.thread.ident)
        if attempt.hung is None and attempt.seconds >= attempt.limit_seconds:
            self.hangs += 1
            attempt.hung = (
                f"hangs while it loads: {attempt.what} has taken {attempt.seconds:.0f} s, more than "
                f"health.load_hang_seconds = {attempt.limit_seconds:g}"
            )
            log.error("%s %s %s", *attempt.key, attempt.hung)
            if attempt.thread is not None and attempt.thread.ident is not None:
                loads.give_up(attempt.thread.ident)
            self.found(attempt.version, attempt.hung)
            if attempt.left:
                self._news = True
                self.changed()


def _close(found: object) -> None:
    if isinstance(found, LoadedVersion):
        found.close()


def _key(version: Wanted) -> Key:
    return version.model, version.version
