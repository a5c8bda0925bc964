"""The cache with a real Redis: hits across servers, values that somebody altered, a Redis that is killed or stands still."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
import uvloop

from serving.caching import cache_shared
from serving.caching.cache import ResponseCache
from serving.caching.cache_shared import SharedStore
from tests.redis_server import RedisServer
from tests.unit.serving.helpers import PythonRuntime, Server, close, load, serve, until


@pytest.fixture
def server(program: Callable[[str], Path], tmp_path: Path, free_port: Callable[[], int]) -> Iterator[RedisServer]:
    started = RedisServer(program("redis-server"), tmp_path, free_port())
    yield started
    started.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no Redis that does not answer."""
    monkeypatch.setattr(cache_shared, "_CONNECT_SECONDS", 20.0)


@asynccontextmanager
async def inference(url: str, *, timeout_seconds: float = 2.0) -> Any:
    """A server of one version behind this Redis, and its runtime."""
    runtime = PythonRuntime()
    version = load(runtime, deterministic=True)
    found = serve(version)
    cache = found.serving.cache = ResponseCache(SimpleNamespace(max_mb=1, ttl_seconds=60.0))
    cache.follow([version])
    cache.shared = SharedStore(
        url, "test", timeout_seconds=timeout_seconds, ttl_seconds=60.0, models=cache.models, changed=cache.forget
    )
    cache.shared.start()
    try:
        yield found, runtime, cache.shared
    finally:
        await cache.shared.stop()
        close(version)


async def used(*stores: SharedStore) -> None:
    for store in stores:
        await until(lambda store=store: store.ready("m"))


async def by(server: Server, *values: float) -> str | None:
    """Which level answered; the answer must be right."""
    answer = await server.infer(*values)
    assert answer.status == 200, answer.body
    document = answer.json()
    assert document["outputs"][0]["data"] == [2 * value for value in values]
    found: str | None = document["parameters"].get("cache")
    return found


def test_what_one_server_computed_another_answers_and_keeps(server: RedisServer) -> None:
    async def scenario() -> None:
        async with inference(server.url) as (one, _, first), inference(server.url) as (other, runtime, second):
            await used(first, second)
            assert await by(one, 1, 2) is None
            await until(lambda: first.counts["written"] == 1)
            assert [await by(other, 1, 2), await by(other, 1, 2)] == ["l2", "l1"]
            assert runtime.calls == [] and other.serving.cache.counts.saved_seconds > 0
            assert await by(other, 1, 3) is None

    asyncio.run(scenario())


def test_answers_that_are_dropped_on_one_server_are_dropped_on_all(server: RedisServer) -> None:
    async def scenario() -> None:
        async with inference(server.url) as (one, _, first), inference(server.url) as (other, _, second):
            await used(first, second)
            await by(one, 1, 2)
            await until(lambda: first.counts["written"] == 1)
            assert await by(other, 1, 2) == "l2"
            assert await one.serving.cache.invalidate(["m"]) == (1, True)
            await until(lambda: len(other.serving.cache.local) == 0)
            assert await by(other, 1, 2) is None
            await until(lambda: second.counts["written"] == 1)
            assert await by(one, 1, 2) == "l2"

    asyncio.run(scenario())


@pytest.mark.parametrize("damage", [lambda value: value[:-3], lambda value: b"x" + value[1:], lambda value: b"{}"])
def test_a_poisoned_value_is_computed_again_and_put_right(
    server: RedisServer, damage: Callable[[bytes], bytes]
) -> None:
    async def scenario() -> None:
        async with inference(server.url) as (one, _, first), inference(server.url) as (other, runtime, second):
            await used(first, second)
            await by(one, 1, 2)
            await until(lambda: first.counts["written"] == 1)
            with redis.Redis.from_url(server.url) as client:
                (name,) = [key for key in client.keys("modelkeep:cache:test:*") if not key.endswith(b"marks")]
                client.set(name, damage(client.get(name)))
            assert await by(other, 1, 2) is None
            assert len(runtime.calls) == 1 and second.counts["poisoned"] == 1
            await until(lambda: second.counts["written"] == 1)
            one.serving.cache.forget("m")
            assert await by(one, 1, 2) == "l2"

    asyncio.run(scenario())


