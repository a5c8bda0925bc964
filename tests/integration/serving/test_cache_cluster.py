"""The cache with a real Redis Cluster, three masters with a replica each: hits across servers, masters killed and stopped, all gone."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import uvloop
from redis.crc import key_slot

from serving.caching import cache_shared
from serving.caching.breaker import FAILURES
from serving.caching.cache import ResponseCache
from serving.caching.cache_cluster import ClusterClient
from serving.caching.cache_shared import SharedStore
from tests.e2e.records import record
from tests.integration.serving.test_cache_redis import stops_at_any_moment
from tests.redis_server import RedisCluster, wait
from tests.unit.serving.helpers import PythonRuntime, Server, close, load, serve, until

OWNER = ("m", "1", "0" * 64)
NUMBERS = itertools.count(1)
"""Each input once, whatever test asks for it."""


@pytest.fixture(scope="module")
def six(program: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    found = RedisCluster(program("redis-server"), folder, iter(free_ports(12)).__next__, replicas=1)
    yield found
    found.close()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, no two the same."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@pytest.fixture
def cluster(six: RedisCluster) -> RedisCluster:
    """The cluster, every node of which runs and is in step."""
    six.heal()
    return six


class Box(SimpleNamespace):
    """A server of one version over the cluster."""

    server: Server
    runtime: PythonRuntime
    store: SharedStore

    async def ask(self, number: float) -> str | None:
        """Which level answered; the answer must be right."""
        answer = await self.server.infer(number, 0)
        assert answer.status == 200, answer.body
        document = answer.json()
        assert document["outputs"][0]["data"] == [2 * number, 0]
        found: str | None = document["parameters"].get("cache")
        return found

    def forget_here(self) -> None:
        """The answers in this process, and nowhere else."""
        cache = self.server.serving.cache
        assert cache is not None
        cache.local.drop(OWNER)


@asynccontextmanager
async def box(url: str) -> AsyncIterator[Box]:
    runtime = PythonRuntime()
    version = load(runtime, deterministic=True)
    server = serve(version)
    cache = server.serving.cache = ResponseCache(SimpleNamespace(max_mb=1, ttl_seconds=600.0))
    cache.follow([version])
    store = cache.shared = SharedStore(
        url, "test", timeout_seconds=0.5, ttl_seconds=600.0, models=cache.models, changed=cache.forget
    )
    store.start()
    try:
        yield Box(server=server, runtime=runtime, store=store)
    finally:
        await store.stop()
        close(version)


async def shared_on(one: Box, other: Box, slots: range | None = None) -> float:
    """A number that `one` computed and `other` had from the cluster (from a node with these slots); the number.

    Tried with new numbers until it is so: a busy machine may be slower than a request waits for Redis.
    """
    for number in NUMBERS:
        before = one.store.counts["written"]
        if not (one.store.ready("m") and other.store.ready("m")):
            await asyncio.sleep(0.02)
            continue
        stored = sum(one.store.counts[name] for name in ("written", "not_written", "failed"))
        await one.ask(number)
        await until(
            lambda stored=stored: sum(one.store.counts[name] for name in ("written", "not_written", "failed")) > stored
        )
        if one.store.counts["written"] == before or (slots is not None and slot_of(one, number) not in slots):
            continue
        if await other.ask(number) == "l2":
            return number
    raise AssertionError("numbers do not end")


def slot_of(box: Box, number: float) -> int:
    """Of the answer to a number. The mark must be known."""
    return int(key_slot(name_of(box, number).encode()))


def name_of(box: Box, number: float) -> str:
    cache = box.server.serving.cache
    assert cache is not None
    key = cache._answers[OWNER]._key({"x": np.array([[number, 0]], np.float32)}, None)
    return box.store._name(box.store._marks["m"], key)


def slots_of(cluster: RedisCluster, number: int) -> range:
    """The first run of slots of a master."""
    port = cluster.nodes[number].port
    for first, last, master, *_ in cluster.clients[number].execute_command("CLUSTER", "SLOTS"):
        if master[1] == port:
            return range(first, last + 1)
    raise AssertionError(f"node {number} has no slots")


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def connections(cluster: RedisCluster) -> int:
    """Of this process to the nodes, whatever else it has open."""
    ports = {node.port for node in cluster.nodes}
    return sum(1 for one in psutil.Process().net_connections("tcp") if one.raddr and one.raddr.port in ports)


@asynccontextmanager
async def clients(*boxes: Box) -> AsyncIterator[list[str | None]]:
    """Some that ask all the time, each a number that others ask for too; how each was answered, all of them right."""
    levels: list[str | None] = []
    stop = asyncio.Event()

    async def client(box: Box, seed: int) -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            levels.append(await box.ask(1_000_000 + (seed + turn) // 3))
            if turn % 50 == 0:
                box.forget_here()
            await asyncio.sleep(0.005)

    tasks = [asyncio.create_task(client(box, 7 * seed)) for box in boxes for seed in range(4)]
    try:
        yield levels
    finally:
        stop.set()
        await asyncio.gather(*tasks)  # raises the first that was not answered, or wrongly


def test_two_servers_share_answers_on_all_masters_and_one_node_of_their_list_may_be_down(
    cluster: RedisCluster, free_port: Callable[[], int]
) -> None:
    url = f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster.nodes[4].port}"

    async def scenario() -> None:
        async with box(url) as one, box(cluster.url_of(0, 1, 2)) as other:
            for master in cluster.masters_now():
                await shared_on(one, other, slots_of(cluster, master))
            number = await shared_on(one, other)
            assert other.runtime.calls == [] or await other.ask(number) == "l1"
            await until(lambda: len(other.store.as_dict()["nodes"]) == 6)
            nodes = {node["name"]: node for node in other.store.as_dict()["nodes"]}
            masters = [node for node in nodes.values() if node["role"] == "master"]
            assert sorted(node["role"] for node in nodes.values()) == ["master"] * 3 + ["replica"] * 3
            assert sum(node["slots"] for node in masters) == 16384 and all(node["asked"] for node in masters)
            assert {node["replica_of"] for node in nodes.values() if node["role"] == "replica"} <= {*nodes}
            assert await one.server.serving.cache.invalidate(["m"]) and await one.ask(number) is None  # type: ignore[union-attr]
            await until(lambda: other.store._marks.get("m") == one.store._marks["m"])
            assert name_of(one, number) == name_of(other, number)

    asyncio.run(scenario())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_stop_at_any_moment_ends(cluster: RedisCluster, loop: Callable[[], Any]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(stops_at_any_moment(cluster.url_of(0, 1, 2)))


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_master_that_goes_fails_no_request_and_its_replica_brings_the_hits_back(
    cluster: RedisCluster, fault: str
) -> None:
    before = set(threading.enumerate())

    async def scenario() -> None:
        async with box(cluster.url_of(0, 1, 2)) as one, box(cluster.url_of(3, 4, 5)) as other:
            await shared_on(one, other)
            # Where the marks are: without it nobody knows what was invalidated, so nobody may use the others either.
            marks = int(key_slot((one.store._prefix + "marks").encode()))
            (gone,) = (node for node in cluster.masters_now() if marks in slots_of(cluster, node))
            slots = slots_of(cluster, gone)
            async with clients(one, other) as levels:
                await until(lambda: "l2" in levels)
                if fault == "killed":
                    cluster.nodes[gone].kill()
                else:
                    cluster.nodes[gone].signal(signal.SIGSTOP)
                await until(lambda: not one.store.usable and not other.store.usable)
                answered = len(levels)
                await until(lambda: len(levels) > answered + 20)
                await asyncio.to_thread(wait, "its replica takes over", lambda: took_over(cluster, gone))
                await shared_on(one, other, slots)
                await shared_on(other, one, slots)
                cluster.revive()
                await asyncio.to_thread(cluster.wait_until_whole)
                assert gone not in cluster.masters_now(), "it came back as a replica"
                await shared_on(one, other, slots)
            await until(lambda: not any(node.client.connection_pool._in_use_connections for node in nodes_of(one)))

    asyncio.run(scenario())
    for client in cluster.clients:
        client.connection_pool.disconnect()
    wait("every connection to be closed", lambda: connections(cluster) == 0)
    wait("every thread to end", lambda: not set(threading.enumerate()) - before)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_masters_that_go_one_after_the_other_fail_no_request_and_leave_nothing_behind(cluster: RedisCluster) -> None:
    rounds = int(os.environ.get("MODELKEEP_TEST_FAILOVERS", "50"))
    draw = random.Random(rounds)
    began = time.monotonic()
    levels: Counter[str | None] = Counter()
    back: list[float] = []
    opened: list[int] = []

    async def scenario() -> None:
        async with box(cluster.url_of(0, 1, 2)) as one, box(cluster.url_of(3, 4, 5)) as other:
            await shared_on(one, other)
            async with clients(one, other) as found:
                for turn in range(rounds):
                    gone = draw.choice(cluster.masters_now())
                    slots = slots_of(cluster, gone)
                    if turn % 2:
                        cluster.nodes[gone].signal(signal.SIGSTOP)
                    else:
                        cluster.nodes[gone].kill()
                    away = time.monotonic()
                    await asyncio.to_thread(wait, "its replica takes over", lambda gone=gone: took_over(cluster, gone))
                    await shared_on(one, other, slots)
                    back.append(time.monotonic() - away)
                    cluster.revive()
                    await asyncio.to_thread(cluster.wait_until_whole)
                    opened.append(descriptors())
            levels.update(found)
            await until(lambda: not any(node.client.connection_pool._in_use_connections for node in nodes_of(one)))

    asyncio.run(scenario())
    third = len(opened) // 3
    grown = max(opened[-third:]) - max(opened[:third])
    assert sum(levels.values()) > 100 * rounds and levels["l2"]
    assert grown <= 2 * len(cluster.nodes), opened
    took = round(time.monotonic() - began, 1)
    waits = sorted(back)
    figures = (
        rounds,
        sum(levels.values()),
        levels["l2"],
        0,
        f"{waits[len(waits) // 2]:.1f}",
        f"{waits[-1]:.1f}",
        grown,
        took,
    )
    record("| date | commit | failovers |", figures)


def took_over(cluster: RedisCluster, gone: int) -> bool:
    """Whether the others serve every slot without it."""
    others = [number for number in range(len(cluster.nodes)) if number != gone]
    masters = [number for number in others if cluster.clients[number].info("replication")["role"] == "master"]
    return len(masters) == cluster.masters and all(
        cluster.clients[number].cluster("INFO")["cluster_state"] == "ok" for number in others
    )


def nodes_of(box: Box) -> list[Any]:
    client = box.store._client
    assert isinstance(client, ClusterClient)
    return list(client._nodes.values())


def test_a_cluster_that_is_gone_as_a_whole_costs_hits_only_and_is_used_again_when_it_is_back(
    cluster: RedisCluster,
) -> None:
    async def scenario() -> None:
        async with box(cluster.url) as one, box(cluster.url) as other:
            await shared_on(one, other)
            async with clients(one, other) as levels:
                for node in cluster.nodes:
                    node.kill()
                await until(lambda: not one.store.usable and not other.store.usable)
                answered = len(levels)
                await until(lambda: len(levels) > answered + 50)
                assert {*levels[answered + 20 :]} <= {None, "l1", "shared"}
                assert not await one.store.invalidate(["m"]), "nobody can be told"
                cluster.revive()
                await asyncio.to_thread(cluster.wait_until_whole)
                await shared_on(one, other)
                assert one.store.as_dict()["invalidations_waiting"] == []

    asyncio.run(scenario())


def test_a_slot_that_moves_to_another_master_is_found_on_the_way_and_there(cluster: RedisCluster) -> None:
    """By redirections alone: nobody looks for the nodes again in between."""
    source, target = cluster.masters_now()[:2]
    slot = slots_of(cluster, source)[-1]
    name = next(f"name-{number}" for number in itertools.count() if key_slot(b"name-%d" % number) == slot)
    ids = {number: cluster.clients[number].execute_command("CLUSTER", "MYID").decode() for number in (source, target)}

    async def scenario() -> None:
        client = ClusterClient(
            cluster.url, open_client=cache_shared._open, timeout_seconds=1.0, failures=FAILURES, warm=1
        )
        await client.refresh()
        await client.set(name, b"value", px=600_000)
        cluster.clients[target].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        cluster.clients[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        cluster.clients[source].execute_command("MIGRATE", "127.0.0.1", cluster.nodes[target].port, name, 0, 5000)
        assert await client.getrange(name, 0, 10) == b"value", "on the way: ASK"
        before = client._slots[slot]
        for number in (target, source, *set(cluster.masters_now()) - {source, target}):
            cluster.clients[number].execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        assert await client.getrange(name, 0, 10) == b"value", "there: MOVED"
        after = client._slots[slot]
        assert before is not None and after is not None and after.address[1] == cluster.nodes[target].port
        assert before is not after and client.ready(name)
        await client.refresh()
        assert await client.getrange(name, 0, 10) == b"value"
        await client.aclose()

    asyncio.run(scenario())
