"""Queues come back with all that they held, into a Redis of any settings; what could be lost is said."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from registry.errors import ArtifactError, ConflictError, NotFoundError, StorageError, UnavailableError, UsageError
from registry.settings import Settings
from tasks.backup import keyvalues, queues, throwaway
from tasks.backup.components import Target
from tasks.backup.queues import QueuesPart
from tests.redis_server import RedisCluster
from tests.unit.tasks.backup.shelf import Shelf, taken

Program = Callable[[str], Path]
PATTERNS = ("jobs*", "critical:*", "alone")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, program: Program) -> Iterator[tuple[str, str]]:
    """Two Redis servers: the one that is backed up, and the one that takes what comes back."""
    program("redis-server")
    with (
        throwaway.redis(tmp_path_factory.mktemp("from")) as first,
        throwaway.redis(tmp_path_factory.mktemp("to"), options=("--appendonly", "yes")) as second,
    ):
        yield first.url, second.url


@pytest.fixture
def live(servers: tuple[str, str]) -> Iterator[Any]:
    client = redis.Redis.from_url(servers[0])
    client.flushall()
    fill(client)
    yield client
    client.close()


@pytest.fixture
def other(servers: tuple[str, str]) -> Iterator[Any]:
    client = redis.Redis.from_url(servers[1])
    client.flushall()
    yield client
    client.close()


def fill(client: Any) -> None:
    client.rpush("jobs", *[f"job {number}" for number in range(500)], b"\x00\xff")
    client.hset("jobs:state", mapping={f"f{number}": number for number in range(300)})
    client.sadd("jobs:done", *range(100))
    client.zadd("jobs:due", {"a": 1.5, "b": -0.1, "c": float("inf")})
    for number in range(20):
        client.xadd("jobs:events", {"n": number, "what": b"\xfe"})
    client.xgroup_create("jobs:events", "workers", id="0")
    client.xreadgroup("workers", "one", {"jobs:events": ">"}, count=5)
    client.set("critical:a", b"\x00binary\xff", px=600_000)
    client.set(b"critical:\xff\xfe", "odd")
    client.set("alone", "by its name")
    client.set("other", "not asked for")


def part(url: str, *patterns: str) -> QueuesPart:
    return QueuesPart(url, patterns or PATTERNS)


def held(client: Any, *patterns: str) -> dict[bytes, Any]:
    names = keyvalues.find(client, patterns or PATTERNS)
    found = [value for value in keyvalues.read(client, names, 3) if value is not None]
    return {value.name: (value.type, value.length, value.sha256) for value in found}


def test_all_kinds_of_keys_come_back_into_a_redis_with_appendonly(
    servers: tuple[str, str], live: Any, other: Any, tmp_path: Path
) -> None:
    before = held(live)
    shelf = taken(part(servers[0]))
    assert shelf.captured.snapshot["consistent"] is True
    assert shelf.record.facts["types"] == {"hash": 1, "list": 1, "set": 1, "stream": 1, "string": 3, "zset": 1}
    assert shelf.warnings == []
    found = queues.verify(shelf, tmp_path)
    assert (found.differences, found.unverifiable) == ((), None)
    done = queues.restore(shelf, Target(url=servers[1]))
    assert done["written"] == 8
    assert held(other) == before == held(live)
    assert 0 < other.pttl("critical:a") <= 600_000
    assert other.pttl("alone") == -1
    assert not other.exists("other")
    pending = other.xpending("jobs:events", "workers")
    assert pending["pending"] == 5
    assert other.info("persistence")["aof_enabled"] == 1


def test_an_entry_whose_time_has_come_stays_away_and_is_still_verified(
    servers: tuple[str, str], live: Any, other: Any, tmp_path: Path
) -> None:
    live.pexpire("critical:a", 100_000)
    shelf = taken(part(servers[0]))
    lines = [json.loads(line) for line in b"".join(shelf.open(stream(shelf))).splitlines()]
    for line in lines:
        line["expires_at_ms"] = line["expires_at_ms"] and int(time.time() * 1000) - 1
    shelf.rewrite(queues.FILE, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    assert queues.verify(shelf, tmp_path).differences == ()
    done = queues.restore(shelf, Target(url=servers[1]))
    assert (done["expired"], done["written"]) == (1, 7)
    assert not other.exists("critical:a")


def test_a_key_that_stands_there_is_refused_before_anything_is_written(
    servers: tuple[str, str], live: Any, other: Any
) -> None:
    shelf = taken(part(servers[0]))
    other.rpush("jobs", "mine")
    assert queues.occupied(Target(url=servers[1])) == "1 key"
    with pytest.raises(ConflictError, match="jobs"):
        queues.restore(shelf, Target(url=servers[1]))
    assert other.keys() == [b"jobs"]
    queues.restore(shelf, Target(url=servers[1], force=True))
    assert held(other) == held(live)


def test_an_interrupted_restore_goes_on(
    servers: tuple[str, str], live: Any, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, real, left = taken(part(servers[0])), keyvalues.write, 3

    def killed(*rest: Any, **more: Any) -> Any:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return real(*rest, **more)

    monkeypatch.setattr(keyvalues, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        queues.restore(shelf, Target(url=servers[1]))
    monkeypatch.undo()
    done = queues.restore(shelf, Target(url=servers[1]))
    assert (done["already_there"], done["written"]) == (3, 5)
    assert held(other) == held(live)


def test_some_keys_come_back_alone(servers: tuple[str, str], live: Any, other: Any) -> None:
    shelf = taken(part(servers[0]))
    queues.restore(shelf, Target(url=servers[1], only=("critical:*", "alone")))
    assert len(other.keys()) == 3
    with pytest.raises(NotFoundError, match="no key in this backup"):
        queues.restore(shelf, Target(url=servers[1], only=("nobody",)))


@pytest.mark.parametrize(("limit", "value"), [("ONE_MOMENT_BYTES", 8000), ("ONE_MOMENT_KEYS", 3)])
def test_more_than_one_transaction_takes_is_said_to_be_of_no_one_moment(
    limit: str, value: int, servers: tuple[str, str], live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, limit, value)
    shelf = taken(part(servers[0]))
    assert shelf.captured.snapshot["consistent"] is False
    assert "transactions" in shelf.captured.snapshot["why"]
    assert queues.verify(shelf, tmp_path).differences == ()


def test_keys_that_are_consumed_or_evicted_meanwhile_are_named(
    servers: tuple[str, str], live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = keyvalues.batches

    def late(client: Any, names: list[bytes], *most: int) -> Any:
        found = real(client, names, *most)
        live.delete("alone")
        return found

    monkeypatch.setattr(keyvalues, "batches", late)
    live.config_set("maxmemory-policy", "allkeys-lru")
    try:
        shelf = taken(part(servers[0]))
    finally:
        live.config_set("maxmemory-policy", "noeviction")
    assert "throws keys away" in shelf.warnings[0]
    assert shelf.warnings[1].startswith("alone was there when the keys were listed")
    assert shelf.record.facts["keys"] == 7


def test_a_key_that_takes_another_type_meanwhile_is_read_again(
    servers: tuple[str, str], live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, once = keyvalues._types, True

    def late(client: Any, names: list[bytes]) -> Any:
        nonlocal once
        found = real(client, names)
        if once and b"alone" in names:
            once = False
            live.delete("alone")
            live.rpush("alone", "a list by now")
        return found

    monkeypatch.setattr(keyvalues, "_types", late)
    shelf = taken(part(servers[0]))
    assert shelf.record.facts["types"]["list"] == 2
    assert queues.verify(shelf, tmp_path).differences == ()


def test_a_redis_that_dies_fails_the_component(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("redis-server")
    with throwaway.redis(tmp_path) as server:
        client = redis.Redis.from_url(server.url)
        fill(client)
        client.close()
        real = keyvalues.batches

        def killed(*rest: Any) -> Any:
            found = real(*rest)
            server.process.kill()
            server.process.wait(30)
            return found

        monkeypatch.setattr(keyvalues, "batches", killed)
        with pytest.raises(UnavailableError, match="does not answer as it should"):
            taken(part(server.url))
        with pytest.raises(UnavailableError):
            queues.occupied(Target(url=server.url))


def test_a_full_redis_says_so(servers: tuple[str, str], live: Any, other: Any) -> None:
    shelf = taken(part(servers[0]))
    other.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(StorageError, match="is full"):
            queues.restore(shelf, Target(url=servers[1]))
    finally:
        other.config_set("maxmemory", "0")


def test_a_password_is_in_no_message(servers: tuple[str, str]) -> None:
    with pytest.raises(UnavailableError) as caught:
        taken(part("redis://app:hunter2@127.0.0.1:1/0"))
    assert "hunter2" not in str(caught.value)


def lines_of(shelf: Shelf) -> list[bytes]:
    return b"".join(shelf.open(stream(shelf))).splitlines(keepends=True)


def stream(shelf: Shelf) -> Any:
    return shelf.entry(queues.FILE).stream


DAMAGES: dict[str, Callable[[Shelf], None]] = {
    "a flipped bit": lambda shelf: shelf.flip(queues.FILE),
    "a missing object": lambda shelf: shelf.objects.clear(),
    "a key less": lambda shelf: shelf.rewrite(queues.FILE, b"".join(lines_of(shelf)[1:])),
    "cut at the end of a key": lambda shelf: shelf.rewrite(queues.FILE, b"".join(lines_of(shelf)[:-1])),
    "cut in the middle of a key": lambda shelf: shelf.rewrite(queues.FILE, b"".join(lines_of(shelf))[:-40]),
    "no keys": lambda shelf: shelf.rewrite(queues.FILE, b""),
    "a key twice": lambda shelf: shelf.rewrite(queues.FILE, b"".join([*lines_of(shelf), lines_of(shelf)[0]])),
    "the content of another key": lambda shelf: shelf.rewrite(queues.FILE, swapped(lines_of(shelf))),
    "another count in the manifest": lambda shelf: shelf.change(keys=9),
    "another hash in the manifest": lambda shelf: shelf.change(sha256="0" * 64),
    "no entry": lambda shelf: shelf.lines.clear(),
}  # fmt: skip


def swapped(lines: list[bytes]) -> bytes:
    first, second = json.loads(lines[0]), json.loads(lines[1])
    first["dump"], second["dump"] = second["dump"], first["dump"]
    return b"".join([*(json.dumps(one).encode() + b"\n" for one in (first, second)), *lines[2:]])


@pytest.fixture(scope="module")
def captured(servers: tuple[str, str]) -> Shelf:
    client = redis.Redis.from_url(servers[0])
    client.flushall()
    fill(client)
    client.close()
    return taken(part(servers[0]))


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "a key twice"])
def test_a_damaged_backup_is_never_called_verified(damage: str, captured: Shelf, tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.objects, shelf.lines, shelf.record = dict(captured.objects), list(captured.lines), captured.record
    DAMAGES[damage](shelf)
    found = queues.verify(shelf, tmp_path)
    assert found.differences
    assert found.unverifiable is None


def test_a_cluster_goes_into_a_single_redis_and_back(
    other: Any, servers: tuple[str, str], tmp_path: Path, program: Program, free_port: Callable[[], int]
) -> None:
    cluster = RedisCluster(program("redis-server"), tmp_path, free_port)
    try:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in cluster.nodes)
        url = f"redis+cluster://{hosts}"
        with keyvalues.connected(url) as client:
            fill(client)
            before = held(client)
            shelf = taken(part(url))
            assert shelf.captured.snapshot["consistent"] is False
            queues.restore(shelf, Target(url=servers[1]))
            assert held(other) == before
            client.flushall(target_nodes=client.PRIMARIES)
            assert queues.restore(shelf, Target(url=url))["written"] == 8
            assert held(client) == before
            assert queues.occupied(Target(url=url)) == "8 keys"
    finally:
        cluster.close()


def test_keys_without_a_redis_are_a_mistake_and_no_keys_are_no_part() -> None:
    assert queues.parts(Settings()) == []
    with pytest.raises(UsageError, match="there is no Redis"):
        queues.parts(Settings(queues={"critical": ["prices:*"]}))  # type: ignore[arg-type]
    found = queues.parts(
        Settings(redis_url="redis://127.0.0.1:6379/0", queues={"names": ["jobs"], "critical": ["p:*"]})
    )  # type: ignore[arg-type]
    assert found == [QueuesPart("redis://127.0.0.1:6379/0", ("jobs", "p:*"))]


def test_a_backup_of_something_else_is_no_queue(servers: tuple[str, str], other: Any) -> None:
    shelf = Shelf()
    with pytest.raises(ArtifactError, match=r"holds no keys\.jsonl"):
        queues.restore(shelf, Target(url=servers[1]))
