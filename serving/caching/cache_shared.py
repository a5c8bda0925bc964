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
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from registry.redaction import redact
from serving.caching.breaker import FAILURES, Breaker
from serving.caching.cache_values import Answer, is_longer, pack, unpack
from serving.process.tasks import all_of, ended

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from serving.caching.cache_cluster import ClusterClient

log = logging.getLogger("modelkeep.cache")

REFRESH_SECONDS = 1.0
"""How often the marks are read, which is how long an invalidation takes to reach other servers."""
CONNECTIONS = 8
"""Most requests that ask Redis at a time; those beyond are computed."""
_CONNECT_SECONDS = 1.0
_WRITES_WAITING = 64
_WRITES_WAITING_BYTES = 8 << 20
_LARGEST_BYTES = 1 << 20
"""Longer answers are not shared: their checksums would hold up the event loop for milliseconds."""
_RETIRED_MARKS = 16
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
        self._client: Redis | ClusterClient = connect(url, timeout_seconds) if client is None else client
        self._cluster: ClusterClient | None = _cluster_of(self._client)
        self._breaker = Breaker(
            self.url, self.counts, log, by_node=self._cluster is not None,
            lost="%s is not used until it answers in time: %s", back="answers are shared by %s",
        )  # fmt: skip
        from redis.exceptions import RedisError, ResponseError

        self._errors: tuple[type[Exception], ...] = (RedisError, OSError, TimeoutError)
        self._refused: type[Exception] = ResponseError
        self._prefix = f"modelkeep:cache:{environment}:"
        self._timeout_seconds = timeout_seconds
        self._ttl_milliseconds = max(1, int(ttl_seconds * 1000))
        self._models = models
        self._changed = changed
        self._marks: dict[str, str] = {}
        self._retired: dict[str, deque[str]] = {}
        """The last marks of each model that newer ones replaced."""
        self._pending: set[str] = set()
        """The models that need a new mark, and ..."""
        self._settled: set[str] = set()
        """... those for which it is being written."""
        self._settling = asyncio.Lock()
        self._asking = 0
        self._writes: set[asyncio.Task[None]] = set()
        self._writing_bytes = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def usable(self) -> bool:
        """Whether requests ask it now."""
        return self._breaker.usable

    def start(self) -> None:
        """Look after Redis from now on."""
        self._task = asyncio.create_task(self._look_after())

    async def stop(self) -> None:
        tasks = [*self._writes, *([self._task] if self._task is not None else [])]
        await ended(tasks)
        with suppress(*self._errors):
            async with asyncio.timeout(_CONNECT_SECONDS):
                await self._client.aclose()

    def ready(self, model: str, key: bytes | None = None) -> bool:
        """Whether a request for this model should ask, and for this key where the nodes of a cluster differ."""
        if not self._breaker.usable or (mark := self._marks.get(model)) is None:
            return False
        resting = self._cluster is not None and key is not None and not self._cluster.ready(self._name(mark, key))
        if resting or self._asking >= CONNECTIONS:
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
                # No more than an answer can have, whatever somebody put there; one that is longer is cut off, and no answer.
                value = await _awaited(self._client.getrange(name, 0, _LARGEST_BYTES))
                answer = unpack(key, value) if value else None
                if answer is not None:
                    answer = _aged(answer, await _awaited(self._client.pttl(name)))
        except self._errors as error:
            if type(error) is not self._refused:  # its subclasses say what is wrong with Redis, it with the value
                self._breaker.failed(error)
                return None
            value, answer = b"?", None
        self._breaker.answered()
        if value and answer is None:
            self.counts["poisoned"] += 1
        self.counts["hits" if answer is not None else "misses"] += 1
        return answer

    def put(self, model: str, key: bytes, answer: Answer) -> None:
        """Store in the background. Not stored is what Redis does not take in time, or what too many wait before."""
        if not self.usable or model not in self._marks or len(self._writes) >= _WRITES_WAITING:
            self.counts["not_written"] += 1
            return
        name = self._name(self._marks[model], key)
        # Packing is what takes the time, so what is too long anyway is not packed.
        if is_longer(answer, _LARGEST_BYTES) or (self._cluster is not None and not self._cluster.ready(name)):
            self.counts["not_written"] += 1
            return
        value = pack(key, answer)
        if value is None or len(value) > _LARGEST_BYTES or self._writing_bytes + len(value) > _WRITES_WAITING_BYTES:
            self.counts["not_written"] += 1
            return
        self._writing_bytes += len(value)
        task = asyncio.create_task(self._write(name, value))
        self._writes.add(task)
        task.add_done_callback(partial(self._wrote, len(value)))

    def _wrote(self, size_bytes: int, task: asyncio.Task[None]) -> None:
        self._writes.discard(task)
        self._writing_bytes -= size_bytes

    async def invalidate(self, models: Collection[str]) -> bool:
        """Make what is stored of these models unreachable for every server. False where Redis does not answer: it is done when it does."""
        for model in models:
            self._retire(model)
            self._pending.add(model)
        return await self._settle()

    def _retire(self, model: str) -> None:
        mark = self._marks.pop(model, None)
        if mark is not None:
            self._retired.setdefault(model, deque(maxlen=_RETIRED_MARKS)).append(mark)

    def as_dict(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "usable": self.usable,
            "models": sorted(self._marks),
            "invalidations_waiting": sorted(self._pending | self._settled),
            "nodes": [] if self._cluster is None else self._cluster.nodes(),
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
            self._breaker.failed(error)
        else:
            self.counts["written"] += 1

    async def _look_after(self) -> None:
        while True:
            try:
                await self._settle()
            except Exception as error:  # marks that nobody can read, or a client's own fault: not to end with it
                log.exception("looking after %s failed", self.url)
                self._breaker.open(error)
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
            if self._cluster is not None:
                await self._cluster.refresh()
            async with asyncio.timeout(_CONNECT_SECONDS):
                if pending:
                    await self._write_marks(pending)
                found = await self._read_marks()
                old = {model for model, mark in found.items() if mark in self._retired.get(model, ())} - self._pending
                if old:
                    # A master died before its replica had the newer mark: what was dropped must not come back with it.
                    log.warning(
                        "%s has old marks of %s again; what is stored under them is dropped again",
                        self.url,
                        sorted(old),
                    )
                    for model in old:
                        self._retire(model)
                    await self._write_marks(old)
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
            self._breaker.open(error)
            return False
        for model, mark in found.items():
            if model not in self._pending and self._marks.get(model) != mark:
                self._retire(model)
                self._marks[model] = mark
                # Also for the first mark: while none was known here, others may have invalidated.
                self._changed(model)
        if not self.usable and taken <= self._timeout_seconds:
            self._breaker.close()
        return True

    async def _write_marks(self, models: Collection[str]) -> None:
        new: dict[Any, Any] = {model: secrets.token_hex(8) for model in models}
        await _awaited(self._client.hset(self._prefix + "marks", mapping=new))

    async def _read_marks(self) -> dict[str, str]:
        marks = await _awaited(self._client.hgetall(self._prefix + "marks"))
        return {name.decode(): mark.decode() for name, mark in marks.items()}

    async def _warm(self) -> None:
        """Connections for requests, which themselves have no time to wait for one."""
        client: Any = self._client
        await all_of(client.exists(self._prefix + "marks") for _ in range(CONNECTIONS))


def connect(url: str, timeout_seconds: float) -> Redis | ClusterClient:
    """A client that tries nothing twice. It connects when it is used; a node of a cluster has `timeout_seconds` to answer."""
    if not url.partition("://")[0].endswith("+cluster"):
        return _open(url)
    from serving.caching.cache_cluster import ClusterClient

    return ClusterClient(url, open_client=_open, timeout_seconds=timeout_seconds, failures=FAILURES, warm=CONNECTIONS)


def _open(url: str) -> Redis:
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.maint_notifications import MaintNotificationsConfig

    client = Redis.from_url(
        url,
        retry=Retry(NoBackoff(), 0),
        socket_connect_timeout=_CONNECT_SECONDS,
        max_connections=2 * CONNECTIONS + _WRITES_WAITING,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )
    # Whoever asks has a time-out of their own. With one of redis-py's, also one from the URL or set by such a notification, each
    # command is sent within `asyncio.wait_for`, which before Python 3.12 swallows a cancellation that comes as it ends.
    client.connection_pool.connection_kwargs["socket_timeout"] = None
    return client


def _cluster_of(client: Any) -> ClusterClient | None:
    from serving.caching.cache_cluster import ClusterClient

    return client if isinstance(client, ClusterClient) else None


def _aged(answer: Answer, left_milliseconds: int) -> Answer:
    """With the time that Redis says is left to it, by the one clock that all servers share. Negative: it has no end, or has just ended."""
    return answer if left_milliseconds == -1 else answer._replace(left_seconds=max(0, left_milliseconds) / 1000)


async def _awaited(answer: Awaitable[Any] | Any) -> Any:
    """redis types its commands for its clients with and without asyncio; these are always awaited."""
    return await answer
