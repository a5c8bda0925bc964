"""Answers that need not be computed again, of versions that say they are deterministic. Two levels: this process, and Redis.

A request goes one of four ways: past the cache, answered by it, behind an equal request that is under way, or computed.
Those that a promotion judges go past it: a hit takes no time and cannot fail, and what is left over once hits are taken
out is not what clients send, so either way the stable version, whose answers are kept already, would be compared with a
candidate whose are not. Both compute everything while they are watched; what they answer is stored for afterwards.
Hits are counted here and in `VersionTelemetry.cache`, never among the requests and errors of a version.
"""

from __future__ import annotations

import asyncio
import fnmatch
import itertools
import logging
from collections.abc import Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from registry.errors import ModelkeepError
from serving.caching.cache_store import LocalStore, Owner
from serving.caching.cache_values import Answer, Arrays, KeyMaker, computing, kept
from serving.caching.cache_written import Written, WrittenAnswers
from serving.compute.engine import QueueFullError
from serving.compute.work import ParkedWork, Work, cached_by, left_of, saved_by
from serving.figures.telemetry import CacheCounts
from serving.statuses import ClientGoneError, DeadlineError

if TYPE_CHECKING:
    from serving.caching.cache_shared import SharedStore
    from serving.compute.engine import LoadedVersion
    from serving.traffic.routing import Route

log = logging.getLogger("modelkeep.cache")

L1, L2, SHARED = "l1", "l2", "shared"
"""Who answered: this process, Redis, or an equal request that was being computed."""
WRITTEN_SHARE = 0.125
"""Of the cache's bytes, for answers as they were sent."""
_serials = itertools.count(1)


class Limits(Protocol):
    """What the cache needs of the settings."""

    @property
    def max_mb(self) -> int: ...
    @property
    def ttl_seconds(self) -> float: ...


class ResponseCache:
    """One a process, used on the event loop. `follow` says which versions there are."""

    def __init__(self, limits: Limits) -> None:
        written_bytes = int((limits.max_mb << 20) * WRITTEN_SHARE)
        self.local = LocalStore((limits.max_mb << 20) - written_bytes, limits.ttl_seconds)
        self.written = WrittenAnswers(written_bytes)
        self.shared: SharedStore | None = None
        self.counts = CacheCounts()
        self._answers: dict[Owner, VersionAnswers] = {}
        self._sweeping = False

    def follow(self, loaded: Iterable[LoadedVersion]) -> None:
        """From now on these versions are loaded: give those that are deterministic their part of the cache, drop all others'."""
        answers: dict[Owner, VersionAnswers] = {}
        for version in loaded:
            owner = (version.model, version.version, version.digest)
            known = version.answers
            version.answers = None
            if version.deterministic:
                answers[owner] = version.answers = known if known is not None else VersionAnswers(self, version, owner)
        if set(self._answers.values()) - set(answers.values()):  # also where the same version was loaded anew
            self.written.clear()  # of the others it comes back with their next hits
        self._answers = answers
        for owner in self.local.owners():
            if owner not in answers:
                self.local.drop(owner)
        self._sweep()

    def models(self) -> set[str]:
        """Whose answers are kept."""
        return {model for model, _, _ in self._answers}

    def follows(self, owner: Owner) -> bool:
        return owner in self._answers

    def forget(self, model: str) -> int:
        """Remove what this process holds of a model, and do not keep what is being computed; how many answers that were."""
        for answers in self._answers.values():
            if answers.owner[0] == model:
                answers.forget()
        dropped = sum(self.local.drop(owner) for owner in self.local.owners() if owner[0] == model)
        self._sweep()
        return dropped

    def _sweep(self) -> None:
        """Remove what was dropped, a slice at a time: a promotion's switch and the requests do not wait for it."""
        if self._sweeping:
            return
        if self.local.sweep():
            asyncio.get_running_loop().call_soon(self._sweep_on)
            self._sweeping = True

    def _sweep_on(self) -> None:
        self._sweeping = False
        self._sweep()

    def matching(self, pattern: str) -> list[str]:
        """The models that a shell pattern matches, in order."""
        return sorted(model for model in self.models() if fnmatch.fnmatchcase(model, pattern))

    async def invalidate(self, models: Collection[str]) -> tuple[int, bool]:
        """Drop the answers of these models in both levels. How many this process held, and whether Redis knows already."""
        dropped = sum(self.forget(model) for model in models)
        return dropped, self.shared is not None and await self.shared.invalidate(models)

    def stats(self) -> dict[str, Any]:
        """For `GET /api/cache/stats`, JSON-able."""
        held = {owner: (entries, size) for owner, entries, size in self.local.held()}
        local = self.local
        return {
            **self.counts.as_dict(),
            "l1": {
                "entries": len(local),
                "bytes": local.bytes + self.written.bytes,
                "max_bytes": local.max_bytes + self.written.max_bytes,
                "written": len(self.written),
                **local.counts,
            },
            "l2": None if self.shared is None else self.shared.as_dict(),
            "versions": [
                {
                    "model": owner[0],
                    "version": owner[1],
                    "entries": held.get(owner, (0, 0))[0],
                    "bytes": held.get(owner, (0, 0))[1],
                    **answers.counts.as_dict(),
                }
                for owner, answers in sorted(self._answers.items())
            ],
        }


