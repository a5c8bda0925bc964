"""Answers as they were sent, by the bytes of the request that they answered: an equal one is neither read nor answered anew.

Nothing here is an answer by itself: each belongs to one that the first level holds, and is given only while that is held.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

LARGEST_BYTES = 1 << 20
"""Of a request and its answer together. Looking for it is hashing it, 0.2 ns a byte on the event loop; reading JSON takes ten times as long."""
LARGEST_SHARE = 0.125
"""Of all that may be held: one long answer does not push out the others."""
_ENTRY_BYTES = 400

Key = tuple[int, int | None, bytes]
"""(whose, Inference-Header-Content-Length, body): all that an answer depends on once its version is chosen."""


class Written(NamedTuple):
    """What was sent, the length of its JSON header (None: it is all JSON), and the answer in the first level: key, serial."""

    body: bytes
    header_length: int | None
    key: bytes
    serial: int


class WrittenAnswers:
    """Used on one thread. The answers that were given last, `max_bytes` of them with their requests."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.largest_bytes = min(LARGEST_BYTES, int(max_bytes * LARGEST_SHARE))
        """Of a request and its answer together; longer ones are not held."""
        self.bytes = 0
        self._held: OrderedDict[Key, Written] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Key) -> Written | None:
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
        return found

    def put(self, key: Key, written: Written) -> None:
        size = _size(key, written)
        if size > self.largest_bytes:
            return
        self.drop(key)
        self._held[key] = written
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.drop(next(iter(self._held)))

    def drop(self, key: Key) -> None:
        found = self._held.pop(key, None)
        if found is not None:
            self.bytes -= _size(key, found)

    def clear(self) -> None:
        self._held.clear()
        self.bytes = 0


def _size(key: Key, written: Written) -> int:
    return len(key[2]) + len(written.body) + _ENTRY_BYTES
