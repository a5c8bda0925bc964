"""Answers as they were sent, by the bytes of the request that they answered: an equal one is neither read nor answered anew.

Nothing here is an answer by itself: each belongs to one that the first level holds, and is given only while that is held.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

LARGEST_BYTES = 1 << 20
"""Of a request and its answer together. Looking for it is hashing it, 0.2 ns a byte on the event loop; reading JSON takes ten times as
long, and making the key of binary numbers five times."""
LARGEST_SHARE = 0.25
"""Of all that may be held of its length: one answer does not push out many others."""
SHORT_BYTES = 16_384
"""Up to so many a request is short, with its answer; short and long ones have half of the room each."""
_ENTRY_BYTES = 550

Key = tuple[int, int | None, bytes]
"""(whose, Inference-Header-Content-Length, body): all that an answer depends on once its version is chosen."""


class Written(NamedTuple):
    """What was sent, the length of its JSON header (None: it is all JSON), and the answer in the first level: key, serial."""

    body: bytes
    header_length: int | None
    key: bytes
    serial: int


class _Part:
    """The entries that were asked for last, `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.held: OrderedDict[Key, Written] = OrderedDict()

    def put(self, key: Key, written: Written, size: int) -> None:
        self.held[key] = written
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.drop(next(iter(self.held)))

    def drop(self, key: Key) -> bool:
        found = self.held.pop(key, None)
        if found is not None:
            self.bytes -= _size(key, found)
        return found is not None

    def clear(self) -> None:
        self.held.clear()
        self.bytes = 0


class WrittenAnswers:
    """Used on one thread. The answers that were given last, `max_bytes` of them with their requests: a few long ones do not push out
    many short ones.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._short, self._long = _Part(max_bytes - max_bytes // 2), _Part(max_bytes // 2)
        self.largest_bytes = min(LARGEST_BYTES, int(self._long.max_bytes * LARGEST_SHARE))
        """Of a request and its answer together; longer ones are not held."""

    def __len__(self) -> int:
        return len(self._short.held) + len(self._long.held)

    @property
    def bytes(self) -> int:
        return self._short.bytes + self._long.bytes

    def get(self, key: Key) -> Written | None:
        held = self._short.held
        found = held.get(key)
        if found is None:
            held = self._long.held
            found = held.get(key)
            if found is None:
                return None
        held.move_to_end(key)
        return found

    def put(self, key: Key, written: Written) -> None:
        self.drop(key)
        size = _size(key, written)
        if size <= self.largest_bytes:
            (self._short if size <= SHORT_BYTES else self._long).put(key, written, size)

    def drop(self, key: Key) -> None:
        if not self._short.drop(key):
            self._long.drop(key)

    def clear(self) -> None:
        self._short.clear()
        self._long.clear()


def _size(key: Key, written: Written) -> int:
    return len(key[2]) + len(written.body) + _ENTRY_BYTES
