"""Which node of a cluster has a key, whose view counts, and who is left alone: with nodes that do as they are told."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from redis.crc import key_slot
from redis.exceptions import ClusterDownError, MovedError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from registry.sections import check_redis_url
from serving.caching import cache_cluster
from serving.caching.breaker import FAILURES
from serving.caching.cache_cluster import SLOTS, ClusterClient
from serving.caching.cache_shared import SharedStore
from serving.caching.cache_values import Answer
from tests.unit.serving.test_cache_shared import ANSWER

HALF = SLOTS // 2


class FakeNode:
    """One node; all of a cluster share `values`. `moved`: where it sends who asks it."""

    def __init__(self, cluster: FakeCluster, url: str) -> None:
        self.cluster, self.url = cluster, url
        self.port = int(url.rpartition(":")[2].partition("/")[0])
        self.closed = False

    async def _answer(self) -> None:
        if self.port in self.cluster.down:
            raise RedisConnectionError("no such place")
        if self.port in self.cluster.stuck:
            await asyncio.Event().wait()

    async def execute_command(self, *words: str) -> Any:
        await self._answer()
        state, epoch, slots = self.cluster.views[self.port]
        if words == ("CLUSTER", "INFO"):
            return f"cluster_state:{state}\r\ncluster_current_epoch:{epoch}\r\n".encode()
        assert words == ("CLUSTER", "SLOTS")
        return [[first, last, [b"", port, b"id"]] for first, last, port in slots]

    async def ping(self) -> None:
        await self._answer()

    async def getrange(self, name: str, start: int, end: int) -> bytes:
        await self._answer()
        self.cluster.asked.append(self.port)
        if (error := self.cluster.errors.get(self.port)) is not None:
            raise error
        return self.cluster.values.get(name, b"")[start : end + 1]

    async def pttl(self, name: str) -> int:
        await self._answer()
        return 60_000

    async def set(self, name: str, value: bytes, px: int) -> None:
        await self._answer()
        self.cluster.values[name] = value

    async def hset(self, name: str, mapping: dict[str, str]) -> None:
        await self._answer()
        self.cluster.marks.update(mapping)

    async def hsetnx(self, name: str, field: str, value: str) -> None:
        await self._answer()
        self.cluster.marks.setdefault(field, value)

    async def hgetall(self, name: str) -> dict[bytes, bytes]:
        await self._answer()
        return {field.encode(): value.encode() for field, value in self.cluster.marks.items()}

    async def exists(self, name: str) -> int:
        await self._answer()
        return 1

    async def aclose(self) -> None:
        self.closed = True


class FakeCluster:
    """Two masters, on ports 1 and 2, each with half of the slots."""

    def __init__(self) -> None:
        slots = [(0, HALF - 1, 1), (HALF, SLOTS - 1, 2)]
        self.views: dict[int, tuple[str, int, list[tuple[int, int, int]]]] = {n: ("ok", 1, slots) for n in (1, 2, 3)}
        self.values: dict[str, bytes] = {}
        self.marks: dict[str, str] = {}
        self.down: set[int] = set()
        self.stuck: set[int] = set()
        self.errors: dict[int, Exception] = {}
        self.asked: list[int] = []
        self.opened: list[FakeNode] = []

    def open(self, url: str) -> Any:
        self.opened.append(FakeNode(self, url))
        return self.opened[-1]

    def client(self, url: str = "redis+cluster://:secret@host:1,host:2") -> ClusterClient:
        return ClusterClient(url, open_client=self.open, timeout_seconds=1.0, failures=FAILURES, warm=2)


def name_on(port: int) -> str:
    """A key that the first or the second master has."""
    return next(f"k{number}" for number in itertools.count() if (key_slot(b"k%d" % number) >= HALF) == (port == 2))


def test_a_node_that_fails_is_left_alone_until_it_answers_and_the_others_are_asked_on() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        client = cluster.client()
        assert not client.ready(name_on(1)), "nothing is known yet"
        await client.refresh()
        cluster.down.add(1)
        for _ in range(FAILURES):
            assert client.ready(name_on(1))
            with pytest.raises(RedisConnectionError):
                await client.getrange(name_on(1), 0, 9)
        assert not client.ready(name_on(1)) and client.ready(name_on(2))
        await client.refresh()
        assert not client.ready(name_on(1))
        cluster.down.clear()
        await client.refresh()
        assert client.ready(name_on(1))
        one, two = client.nodes()
        assert (one["name"], one["slots"], one["share"], one["usable"]) == ("host:1", HALF, 0.5, True)
        assert one["failed"] == FAILURES == one["asked"] and two["failed"] == 0

    asyncio.run(scenario())


def test_a_node_that_stands_still_counts_as_one_that_fails_and_holds_up_nobody_who_looks() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        client = cluster.client()
        await client.refresh()
        cluster.stuck.add(1)
        for _ in range(FAILURES):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await client.getrange(name_on(1), 0, 9)
        assert not client.ready(name_on(1))
        await client.refresh()
        assert client.ready(name_on(2)) and await client.getrange(name_on(2), 0, 9) == b""

    asyncio.run(scenario())


def test_connections_to_a_node_are_given_up_together_where_one_of_them_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_cluster, "_VIEW_SECONDS", 0.05)

    async def scenario() -> None:
        cluster, waiting, turns = FakeCluster(), [0], itertools.count()

        async def ping(node: FakeNode) -> None:
            if next(turns) % 2 == 0:
                raise RedisConnectionError("gone")
            waiting[0] += 1
            try:
                await asyncio.Event().wait()
            finally:
                waiting[0] -= 1

        monkeypatch.setattr(FakeNode, "ping", ping)
        client = cluster.client()
        for _ in range(3):
            await client.refresh()
            assert waiting == [0] and not client.ready(name_on(1))
        monkeypatch.undo()
        await client.refresh()
        assert client.ready(name_on(1))

    asyncio.run(scenario())


def test_the_newest_view_counts_and_one_of_a_cluster_that_does_not_work_does_not() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        client = cluster.client("redis+cluster://host:1,host:2,host:3")
        await client.refresh()
        cluster.views[3] = ("ok", 7, [(0, SLOTS - 1, 2)])
        cluster.views[2] = ("fail", 9, [(0, SLOTS - 1, 1)])
        await client.refresh()
        assert [node["slots"] for node in client.nodes()] == [0, SLOTS, 0]
        for port in cluster.views:
            cluster.views[port] = ("fail", 9, [(0, SLOTS - 1, 1)])
        with pytest.raises(RedisConnectionError, match="none of 3 nodes"):
            await client.refresh()
        assert client.ready(name_on(1)), "what was known is still good for who is asked"

    asyncio.run(scenario())


def test_nodes_that_left_are_closed_and_those_of_the_url_are_kept() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        client = cluster.client("redis+cluster://user:secret@host:3/?health_check_interval=7")
        await client.refresh()
        assert {node.url for node in cluster.opened} == {
            f"redis://user:secret@host:{port}/0?health_check_interval=7" for port in (1, 2, 3)
        }
        for port in cluster.views:
            cluster.views[port] = ("ok", 2, [(0, SLOTS - 1, 2)])
        await client.refresh()
        await asyncio.gather(*client._leaving)
        assert {node.port: node.closed for node in cluster.opened} == {1: True, 2: False, 3: False}
        await client.aclose()
        assert all(node.closed for node in cluster.opened) and not client.ready(name_on(1))

    asyncio.run(scenario())


def test_a_key_that_moved_is_asked_for_where_it_is_now_and_from_then_on_at_once() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        client = cluster.client()
        await client.refresh()
        name = name_on(1)
        cluster.values[name] = b"value"
        cluster.errors[1] = MovedError(f"{key_slot(name.encode())} host:2")
        assert await client.getrange(name, 0, 9) == b"value" == await client.getrange(name, 0, 9)
        assert cluster.asked == [1, 2, 2]
        cluster.errors[2] = MovedError(f"{key_slot(name.encode())} host:1")
        with pytest.raises(ClusterDownError):  # two that send us round and round
            await client.getrange(name, 0, 9)

    asyncio.run(scenario())


def test_a_value_of_another_kind_is_the_values_fault_and_not_the_nodes() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        client = cluster.client()
        store = SharedStore(
            "redis+cluster://host:1", "test", timeout_seconds=1.0, ttl_seconds=60.0, models=lambda: {"m"},
            changed=lambda model: None, client=client,
        )  # fmt: skip
        assert await store._settle()
        for error in (ResponseError("WRONGTYPE"), ClusterDownError("CLUSTERDOWN")):
            cluster.errors = {1: error, 2: error}
            for _ in range(2 * FAILURES):
                assert await store.get("m", b"k" * 16) is None
            resting = isinstance(error, ClusterDownError)
            assert store.ready("m", b"k" * 16) is not resting
        assert store.counts["poisoned"] == 2 * FAILURES and store.usable
        assert store.counts["skipped"] == 1
        store.put("m", b"k" * 16, ANSWER)
        assert store.counts["not_written"] == 1

    asyncio.run(scenario())


def test_answers_on_the_other_nodes_are_still_hits_while_one_is_down() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        store = SharedStore(
            "redis+cluster://host:1", "test", timeout_seconds=1.0, ttl_seconds=60.0, models=lambda: {"m"},
            changed=lambda model: None, client=cluster.client(),
        )  # fmt: skip
        await store._settle()
        keys = [number.to_bytes(16, "little") for number in range(40)]
        for key in keys:
            store.put("m", key, Answer({}, 0.5))
        await asyncio.gather(*store._writes)
        marks = (key_slot(store._prefix.encode() + b"marks") >= HALF) + 1
        cluster.down.add(3 - marks)
        found = [await store.get("m", key) for key in keys if store.ready("m", key)]
        assert sum(answer is None for answer in found) == FAILURES and sum(answer is not None for answer in found) > 10
        assert store.usable and await store._settle()
        assert store.as_dict()["nodes"][3 - marks - 1]["usable"] is False

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "url", ["redis+cluster://a:1,b:2", "rediss+cluster://user:p,w@a,[::1]:7/?ssl_cert_reqs=none", "redis://a:1/0"]
)
def test_a_cluster_is_named_by_some_of_its_nodes(url: str) -> None:
    assert check_redis_url(url) == url


@pytest.mark.parametrize("url", ["redis+cluster://a:1,", "redis+cluster://a:1,b:x", "redis://a:1,b:2"])
def test_a_list_of_nodes_with_a_fault_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="redis"):
        check_redis_url(url)
