"""One request on its way through a version: what was asked, where it stands, what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from registry.errors import ModelkeepError
from serving.figures.telemetry import WatchCounts

Arrays = Mapping[str, NDArray[Any]]


class Work:
    """One request on its way through a version. `future` resolves on the event loop once `answer` is there.

    `company` is how many were computed with it, itself among them. `asker` is the API key that sent it, "" where none did; `round`
    where it stands among those of other keys (serving.traffic.turns).
    """

    __slots__ = (
        "answer",
        "asker",
        "batch",
        "company",
        "counted",
        "counts",
        "enqueued",
        "failure",
        "finished",
        "future",
        "inputs",
        "key",
        "mark",
        "outputs",
        "round",
        "rows",
        "slow_threshold_seconds",
        "started",
        "withdrawn",
    )

    def __init__(
        self,
        inputs: Arrays,
        outputs: tuple[str, ...] | None,
        rows: int,
        key: object,
        future: asyncio.Future[None],
        enqueued: float,
        counts: WatchCounts | None,
        slow_threshold_seconds: float | None,
        mark: int | None = None,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.rows = rows
        self.key = key
        self.mark = mark
        self.asker = ""
        self.round = 0
        self.batch = 0
        self.future = future
        self.enqueued = enqueued
        self.counts = counts
        self.slow_threshold_seconds = slow_threshold_seconds
        self.started = self.finished = enqueued
        self.answer: dict[str, NDArray[Any]] = {}
        self.failure: ModelkeepError | None = None
        self.withdrawn = False
        self.counted = False
        self.company = 1

    @property
    def queue_seconds(self) -> float:
        return self.started - self.enqueued

    @property
    def model_seconds(self) -> float:
        return self.finished - self.started


class ParkedWork(Work):
    """One that the cache may answer. `cached` says who did (serving.caching.cache), None where the version computed it.

    `left_seconds` is how long its answer is still one, where another server computed it; `found` the key under which this
    process holds it, `serial` the number of what it found there.
    """

    __slots__ = ("cached", "found", "left_seconds", "saved_seconds", "serial")

    def __init__(
        self,
        inputs: Arrays,
        outputs: tuple[str, ...] | None,
        future: asyncio.Future[None],
        now: float,
        mark: int | None,
    ) -> None:
        super().__init__(inputs, outputs, 0, None, future, now, None, None, mark)
        self.cached: str | None = None
        self.saved_seconds = 0.0
        self.left_seconds: float | None = None
        self.found = b""
        self.serial = 0


def cached_by(work: Work) -> str | None:
    """Who answered in the version's place; None where it did itself."""
    return work.cached if type(work) is ParkedWork else None


def saved_by(work: Work) -> float:
    """Seconds of the model that this saved."""
    return work.saved_seconds if type(work) is ParkedWork else 0.0


def left_of(work: Work) -> float | None:
    """How long its answer is still one; None for as long as a new one is."""
    return work.left_seconds if type(work) is ParkedWork else None
