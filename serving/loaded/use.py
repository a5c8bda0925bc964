"""When models were asked last, also before this process: who is loaded first, and who goes first."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from serving.process import documents
from serving.state import Serving

log = logging.getLogger("modelkeep.residency")

_WRITTEN_EVERY_SECONDS = 30.0
_FORMAT = 1


class Use:
    """On the event loop, but for the writing. Nothing but an order depends on it, so a file that is lost or damaged is only logged."""

    def __init__(
        self,
        serving: Serving,
        path: Path,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._serving, self._path, self._monotonic, self._clock = serving, path, monotonic, clock
        self._used: dict[str, float] = {}
        self._written: tuple[float, dict[str, float]] = (float("-inf"), {})

    def look(self) -> None:
        """See what was asked since: before `at`, which is asked for many."""
        now = self._clock()
        # By a clock that was ahead: until now, or who is asked from here on would look older than that until it is there again.
        self._used = {model: min(at, now) for model, at in self._used.items()}
        for (model, _), version in self._serving.loaded.items():
            last = now if version.references else version.telemetry.last_inference_unix_seconds
            if last is None:
                continue
            if last > now:
                self._used.setdefault(model, now)
            elif last > self._used.get(model, 0.0):
                self._used[model] = last

    def at(self, model: str) -> float:
        """Unix time at which a model was asked last, as far as it was known at the last look; 0 where it never was. One that computes: then."""
        return self._used.get(model, 0.0)

    def recall(self) -> None:
        """What a process before this one knew."""
        try:
            document = json.loads(self._path.read_text())
            if document["format"] != _FORMAT:
                raise ValueError(f"it is of format {document['format']!r}")
            self._used = {str(model): float(at) for model, at in document["used"].items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.error(
                "when models were asked last cannot be read from %s, they are loaded in any order: %s",
                self._path,
                error,
            )

    async def keep(self, *, now: bool = False) -> None:
        """Write it where there is something new, at most every half minute."""
        self.look()
        used = {model: at for model in self._serving.routes if (at := self.at(model))}
        at, last = self._written
        if used == last or not (now or self._monotonic() - at >= _WRITTEN_EVERY_SECONDS):
            return
        self._written = (self._monotonic(), used)
        try:
            await asyncio.to_thread(documents.replace, self._path, {"format": _FORMAT, "used": used})
        except OSError as error:
            log.error("when models were asked last could not be kept in %s: %s", self._path, error)
