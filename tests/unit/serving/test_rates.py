"""Token buckets: what they let through over time, what they tell clients, and what is counted of those they refuse."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from registry.keys import INTERNAL, Principal
from registry.rates import Rate
from serving.access import rates_shared
from serving.access.rates import Buckets, Limiter, Verdict, verdict
from serving.access.rates_shared import SharedBuckets
from tests.unit.serving.helpers import until

MINUTE = Rate(60, 60)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def alice(rate: str | None = None) -> Principal:
    return Principal("a" * 12, "alice", "infer", rate)


def test_a_bucket_holds_what_the_rate_names_and_fills_again_bit_by_bit() -> None:
    clock = Clock()
    buckets = Buckets(monotonic=clock)
    assert [buckets.take("a", MINUTE).remaining for _ in range(60)] == list(range(59, -1, -1))
    refused = buckets.take("a", MINUTE)
    assert not refused.allowed and refused.retry_after == 1
    assert buckets.take("b", MINUTE).allowed, "another key has its own"
    clock.now += 0.5
    assert not buckets.take("a", MINUTE).allowed
    clock.now += refused.retry_after - 0.5
    assert buckets.take("a", MINUTE).allowed, "who waited as long as he was told is let in"
    assert not buckets.take("a", MINUTE).allowed
    clock.now += 3600
    assert sum(buckets.take("a", MINUTE).allowed for _ in range(100)) == 60


@pytest.mark.parametrize("rate", [Rate(1, 1), Rate(7, 60), Rate(3, 3600), Rate(1, 86400), Rate(1000, 1)])
def test_in_any_stretch_of_time_no_more_pass_than_the_bucket_and_what_ran_into_it(rate: Rate) -> None:
    clock = Clock()
    buckets = Buckets(monotonic=clock)
    step, passed = rate.unit_seconds / rate.count / 10, 0
    for _ in range(200):
        passed += buckets.take("a", rate).allowed
        clock.now += step
    assert passed <= rate.count + 200 * step * rate.per_second
    assert passed >= min(200, rate.count)


def test_a_clock_that_goes_back_gives_no_tokens_and_takes_none() -> None:
    clock = Clock()
    buckets = Buckets(monotonic=clock)
    buckets.take("a", MINUTE)
    clock.now -= 500
    assert buckets.take("a", MINUTE).remaining == 58


def test_many_keys_do_not_fill_the_memory() -> None:
    clock = Clock()
    buckets = Buckets(monotonic=clock)
    for n in range(10_000):
        clock.now += 0.001
        buckets.take(str(n), MINUTE)
    assert len(buckets._tokens) <= 4096


def test_a_key_has_its_own_rate_or_the_servers_and_our_own_processes_have_none() -> None:
    limiter = Limiter(MINUTE)
    assert limiter.rate_of(alice()) == MINUTE
    assert limiter.rate_of(alice("5/second")) == Rate(5, 1)
    assert limiter.rate_of(alice("none")) is None
    assert limiter.rate_of(alice("7/fortnight")) == MINUTE, "what a newer modelkeep wrote"
    assert limiter.rate_of(Principal(INTERNAL, INTERNAL, "infer")) is None
    assert asyncio.run(limiter.take(alice("none"))) is None
    assert Limiter(None).rate_of(alice()) is None


def test_clients_are_told_limit_rest_and_when_it_is_full() -> None:
    told = dict(verdict(MINUTE, True, 12.5).headers())
    assert told == {b"ratelimit-limit": b"60", b"ratelimit-remaining": b"12", b"ratelimit-reset": b"48"}
    assert verdict(Rate(1, 86400), False, 0.0).retry_after == 86400


def test_refusals_are_counted_by_few_names() -> None:
    limiter = Limiter(MINUTE)
    for n in range(150):
        limiter.count(Principal(f"{n:012x}", f"client-{n}", "infer"), "/v2/models/{model}/infer")
    limiter.count(Principal("0" * 12, "client-0", "infer"), "/v2/models/{model}/infer")
    assert len(limiter.hits) == 101
    assert limiter.hits["client-0", "/v2/models/{model}/infer"] == 2
    assert limiter.hits["others", "/v2/models/{model}/infer"] == 50


class FakeRedis:
    """Holds one bucket for each name, which nothing runs into. `down`: every command fails. `stuck`: none ends while it is set."""

    def __init__(self, tokens: int = 10) -> None:
        self.tokens: dict[str, int] = {}
        self.start = tokens
        self.down = False
        self.stuck: asyncio.Event | None = None
        self.asked: list[int] = []
        self.nonsense: list[Any] = []

    async def eval(self, script: str, keys: int, name: str, count: str, per_second: str, wanted: str) -> Any:
        if self.down:
            raise RedisConnectionError("no such place")
        if self.stuck is not None:
            await self.stuck.wait()
        if name.endswith(":-"):
            return [0, b"1000000"]
        self.asked.append(int(wanted))
        if self.nonsense:
            return self.nonsense.pop()
        left = self.tokens.setdefault(name, self.start)
        given = min(int(wanted), left)
        self.tokens[name] = left - given
        return [given, str(left - given).encode()]

    async def aclose(self) -> None:
        pass


def shared(redis: FakeRedis, clock: Clock | None = None) -> SharedBuckets:
    return SharedBuckets(
        "redis://:secret@box/0", "production", timeout_seconds=0.05, client=redis, monotonic=clock or Clock()
    )


async def started(redis: FakeRedis, clock: Clock | None = None) -> SharedBuckets:
    found = shared(redis, clock)
    found.start()
    await until(lambda: found.usable)
    return found


def test_servers_share_one_bucket() -> None:
    async def scenario() -> None:
        redis = FakeRedis(tokens=5)
        one, other = await started(redis), await started(redis)
        verdicts = [await server.take("a", MINUTE) for server in (one, other, one, other, one, other)]
        assert [v is not None and v.allowed for v in verdicts] == [True] * 5 + [False]
        await one.stop()
        await other.stop()

    asyncio.run(scenario())


def test_many_at_once_ask_together_and_get_no_more_than_there_is() -> None:
    async def scenario() -> None:
        redis = FakeRedis(tokens=30)
        server = await started(redis)
        verdicts = await asyncio.gather(*(server.take("a", MINUTE) for _ in range(50)))
        assert sum(v is not None and v.allowed for v in verdicts) == 30
        assert all(v is not None for v in verdicts)
        assert len(redis.asked) < 10, "not one by one"
        await server.stop()

    asyncio.run(scenario())


def test_a_fast_rate_is_taken_ahead_and_what_is_not_used_is_forgotten() -> None:
    async def scenario() -> None:
        redis, clock = FakeRedis(tokens=1000), Clock()
        server = await started(redis, clock)
        rate = Rate(1000, 1)
        for _ in range(50):
            found = await server.take("a", rate)
            assert found is not None and found.allowed
        assert redis.asked == [50], "a twentieth of a second"
        await server.take("a", rate)
        clock.now += 1.5
        await server.take("a", rate)
        assert redis.asked == [50, 50, 50]
        await server.stop()

    asyncio.run(scenario())


def test_who_was_refused_is_not_asked_for_again_before_a_token_can_be_there() -> None:
    async def scenario() -> None:
        redis, clock = FakeRedis(tokens=0), Clock()
        server = await started(redis, clock)
        for _ in range(20):
            found = await server.take("a", MINUTE)
            assert found is not None and not found.allowed and found.retry_after == 1
        assert len(redis.asked) == 1, "a flood costs Redis nothing"
        clock.now += 1.001
        redis.tokens["modelkeep:rate:production:a"] = 1
        found = await server.take("a", MINUTE)
        assert found is not None and found.allowed
        await server.stop()

    asyncio.run(scenario())


def test_a_redis_that_is_down_stuck_or_talks_nonsense_leaves_the_rate_to_this_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates_shared, "LOOK_SECONDS", 0.01)

    async def scenario() -> None:
        redis = FakeRedis(tokens=1000)
        server = await started(redis)
        limiter = Limiter(Rate(2, 60), shared=server)

        async def allowed() -> list[bool]:
            found = [await limiter.take(alice()) for _ in range(4)]
            return [isinstance(v, Verdict) and v.allowed for v in found]

        redis.down = True
        assert await allowed() == [True, True, False, False]
        assert not server.usable and server.counts["opened"] == 1
        redis.down = False
        await until(lambda: server.usable)
        redis.stuck = asyncio.Event()
        asked = server.counts["asked"]
        assert await allowed() == [False] * 4, "its own bucket goes on where it was"
        assert server.counts["asked"] - asked == 3 and not server.usable, "after three failures nobody asks"
        redis.stuck.set()
        redis.stuck = None
        await until(lambda: server.usable)
        for nonsense in (
            [b"x", b"y"],
            None,
            [1],
            [1, b"x"],
            [None, b"1"],
            [0, None],
            [0, b"nan"],
            [0, b"inf"],
            [9**9, b"1"],
        ):
            redis.nonsense = [nonsense]
            assert await server.take("b", MINUTE) is None, nonsense
            await until(lambda: server.usable)
        await server.stop()

    asyncio.run(scenario())
