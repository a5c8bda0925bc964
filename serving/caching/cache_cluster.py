"""A Redis Cluster as the cache asks it: which node has a key, and which nodes to leave alone. What a key means is not known here.

redis-py's own cluster client looks for the nodes again inside of the request that failed, and drops every connection when that
request has no time for it. Here the nodes are looked for beside the requests (`refresh`), and a node that fails is left
alone until it has answered in time: the answers on the others go on being hits.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from registry.redaction import redact
from serving.process.tasks import all_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

SLOTS = 16384
Address = tuple[str, int]
Range = tuple[int, int, tuple[Address, ...]]
"""(first slot, last slot, addresses: the master's first, then its replicas')."""

_VIEW_SECONDS = 0.5
_GRACE_SECONDS = 0.1
"""Once one node has told its view, the others have so long: whoever was cut off for a while tells an old one."""
_ASKED_FOR_VIEWS = 8
_PORT = 6379
_REDIRECTS = 3


class Node:
    """One server of the cluster. `failures` are those in a row; from `limit` on it is left alone."""

    __slots__ = ("address", "client", "counts", "failures", "limit")

    def __init__(self, address: Address, client: Redis, limit: int) -> None:
        self.address = address
        self.client = client
        self.limit = limit
        self.failures = limit
        """Not asked before its first answer."""
        self.counts = {"asked": 0, "written": 0, "failed": 0}

    @property
    def name(self) -> str:
        return f"{self.address[0]}:{self.address[1]}"

    @property
    def usable(self) -> bool:
        return self.failures < self.limit

    def failed(self) -> None:
        self.failures += 1
        self.counts["failed"] += 1


class ClusterClient:
    """Used on one event loop. `refresh` must have been called before anything else, and then every second or so.

    `open_client` makes a client for one node's URL. `timeout_seconds` is what a node must answer within to be used;
    `warm` is how many connections are opened to it before.
    """

    def __init__(
        self, url: str, *, open_client: Callable[[str], Redis], timeout_seconds: float, failures: int, warm: int
    ) -> None:
        scheme, _, rest = url.partition("://")
        place, _, query = rest.partition("?")
        user, at, hosts = place.partition("/")[0].rpartition("@")
        self._scheme, self._user, self._query = scheme.removesuffix("+cluster"), user + at, query
        self._open_client = open_client
        self._timeout_seconds = timeout_seconds
        self._failures = failures
        self._warm = warm
        self._seeds = [_address(host) for host in hosts.split(",") if host]
        self._nodes: dict[Address, Node] = {}
        self._ranges: tuple[Range, ...] = ()
        self._slots: list[Node | None] = [None] * SLOTS
        self._moved = False
        """Whether `_slots` has what nodes said since `_ranges` were read."""
        self._leaving: set[asyncio.Task[None]] = set()

        from redis.crc import key_slot
        from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, ResponseError

        self._key_slot = key_slot
        self._moved_error, self._ask_error, self._down_error = MovedError, AskError, ClusterDownError
        self._errors: tuple[type[BaseException], ...] = (RedisError, OSError, TimeoutError)
        self._answered: type[Exception] = ResponseError

    # What the shared store asks of a Redis

    async def getrange(self, name: str, start: int, end: int) -> Any:
        return await self._call(name, "asked", lambda client: client.getrange(name, start, end))

    async def pttl(self, name: str) -> Any:
        return await self._call(name, None, lambda client: client.pttl(name))

    async def set(self, name: str, value: bytes, px: int) -> Any:
        return await self._call(name, "written", lambda client: client.set(name, value, px=px))

    async def hset(self, name: str, mapping: dict[Any, Any]) -> Any:
        return await self._call(name, None, lambda client: client.hset(name, mapping=mapping))

    async def hsetnx(self, name: str, field: str, value: str) -> Any:
        return await self._call(name, None, lambda client: client.hsetnx(name, field, value))

    async def hgetall(self, name: str) -> Any:
        return await self._call(name, None, lambda client: client.hgetall(name))

    async def eval(self, script: str, keys: int, name: str, *arguments: str) -> Any:
        """A script on one key."""
        return await self._call(name, "written", lambda client: client.eval(script, keys, name, *arguments))

    async def exists(self, name: str) -> Any:
        return await self._call(name, None, lambda client: client.exists(name))

    async def aclose(self) -> None:
        nodes, self._nodes = tuple(self._nodes.values()), {}
        self._slots, self._ranges = [None] * SLOTS, ()
        await asyncio.gather(*self._leaving, *(self._close(node) for node in nodes))

    def ready(self, name: str) -> bool:
        """Whether the node of a key is one that requests ask."""
        node = self._slots[self._key_slot(name.encode())]
        return node is not None and node.usable

    def nodes(self) -> list[dict[str, Any]]:
        """JSON-able, masters and replicas in the order of their addresses: slots, and what was asked of each."""
        slots: dict[Address, int] = {}
        replicas: dict[Address, Address] = {}
        for first, last, (master, *others) in self._ranges:
            slots[master] = slots.get(master, 0) + last - first + 1
            replicas.update(dict.fromkeys(others, master))
        return [
            {
                "name": node.name,
                "role": "master" if address in slots else "replica" if address in replicas else "unknown",
                "replica_of": "{}:{}".format(*replicas[address]) if address in replicas else None,
                "slots": slots.get(address, 0),
                "share": round(slots.get(address, 0) / SLOTS, 6),
                "usable": node.usable,
                **node.counts,
            }
            for address, node in sorted(self._nodes.items())
        ]

    # Who has what

    async def refresh(self) -> None:
        """Ask several nodes who has which slots, take the newest view, and try those that are left alone.

        Raises redis' ConnectionError where no node is in a cluster that works.
        """
        known = list(self._nodes)
        asked = {*self._seeds, *random.sample(known, min(len(known), _ASKED_FOR_VIEWS))}
        views = await self._views([self._node(address) for address in asked])
        if not views:
            from redis.exceptions import ConnectionError as RedisConnectionError

            raise RedisConnectionError(f"none of {len(asked)} nodes knows a cluster that works")
        _, ranges = max(views)
        if ranges != self._ranges or self._moved:
            self._follow(ranges)
        masters = {self._node(addresses[0]) for _, _, addresses in self._ranges}
        await all_of(self._try(node) for node in masters if not node.usable)

    async def _views(self, nodes: Iterable[Node]) -> list[tuple[int, tuple[Range, ...]]]:
        """(epoch, ranges) of those whose cluster works, from whoever answers first and all that answer just after."""
        pending = {asyncio.create_task(self._view(node)) for node in nodes}
        views: list[tuple[int, tuple[Range, ...]]] = []
        deadline = time.monotonic() + _VIEW_SECONDS
        try:
            while pending and (left := deadline - time.monotonic()) > 0:
                done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                found = [view for task in done if (view := task.result()) is not None]
                if found and not views:
                    deadline = time.monotonic() + _GRACE_SECONDS
                views += found
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return views

    async def _view(self, node: Node) -> tuple[int, tuple[Range, ...]] | None:
        client: Any = node.client
        try:
            said = await client.execute_command("CLUSTER", "INFO")
            slots = await client.execute_command("CLUSTER", "SLOTS")
        except self._errors:
            return None  # whoever tells nothing is not heard; nobody telling anything is an error of `refresh`
        info = dict(line.split(":", 1) for line in _text(said).split() if ":" in line)
        if info.get("cluster_state") != "ok":
            return None
        ranges = tuple(
            sorted(
                (int(first), int(last), tuple(_announced(place, node.address[0]) for place in places))
                for first, last, *places in slots
            )
        )
        return int(info["cluster_current_epoch"]), ranges

    def _follow(self, ranges: tuple[Range, ...]) -> None:
        self._ranges, self._moved = ranges, False
        self._slots = [None] * SLOTS
        there: set[Address] = set()
        for first, last, addresses in ranges:
            there.update(addresses)
            nodes = [self._node(address) for address in addresses]
            self._slots[first : last + 1] = [nodes[0]] * (last - first + 1)
        for address in [address for address in self._nodes if address not in there and address not in self._seeds]:
            task = asyncio.create_task(self._close(self._nodes.pop(address)))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _try(self, node: Node) -> None:
        """Open connections to a node, which requests have no time for, and use it if it then answers in time."""
        try:
            async with asyncio.timeout(_VIEW_SECONDS):
                await all_of(_ping(node.client) for _ in range(self._warm))
                started = time.monotonic()
                await _ping(node.client)
                if time.monotonic() - started <= self._timeout_seconds:
                    node.failures = 0
        except self._errors:
            node.failures += 1

    def _node(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            host, port = address
            shown = f"[{host}]" if ":" in host else host
            query = f"?{self._query}" if self._query else ""
            client = self._open_client(f"{self._scheme}://{self._user}{shown}:{port}/0{query}")
            node = self._nodes[address] = Node(address, client, self._failures)
        return node

    async def _close(self, node: Node) -> None:
        try:
            async with asyncio.timeout(_VIEW_SECONDS):
                await node.client.aclose()
        except self._errors:
            node.failures += 1  # a connection that cannot be closed is broken already

    async def _call(self, name: str, what: str | None, command: Callable[[Any], Any]) -> Any:
        """A command on the node of a key, and on the one that it names where the key has moved; counted as `what`.

        Raises redis' errors.
        """
        slot = self._key_slot(name.encode())
        node = self._slots[slot]
        asking = False
        for _ in range(_REDIRECTS):
            if node is None:
                break
            if what is not None:
                node.counts[what] += 1
            try:
                answer = await (_asking(node.client, command) if asking else command(node.client))
            except self._moved_error as error:
                node = self._slots[slot] = self._redirected(error, node)
                self._moved, asking = True, False
                continue
            except self._ask_error as error:
                node, asking = self._redirected(error, node), True
                self._moved = True
                continue
            except asyncio.CancelledError:  # the caller's time is over
                node.failed()
                raise
            except self._errors as error:
                if not isinstance(error, self._answered) or isinstance(error, self._down_error):
                    node.failed()
                raise
            node.failures = 0
            return answer
        raise self._down_error(f"no node has the slot {slot}: {redact(name)}")

    def _redirected(self, error: Any, node: Node) -> Node:
        return self._node((error.host or node.address[0], int(error.port)))


async def _asking(client: Any, command: Callable[[Any], Any]) -> Any:
    """On one connection, as a key that is on its way to another node wants it."""
    pipeline = client.pipeline(transaction=False)
    pipeline.execute_command("ASKING")
    command(pipeline)
    return (await pipeline.execute())[1]


async def _ping(client: Any) -> None:
    await client.ping()


def _address(host: str) -> Address:
    """Of one host of the URL. Raises ValueError where its port is no number."""
    parts = urlsplit(f"//{host}")
    return parts.hostname or host, parts.port or _PORT


def _announced(place: Any, asked: str) -> Address:
    """A node as CLUSTER SLOTS names it: without an address of its own it has that of whom we asked."""
    host = "" if place[0] is None else _text(place[0])
    return (host if host not in ("", "?") else asked), int(place[1])


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
