"""The cache's second level with a Redis that does as it is told: what is asked when, and what is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from serving.caching import cache_shared
from serving.caching.breaker import FAILURES
from serving.caching.cache_shared import CONNECTIONS, SharedStore
from serving.caching.cache_values import Answer
from tests.unit.serving.helpers import until

KEY = b"k" * 16
ANSWER = Answer({"y": np.ones((1, 2), "<f4")}, 0.25)


class FakeRedis:
    """Holds what it is told. `down`: every command fails. `stuck`: none ends while it is set."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.marks: dict[str, dict[str, str]] = {}
        self.down = False
        self.stuck: asyncio.Event | None = None
        self.gets = 0
        self.left = -1

    async def _answer(self) -> None:
        if self.down:
            raise RedisConnectionError("no such place")
        if self.stuck is not None:
            await self.stuck.wait()

    async def getrange(self, name: str, start: int, end: int) -> bytes:
        self.gets += 1
        await self._answer()
        return self.values.get(name, b"")[start : end + 1]

    async def pttl(self, name: str) -> int:
        await self._answer()
        return self.left if name in self.values else -2

    async def set(self, name: str, value: bytes, px: int) -> None:
        await self._answer()
        self.values[name] = value
        self.left = px

    async def hset(self, name: str, mapping: dict[str, str]) -> None:
        await self._answer()
        self.marks.setdefault(name, {}).update(mapping)

    async def hsetnx(self, name: str, field: str, value: str) -> None:
        await self._answer()
        self.marks.setdefault(name, {}).setdefault(field, value)

    async def hgetall(self, name: str) -> dict[bytes, bytes]:
        await self._answer()
        return {field.encode(): value.encode() for field, value in self.marks.get(name, {}).items()}

    async def exists(self, name: str) -> int:
        await self._answer()
        return int(name in self.marks)

    async def aclose(self) -> None:
        pass


def shared(redis: FakeRedis, changed: Callable[[str], object] = lambda model: None, **options: Any) -> SharedStore:
    # Long enough for a machine that has other things to do: what answers too late is not used.
    wanted = {"timeout_seconds": 10.0, "ttl_seconds": 60.0, **options}
    return SharedStore(
        "redis://:secret@cache:6379/0", "production", models=lambda: {"m"}, changed=changed, client=redis, **wanted
    )


async def put(store: SharedStore, key: bytes = KEY) -> None:
    before = store.counts["written"]
    store.put("m", key, ANSWER)
    await until(lambda: store.counts["written"] > before)


def test_it_is_asked_once_it_has_answered_and_gives_back_what_was_stored() -> None:
    async def scenario() -> None:
        store = shared(FakeRedis())
        assert not store.ready("m")
        assert await store._settle()
        assert store.ready("m") and not store.ready("unknown")
        assert await store.get("m", KEY) is None
        await put(store)
        found = await store.get("m", KEY)
        assert found is not None and found.model_seconds == 0.25
        assert (store.counts["hits"], store.counts["misses"]) == (1, 1)
        assert "secret" not in str(store.as_dict())

    asyncio.run(scenario())


def test_a_redis_that_fails_is_not_asked_again_until_it_has_answered() -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        store = shared(redis)
        await store._settle()
        redis.down = True
        for _ in range(FAILURES):
            assert store.ready("m")
            assert await store.get("m", KEY) is None
        assert not store.ready("m") and store.counts["opened"] == 1
        assert not await store._settle() and not store.ready("m")
        redis.down = False
        assert await store._settle() and store.ready("m")
        asked = redis.gets
        await store.get("m", KEY)
        assert redis.gets == asked + 1

    asyncio.run(scenario())


def test_failures_that_are_not_in_a_row_change_nothing() -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        store = shared(redis)
        await store._settle()
        for _ in range(2 * FAILURES):
            redis.down = True
            await store.get("m", KEY)
            redis.down = False
            await store.get("m", KEY)
        assert store.ready("m") and store.counts["failed"] == 2 * FAILURES

    asyncio.run(scenario())


