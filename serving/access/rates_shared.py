"""Token buckets in Redis, so that a key has one rate on all servers. Whatever is wrong with Redis, each server counts by itself.

One script takes tokens, by Redis's own clock. A server takes what a rate gives in a twentieth of a second ahead, so that a key of
many requests a second does not ask for each; and it does not ask again before a token can be there. A request waits a few
milliseconds for Redis and no longer; after some failures nobody asks, until a task that looks each second has had an answer in time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from registry.rates import Rate
from registry.redaction import redact
from serving.access.rates import Verdict, verdict
from serving.caching.breaker import Breaker
from serving.caching.cache_shared import connect
from serving.process.tasks import ended

log = logging.getLogger("modelkeep.rates")

LOOK_SECONDS = 1.0
AHEAD_SECONDS = 0.05
LEASE_SECONDS = 1.0
"""What was taken ahead and not used within that time is lost, so that a key has not more here because it was quiet here."""
_MOST_LEASES = 4096
_REFUSED_SECONDS = 60.0
"""Longer than that nobody is refused without asking again: Redis may have been emptied."""
_CLOSE_SECONDS = 1.0

SCRIPT = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local count, per_second, wanted = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local kept = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens, at = tonumber(kept[1] or nil), tonumber(kept[2] or nil)
if tokens == nil or at == nil or tokens ~= tokens or at ~= at then tokens, at = count, now end
tokens = math.min(count, tokens + math.max(0, now - at) * per_second)
local given = math.min(wanted, math.floor(tokens + 0.000000001))
if given < 0 then given = 0 end
tokens = tokens - given
redis.call('HSET', KEYS[1], 'tokens', string.format('%.17g', tokens), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil((count - tokens) / per_second * 1000) + 1000)
return {given, string.format('%.17g', tokens)}
"""


class _Lease:
    """What this server has of a key's tokens."""

    __slots__ = ("asking", "at", "left", "refused_until", "tokens", "waiting")

    def __init__(self) -> None:
        self.tokens = 0
        self.at = float("-inf")
        self.left = 0.0
        self.refused_until = float("-inf")
        self.waiting = 0
        self.asking: asyncio.Task[bool] | None = None


class SharedBuckets:
    """On the event loop only. `client` is a redis.asyncio client."""

    def __init__(
        self,
        url: str,
        environment: str,
        *,
        timeout_seconds: float,
        client: Any = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        from redis.exceptions import RedisError

        self.url = redact(url)
        self.counts = {"asked": 0, "failed": 0, "opened": 0}
        self._client: Any = connect(url, timeout_seconds) if client is None else client
        self._cluster = hasattr(self._client, "refresh")
        """Whether it is a cluster, which itself knows which of its nodes answer in time."""
        self._breaker = Breaker(
            self.url, self.counts, log, by_node=self._cluster,
            lost="the rates of keys are counted by this server alone until %s answers in time: %s",
            back="the rates of keys are counted in %s",
        )  # fmt: skip
        self._errors: tuple[type[Exception], ...] = (RedisError, OSError, TimeoutError, ValueError)
        self._prefix = f"modelkeep:rate:{environment}:"
        self._timeout_seconds = timeout_seconds
        self._monotonic = monotonic
        self._leases: dict[str, _Lease] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def usable(self) -> bool:
        """Whether requests ask it now."""
        return self._breaker.usable

    def start(self) -> None:
        """Look after Redis from now on."""
        self._task = asyncio.create_task(self._look_after())

    async def stop(self) -> None:
        tasks = [lease.asking for lease in self._leases.values() if lease.asking is not None]
        if self._task is not None:
            await ended([self._task])
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(*self._errors):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._client.aclose()

    async def take(self, key: str, rate: Rate) -> Verdict | None:
        """One token. None where Redis is not to be asked, or says nothing in time."""
        lease = self._leases.get(key)
        if lease is None:
            if len(self._leases) >= _MOST_LEASES:
                self._leases = {k: v for k, v in self._leases.items() if v.asking is not None or v.waiting}
            lease = self._leases[key] = _Lease()
        lease.waiting += 1
        try:
            while self._breaker.usable and (not self._cluster or self._client.ready(self._prefix + key)):
                now = self._monotonic()
                if lease.tokens > 0 and now - lease.at < LEASE_SECONDS:
                    lease.tokens -= 1
                    return verdict(rate, True, lease.left + lease.tokens)
                if now < lease.refused_until:
                    return verdict(rate, False, lease.left + (now - lease.at) * rate.per_second)
                if lease.asking is None:
                    lease.asking = asyncio.create_task(self._ask(key, lease, rate))
                if not await asyncio.shield(lease.asking):
                    return None
            return None
        finally:
            lease.waiting -= 1

    async def _ask(self, key: str, lease: _Lease, rate: Rate) -> bool:
        ahead = min(int(rate.per_second * AHEAD_SECONDS), rate.count // 10)
        wanted = max(1, ahead, min(lease.waiting, rate.count))
        self.counts["asked"] += 1
        try:
            async with asyncio.timeout(self._timeout_seconds):
                given, left = await self._script(key, rate, wanted)
        except self._errors as error:
            self._breaker.failed(error)
            return False
        finally:
            lease.asking = None
        self._breaker.answered()
        now = self._monotonic()
        lease.tokens, lease.at, lease.left = given, now, left
        if given == 0:
            lease.refused_until = now + min(max(0.0, 1 - left) / rate.per_second, _REFUSED_SECONDS)
        return True

    async def _script(self, key: str, rate: Rate, wanted: int) -> tuple[int, float]:
        arguments = (str(rate.count), repr(rate.per_second), str(wanted))
        answer = await self._client.eval(SCRIPT, 1, self._prefix + key, *arguments)
        match answer:
            case [int(given), bytes() | str() as text] if 0 <= given <= wanted and math.isfinite(left := float(text)):
                return given, left
        raise ValueError(f"an answer that is none of the script's: {answer!s:.100}")

    async def _look_after(self) -> None:
        while True:
            if self._cluster or not self.usable:
                await self._look()
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        """Whether it answers in time again. The first answer may need a connection, so the second counts."""
        probe = Rate(1_000_000, 1)
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                if self._cluster:
                    await self._client.refresh()
                    self._breaker.close()
                    return
                await self._script("-", probe, 0)
                began = time.monotonic()
                await self._script("-", probe, 0)
                taken = time.monotonic() - began
        except self._errors as error:
            self._breaker.open(error)
            return
        if taken <= self._timeout_seconds:
            self._breaker.close()
