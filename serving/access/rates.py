"""How many inference requests a key may make: a token bucket for each, in this process, or shared by servers (serving.access.rates_shared).

A bucket of 60/minute holds 60 requests and gets one more each second. Requests without a key have no rate: they are of this machine,
or something in front of the server lets them in and counts them.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from registry import rates
from registry.errors import UsageError
from registry.keys import INTERNAL, Principal
from registry.rates import Rate

log = logging.getLogger("modelkeep.rates")

_MOST_BUCKETS = 4096
_MOST_CLIENTS = 100
_OTHERS = "others"
_ENOUGH = 1 - 1e-9
"""Of a token: sums of fractions fall short of it by rounding."""


class Verdict(NamedTuple):
    """Whether a request may go on. `wait_seconds`: until one may, 0 where this one may; `full_seconds`: until the bucket is full."""

    allowed: bool
    rate: Rate
    remaining: int
    wait_seconds: float
    full_seconds: float

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a request finds a token."""
        return max(1, math.ceil(self.wait_seconds))

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers RateLimit-Limit, -Remaining and -Reset (seconds until the bucket is full), as most clients know them."""
        return [
            (b"ratelimit-limit", b"%d" % self.rate.count),
            (b"ratelimit-remaining", b"%d" % self.remaining),
            (b"ratelimit-reset", b"%d" % math.ceil(self.full_seconds)),
        ]


def verdict(rate: Rate, allowed: bool, tokens: float) -> Verdict:
    """By the tokens that are left."""
    wait = 0.0 if allowed else max(0.0, 1 - tokens) / rate.per_second
    return Verdict(allowed, rate, int(tokens + 1e-9), wait, max(0.0, rate.count - tokens) / rate.per_second)


class Buckets:
    """The buckets of this process. Those that are full again are forgotten when there are many."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._tokens: dict[str, tuple[float, float]] = {}
        """(tokens, when) by key."""

    def take(self, key: str, rate: Rate) -> Verdict:
        now = self._monotonic()
        found = self._tokens.get(key)
        if found is None:
            if len(self._tokens) >= _MOST_BUCKETS:
                self._forget(now)
            tokens = float(rate.count)
        else:
            tokens = min(rate.count, found[0] + max(0.0, now - found[1]) * rate.per_second)
        allowed = tokens >= _ENOUGH
        if allowed:
            tokens -= 1
        self._tokens[key] = (tokens, now)
        return verdict(rate, allowed, tokens)

    def _forget(self, now: float) -> None:
        """Drop the older half: nobody makes so many keys, so most are of keys that are gone."""
        kept = sorted(self._tokens.items(), key=lambda item: item[1][1])[len(self._tokens) // 2 :]
        self._tokens = dict(kept)


class Shared(Protocol):
    """Buckets that servers share."""

    @property
    def usable(self) -> bool: ...

    """Whether they are asked now."""

    async def take(self, key: str, rate: Rate) -> Verdict | None:
        """None where that cannot be found out in time."""


class Limiter:
    """Asked for every inference request that came with a key. On the event loop only."""

    def __init__(self, default: Rate | None, *, buckets: Buckets | None = None, shared: Shared | None = None) -> None:
        self.default = default
        self.shared = shared
        self.hits: dict[tuple[str, str], int] = {}
        """Refused requests by client (the name of a key) and endpoint. Of the first so many clients; the rest are one."""
        self._buckets = Buckets() if buckets is None else buckets
        self._clients: set[str] = set()

    def rate_of(self, principal: Principal) -> Rate | None:
        """None where it has no limit: its own, else the server's. Our own processes have none."""
        if principal.rate is None:
            return None if principal.key_id == INTERNAL else self.default
        return _parsed(principal.rate, self.default)

    async def take(self, principal: Principal) -> Verdict | None:
        """None where the key has no limit. The shared bucket's word where there is one in time, else that of this process's own."""
        rate = self.rate_of(principal)
        if rate is None:
            return None
        if self.shared is not None:
            found = await self.shared.take(principal.key_id, rate)
            if found is not None:
                return found
        return self._buckets.take(principal.key_id, rate)

    def count(self, principal: Principal, endpoint: str) -> None:
        """One was refused. `endpoint` is a template, of which there are few."""
        client = principal.name
        if client not in self._clients:
            if len(self._clients) >= _MOST_CLIENTS:
                client = _OTHERS
            else:
                self._clients.add(client)
        self.hits[client, endpoint] = self.hits.get((client, endpoint), 0) + 1

    def as_dict(self) -> dict[str, Any]:
        return {"default": rates.NONE if self.default is None else str(self.default), "shared": self.shared is not None}


@functools.lru_cache(maxsize=1024)
def _parsed(text: str, default: Rate | None) -> Rate | None:
    try:
        return rates.parse(text)
    except UsageError as error:  # a newer modelkeep may write what this one does not know
        log.error("the rate of a key cannot be used, the server's own is: %s", error)
        return default
