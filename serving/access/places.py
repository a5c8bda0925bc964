"""The places for requests in flight, and who gets them where they are scarce: no key and no model keeps the others out.

Everybody takes what he likes while places are left over. The last ones (an eighth, at least one) go to keys and models that hold less
than their share, which is all places by the number of those that asked lately. Where all are taken, who holds less than his share
waits for the next; who holds it already is told to come again (429). One key that asks for one model has all places.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from serving.statuses import ClientGoneError
from serving.traffic.gate import Receive, client_gone

ACTIVE_SECONDS = 10.0
"""Who has asked within that time has a share."""
_FEWEST_WAITING = 16
_COUNTED_EVERY_SECONDS = 0.05
_COUNTED_ALWAYS = 64
_MOST_SHARES = 1024


class _Share:
    """What a key or a model holds."""

    __slots__ = ("held", "seen", "waiting")

    def __init__(self) -> None:
        self.held = 0
        self.waiting = 0
        self.seen = float("-inf")


class _Shares:
    """The shares of one kind, by name."""

    __slots__ = ("_active", "_counted", "_known", "_rest", "by_name")

    def __init__(self, known: Callable[[str], bool]) -> None:
        self.by_name: dict[str, _Share] = {}
        self._rest = _Share()
        self._known = known
        self._active, self._counted = 1, float("-inf")

    def add(self, name: str, now: float) -> _Share:
        """The share of one that has none yet. What is not known (a model by a name that somebody made up) shares one."""
        if not self._known(name):
            return self._rest
        if len(self.by_name) >= _MOST_SHARES:
            self.by_name = {n: s for n, s in self.by_name.items() if _is_active(s, now)}
            if len(self.by_name) >= _MOST_SHARES:
                return self._rest
        share = self.by_name[name] = _Share()
        return share

    def active(self, now: float) -> int:
        """How many there are to share; where there are very many, as of a moment ago."""
        if len(self.by_name) <= _COUNTED_ALWAYS or now - self._counted > _COUNTED_EVERY_SECONDS:
            count = sum(_is_active(share, now) for share in self.by_name.values())
            self._active, self._counted = max(1, count + _is_active(self._rest, now)), now
        return self._active


class Place(NamedTuple):
    """One that a request has taken: give it to `leave`."""

    key: _Share
    model: _Share


class _Waiter(NamedTuple):
    place: Place
    turn: asyncio.Future[Place]
    patient: bool
    for_long: bool


class Places:
    """On the event loop only. `known` says whether a model of that name is here."""

    def __init__(
        self,
        capacity: int = 1,
        *,
        known: Callable[[str], bool] = lambda model: True,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.in_flight = 0
        self.waiting = 0
        """Requests that wait for a place."""
        self.refused = {"full": 0, "key": 0, "model": 0}
        """Refusals: nobody had less than his share to wait for; the key, or the model, held its share while others asked."""
        self.left = 0
        """Clients that went while they waited."""
        self._keys = _Shares(lambda key: True)
        self._models = _Shares(known)
        self._waiters: list[_Waiter] = []
        self._monotonic = monotonic
        self.resize(capacity)

    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        reserve = max(1, capacity // 8) if capacity > 1 else 0
        self.ample = capacity - reserve
        """Below so many in flight nobody is asked how much he holds."""

    def asked(self) -> set[str]:
        """The models that are asked: now, or within ACTIVE_SECONDS."""
        now = self._monotonic()
        return {name for name, share in self._models.by_name.items() if _is_active(share, now)}

    def enter(self, key: str, model: str, *, for_long: bool = False) -> Place | None:
        """A place, None where there is none for this key and model now; see `turn`. `for_long`: it is held for minutes, so none of the last
        ones is taken, which are left to other models, whoever asks for them then.
        """
        now = self._monotonic()
        share = self._keys.by_name.get(key)
        if share is None:
            share = self._keys.add(key, now)
        of_model = self._models.by_name.get(model)
        if of_model is None:
            of_model = self._models.add(model, now)
        share.seen = of_model.seen = now
        if self.in_flight >= self.ample and (for_long or not self._may_take(share, of_model, now)):
            return None
        self.in_flight += 1
        share.held += 1
        of_model.held += 1
        return Place(share, of_model)

    async def turn(
        self,
        key: str,
        model: str,
        timeout_seconds: float,
        *,
        patient: bool = False,
        for_long: bool = False,
        receive: Receive | None = None,
    ) -> Place | None:
        """Wait for the place of a request that ends, where `enter` had none. None at once where key and model hold their share already,
        and after `timeout_seconds`. `patient`: wait whatever they hold. `for_long`: as for `enter`. `receive` is the client's: if he goes, waiting ends.

        Raises ClientGoneError.
        """
        now = self._monotonic()
        share = self._keys.by_name.get(key) or self._keys.add(key, now)
        of_model = self._models.by_name.get(model) or self._models.add(model, now)
        share.seen = of_model.seen = now
        if not patient and (why := self._refusal(share, of_model, now)) is not None:
            self.refused[why] += 1
            return None
        turn: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(Place(share, of_model), turn, patient, for_long)
        self._waiters.append(waiter)
        self.waiting += 1
        share.waiting += 1
        of_model.waiting += 1
        gone = None if receive is None else asyncio.create_task(client_gone(receive))
        kept = False
        try:
            waited: set[asyncio.Future[Any]] = {turn} if gone is None else {turn, gone}
            await asyncio.wait(waited, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            if gone is not None and gone.done():
                self.left += 1
                raise ClientGoneError("the client went while it waited for a place")
            if turn.done():
                kept = True
                return turn.result()
            self.refused["full"] += 1
            return None
        finally:
            if gone is not None:
                gone.cancel()
            if not turn.done() or turn.cancelled():
                self._forget(waiter)
            elif not kept:  # it came in the same moment
                self.leave(turn.result())

    def words(self, key: str, model: str) -> str:
        """Why a request has no place, for its client."""
        by_name, models = self._keys.by_name, self._models.by_name
        here = f"the server has {self.in_flight} requests in flight, of at most {self.capacity}"
        if (share := by_name.get(key)) is not None and share.held < self.in_flight and key:
            return f"{here}, {share.held} of them with this key, others ask too; try again later"
        if (share := models.get(model)) is not None and share.held < self.in_flight:
            return f"{here}, {share.held} of them for model '{model}', others are asked too; try again later"
        if self.in_flight < self.capacity:
            return f"{here}, and keeps the rest for other models; try again later"
        return f"{here}, its limit; try again later"

    def leave(self, place: Place) -> None:
        """Give the place back; who waits for one gets it."""
        self.in_flight -= 1
        place.key.held -= 1
        place.model.held -= 1
        if self._waiters:
            self._hand_over()

    def _may_take(self, share: _Share, of_model: _Share, now: float) -> bool:
        if self.in_flight < self.ample:
            return True
        if self.in_flight >= self.capacity:
            return False
        return self._below(self._keys, share, now) and self._below(self._models, of_model, now)

    def _below(self, shares: _Shares, share: _Share, now: float) -> bool:
        active = shares.active(now)
        return active == 1 or share.held < max(1, self.capacity // active)

    def _low(self, shares: _Shares, share: _Share, now: float) -> bool:
        """Whether it is one of several, and holds or waits for less than its share."""
        active = shares.active(now)
        return active > 1 and share.held + share.waiting < max(1, self.capacity // active)

    def _refusal(self, share: _Share, of_model: _Share, now: float) -> str | None:
        """Why this one may not wait."""
        low = self._low(self._keys, share, now)
        if not low and not self._below(self._keys, share, now):
            return "key"
        if not low and not self._low(self._models, of_model, now):
            return "full" if self._models.active(now) == 1 else "model"
        return "full" if self.waiting >= max(_FEWEST_WAITING, self.capacity) else None

    def _hand_over(self) -> None:
        now = self._monotonic()
        while self._waiters and self.in_flight < self.capacity:
            # One that has just been cancelled, or was too long in waiting, takes itself out when its task comes on.
            ready = [
                w
                for w in self._waiters
                if not w.turn.done()
                and (self.in_flight < self.ample or not w.for_long)
                and (w.patient or self._may_take(w.place.key, w.place.model, now))
            ]
            if not ready:
                return
            waiter = min(ready, key=lambda w: w.place.key.held)  # of equals the one that came first
            self._forget(waiter)
            self.in_flight += 1
            waiter.place.key.held += 1
            waiter.place.model.held += 1
            waiter.turn.set_result(waiter.place)

    def _forget(self, waiter: _Waiter) -> None:
        self._waiters.remove(waiter)
        self.waiting -= 1
        waiter.place.key.waiting -= 1
        waiter.place.model.waiting -= 1


def key_of(scope: Any) -> str:
    """The key that a request came with, as the guard found it; empty where it came with none."""
    state = scope.get("state")
    who = state.get("who") if state else None
    return (who.key_id or "") if who is not None else ""


def _is_active(share: _Share, now: float) -> bool:
    return share.held > 0 or share.waiting > 0 or now - share.seen < ACTIVE_SECONDS