class Flight:
    """A request that is looked up or computed, and those that wait for its answer."""

    __slots__ = ("behind", "leader")

    def __init__(self, leader: Work) -> None:
        self.leader = leader
        self.behind: dict[ParkedWork, bool] = {}
        """In the order in which they came."""


class VersionAnswers:
    """One version's part of the cache: what `api.V2` asks instead of the version itself."""

    def __init__(self, cache: ResponseCache, loaded: LoadedVersion, owner: Owner) -> None:
        self.owner = owner
        self.invalidated = 0
        """How often this was emptied: what was being computed at the time is not stored."""
        self._cache = cache
        self._loaded = loaded
        self._key = KeyMaker(loaded.model, loaded.version, loaded.digest, *computing(loaded.runtime))
        self._flights: dict[bytes, Flight] = {}
        """Those that a new request may join, by key."""
        self._waiting = 0
        """How many requests wait behind others, those of flights that can no longer be joined too."""
        self._looking: set[asyncio.Task[Answer | None]] = set()

        self._token = next(_serials)
        """In the names of what was written. Not itself: that would keep a version in memory that is gone."""
        self._hit: ParkedWork | None = None
        """Stands for each request that is answered as it was before."""

    @property
    def counts(self) -> CacheCounts:
        return self._loaded.telemetry.cache

    def recall(
        self, body: bytes, header_length: int | None, route: Route | None
    ) -> tuple[bytes, int | None, Work] | None:
        """What was sent for an equal request, where its answer is still held here: body, header length, work.

        None where a promotion watches or copies the requests: it needs them read.
        """
        cache = self._cache
        if len(body) > cache.written.largest_bytes or type(body) is not bytes:
            return None
        if route is not None and (route.watch or route.shadow):
            return None
        name = (self._token, header_length, body)
        written = cache.written.get(name)
        if written is None:
            return None
        found: Answer | None = cache.local.get(written.key)
        if found is None or found.serial != written.serial:
            cache.written.drop(name)
            return None
        if self._hit is None:
            self._hit = self._loaded.park({}, None)
            self._hit.cached = L1
            self._hit.future.set_result(None)
        for counts in (cache.counts, self.counts):
            counts.l1 += 1
            counts.saved_seconds += found.model_seconds
        return written.body, written.header_length, self._hit

    def remember(
        self, body: bytes, header_length: int | None, work: Work, answer: bytes, answer_header_length: int | None
    ) -> None:
        """An answer was written. Kept for `recall` where it came from this process, so that it says the same again."""
        if cached_by(work) != L1 or type(work) is not ParkedWork or type(body) is not bytes:
            return
        found: Answer | None = self._cache.local.peek(work.found)
        # What is there now may be another than what was written, where writing took a thread.
        if found is not None and found.serial and found.serial == work.serial:
            written = Written(answer, answer_header_length, work.found, found.serial)
            self._cache.written.put((self._token, header_length, body), written)

    def forget(self) -> None:
        """Keep nothing of what is being computed, and let nobody join it who comes from now on."""
        self.invalidated += 1
        self._flights.clear()

    def submit(
        self,
        inputs: Arrays,
        outputs: tuple[str, ...] | None,
        route: Route | None = None,
        mark: int | None = None,
        asker: str = "",
    ) -> Work:
        """What `LoadedVersion.submit` does, with an answer that is there already where there is one.

        Raises QueueFullError, UnavailableError.
        """
        cache, loaded = self._cache, self._loaded
        key = self._key(inputs, outputs)
        work: Work
        if route is not None and route.watch:
            cache.local.ask(key)
            work = loaded.submit(inputs, outputs, route, mark, asker)
            self._count("bypassed")
            work.future.add_done_callback(partial(self._store, key, work, self.invalidated))
            return work
        found: Answer | None = cache.local.get(key)
        if found is not None:
            hit = loaded.park(inputs, outputs, mark)
            hit.found, hit.serial = key, found.serial
            self._answer(hit, found.arrays, L1, found.model_seconds)
            return hit
        flight = self._flights.get(key)
        if flight is not None:
            return self._join(flight, mark, asker)
        shared = cache.shared
        if shared is not None and shared.ready(loaded.model, key):
            work = parked = loaded.park(inputs, outputs, mark)
            work.asker = asker
            self._look(shared, key, parked)
        else:
            work = loaded.submit(inputs, outputs, route, mark, asker)
            self._count("misses")
        flight = self._flights[key] = Flight(work)
        self._take_off(key, flight)
        return work

    def _join(self, flight: Flight, mark: int | None, asker: str) -> ParkedWork:
        loaded, leader = self._loaded, flight.leader
        if self._waiting >= loaded.queue_size:
            raise QueueFullError(
                f"model '{loaded.model}' version '{loaded.version}' has {loaded.queue_size} requests waiting for answers "
                "that are being computed for others; try again later"
            )
        # With the leader's inputs, which are equal: its own, and with them the body that they lie in, need not stay.
        work = loaded.park(leader.inputs, leader.outputs, mark)
        work.asker = asker  # should it be computed after all
        flight.behind[work] = True
        self._waiting += 1
        work.future.add_done_callback(partial(self._leave, flight, work))
        return work

    def _leave(self, flight: Flight, work: ParkedWork, future: asyncio.Future[None] | None = None) -> None:
        """It waits behind nobody any more: it gave up, or is computed itself."""
        if flight.behind.pop(work, False):
            self._waiting -= 1

    def _look(self, shared: SharedStore, key: bytes, work: ParkedWork) -> None:
        task = shared.begin(self._loaded.model, key)
        self._looking.add(task)
        task.add_done_callback(partial(self._looked, work))

    def _looked(self, work: ParkedWork, task: asyncio.Task[Answer | None]) -> None:
        self._looking.discard(task)
        found = None
        if not task.cancelled():
            if (error := task.exception()) is not None:
                log.error("looking into Redis failed in a way that was not thought of", exc_info=error)
            else:
                found = task.result()
        if work.future.done():
            return
        if found is not None:
            work.left_seconds = found.left_seconds
            self._answer(work, found.arrays, L2, found.model_seconds)
            return
        self._count("misses")
        self._compute(work)

    def _compute(self, work: ParkedWork) -> None:
        try:
            self._loaded.queue(work)
        except ModelkeepError as error:
            work.future.set_exception(error)

    def _take_off(self, key: bytes, flight: Flight) -> None:
        flight.leader.future.add_done_callback(partial(self._landed, key, flight, self.invalidated))

    def _landed(self, key: bytes, flight: Flight, invalidated: int, future: asyncio.Future[None]) -> None:
        leader = flight.leader
        waiting = [work for work in flight.behind if not work.future.done()]
        error = None if future.cancelled() else future.exception()
        if waiting and (future.cancelled() or isinstance(error, ClientGoneError | DeadlineError)):
            # Only the first client is gone: the next one takes its place.
            first = flight.leader = waiting[0]
            self._leave(flight, first)
            self._take_off(key, flight)
            self._count("misses")
            self._compute(first)
            return
        if self._flights.get(key) is flight:  # and not a later one: this may have been forgotten
            del self._flights[key]
        for work in tuple(flight.behind):
            self._leave(flight, work)
        if error is None and not future.cancelled():
            seconds = leader.model_seconds / leader.company if cached_by(leader) is None else saved_by(leader)
            for work in waiting:
                self._answer(work, leader.answer, SHARED, seconds)
            self._store(key, leader, invalidated, future)
            return
        # The version failed. An error is nobody's answer but its own request's: each is computed, and counted.
        for work in waiting:
            work.future.add_done_callback(partial(self._store, key, work, self.invalidated))
            self._count("misses")
            self._compute(work)

    def _store(self, key: bytes, work: Work, invalidated: int, future: asyncio.Future[None]) -> None:
        """Keep what a request was answered with, in both levels."""
        if future.cancelled() or future.exception() is not None:
            return
        if cached_by(work) is None:
            for counts in (self._cache.counts, self.counts):
                counts.computed_seconds += work.model_seconds / work.company
        if invalidated != self.invalidated or not self._cache.follows(self.owner):
            return
        try:
            self._keep(key, work)
        except Exception:  # the request has its answer all the same
            log.exception("an answer of model '%s' version '%s' could not be kept", *self.owner[:2])

    def _keep(self, key: bytes, work: Work) -> None:
        arrays, size_bytes = kept(work.answer)
        computed = cached_by(work) is None
        seconds = work.model_seconds / work.company if computed else saved_by(work)
        answer = Answer(arrays, seconds, serial=next(_serials))
        self._cache.local.put(key, self.owner, answer, size_bytes, left_of(work))
        if computed and self._cache.shared is not None:
            self._cache.shared.put(self.owner[0], key, answer)

    def _answer(self, work: ParkedWork, arrays: dict[str, Any], level: str, saved_seconds: float) -> None:
        work.answer = arrays
        work.cached = level
        work.saved_seconds = saved_seconds
        work.future.set_result(None)
        for counts in (self._cache.counts, self.counts):
            counts.hit(level, saved_seconds)

    def _count(self, what: str) -> None:
        for counts in (self._cache.counts, self.counts):
            setattr(counts, what, getattr(counts, what) + 1)