def test_a_key_that_holds_something_else_is_a_miss_and_put_right(server: RedisServer) -> None:
    async def scenario() -> None:
        async with inference(server.url) as (one, _, first), inference(server.url) as (other, runtime, second):
            await used(first, second)
            await by(one, 1, 2)
            await until(lambda: first.counts["written"] == 1)
            with redis.Redis.from_url(server.url) as client:
                (name,) = [key for key in client.keys("modelkeep:cache:test:*") if not key.endswith(b"marks")]
                client.delete(name)
                client.lpush(name, "a list")
            assert await by(other, 1, 2) is None
            assert (second.counts["poisoned"], second.counts["failed"]) == (1, 0) and len(runtime.calls) == 1
            await until(lambda: second.counts["written"] == 1)
            one.serving.cache.forget("m")
            assert await by(one, 1, 2) == "l2"

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["stopped", "killed"])
def test_a_redis_that_goes_costs_hits_and_no_request(server: RedisServer, fault: str) -> None:
    """Every request is answered, right, and none waits for Redis longer than a request may; once it is known, none waits at all."""

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            one, runtime, store = await stack.enter_async_context(inference(server.url, timeout_seconds=0.5))
            await used(store)
            assert await by(one, 0, 0) is None
            server.kill() if fault == "killed" else server.signal(signal.SIGSTOP)
            waits = []
            for number in range(1, 60):
                started = time.perf_counter()
                assert await by(one, number, 0) is None
                waits.append(time.perf_counter() - started)
            assert not store.usable and store.counts["opened"] == 1
            assert 3 <= store.counts["failed"] <= 8, "the others were not sent there"
            assert len(runtime.calls) == 60 and max(waits) < 20, "nobody hung"
            assert await by(one, 7, 0) == "l1", "the first level goes on"
            server.start() if fault == "killed" else server.signal(signal.SIGCONT)
            await used(store)
            written = store.counts["written"]
            assert await by(one, 100, 0) is None
            await until(lambda: store.counts["written"] > written)
            one.serving.cache.local.drop(("m", "1", "0" * 64))
            assert await by(one, 100, 0) == "l2"

    asyncio.run(scenario())


def test_equal_requests_at_once_ask_redis_once(server: RedisServer) -> None:
    async def scenario() -> None:
        async with inference(server.url) as (one, _, first), inference(server.url) as (other, runtime, second):
            await used(first, second)
            await by(one, 1, 2)
            await until(lambda: first.counts["written"] == 1)
            levels = await asyncio.gather(*(by(other, 1, 2) for _ in range(20)))
            assert sorted(map(str, levels)) == ["l2", *["shared"] * 19]
            assert second.counts["hits"] == 1 and runtime.calls == []
            took = one.serving.cache.counts.computed_seconds
            assert other.serving.cache.counts.saved_seconds == pytest.approx(20 * took)

    asyncio.run(scenario())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("query", ["", "?socket_timeout=1"])
def test_a_stop_at_any_moment_ends(server: RedisServer, query: str, loop: Callable[[], Any]) -> None:
    """redis-py with its own time-out lost the cancellation of some: the store was looked after for ever, and the stop waited."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(stops_at_any_moment(server.url + query))


async def stops_at_any_moment(url: str) -> None:
    for turns in range(300):
        store = SharedStore(
            url, "test", timeout_seconds=2.0, ttl_seconds=60.0, models=lambda: ["m"], changed=lambda model: None
        )
        store.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        looking = store._task
        assert looking is not None
        looking.cancel()
        await asyncio.wait([looking], timeout=30)
        assert looking.cancelled(), f"its cancellation was lost after {turns} turns"
        await store.stop()


def test_a_redis_that_tells_of_its_maintenance_sets_no_time_out_of_its_own() -> None:
    """Redis Enterprise and others do, to those who ask them to: each command had a time-out of redis-py's from then on."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        commands = 0
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while line := await reader.readline():
                words = []
                for _ in range(int(line[1:])):
                    length = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(length + 2))[:-2].upper())
                if words[0] == b"HELLO":
                    writer.write(b"%1\r\n$5\r\nproto\r\n:3\r\n")
                elif words[0] == b"EXISTS":
                    commands += 1
                    writer.write({2: b">3\r\n$9\r\nMIGRATING\r\n:1\r\n:10\r\n"}.get(commands, b"") + b":1\r\n")
                else:
                    writer.write(b"+OK\r\n")
        writer.close()

    async def scenario() -> None:
        fake = await asyncio.start_server(talk, "127.0.0.1", 0)
        client: Any = cache_shared.connect(f"redis://127.0.0.1:{fake.sockets[0].getsockname()[1]}/0", 1.0)
        for _ in range(4):
            assert await client.exists("x") == 1
            [connection] = client.connection_pool._available_connections
            assert connection.socket_timeout is None
        await client.aclose()
        fake.close()
        await fake.wait_closed()

    asyncio.run(scenario())


def test_a_server_without_its_redis_starts_and_answers(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        async with inference(f"redis://127.0.0.1:{free_port()}/0") as (one, runtime, store):
            assert [await by(one, 1, 2), await by(one, 1, 2)] == [None, "l1"]
            await until(lambda: store._breaker._logged is False)
            assert len(runtime.calls) == 1 and not store.ready("m")

    asyncio.run(scenario())