def test_a_redis_that_hangs_is_left_after_its_time_and_holds_no_more_than_a_few_requests() -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        store = shared(redis)
        await store._settle()
        store._timeout_seconds = 0.05
        redis.stuck = asyncio.Event()
        asking = [store.begin("m", KEY) for _ in range(CONNECTIONS)]
        assert not store.ready("m") and store.counts["skipped"] == 1
        await until(lambda: redis.gets == CONNECTIONS)
        assert await asyncio.gather(*asking) == [None] * CONNECTIONS
        assert not store.usable and store.counts["failed"] == CONNECTIONS

    asyncio.run(scenario())


class HalfGone(FakeRedis):
    """Of the commands that open connections the first fails, and the others are not answered."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = 0
        self.waiting = 0
        self.failing: asyncio.Future[int] | None = None

    async def exists(self, name: str) -> int:
        self.begun += 1
        if self.begun % CONNECTIONS == 1:
            self.failing = asyncio.get_running_loop().create_future()
            return await self.failing
        self.waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        raise AssertionError("nobody answers")


def test_connections_that_are_not_answered_are_given_up_with_the_one_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each holds one of those that there are at most: left alone, they were all taken after ten looks, and none was used again."""
    monkeypatch.setattr(cache_shared, "_CONNECT_SECONDS", 0.05)

    async def scenario() -> None:
        redis = HalfGone()
        store = shared(redis)
        looking = asyncio.create_task(store._settle())
        await until(lambda: redis.waiting == CONNECTIONS - 1)
        assert redis.failing is not None
        redis.failing.set_exception(RedisConnectionError("gone"))
        assert await looking is False
        assert redis.waiting == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("turns", range(6))
def test_a_stop_counts_when_a_connection_fails_in_the_same_turn(turns: int) -> None:
    async def scenario() -> None:
        redis = HalfGone()
        store = shared(redis)
        store.start()
        await until(lambda: redis.waiting == CONNECTIONS - 1)
        assert redis.failing is not None
        redis.failing.set_exception(RedisConnectionError("gone"))
        for _ in range(turns):
            await asyncio.sleep(0)
        assert store._task is not None
        store._task.cancel()
        await asyncio.wait([store._task], timeout=30)
        assert store._task.cancelled()

    asyncio.run(scenario())


def test_writes_that_pile_up_are_left_out() -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        store = shared(redis)
        await store._settle()
        redis.stuck = asyncio.Event()
        for number in range(100):
            store.put("m", bytes([number]) * 16, ANSWER)
        assert store.counts["not_written"] == 36
        redis.stuck.set()
        await until(lambda: store.counts["written"] == 64)

    asyncio.run(scenario())


def test_a_poisoned_value_is_a_miss_and_counted() -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        store = shared(redis)
        await store._settle()
        await put(store)
        (name,) = redis.values
        whole = redis.values[name]
        for value in (
            b"",
            b"nonsense",
            whole[:-1],
            whole[:20],
            b"\x02" + whole[1:],
            whole[:-1] + b"\x00",
            whole + b"\x00",
        ):
            redis.values[name] = value
            assert await store.get("m", KEY) is None
        assert store.counts["poisoned"] == 6 and store.usable  # what is empty is not there
        redis.values[name.replace(KEY.hex(), (b"q" * 16).hex())] = whole
        assert await store.get("m", b"q" * 16) is None, "another key's answer"

    asyncio.run(scenario())


def test_an_invalidation_reaches_the_other_server_at_its_next_look() -> None:
    async def scenario() -> None:
        redis, forgotten = FakeRedis(), list[str]()
        one, other = shared(redis), shared(redis, forgotten.append)
        await one._settle()
        await other._settle()
        forgotten.clear()
        await put(one)
        assert await other.get("m", KEY) is not None
        assert await one.invalidate(["m"])
        assert await one.get("m", KEY) is None and forgotten == []
        await put(other)  # under the old mark: nobody who knows the new one finds it
        assert await one.get("m", KEY) is None
        await other._settle()
        assert forgotten == ["m"] and await other.get("m", KEY) is None
        await put(one)
        assert await other.get("m", KEY) is not None

    asyncio.run(scenario())


def test_who_looks_while_the_answers_are_dropped_finds_nothing() -> None:
    async def scenario() -> None:
        store = shared(FakeRedis())
        await store._settle()
        await put(store)
        assert store.ready("m")
        looking = asyncio.create_task(store.get("m", KEY))
        dropping = asyncio.create_task(store.invalidate(["m"]))
        store._marks.pop("m")  # as the second does, before the first has begun
        assert await looking is None
        assert await dropping

    asyncio.run(scenario())


