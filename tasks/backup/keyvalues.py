"""Keys of a Redis, alone or a cluster: found, read with all that they hold at one moment, written back. What is kept of them: queues."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from registry.errors import ArtifactError, ConflictError, StorageError, UnavailableError
from registry.redaction import redact

TIMEOUT_SECONDS = 60.0
_SCAN = 1000
_GLOB = frozenset("*?[]\\")


@dataclass(frozen=True, slots=True)
class Value:
    """A key at one moment. `length` is that of its own kind (elements, entries, bytes of a string), `sha256` is of what it holds,
    written down so that the order in which a server keeps sets and hashes does not matter."""

    name: bytes
    type: str
    length: int
    sha256: str
    expires_at_ms: int | None
    """Milliseconds since 1970, by the clock of the server."""
    dump: bytes


@contextmanager
def connected(url: str) -> Iterator[Any]:
    """A client. Raises UnavailableError where Redis does not answer, or stops to; StorageError where it is full."""
    import redis
    from redis.cluster import ClusterNode, RedisCluster
    from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisClusterException

    options: dict[str, Any] = {"socket_timeout": TIMEOUT_SECONDS, "socket_connect_timeout": 10.0, "protocol": 2}
    client: Any = None
    try:
        if "+cluster://" in url:
            nodes, more = _nodes(url)
            client = RedisCluster(startup_nodes=[ClusterNode(host, port) for host, port in nodes], **more, **options)
        else:
            client = redis.Redis.from_url(url, **options)
        yield client
    except OutOfMemoryError as error:
        raise StorageError(f"the Redis {redact(url)} is full ({error}): give it more memory (maxmemory)") from error
    except ReadOnlyError as error:
        raise StorageError(f"the Redis {redact(url)} takes no writes: {error}") from error
    except (redis.RedisError, RedisClusterException, OSError) as error:
        raise UnavailableError(f"the Redis {redact(url)} does not answer as it should: {error}") from error
    finally:
        if client is not None:
            client.close()


def _nodes(url: str) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    scheme, _, rest = url.partition("://")
    user, at, hosts = rest.partition("/")[0].rpartition("@")
    account = urlsplit(f"redis://{user}{at}host")
    more: dict[str, Any] = {"ssl": scheme.startswith("rediss")}
    if account.password is not None:
        more.update(username=unquote(account.username or "") or None, password=unquote(account.password))
    found = []
    for host in hosts.split(","):
        parts = urlsplit(f"redis://{host}")
        found.append((str(parts.hostname), parts.port or 6379))
    return found, more


def is_cluster(client: Any) -> bool:
    return hasattr(client, "get_primaries")


def server_facts(client: Any) -> dict[str, Any]:
    """Version, and what can take keys away or bring them back in another state."""
    info: dict[str, Any] = _info(client)
    return {
        "version": str(info["redis_version"]),
        "maxmemory_policy": str(info.get("maxmemory_policy", "unknown")),
        "appendonly": bool(info.get("aof_enabled", 0)),
        "cluster": is_cluster(client),
    }


def _info(client: Any) -> dict[str, Any]:
    if is_cluster(client):
        found: dict[str, Any] = client.info(target_nodes=client.get_primaries()[0])
        return found
    return dict(client.info())


def size(client: Any) -> int:
    """Keys of the database."""
    if is_cluster(client):
        return sum(int(client.dbsize(target_nodes=node)) for node in client.get_primaries())
    return int(client.dbsize())


def find(client: Any, patterns: Iterable[str]) -> list[bytes]:
    """The keys that fit, sorted, each once. What is no pattern is asked for by its name."""
    found: set[bytes] = set()
    for pattern in patterns:
        if _GLOB & set(pattern):
            found.update(client.scan_iter(match=pattern, count=_SCAN))
        elif client.exists(pattern):
            found.add(pattern.encode())
    return sorted(found)


def batches(client: Any, names: list[bytes], most_bytes: int, most_keys: int) -> list[list[bytes]]:
    """The keys in groups of at most `most_bytes` of the server's memory; of a cluster, and where one is larger, one by one."""
    if is_cluster(client):
        return [[name] for name in names]
    groups: list[list[bytes]] = []
    room = 0
    for at in range(0, len(names), _SCAN):
        some = names[at : at + _SCAN]
        with client.pipeline(transaction=False) as pipe:
            for name in some:
                pipe.memory_usage(name)
            sizes = pipe.execute()
        for name, size_bytes in zip(some, sizes, strict=True):
            cost = int(size_bytes or 0)
            if not groups or cost > room or len(groups[-1]) == most_keys:
                groups.append([])
                room = most_bytes
            groups[-1].append(name)
            room -= cost
    return groups


def read(client: Any, names: list[bytes], tries: int) -> list[Value | None]:
    """The keys as they are at one moment; None for one that is not there. In a cluster each is of its own moment.

    Raises UnavailableError where a key changes its type at every try.
    """
    if is_cluster(client):
        return [value for name in names for value in _read(client, [name], tries)]
    return _read(client, names, tries) if names else []


