"""Queues and critical cache entries in a backup: keys of a Redis, each as Redis itself writes it down (DUMP), with its time to live.

Not by a file of Redis: a dump.rdb that is put beside `appendonly yes` starts empty, without an error.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry import clock
from registry.errors import ArtifactError, ConflictError, NotFoundError, RefusedError, UsageError
from registry.redaction import redact
from registry.settings import Settings
from tasks.backup import keyvalues
from tasks.backup.components import Captured, Compared, Part, Sink, Source, Target
from tasks.backup.keyvalues import Value
from tasks.backup.manifest import Entry

FILE = "keys.jsonl"
ONE_MOMENT_BYTES = 64 << 20
ONE_MOMENT_KEYS = 50_000
"""Keys of so much memory, and so many, are read in one transaction. More would hold the server up, and fill our own memory."""
BATCH = 200
TRIES = 5
_NAMED = 10


@dataclass(frozen=True, slots=True)
class QueuesPart:
    url: str
    patterns: tuple[str, ...]
    name: str = "queues"
    kind: str = "queues"

    def capture(self, sink: Sink) -> Captured:
        """Raises UnavailableError where Redis does not answer."""
        with keyvalues.connected(self.url) as client:
            facts = keyvalues.server_facts(client)
            policy = facts["maxmemory_policy"]
            if policy.startswith("allkeys"):
                sink.warn(
                    f"Redis throws keys away when its memory is full (maxmemory-policy {policy}): a queue can be lost without a backup "
                    "ever seeing it; use noeviction or volatile-lru where queues live"
                )
            names = keyvalues.find(client, self.patterns)
            work = _Capture(sink, keyvalues.batches(client, names, ONE_MOMENT_BYTES, ONE_MOMENT_KEYS))
            stream = sink.store(work.lines(client))
            sink.add(Entry(FILE, "keys", stream))
            batches, cluster = work.count, keyvalues.is_cluster(client)
        if cluster:
            snapshot = {
                "consistent": False,
                "why": "a Redis Cluster has no transaction over its nodes: each key is of one moment",
            }
        elif batches > 1:
            snapshot = {
                "consistent": False,
                "why": f"they are more than {ONE_MOMENT_KEYS} keys or {ONE_MOMENT_BYTES >> 20} MB, so they were read in {batches} transactions",
            }
        else:
            snapshot = {"consistent": True, "how": "one MULTI … EXEC"}
        for name in work.gone[:_NAMED]:
            sink.warn(
                f"{name} was there when the keys were listed and not when they were read: consumed, expired or evicted"
            )
        facts.update(
            patterns=list(self.patterns),
            keys=sum(work.types.values()),
            types=dict(sorted(work.types.items())),
            elements=work.elements,
            sha256=work.digest(),
        )
        return Captured(facts, {**snapshot, "at": clock.text(clock.now())}, {"redis": facts["version"]})


@dataclass(slots=True)
class _Capture:
    sink: Sink
    groups: list[list[bytes]]
    count: int = 0
    elements: int = 0
    types: Counter[str] = field(default_factory=Counter)
    gone: list[str] = field(default_factory=list)
    _hashes: list[str] = field(default_factory=list)
    _done: int = 0

    def lines(self, client: Any) -> Iterator[bytes]:
        for group in self.groups:
            self.count += 1
            for name, value in zip(group, keyvalues.read(client, group, TRIES), strict=True):
                if value is None:
                    self.gone.append(shown(name))
                    continue
                self.types[value.type] += 1
                self.elements += value.length
                self._hashes.append(fingerprint(value))
                line = _line(value)
                self._done += len(line)
                self.sink.progress(self._done)
                yield line

    def digest(self) -> str:
        return combined(self._hashes)


def fingerprint(value: Value) -> str:
    return hashlib.sha256(f"{value.type} {value.length} {value.sha256} ".encode() + value.name).hexdigest()


def combined(fingerprints: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(fingerprints)).encode()).hexdigest()


def parts(settings: Settings) -> list[Part]:
    """Nothing where no key is named. Raises UsageError where keys are named and no Redis is."""
    patterns = tuple(dict.fromkeys([*settings.queues.names, *settings.queues.critical]))
    url = settings.queues.url or settings.redis_url
    if not patterns:
        return []
    if url is None:
        raise UsageError("[queues] names keys to keep, and there is no Redis: set its url, or redis_url")
    return [QueuesPart(url, patterns)]


def occupied(target: Target) -> str | None:
    """How many keys stand there. Raises UnavailableError."""
    with keyvalues.connected(_url(target)) as client:
        count = len(keyvalues.find(client, target.only)) if target.only else keyvalues.size(client)
    return f"{count} key{'' if count == 1 else 's'}" if count else None


def restore(source: Source, target: Target) -> dict[str, Any]:
    """Bring the keys back; `only` takes keys and patterns. Those whose time has come meanwhile stay away.

    Each key is written and read back in one transaction, so that a consumer cannot empty it in between. A key that stands there with
    another content is refused before anything is written, unless `target.force`. What an interrupted call has written stands, and
    the next goes on.

    Raises ConflictError, NotFoundError (nothing fits `only`), ArtifactError, StorageError (Redis is full), UnavailableError.
    """
    keep_time = not target.options.get("without_expiry", False)
    url = _url(target)
    with keyvalues.connected(url) as client:
        asked = [value.name for value in _values(source) if _fits(value.name, target.only)] if target.only else None
        if asked == []:
            raise NotFoundError(f"{', '.join(target.only)}: no key in this backup of the queues fits")
        there = _there(client, source, target)
        now, done = keyvalues.now_ms(client), 0
        found: Counter[str] = Counter()
        for value in _values(source):
            done += len(value.dump)
            if not _fits(value.name, target.only):
                continue
            expired = keep_time and value.expires_at_ms is not None and value.expires_at_ms <= now
            if expired:
                found["expired"] += 1
            elif value.name in there:
                found["already_there"] += 1
            else:
                back = keyvalues.write(client, value, force=target.force, keep_time=keep_time)
                if back is None or fingerprint(back) != fingerprint(value):
                    raise ArtifactError(f"key {shown(value.name)} came back as something else than it was")
                found["written"] += 1
            target.progress(done, None)
    return {"redis": redact(url), "keys": sum(found.values()), **dict(found)}


def _there(client: Any, source: Source, target: Target) -> set[bytes]:
    """The keys that stand there as they should. Raises ConflictError, without force, for those that stand there otherwise."""
    there: set[bytes] = set()
    taken: list[str] = []
    for group in _grouped(value for value in _values(source) if _fits(value.name, target.only)):
        for value, standing in zip(group, keyvalues.read(client, [one.name for one in group], TRIES), strict=True):
            if standing is None:
                continue
            if fingerprint(standing) == fingerprint(value):
                there.add(value.name)
            else:
                taken.append(shown(value.name))
    if taken and not target.force:
        raise ConflictError(
            f"{len(taken)} keys stand there with another content ({', '.join(taken[:_NAMED])}), so nothing was restored; restore into "
            "another Redis, or replace them with --force"
        )
    return there


def verify(source: Source, folder: Path) -> Compared:
    """Restore into a private Redis, and compare type, length and content of every key."""
    from tasks.backup import throwaway

    facts = source.record.facts
    try:
        with throwaway.redis(folder) as server:
            if _version(server.version) < _version(str(facts["version"])):
                return Compared(
                    unverifiable=f"the keys are of Redis {facts['version']}, and {server.version} is installed here, which is older"
                )
            options = {"without_expiry": True}
            done = restore(source, Target(url=server.url, options=options))
            hashes, types, elements = [], Counter[str](), 0
            with keyvalues.connected(server.url) as client:
                names = keyvalues.find(client, ("*",))
                for at in range(0, len(names), BATCH):
                    for value in keyvalues.read(client, names[at : at + BATCH], TRIES):
                        if value is not None:
                            hashes.append(fingerprint(value))
                            types[value.type] += 1
                            elements += value.length
    except NotFoundError as error:
        return Compared(unverifiable=str(error))
    except (ArtifactError, RefusedError, ConflictError) as error:
        return Compared((str(error),))
    differences = [
        f"{what}: {found}, the manifest says {due}"
        for what, found, due in (
            ("keys", len(hashes), facts["keys"]),
            ("types", dict(sorted(types.items())), facts["types"]),
            ("elements", elements, facts["elements"]),
            ("content of all keys", combined(hashes), facts["sha256"]),
        )
        if found != due
    ]
    return Compared(tuple(differences), {"keys": done["keys"], "elements": elements})


def _values(source: Source) -> Iterator[Value]:
    """The keys of a backup, one at a time. Raises ArtifactError."""
    entry = next((one for one in source.entries() if one.name == FILE), None)
    if entry is None or entry.stream is None:
        raise ArtifactError(f"the component {source.record.name} holds no {FILE}")
    rest: list[bytes] = []
    for piece in source.open(entry.stream):
        first, *lines = piece.split(b"\n")
        rest.append(first)
        for line in lines:
            yield _value(b"".join(rest))
            rest = [line]
    if b"".join(rest):
        raise ArtifactError(f"{FILE} of {source.record.name} ends in the middle of a key")


def _grouped(values: Iterable[Value]) -> Iterator[list[Value]]:
    group: list[Value] = []
    size = 0
    for value in values:
        group.append(value)
        size += len(value.dump)
        if len(group) == BATCH or size > ONE_MOMENT_BYTES // 4:
            yield group
            group, size = [], 0
    if group:
        yield group


def _line(value: Value) -> bytes:
    document = {
        "key": base64.b64encode(value.name).decode(),
        "type": value.type,
        "length": value.length,
        "sha256": value.sha256,
        "expires_at_ms": value.expires_at_ms,
        "dump": base64.b64encode(value.dump).decode(),
    }
    return json.dumps(document, sort_keys=True).encode() + b"\n"


def _value(line: bytes) -> Value:
    try:
        document = json.loads(line)
        return Value(
            base64.b64decode(document["key"], validate=True),
            str(document["type"]),
            int(document["length"]),
            str(document["sha256"]),
            None if document["expires_at_ms"] is None else int(document["expires_at_ms"]),
            base64.b64decode(document["dump"], validate=True),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"a key in {FILE} cannot be read ({error!r})") from error


def _fits(name: bytes, only: tuple[str, ...]) -> bool:
    text = name.decode("utf-8", "surrogateescape")
    return not only or any(text == one or fnmatch.fnmatchcase(text, one) for one in only)


def _url(target: Target) -> str:
    if target.url is None:
        raise UsageError("queues are restored into a Redis: its URL is missing")
    return target.url


def _version(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(int(part) for part in found.groups()) if found else ()


def shown(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
