"""Bad requests that have one cause: those of one executed batch, and those of one client's key. Counted, not judged."""

from __future__ import annotations

from typing import Any

KEYS_KEPT = 4096
"""Keys that a window remembers in one stream. What fails under further ones is taken as if it had no key."""

KEYS_REPORTED = 64
"""The keys with the most bad requests, told to the registry, so that one that fails on several servers counts once."""


class Clusters:
    """The bad requests of one stream in one window. Written on the event loop only.

    `events` counts each batch and each key once. `batched` and `keyed` are sums of size x size - size over the clusters, by
    batch and by key (by batch where there is no key): what the judge needs to know how much the bad requests are worth.
    """

    __slots__ = ("_batch", "_in_batch", "batched", "events", "keyed", "keys")

    def __init__(self) -> None:
        self.events = 0
        self.batched = 0
        self.keyed = 0
        self.keys: dict[int, int] = {}
        self._batch = 0
        self._in_batch = 0

    def add(self, batch: int, key: int | None) -> None:
        """One more bad request, of an executed batch (a number that no other has), with its client's key."""
        if batch != self._batch:
            self._batch, self._in_batch = batch, 0
        before = self._in_batch
        self._in_batch += 1
        self.batched += 2 * before
        if key is None:
            self.keyed += 2 * before
            known = 0
        else:
            known = self.keys.get(key, 0)
            if known or len(self.keys) < KEYS_KEPT:
                self.keys[key] = known + 1
                self.keyed += 2 * known
            else:
                self.keyed += 2 * before
        if not before and not known:
            self.events += 1

    def as_dict(self, stream: str) -> dict[str, Any]:
        """JSON-able; the keys as hexadecimal text."""
        keys = self.keys
        told = sorted(keys, key=lambda key: (-keys[key], key))[:KEYS_REPORTED] if keys else ()
        return {
            f"{stream}_events": self.events,
            f"{stream}_batched": self.batched,
            f"{stream}_keyed": self.keyed,
            f"{stream}_keys": {f"{key:x}": keys[key] for key in told},
        }
