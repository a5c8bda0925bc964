"""The cache's second level: answers in Redis, shared by servers. Whatever is wrong with Redis costs hits and nothing else.

A request waits a few milliseconds for it and no longer. After some failures nobody asks it any more, until the task that
looks after it has had an answer in time. Invalidation goes by a mark for each model: it is part of every key, each server
reads the marks again every second, and a new mark makes all that was stored under the old one unreachable.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from registry.redaction import redact
from serving.cache_values import Answer, is_longer, pack, unpack

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.cluster import RedisCluster

log = logging.getLogger("modelkeep.cache")

REFRESH_SECONDS = 1.0
"""How often the marks are read, which is how long an invalidation takes to reach other servers."""
CONNECTIONS = 8
"""Most requests that ask Redis at a time; those beyond are computed."""
FAILURES = 3
"""After so many in a row requests no longer ask."""
_CONNECT_SECONDS = 1.0
_WRITES_WAITING = 64
_LARGEST_BYTES = 1 << 20
"""Longer answers are not shared: their checksums would hold up the event loop for milliseconds."""
_NAMES = ("hits", "misses", "poisoned", "failed", "skipped", "written", "not_written", "opened")


class SharedStore:
    """Used on the event loop. `changed` is called with a model whose mark is another than before, or was not known here."""

    def __init__(
        self,
        url: str,
        environment: str,
        *,
        timeout_seconds: float,
        ttl_seconds: float,
        models: Callable[[], Collection[str]],
        changed: Callable[[str], object],
        client: Any = None,
    ) -> None:
        self.url = redact(url)
        self.counts = dict.fromkeys(_NAMES, 0)
        self.usable = False
        """Whether requests ask it now: not before the first answer, and not after FAILURES."""
        self._client: Redis | RedisCluster = connect(url) if client is None else client
        from redis.exceptions import RedisError

        self._errors: tuple[type[Exception], ...] = (RedisError, OSError, TimeoutError)
        self._prefix = f"modelkeep:cache:{environment}:"
        self._timeout_seconds = timeout_seconds
        self._ttl_milliseconds = max(1, int(ttl_seconds * 1000))
        self._models = models
        self._changed = changed
        self._marks: dict[str, str] = {}
        self._pending: set[str] = set()
        """The models that need a new mark, and ..."""
        self._settled: set[str] = set()
        """... those for which it is being written."""
        self._settling = asyncio.Lock()
        self._failures = 0
        self._asking = 0
        self._writes: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._logged: bool | None = None

    def start(self) -> None:
        """Look after Redis from now on."""
        self._task = asyncio.create_task(self._look_after())

    async def stop(self) -> None:
        tasks = [*self._writes, *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(*self._errors):
            async with asyncio.timeout(_CONNECT_SECONDS):
                await self._client.aclose()

    def ready(self, model: str) -> bool:
        """Whether a request for this model should ask."""
        if not self.usable or model not in self._marks:
            return False
        if self._asking >= CONNECTIONS:
            self.counts["skipped"] += 1
            return False
        return True

    def begin(self, model: str, key: bytes) -> asyncio.Task[Answer | None]:
        """Get in the background. It is one of those that ask from now on, not from when the task is run."""
        self._asking += 1
        task = asyncio.create_task(self.get(model, key))
        task.add_done_callback(self._asked)  # a task that is cancelled before it runs has no `finally`
        return task

    def _asked(self, task: asyncio.Task[Answer | None]) -> None:
        self._asking -= 1

    async def get(self, model: str, key: bytes) -> Answer | None:
        """The answer, None where there is none to be had in time."""
        mark = self._marks.get(model)
        if mark is None:  # invalidated a moment ago
            return None
        name = self._name(mark, key)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                value = await _awaited(self._client.get(name))
        except self._errors as error:
            self._failed(error)
            return None
        self._failures = 0
        answer = unpack(key, value) if isinstance(value, bytes) else None
        self.counts["hits" if answer is not None else "misses"] += 1
        if value is not None and answer is None:
            self.counts["poisoned"] += 1
        return answer

    def put(self, model: str, key: bytes, answer: Answer) -> None:
        """Store in the background. Not stored is what Redis does not take in time, or what too many wait before."""
        if not self.usable or model not in self._marks or len(self._writes) >= _WRITES_WAITING:
            self.counts["not_written"] += 1
            return
        # Packing is what takes the time, so what is too long anyway is not packed.
        value = None if is_longer(answer, _LARGEST_BYTES) else pack(key, answer)
        if value is None or len(value) > _LARGEST_BYTES:
            self.counts["not_written"] += 1
            return
        task = asyncio.create_task(self._write(self._name(self._marks[model], key), value))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def invalidate(self, models: Collection[str]) -> bool:
        """Make what is stored of these models unreachable for every server. False where Redis does not answer: it is done when it does."""
        for model in models:
            self._marks.pop(model, None)
            self._pending.add(model)
        return await self._settle()

    def as_dict(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "usable": self.usable,
            "models": sorted(self._marks),
            "invalidations_waiting": sorted(self._pending | self._settled),
            **self.counts,
        }

    def _name(self, mark: str, key: bytes) -> str:
        return f"{self._prefix}{mark}:{key.hex()}"

    async def _write(self, name: str, value: bytes) -> None:
        try:
            async with asyncio.timeout(self._timeout_seconds * 10):
                await _awaited(self._client.set(name, value, px=self._ttl_milliseconds))
        except self._errors as error:
            self.counts["not_written"] += 1
            self._failed(error)
        else:
            self.counts["written"] += 1

    def _failed(self, error: BaseException) -> None:
        self.counts["failed"] += 1
        self._failures += 1
        if self._failures >= FAILURES and self.usable:
            self._unusable(error)

    def _unusable(self, error: BaseException) -> None:
        if self.usable:
            self.counts["opened"] += 1
        self.usable = False
        if self._logged is not False:
            self._logged = False
            log.warning(
                "%s is not used until it answers in time: %s", self.url, redact(str(error)) or type(error).__name__
            )

    async def _look_after(self) -> None:
        while True:
            try:
                await self._settle()
            except Exception as error:  # marks that nobody can read, or a client's own fault: not to end with it
                log.exception("looking after %s failed", self.url)
                self._unusable(error)
            await asyncio.sleep(REFRESH_SECONDS)

    async def _settle(self) -> bool:
        """Write the marks that are to be written, read all, and find out whether Redis answers in time."""
        async with self._settling:  # or marks that were read before an invalidation would be noted after it
            # What is invalidated from here on is for the next time, also where it is one of these models again.
            pending = self._settled = self._pending
            self._pending = set()
            settled = False
            try:
                settled = await self._settle_alone(pending)
            finally:
                self._settled = set()
                if not settled:
                    self._pending |= pending
            return settled

    async def _settle_alone(self, pending: Collection[str]) -> bool:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                if pending:
                    new: dict[Any, Any] = {model: secrets.token_hex(8) for model in pending}
                    await _awaited(self._client.hset(self._prefix + "marks", mapping=new))
                found = await self._read_marks()
                missing = {model: secrets.token_hex(8) for model in set(self._models()) - found.keys()}
                for model, mark in missing.items():
                    # Who comes first decides; a mark that Redis lost is a new one, so that nothing old comes back.
                    await _awaited(self._client.hsetnx(self._prefix + "marks", model, mark))
                if missing:
                    found = await self._read_marks()
                if not self.usable:
                    await self._warm()
                started = time.monotonic()
                await _awaited(self._client.exists(self._prefix + "marks"))
                taken = time.monotonic() - started
        except self._errors as error:
            self._unusable(error)
            return False
        for model, mark in found.items():
            if model not in self._pending and self._marks.get(model) != mark:
                self._marks[model] = mark
                # Also for the first mark: while none was known here, others may have invalidated.
                self._changed(model)
        if not self.usable and taken <= self._timeout_seconds:
            self.usable = True
            self._failures = 0
            if self._logged is not True:
                self._logged = True
                log.info("answers are shared by %s", self.url)
        return True

    async def _read_marks(self) -> dict[str, str]:
        marks = await _awaited(self._client.hgetall(self._prefix + "marks"))
        return {name.decode(): mark.decode() for name, mark in marks.items()}

    async def _warm(self) -> None:
        """Connections for requests, which themselves have no time to wait for one."""
        await asyncio.gather(*(_awaited(self._client.exists(self._prefix + "marks")) for _ in range(CONNECTIONS)))


def connect(url: str) -> Redis | RedisCluster:
    """A client that tries nothing twice. It connects when it is used."""
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    options: dict[str, Any] = {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": _CONNECT_SECONDS,
        "socket_connect_timeout": _CONNECT_SECONDS,
        "max_connections": 2 * CONNECTIONS + _WRITES_WAITING,
    }
    scheme, mark, rest = url.partition("://")
    if scheme.endswith("+cluster"):
        from redis.asyncio.cluster import RedisCluster

        return RedisCluster.from_url(scheme.removesuffix("+cluster") + mark + rest, **options)
    from redis.asyncio import Redis

    return Redis.from_url(url, **options)


async def _awaited(answer: Awaitable[Any] | Any) -> Any:
    """redis types its commands for both of its clients; these are always awaited."""
    return await answer
