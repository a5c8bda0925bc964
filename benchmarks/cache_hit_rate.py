"""Replays requests against the cache's first level and prints hit rates as a Markdown table, beside the best possible.

`python -m benchmarks.cache_hit_rate` takes about a minute on one core. The best possible is Belady's: whoever is asked for
again last goes first, and what would be that is not let in; it needs to know the future. Nothing of it is timed.
"""

from __future__ import annotations

import argparse
import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from serving.caching.cache_store import LocalStore

ENTRY_BYTES = 1000


def zipf(requests: int, distinct: int, *, exponent: float = 1.1, seed: int = 1) -> list[int]:
    """Keys 0 … distinct-1, drawn independently; key k has a weight of 1 / (k + 1) ** exponent."""
    weights = 1.0 / np.arange(1, distinct + 1) ** exponent
    drawn: list[int] = np.random.default_rng(seed).choice(distinct, requests, p=weights / weights.sum()).tolist()
    return drawn


def with_scans(keys: Sequence[int], *, every: int, length: int) -> list[int]:
    """The same with runs of keys in between that are asked for once and never again."""
    mixed: list[int] = []
    once = max(keys) + 1
    for start in range(0, len(keys), every):
        mixed += keys[start : start + every]
        mixed += range(once, once + length)
        once += length
    return mixed


def moving(requests: int, distinct: int, *, parts: int = 4, seed: int = 1) -> list[int]:
    """What is popular changes: each part of the replay ranks the same keys in another order."""
    random = np.random.default_rng(seed)
    keys: list[int] = []
    for part in range(parts):
        order = random.permutation(distinct)
        keys += order[np.array(zipf(requests // parts, distinct, seed=seed + part))].tolist()
    return keys


def belady(keys: Sequence[int], capacity: int) -> float:
    """The best hit rate that any cache of so many entries could have."""
    never = len(keys)
    following = [never] * len(keys)
    seen: dict[int, int] = {}
    for at in range(len(keys) - 1, -1, -1):
        following[at] = seen.get(keys[at], never)
        seen[keys[at]] = at
    held: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    hits = 0
    for at, key in enumerate(keys):
        again = following[at]
        if key in held:
            hits += 1
        elif again == never:
            continue
        elif len(held) >= capacity:
            while held.get(farthest[0][1]) != -farthest[0][0]:
                heapq.heappop(farthest)
            if -farthest[0][0] <= again:
                continue
            del held[heapq.heappop(farthest)[1]]
        held[key] = again
        heapq.heappush(farthest, (-again, key))
    return hits / len(keys)


def lru(keys: Iterable[int], capacity: int) -> float:
    held: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for key in keys:
        total += 1
        if key in held:
            hits += 1
            held.move_to_end(key)
            continue
        held[key] = None
        if len(held) > capacity:
            held.popitem(last=False)
    return hits / total


def ours(keys: Iterable[int], capacity: int) -> float:
    """`LocalStore` of so many entries of one size."""
    store = LocalStore(capacity * ENTRY_BYTES, 3600.0, clock=lambda: 0.0)
    names: dict[int, bytes] = {}
    hits = total = 0
    for key in keys:
        total += 1
        name = names.get(key)
        if name is None:
            name = names[key] = blake2b(b"%d" % key, digest_size=16).digest()
        if store.get(name) is not None:
            hits += 1
        else:
            store.put(name, "owner", True, ENTRY_BYTES)
    return hits / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument(
        "--entries", type=int, default=2_000, help="how many the cache holds; there are twice as many keys"
    )
    options = parser.parse_args()
    distinct = 2 * options.entries
    drawn = zipf(options.requests, distinct)
    replays = {
        "Zipf(1.1), twice as many keys as entries": drawn,
        "the same, ten times as many keys": zipf(options.requests, 10 * options.entries),
        "the same, what is popular changes 4 times": moving(options.requests, distinct),
        "the first, a third of it asked for once": with_scans(drawn, every=1_000, length=500),
    }
    print(f"{options.requests} requests, a cache of {options.entries} entries of one size\n")
    print("| replay | best possible | modelkeep | LRU | points below the best |\n| --- | --- | --- | --- | --- |")
    for name, keys in replays.items():
        best, found = belady(keys, options.entries), ours(keys, options.entries)
        print(
            f"| {name} | {best:.2%} | {found:.2%} | {lru(keys, options.entries):.2%} | {100 * (best - found):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