def _read(client: Any, names: list[bytes], tries: int) -> list[Value | None]:
    for _ in range(tries):
        types = _types(client, names)
        with client.pipeline(transaction=True) as pipe:
            for name, kind in zip(names, types, strict=True):
                _ask(pipe, name, kind)
            asked_ms = now_ms(client)
            answers = iter(pipe.execute(raise_on_error=False))
        found = [_answer(name, kind, answers, asked_ms) for name, kind in zip(names, types, strict=True)]
        if "changed" not in found:
            return [None if isinstance(one, str) else one for one in found]
    raise UnavailableError(f"a key among {names[0]!r} … changes its type at every look: repeat the backup")


def _types(client: Any, names: list[bytes]) -> list[str]:
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.type(name)
        return [kind.decode() for kind in pipe.execute()]


def _ask(pipe: Any, name: bytes, kind: str) -> None:
    pipe.type(name)
    pipe.pttl(name)
    pipe.dump(name)
    match kind:
        case "string":
            pipe.get(name)
        case "list":
            pipe.lrange(name, 0, -1)
        case "set":
            pipe.smembers(name)
        case "hash":
            pipe.hgetall(name)
        case "zset":
            pipe.zrange(name, 0, -1, withscores=True)
        case "stream":
            pipe.xrange(name)
            pipe.xinfo_groups(name)
        case _:
            pipe.exists(name)


def _answer(name: bytes, kind: str, answers: Iterator[Any], asked_ms: int) -> Value | str:
    now, left_ms, dump = next(answers), next(answers), next(answers)
    held = [next(answers)] + ([next(answers)] if kind == "stream" else [])
    for one in (now, left_ms, dump, *held):
        if isinstance(one, Exception) and now == kind.encode():
            raise one
    if now == b"none" or dump is None:
        return "gone"
    if now != kind.encode():
        return "changed"
    length, digest = _content(kind, held, dump)
    return Value(name, kind, length, digest, None if left_ms < 0 else asked_ms + left_ms, dump)


def _content(kind: str, held: list[Any], dump: bytes) -> tuple[int, str]:
    digest = hashlib.sha256()

    def note(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)

    first = held[0]
    match kind:
        case "string":
            note(first)
        case "list":
            note(*first)
        case "set":
            note(*sorted(first))
        case "hash":
            first = _pairs(first)
            for field, value in sorted(first):
                note(field, value)
        case "zset":
            first = _pairs(first)
            for member, score in first:
                note(member, repr(float(score)).encode())
        case "stream":
            for identity, fields in first:
                pairs = _pairs(fields or [])
                note(identity, str(len(pairs)).encode())
                for field, value in pairs:
                    note(field, value)
            for one in held[1]:
                group = {_word(key): value for key, value in _pairs(one)}
                note(_bytes(group["name"]), _bytes(group["last-delivered-id"]), str(int(group["pending"])).encode())
        case _:  # of a module: as Redis writes it down, without its version and its sum
            note(dump[:-10])
    return (len(first) if hasattr(first, "__len__") else 1), digest.hexdigest()


def _pairs(answer: Any) -> list[tuple[Any, Any]]:
    """Name and value, whether the client has put them together (it does not, in a transaction of a cluster) or not."""
    if isinstance(answer, dict):
        return list(answer.items())
    if answer and isinstance(answer[0], (tuple, list)):
        return [(one[0], one[1]) for one in answer]
    return list(zip(answer[::2], answer[1::2], strict=True))


def _word(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def write(client: Any, value: Value, *, force: bool, keep_time: bool = True) -> Value | None:
    """Put a key back, and read it in the same transaction. Raises ConflictError where one stands there and `force` is not given."""
    import redis

    with client.pipeline(transaction=True) as pipe:
        expires = value.expires_at_ms if keep_time and value.expires_at_ms is not None else 0
        pipe.restore(value.name, expires, value.dump, replace=force, absttl=bool(expires))
        _ask(pipe, value.name, value.type)
        first, *rest = pipe.execute(raise_on_error=False)
    if isinstance(first, redis.exceptions.OutOfMemoryError):
        raise first
    if isinstance(first, redis.ResponseError):
        said, name = str(first), value.name.decode("utf-8", "backslashreplace")
        if "BUSYKEY" in said or "already exists" in said:
            raise ConflictError(f"key {name} appeared while the queues were restored: it was left as it is")
        raise ArtifactError(f"Redis does not take key {name} back: {said}; is it older than the one it comes from?")
    if isinstance(first, Exception):
        raise first
    found = _answer(value.name, value.type, iter(rest), now_ms(client))
    return None if isinstance(found, str) else found


def now_ms(client: Any) -> int:
    """By the clock of the server; of a cluster, whose nodes have several, by ours."""
    if is_cluster(client):
        return int(time.time() * 1000)
    seconds, micros = client.time()
    return int(seconds) * 1000 + int(micros) // 1000
