"""The life of a version on this replica: DOWNLOADING, LOADING, READY, IN_USE, UNLOADING, ARCHIVED, ERROR. Told in model-info."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from registry import clock

_GONE_KEPT = 64
Key = tuple[str, str]


class ModelState(StrEnum):
    DOWNLOADING = "DOWNLOADING"
    """Its files come from the artifact store, and are checked."""
    LOADING = "LOADING"
    READY = "READY"
    """Loaded; no request without a version in its path is routed to it."""
    IN_USE = "IN_USE"
    """Its route gives it traffic."""
    UNLOADING = "UNLOADING"
    """It finishes what it has, and gets nothing new."""
    ARCHIVED = "ARCHIVED"
    """No longer in memory."""
    ERROR = "ERROR"


MOVES: dict[ModelState | None, frozenset[ModelState]] = {
    None: frozenset({ModelState.DOWNLOADING}),
    ModelState.DOWNLOADING: frozenset({ModelState.LOADING, ModelState.ERROR}),
    ModelState.LOADING: frozenset(
        {ModelState.READY, ModelState.IN_USE, ModelState.ERROR, ModelState.DOWNLOADING, ModelState.UNLOADING}
    ),
    ModelState.READY: frozenset({ModelState.IN_USE, ModelState.UNLOADING, ModelState.DOWNLOADING}),
    ModelState.IN_USE: frozenset({ModelState.READY, ModelState.UNLOADING, ModelState.DOWNLOADING}),
    ModelState.UNLOADING: frozenset({ModelState.ARCHIVED, ModelState.DOWNLOADING}),
    ModelState.ARCHIVED: frozenset({ModelState.DOWNLOADING}),
    ModelState.ERROR: frozenset({ModelState.DOWNLOADING, ModelState.READY, ModelState.IN_USE}),
}
"""Legal moves. A version that serves goes back to DOWNLOADING where it is loaded again beside itself; if that fails, it goes on."""


@dataclass(frozen=True, slots=True)
class Life:
    state: ModelState
    since: dt.datetime
    error: str | None = None


class Lifecycle:
    """The states of all versions that this process has touched. Told by the event loop and by the loader's thread."""

    def __init__(self, now: Callable[[], dt.datetime] = clock.now) -> None:
        self._now = now
        self._lives: dict[Key, Life] = {}
        self._lock = threading.RLock()

    def move(self, key: Key, state: ModelState, *, error: str | None = None) -> None:
        """Raises ValueError for a move that there is none of. Staying is no move."""
        with self._lock:
            life = self._lives.get(key)
            if life is not None and life.state == state and life.error == error:
                return
            if life is None or life.state != state:
                self._check(key, life, state)
            self._lives.pop(key, None)  # the newest last
            self._lives[key] = Life(state, self._now(), error)
            gone = [k for k, life in self._lives.items() if life.state is ModelState.ARCHIVED]
            for old in gone[:-_GONE_KEPT]:
                del self._lives[old]

    def move_if_legal(self, key: Key, state: ModelState, *, error: str | None = None) -> None:
        """As `move`, but another copy of the version may have been quicker: then its state stays."""
        with self._lock:
            life = self._lives.get(key)
            if state in MOVES[None if life is None else life.state]:
                self.move(key, state, error=error)

    def settle(self, loaded: Iterable[Key], in_use: set[Key]) -> None:
        """After the routes were changed: who is in use, and who is only ready. One that is just being loaded once more is told of later."""
        for key in loaded:
            with self._lock:
                state = self.state(key)
                if state is ModelState.DOWNLOADING:
                    continue
                if state in (ModelState.UNLOADING, ModelState.ARCHIVED):
                    # Another copy of it went while this one was loaded.
                    self.move(key, ModelState.DOWNLOADING)
                    self.move(key, ModelState.LOADING)
                self.move(key, ModelState.IN_USE if key in in_use else ModelState.READY)

    def state(self, key: Key) -> ModelState | None:
        life = self._lives.get(key)
        return None if life is None else life.state

    def as_list(self) -> list[dict[str, Any]]:
        with self._lock:
            lives = sorted(self._lives.items())
        return [
            {
                "model": model,
                "version": version,
                "state": life.state.value,
                "since": clock.text(life.since),
                **({"error": life.error} if life.error else {}),
            }
            for (model, version), life in lives
        ]

    @staticmethod
    def _check(key: Key, life: Life | None, state: ModelState) -> None:
        before = None if life is None else life.state
        if state not in MOVES[before]:
            raise ValueError(f"{key[0]} {key[1]} is {before or 'unknown'} here and cannot become {state}")
