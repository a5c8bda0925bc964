"""Memory for the key/value caches of texts: what each version is sure of, and what all of them may take beside the models.

It is bookkeeping within the budget for models (registry.budget): exact, the same on every device, and never behind. What an allocator
really refuses is met where it happens, in serving.text.batching. Bytes "at rest" are those of a cache between two steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

from registry.textmodels import TextModel
from serving.compute.runtimes import Runtime

COPIES = 2
"""A step's graph answers a new cache while the old one still stands: so many times the bytes at rest are reckoned. Measured with ONNX
Runtime: 2.2, all that a step computes included."""
PATIENCE_SECONDS = 5.0
"""How long the loading of a model waits for caches that have to become smaller for it: that takes them a step."""
UNLIMITED = 1 << 62


class Holder(Protocol):
    """A loaded version: it holds `runtime.memory_bytes` until its worker has ended."""

    @property
    def runtime(self) -> Runtime: ...
    @property
    def ended(self) -> bool: ...


def claim_at_rest(model: TextModel, most_bytes: int) -> int:
    """The cache that a version is always granted: one text of the full context length, or `most_bytes`, if that is less."""
    return min(model.context_length * model.cache_bytes_per_token, most_bytes)


class Share:
    """The caches of one version. `fits` and `take` are its worker's; the figures are for any thread."""

    def __init__(self, caches: Caches, claim_bytes: int, most_bytes: int) -> None:
        self._caches = caches
        self.claim_bytes = claim_bytes
        """Granted whatever happens, and part of what the version takes of the budget; COPIES are in it."""
        self.most_bytes = most_bytes
        """At rest, of several texts together."""
        self.taken_bytes = 0
        """COPIES are in it."""

    def fits(self, at_rest: int, *, alone: bool) -> bool:
        """Take that much, if it may be taken. A text that is alone is bounded by the memory only, not by `most_bytes`."""
        with self._caches.changed:
            if at_rest * COPIES > self._caches.room(self) or (not alone and at_rest > self.most_bytes):
                return False
            self._set(at_rest)
        return True

    def ever_fits(self, at_rest: int) -> bool:
        """Whether a text alone would fit if no other version had any text."""
        with self._caches.changed:
            return at_rest * COPIES <= self._caches.room(self, idle=True)

    def take(self, at_rest: int) -> None:
        """So much it is now, whatever may be."""
        with self._caches.changed:
            self._set(at_rest)

    def wait(self, seconds: float) -> None:
        """Until somebody has given something back, for so long at most."""
        with self._caches.changed:
            self._caches.changed.wait(seconds)

    def end(self) -> None:
        """The version is gone, and its claim."""
        self.take(0)
        self._caches.forget(self)

    def _set(self, at_rest: int) -> None:
        less = at_rest * COPIES < self.taken_bytes
        self.taken_bytes = at_rest * COPIES
        if less:
            self._caches.changed.notify_all()


class Caches:
    """One a process. Every method may be called from any thread."""

    def __init__(self, budget_bytes: int | None, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """`budget_bytes`: for models and caches together; None: not known, so nothing is refused for it."""
        self.budget_bytes = budget_bytes
        self.changed = threading.Condition()
        """Its lock is that of all that follows, and of the shares."""
        self._monotonic = monotonic
        self._shares: list[Share] = []
        self._models: WeakSet[Holder] = WeakSet()
        self._coming = 0

    def share(self, model: TextModel, most_bytes: int) -> Share:
        """The share of a version that begins to generate; `most_bytes` at rest is the most of several texts together."""
        found = Share(self, COPIES * claim_at_rest(model, most_bytes), most_bytes)
        with self.changed:
            self._shares.append(found)
        return found

    def note(self, loaded: Holder) -> None:
        """A version is in memory: reckoned with until its worker has ended, whether anybody routes to it or not."""
        with self.changed:
            self._models.add(loaded)

    @contextmanager
    def coming(self, need_bytes: int, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
        """A model of this size is being loaded: caches that are in its way become smaller first, as far as they can."""
        until = self._monotonic() + patience_seconds
        with self.changed:
            self._coming += need_bytes
            while self._in_the_way() and (left := until - self._monotonic()) > 0:
                self.changed.wait(left)
        try:
            yield
        finally:
            with self.changed:
                self._coming -= need_bytes
                self.changed.notify_all()

    def forget(self, share: Share) -> None:
        with self.changed:
            if share in self._shares:
                self._shares.remove(share)
            self.changed.notify_all()

    def room(self, share: Share, *, idle: bool = False) -> int:
        """What this share may take, its claim at least; `idle`: if the others had no text and nothing were loaded. The lock is held."""
        if self.budget_bytes is None:
            return UNLIMITED
        others = [other for other in self._shares if other is not share]
        theirs = sum(other.claim_bytes if idle else max(other.claim_bytes, other.taken_bytes) for other in others)
        return max(share.claim_bytes, self.budget_bytes - self._held() - theirs - (0 if idle else self._coming))

    def _held(self) -> int:
        return sum(version.runtime.memory_bytes for version in tuple(self._models) if not version.ended)

    def _in_the_way(self) -> bool:
        beyond = sum(max(0, share.taken_bytes - share.claim_bytes) for share in self._shares)
        if self.budget_bytes is None or not beyond:
            return False
        taken = sum(max(share.taken_bytes, share.claim_bytes) for share in self._shares)
        return self._held() + self._coming + taken > self.budget_bytes


def unlimited(model: TextModel, most_bytes: int = UNLIMITED) -> Share:
    """A share of its own, where there is no budget to keep to."""
    return Caches(None).share(model, most_bytes)
