"""The cache's first level: answers in this process, bounded in bytes, and who is let in. It knows nothing of requests or Redis.

W-TinyLFU (Einziger, Friedman, Manes: "TinyLFU: A Highly Efficient Cache Admission Policy", 2017): what is new goes through
a small window, and takes the place of an older entry only where it was asked for more often. How long counts are remembered
is not one number here: long memories tell keys of nearly equal popularity apart, short ones follow when it changes. Both are
kept, and where they disagree about an exchange it is noted which of the two keys is asked for first: that memory was right,
and the one that was right more often of late decides.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np

Owner = tuple[str, str, str]
"""(model, version, digest)."""

WINDOW_SHARE = 0.01
PROTECTED_SHARE = 0.8
LARGEST_SHARE = 0.125
"""No entry may take more of the cache than this."""

_ROWS = 4
_FEWEST_COUNTERS, _MOST_COUNTERS = 1 << 12, 1 << 20
_BYTES_A_COUNTER = 256
_REMEMBERED = 30
"""The short counts are halved after so many askings for each entry that is held, ..."""
_HALVINGS_A_LONG_ONE = 20
"""... and the long ones so many times more seldom."""
_MOST, _MOST_RECENT = 255, 15
"""Short counts end early: what was asked for very often must not live long from that."""
_FEWEST_REMEMBERED, _ASKINGS_A_COUNTER = 1000, 8
_COMPARED = 8
"""The oldest entries of which the one that is asked for least makes room."""
_BETS = 256
_TRUST_GAIN = 0.02
_SLICE = 200
"""Entries that are removed in one go: under a millisecond of the event loop."""
WINDOW, PROBATION, PROTECTED = 0, 1, 2


class Sketch:
    """How often keys were asked for, about: count-min sketches with a short and a long memory, halved from time to time.

    Keys are digests, so their bytes are their hashes. `counters` is a power of two; it takes twelve times as many bytes.
    An asking is counted once: what the short counts lose when they are halved is added to the long ones.
    """

    __slots__ = ("_added", "_halvings", "_long", "_mask", "_short")

    def __init__(self, counters: int) -> None:
        self._mask = counters - 1
        self._short = tuple(bytearray(counters) for _ in range(_ROWS))
        self._long = tuple(array("H", bytes(2 * counters)) for _ in range(_ROWS))
        self._added = self._halvings = 0

    def add(self, key: bytes, remembered: int) -> None:
        """Count an asking; halve the short counts once they hold `remembered` of them."""
        mask, number = self._mask, int.from_bytes(key, "little")
        for row in self._short:
            at = number & mask
            if row[at] < _MOST:
                row[at] += 1
            number >>= 32
        self._added += 1
        if self._added >= remembered:
            self._added //= 2
            self._halve()

    def recent(self, key: bytes) -> int:
        """By the short memory."""
        mask, number = self._mask, int.from_bytes(key, "little")
        one, two, three, four = self._short
        return min(
            _MOST_RECENT,
            one[number & mask],
            two[number >> 32 & mask],
            three[number >> 64 & mask],
            four[number >> 96 & mask],
        )

    def often(self, key: bytes) -> int:
        """By the long memory."""
        mask, number = self._mask, int.from_bytes(key, "little")
        (s1, s2, s3, s4), (l1, l2, l3, l4) = self._short, self._long
        a, b, c, d = number & mask, number >> 32 & mask, number >> 64 & mask, number >> 96 & mask
        return min(s1[a] + l1[a], s2[b] + l2[b], s3[c] + l3[c], s4[d] + l4[d])

    def _halve(self) -> None:
        self._halvings += 1
        for short, long in zip(self._short, self._long, strict=True):
            counts, sums = np.frombuffer(short, np.uint8), np.frombuffer(long, np.uint16)
            if self._halvings % _HALVINGS_A_LONG_ONE == 0:
                sums >>= 1
            lost = counts - np.minimum(counts, _MOST_RECENT) // 2
            np.add(sums, np.minimum(lost, 0xFFFF - sums), out=sums)
            counts -= lost


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
    """Used on one thread. Keys are 16 random-looking bytes. The sketch takes 5 to 9 % of `max_bytes` beside them.

    What was dropped is an answer no longer, but takes its bytes until `sweep` has removed it.
    """

    def __init__(self, max_bytes: int, ttl_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.counts = dict.fromkeys(("admitted", "rejected", "evicted", "expired", "too_large", "dropped"), 0)
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        wanted = min(max(max_bytes // _BYTES_A_COUNTER, _FEWEST_COUNTERS), _MOST_COUNTERS)
        counters = 1 << (wanted - 1).bit_length()
        self._sketch = Sketch(counters)
        # To halve takes as long as there are counters, not as entries are held: in a large and empty store it would be felt.
        self._fewest_remembered = max(_FEWEST_REMEMBERED, counters // _ASKINGS_A_COUNTER)
        self._trust = 1.0
        """In the long memory, from -1 (the short one was right of late) to 1."""
        self._bets: dict[bytes, tuple[bytes, bool]] = {}
        """By key: the one it was compared with, and whether the long memory is right where this one is asked for first."""
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

    def peek(self, key: bytes) -> Any | None:
        """The value, without asking for it."""
        entry = self._entries.get(key)
        return None if entry is None or entry.holding.gone or self._clock() >= entry.expires else entry.value

    def ask(self, key: bytes) -> None:
        """Count that somebody asked for a key."""
        self._sketch.add(key, max(self._fewest_remembered, _REMEMBERED * len(self._entries)))
        if key in self._bets:
            other, long_is_right = self._bets.pop(key)
            del self._bets[other]
            self._trust += _TRUST_GAIN * ((1.0 if long_is_right else -1.0) - self._trust)

    def put(self, key: bytes, owner: Owner, value: Any, size_bytes: int, ttl_seconds: float | None = None) -> bool:
        """Offer a value; whether it is held now. From the window it may still be turned away later.

        `ttl_seconds` is what is left to it, where that is less than a new value has.
        """
        held = self._entries.get(key)
        if held is not None:
            self._remove(key, held)
        if size_bytes > self.max_bytes * LARGEST_SHARE:
            self.counts["too_large"] += 1
            return False
        holding = self._owned.get(owner)
        if holding is None:
            holding = self._owned[owner] = Holding(owner)
        left = self._ttl_seconds if ttl_seconds is None else min(ttl_seconds, self._ttl_seconds)
        entry = Entry(holding, value, size_bytes, self._clock() + left)
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
            victims = self._victims(over, key)
            if victims is None:
                self._remove(key, entry)
                self.counts["rejected"] += 1
                return
            for victim, held in victims:
                self._remove(victim, held)
            self.counts["evicted"] += len(victims)
        self._move(key, entry, PROBATION)
        self.counts["admitted"] += 1

    def _victims(self, wanted_bytes: int, key: bytes) -> list[tuple[bytes, Entry]] | None:
        """Of the oldest entries those that are asked for least, so many bytes; None where they are worth as much as `key`."""
        sketch, now = self._sketch, self._clock()
        count = sketch.often if self._trust >= 0 else sketch.recent
        # What was asked for once replaces hardly anything: it is compared with the oldest entry, and not worth more time.
        compared = _COMPARED if count(key) > 1 else 1
        found: list[tuple[int, bytes, Entry]] = []
        left = wanted_bytes
        for held, entry in chain(self._segments[PROBATION].items(), self._segments[PROTECTED].items()):
            if len(found) >= compared and left <= 0:
                break
            found.append((-1 if entry.holding.gone or now >= entry.expires else count(held), held, entry))
            left -= entry.size_bytes
        if left > 0:
            return None
        found.sort(key=_count_of)
        victims: list[tuple[bytes, Entry]] = []
        for _, held, entry in found:
            victims.append((held, entry))
            wanted_bytes -= entry.size_bytes
            if wanted_bytes <= 0:
                break
        worth, held = found[len(victims) - 1][:2]
        if worth < 0:
            return victims
        by_long, by_short = sketch.often(key) > sketch.often(held), sketch.recent(key) > sketch.recent(held)
        if by_long != by_short:
            self._bet(key, held, by_long)
        return victims if (by_long if self._trust >= 0 else by_short) else None

    def _bet(self, new: bytes, held: bytes, long_wants_new: bool) -> None:
        bets = self._bets
        if new in bets or held in bets:
            return
        if len(bets) >= 2 * _BETS:
            oldest = next(iter(bets))
            del bets[bets.pop(oldest)[0]]
        bets[new] = (held, long_wants_new)
        bets[held] = (new, not long_wants_new)

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


def _count_of(found: tuple[int, bytes, Entry]) -> int:
    return found[0]