def test_marks_that_nobody_can_read_are_no_end_of_looking_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(cache_shared, "REFRESH_SECONDS", 0.01)
        redis = FakeRedis()
        store = shared(redis)
        store.start()
        await until(lambda: store.ready("m"))
        whole = redis.hgetall

        async def poisoned(name: str) -> dict[bytes, bytes]:
            return {b"m": b"\xff"}

        monkeypatch.setattr(redis, "hgetall", poisoned)
        await until(lambda: not store.usable)
        monkeypatch.setattr(redis, "hgetall", whole)
        await until(lambda: store.ready("m"))
        await store.stop()

    asyncio.run(scenario())


def test_a_very_long_answer_is_not_shared() -> None:
    async def scenario() -> None:
        store = shared(FakeRedis())
        await store._settle()
        store.put("m", KEY, Answer({"y": np.zeros(1 << 20, "<u1")}, 0.25))
        assert store.counts["not_written"] == 1

    asyncio.run(scenario())


def texts(*values: Any) -> np.ndarray[Any, Any]:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


@pytest.mark.parametrize(
    "array",
    [np.zeros((1 << 20) + 1, "<u1"), texts(b"x" * (1 << 20)), texts(*["x" * 1_000] * 1_050), texts(*[""] * 300_000)],
)
def test_an_answer_that_is_too_long_is_not_even_packed(array: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        store = shared(FakeRedis())
        await store._settle()
        packed = list[bytes]()
        monkeypatch.setattr(cache_shared, "pack", lambda key, answer: packed.append(key))
        store.put("m", KEY, Answer({"y": array}, 0.25))
        assert store.counts["not_written"] == 1 and packed == []
        store.put("m", KEY, ANSWER)
        assert packed == [KEY]

    asyncio.run(scenario())


def test_one_that_is_cancelled_before_it_asked_makes_room_for_another() -> None:
    async def scenario() -> None:
        store = shared(FakeRedis())
        await store._settle()
        asking = [store.begin("m", KEY) for _ in range(CONNECTIONS)]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await until(lambda: store.ready("m"))

    asyncio.run(scenario())


def test_a_server_that_started_without_redis_hears_of_what_was_invalidated_meanwhile() -> None:
    async def scenario() -> None:
        redis, forgotten = FakeRedis(), list[str]()
        one, late = shared(redis), shared(redis, forgotten.append)
        await one._settle()
        redis.down = True
        assert not await late._settle()  # it answers from its own memory
        redis.down = False
        await one.invalidate(["m"])
        assert await late._settle() and forgotten == ["m"]
        await late._settle()
        assert forgotten == ["m"]

    asyncio.run(scenario())


def test_an_invalidation_while_another_of_the_model_is_written_is_written_too() -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        one, other = shared(redis), shared(redis)
        await one._settle()
        written = redis.hset

        async def slow(name: str, mapping: dict[str, str]) -> None:
            await written(name, mapping)
            second.append(asyncio.create_task(one.invalidate(["m"])))
            await asyncio.sleep(0)
            await other._settle()  # another server has the first's mark already, and stores under it
            redis.hset = written  # type: ignore[method-assign]
            assert one.as_dict()["invalidations_waiting"] == ["m"]

        second: list[asyncio.Task[bool]] = []
        redis.hset = slow  # type: ignore[method-assign]
        await one.invalidate(["m"])
        await put(other)
        assert await second[0]
        assert one.ready("m") and await one.get("m", KEY) is None
        assert one.as_dict()["invalidations_waiting"] == []

    asyncio.run(scenario())


def test_an_invalidation_is_not_forgotten_when_the_marks_cannot_be_read() -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        store = shared(redis)
        await store._settle()
        before = dict(redis.marks[store._prefix + "marks"])
        redis.marks[store._prefix + "marks"] = {}
        read = redis.hgetall

        async def poisoned(name: str) -> dict[bytes, bytes]:
            return {b"m": b"\xff"}

        redis.hgetall = poisoned  # type: ignore[method-assign]
        with pytest.raises(UnicodeDecodeError):
            await store.invalidate(["m"])
        assert store.as_dict()["invalidations_waiting"] == ["m"]
        redis.hgetall = read  # type: ignore[method-assign]
        assert await store._settle()
        assert redis.marks[store._prefix + "marks"]["m"] != before["m"]

    asyncio.run(scenario())


def test_an_invalidation_without_redis_is_made_up_for_before_it_is_used_again() -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        store = shared(redis)
        await store._settle()
        await put(store)
        redis.down = True
        assert not await store.invalidate(["m"])
        assert store.as_dict()["invalidations_waiting"] == ["m"] and not store.ready("m")
        redis.down = False
        assert await store._settle()
        assert store.ready("m") and await store.get("m", KEY) is None

    asyncio.run(scenario())


def test_a_redis_that_lost_everything_gives_nothing_old_back() -> None:
    async def scenario() -> None:
        redis, forgotten = FakeRedis(), list[str]()
        store = shared(redis, forgotten.append)
        await store._settle()
        await put(store)
        forgotten.clear()
        redis.marks.clear()  # the marks only: they were evicted
        await store._settle()
        assert forgotten == ["m"] and await store.get("m", KEY) is None

    asyncio.run(scenario())


def test_two_servers_that_come_at_once_take_the_same_mark() -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        one, other = shared(redis), shared(redis)
        await asyncio.gather(one._settle(), other._settle())
        await put(one)
        assert await other.get("m", KEY) is not None

    asyncio.run(scenario())


def test_an_old_mark_that_comes_back_is_replaced_and_what_lies_under_it_is_no_answer() -> None:
    """As after the death of a master whose replica had not heard of the newest one yet."""

    async def scenario() -> None:
        redis, forgotten = FakeRedis(), list[str]()
        one, other = shared(redis), shared(redis, forgotten.append)
        await one._settle()
        await other._settle()
        await put(one)
        (marks,) = redis.marks
        old = redis.marks[marks]["m"]
        await one.invalidate(["m"])
        await other._settle()
        for store in (one, other):  # whoever looks first puts it right
            forgotten.clear()
            redis.marks[marks]["m"] = old
            assert await store._settle() and redis.marks[marks]["m"] != old
            await one._settle()
            await other._settle()
            assert forgotten == ["m"] and await one.get("m", KEY) is None and await other.get("m", KEY) is None
        await put(one)
        assert await other.get("m", KEY) is not None

    asyncio.run(scenario())


@pytest.mark.parametrize(("left", "seconds"), [(60_000, 60.0), (1_500, 1.5), (-2, 0.0), (-1, None)])
def test_an_answer_has_the_time_that_redis_says_is_left_to_it(left: int, seconds: float | None) -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        store = shared(redis)
        await store._settle()
        await put(store)
        assert redis.left == 60_000
        redis.left = left
        found = await store.get("m", KEY)
        assert found is not None and found.left_seconds == seconds

    asyncio.run(scenario())


def test_no_more_is_read_of_a_value_than_an_answer_can_have() -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        store = shared(redis)
        await store._settle()
        await put(store)
        (name,) = redis.values
        redis.values[name] += bytes(5 << 20)
        read: list[int] = []
        whole = redis.getrange

        async def counted(name: str, start: int, end: int) -> bytes:
            value = await whole(name, start, end)
            read.append(len(value))
            return value

        redis.getrange = counted  # type: ignore[method-assign]
        assert await store.get("m", KEY) is None and store.counts["poisoned"] == 1
        assert read == [(1 << 20) + 1]

    asyncio.run(scenario())


def test_answers_that_wait_to_be_written_are_bounded_in_bytes() -> None:
    async def scenario() -> None:
        redis = FakeRedis()
        store = shared(redis)
        await store._settle()
        redis.stuck = asyncio.Event()
        large = Answer({"y": np.zeros(1 << 19, "<u1")}, 0.25)
        for number in range(40):
            store.put("m", bytes([number]) * 16, large)
        waiting = len(store._writes)
        assert 0 < waiting < 17 and store._writing_bytes <= 8 << 20
        assert store.counts["not_written"] == 40 - waiting
        redis.stuck.set()
        await until(lambda: store.counts["written"] == waiting and not store._writes)
        assert store._writing_bytes == 0
        await put(store)

    asyncio.run(scenario())
