"""The cache's first level: answers in this process, bounded in bytes, and who is let in. It knows nothing of requests or Redis.

W-TinyLFU (Einziger, Friedman, Manes: "TinyLFU: A Highly Efficient Cache Admission Policy", 2017): what is new goes through
a small window, and takes the place of an older entry only where it was asked for more often of late.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

Owner = tuple[str, str, str]
"""(model, version, digest)."""

WINDOW_SHARE = 0.01
PROTECTED_SHARE = 0.8
LARGEST_SHARE = 0.125
"""No entry may take more of the cache than this."""

_ROWS = 4
_MOST = 15
_FEWEST_COUNTERS, _MOST_COUNTERS = 1 << 12, 1 << 20
_BYTES_A_COUNTER = 128
_REMEMBERED = 30
"""The counters are halved after so many askings for each entry that is held."""
_SLICE = 200
"""Entries that are removed in one go: under a millisecond of the event loop."""
_HALVED = bytes(value >> 1 for value in range(256))

WINDOW, PROBATION, PROTECTED = 0, 1, 2


class Sketch:
    """How often keys were asked for of late, about: a count-min sketch to 15, halved from time to time.

    Keys are digests, so their bytes are their hashes. `counters` is a power of two; it takes four times as many bytes.
    """

    __slots__ = ("_added", "_mask", "_rows")

    def __init__(self, counters: int) -> None:
        self._mask = counters - 1
        self._rows = [bytearray(counters) for _ in range(_ROWS)]
        self._added = 0

    def add(self, key: bytes, remembered: int) -> None:
        """Count an asking; halve all counts once there were `remembered` of them."""
        mask, number = self._mask, int.from_bytes(key, "little")
        for row in self._rows:
            at = number & mask
            if row[at] < _MOST:
                row[at] += 1
            number >>= 32
        self._added += 1
        if self._added >= remembered:
            self._rows = [row.translate(_HALVED) for row in self._rows]
            self._added //= 2

    def count(self, key: bytes) -> int:
        mask, number = self._mask, int.from_bytes(key, "little")
        found = _MOST
        for row in self._rows:
            found = min(found, row[number & mask])
            number >>= 32
        return found


class Holding:
    """The keys of an owner, and what their entries take. Once it is `gone` none of them is an answer any more."""

    __slots__ = ("bytes", "gone", "keys", "owner")

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.keys: set[bytes] = set()
        self.bytes = 0
        self.gone = False


class Entry:
    """What is held for a key. `size_bytes` is all that it takes."""

    __slots__ = ("expires", "holding", "size_bytes", "value", "where")

    def __init__(self, holding: Holding, value: Any, size_bytes: int, expires: float) -> None:
        self.holding = holding
        self.value = value
        self.size_bytes = size_bytes
        self.expires = expires
        self.where = WINDOW


class LocalStore:
    """Used on one thread. Keys are 16 random-looking bytes. The sketch takes about 3 % of `max_bytes` beside them.

    What was dropped is an answer no longer, but takes its bytes until `sweep` has removed it.
    """

    def __init__(self, max_bytes: int, ttl_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.counts = dict.fromkeys(("admitted", "rejected", "evicted", "expired", "too_large", "dropped"), 0)
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        wanted = min(max(max_bytes // _BYTES_A_COUNTER, _FEWEST_COUNTERS), _MOST_COUNTERS)
        self._sketch = Sketch(1 << (wanted - 1).bit_length())
        self._entries: dict[bytes, Entry] = {}
        self._segments: tuple[OrderedDict[bytes, Entry], ...] = (OrderedDict(), OrderedDict(), OrderedDict())
        self._sizes = [0, 0, 0]
        self._window_bytes = int(max_bytes * WINDOW_SHARE)
        self._protected_bytes = int((max_bytes - self._window_bytes) * PROTECTED_SHARE)
        self._owned: dict[Owner, Holding] = {}
        self._gone: list[Holding] = []

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Any | None:
        """The value. Asking counts, whether it is there or not."""
        self.ask(key)
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.holding.gone:
            self._remove(key, entry)
            return None
        if self._clock() >= entry.expires:
            self._remove(key, entry)
            self.counts["expired"] += 1
            return None
        if entry.where == PROBATION:
            self._move(key, entry, PROTECTED)
            self._demote()
        else:
            self._segments[entry.where].move_to_end(key)
        return entry.value

    def ask(self, key: bytes) -> None:
        """Count that somebody asked for a key."""
        self._sketch.add(key, max(1000, _REMEMBERED * len(self._entries)))

    def put(self, key: bytes, owner: Owner, value: Any, size_bytes: int) -> bool:
        """Offer a value; whether it is held now. From the window it may still be turned away later."""
        held = self._entries.get(key)
        if held is not None:
            self._remove(key, held)
        if size_bytes > self.max_bytes * LARGEST_SHARE:
            self.counts["too_large"] += 1
            return False
        holding = self._owned.get(owner)
        if holding is None:
            holding = self._owned[owner] = Holding(owner)
        entry = Entry(holding, value, size_bytes, self._clock() + self._ttl_seconds)
        self._entries[key] = entry
        self._segments[WINDOW][key] = entry
        self._sizes[WINDOW] += size_bytes
        self.bytes += size_bytes
        holding.keys.add(key)
        holding.bytes += size_bytes
        while self._sizes[WINDOW] > self._window_bytes and self._segments[WINDOW]:
            self._leave_window()
        return key in self._entries

    def drop(self, owner: Owner) -> int:
        """From now on no entry of an owner is an answer; how many there were. Call `sweep` until nothing is left of them."""
        holding = self._owned.pop(owner, None)
        if holding is None:
            return 0
        holding.gone = True
        self._gone.append(holding)
        count = len(holding.keys)
        self.counts["dropped"] += count
        return count

    def sweep(self) -> bool:
        """Remove some of what was dropped, so many as take no time to speak of; whether more is left."""
        left = _SLICE
        while self._gone:
            keys = self._gone[-1].keys
            while keys:
                if not left:
                    return True
                left -= 1
                key = keys.pop()
                self._remove(key, self._entries[key])
            self._gone.pop()
        return False

    def owners(self) -> list[Owner]:
        """Whose entries there are."""
        return list(self._owned)

    def held(self) -> Iterator[tuple[Owner, int, int]]:
        """(owner, entries, bytes)."""
        for owner, holding in self._owned.items():
            yield owner, len(holding.keys), holding.bytes

    def _leave_window(self) -> None:
        """The window's oldest entry: into the main part where there is room, or in place of what was asked for less often."""
        key, entry = next(iter(self._segments[WINDOW].items()))
        if entry.holding.gone:
            self._remove(key, entry)
            return
        limit = self.max_bytes - self._window_bytes
        over = self._sizes[PROBATION] + self._sizes[PROTECTED] + entry.size_bytes - limit
        if over > 0:
            victims = self._victims(over, self._sketch.count(key))
            if victims is None:
                self._remove(key, entry)
                self.counts["rejected"] += 1
                return
            for victim, held in victims:
                self._remove(victim, held)
            self.counts["evicted"] += len(victims)
        self._move(key, entry, PROBATION)
        self.counts["admitted"] += 1

    def _victims(self, wanted_bytes: int, asked: int) -> list[tuple[bytes, Entry]] | None:
        """The oldest entries of so many bytes; None where one of them was asked for as often as the new one."""
        victims: list[tuple[bytes, Entry]] = []
        now = self._clock()
        for segment in (PROBATION, PROTECTED):
            for key, entry in self._segments[segment].items():
                if wanted_bytes <= 0:
                    return victims
                if not entry.holding.gone and now < entry.expires and self._sketch.count(key) >= asked:
                    return None
                victims.append((key, entry))
                wanted_bytes -= entry.size_bytes
        return victims if wanted_bytes <= 0 else None

    def _demote(self) -> None:
        protected = self._segments[PROTECTED]
        while self._sizes[PROTECTED] > self._protected_bytes and len(protected) > 1:
            key, entry = next(iter(protected.items()))
            self._move(key, entry, PROBATION)

    def _move(self, key: bytes, entry: Entry, where: int) -> None:
        del self._segments[entry.where][key]
        self._sizes[entry.where] -= entry.size_bytes
        entry.where = where
        self._segments[where][key] = entry
        self._sizes[where] += entry.size_bytes

    def _remove(self, key: bytes, entry: Entry) -> None:
        del self._entries[key]
        del self._segments[entry.where][key]
        self._sizes[entry.where] -= entry.size_bytes
        self.bytes -= entry.size_bytes
        holding = entry.holding
        holding.keys.discard(key)
        holding.bytes -= entry.size_bytes
        if not holding.keys and not holding.gone:
            del self._owned[holding.owner]
