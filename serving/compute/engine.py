"""One loaded version: its queue, its worker thread, its micro-batches. Who is routed here is decided elsewhere.

Everything but the worker's own loop runs on the event loop, so counts and references need no locks.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from registry.errors import ModelkeepError, UnavailableError, UsageError
from serving.compute.handover import Bell, Deliveries, deliveries_of
from serving.compute.runtimes import Runtime
from serving.compute.work import Arrays, ParkedWork, Work, cached_by
from serving.compute.worker import Computing
from serving.compute.worker import ModelError as ModelError
from serving.device.memory_limits import BatchLimit
from serving.figures.telemetry import VersionTelemetry, WatchCounts
from serving.statuses import OutOfMemoryError
from serving.statuses import QueueFullError as QueueFullError
from serving.traffic.routing import Route
from serving.traffic.shadow import AGREES, Comparison, Copy, compare
from serving.traffic.turns import Turns
from serving.wire.v2 import Codec

if TYPE_CHECKING:
    from serving.caching.cache import VersionAnswers

logger = logging.getLogger(__name__)

SHADOW_QUEUE_SIZE = 16
_batches = itertools.count(1)
"""Numbers for executed batches, over all versions: counts outlive the version that they began with."""


class LoadedVersion(Computing):
    """A version in memory, with one worker thread.

    Queued requests are computed together, up to `max_batch` rows, only where the rows are independent and the first
    dimension of every input and output is free; nothing ever waits for company. A batch that fails is computed again
    one by one, so that a bad input fails alone; one that runs out of memory is halved until it fits. `mark(True)` and
    `mark(False)` are called on the worker thread around every computation (the supervisor learns from it who was
    computing at a crash).
    """

    def __init__(
        self,
        model: str,
        version: str,
        digest: str,
        runtime: Runtime,
        *,
        rows_independent: bool,
        max_batch: int,
        queue_size: int,
        shadow_queue_size: int = SHADOW_QUEUE_SIZE,
        deterministic: bool = False,
        labels: Mapping[str, Sequence[str]] | None = None,
        mark: Callable[[bool], None] | None = None,
        limit: BatchLimit | None = None,
        clean_up: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`limit` bounds the rows by what memory allows; `clean_up` is called on the worker thread when it ran out."""
        specs = (*runtime.signature.required, *runtime.signature.outputs)
        super().__init__(
            model,
            version,
            runtime,
            limit if limit is not None else BatchLimit(max_batch),
            divisible=rows_independent and all(s.shape[:1] == (-1,) for s in specs),
            mark=mark,
            clean_up=clean_up,
            clock=clock,
        )
        self.digest = digest
        self.rows_independent = rows_independent
        self.max_batch = max_batch
        self.queue_size = queue_size
        self.shadow_queue_size = shadow_queue_size
        self.deterministic = deterministic
        self.quality: Mapping[str, float] = {}
        """By metric, as its validation measured it; for /metrics."""
        self.load_seconds = 0.0
        """What its loading took, with the fetch of its files, also where nobody waited for it."""
        self.answers: VersionAnswers | None = None
        """Its part of the cache, where there is one and the version is deterministic; see serving.caching.cache."""
        self.codec = Codec(runtime.signature, labels)
        self.telemetry = VersionTelemetry()
        self.watch: dict[int, WatchCounts] = {}
        self.references = 0
        self.version_header = version.encode("latin-1", "replace")
        self.id_part: tuple[int, bytes] = (-1, b"")
        """(generation, what the ids of requests hold of it and of this version), as made last."""
        self._fixed_rows = all(-1 not in s.shape[1:] for s in runtime.signature.required)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: deque[Work] = deque()
        self._turns = Turns()
        self._copies: deque[Copy] = deque()
        self._bell = Bell()
        self._back: Deliveries | None = None
        self._closing = False
        self._idle: list[asyncio.Future[None]] = []
        self.hung: str | None = None
        """Why it counts as hanging; it then refuses what it is asked. See serving.loaded.watchdog."""
        self._refusal: ModelkeepError | None = None
        self._batch = next(_batches)
        """The number of the batch that is delivered next: whatever runs out of time now waits for that one."""
        self._thread = threading.Thread(target=self._serve, name=f"{model}/{version}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"LoadedVersion({self.model!r}, {self.version!r})"

    # What the event loop calls

    @property
    def batching(self) -> bool:
        return self._batching

    @property
    def queue_length(self) -> int:
        return len(self._live)

    @property
    def claim_bytes(self) -> int:
        """What it takes of the memory for models, whatever it is asked: its weights, and more where it generates text."""
        return self.runtime.memory_bytes

    @property
    def ended(self) -> bool:
        """Whether its worker has ended, and the runtime is closed."""
        return not self._thread.is_alive()

    def cache_figures(self) -> dict[str, int] | None:
        """Of its key/value caches; None where it has none."""
        return None

    @property
    def shadow_queue_length(self) -> int:
        return len(self._copies)

    def acquire(self) -> None:
        """Hold the version: `drain` waits until every hold is released."""
        self.references += 1

    def release(self) -> None:
        self.references -= 1
        if not self.references and self._idle:
            for waiter in self._idle:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle.clear()

    def counts_for(self, route: Route) -> WatchCounts:
        """The counts of this version under `route.generation`; kept until Serving forgets them."""
        counts = self.watch.get(route.generation)
        if counts is None:
            counts = self.watch[route.generation] = WatchCounts()
        return counts

    def submit(
        self,
        inputs: Arrays,
        outputs: tuple[str, ...] | None,
        route: Route | None = None,
        mark: int | None = None,
        asker: str = "",
    ) -> Work:
        """Queue a request that the codec has checked. `route` is what chose this version, None where the client did.

        `mark` is that of the client's key (`routing.mark_of`), where it sent one; `asker` its API key: of each key one in turn.
        Raises QueueFullError, or UnavailableError once the version is closed or where it hangs.
        """
        if self._refusal is not None:
            self._refuse(self._refusal, route, mark)
        self._check_room()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        counts = slow_threshold = None
        if route is not None and route.watch:
            counts = self.counts_for(route)
            slow_threshold = route.slow_threshold_seconds
        rows, key = self._batch_key(inputs, outputs) if self._batching else (0, None)
        work = Work(inputs, outputs, rows, key, self._loop.create_future(), self._clock(), counts, slow_threshold, mark)
        work.asker = asker
        self._turns.put(self._live, work)
        self._bell.pull(self._loop)
        return work

    def park(self, inputs: Arrays, outputs: tuple[str, ...] | None, mark: int | None = None) -> ParkedWork:
        """A request that is not queued: somebody else answers it, or `queue` does it later. No promotion judges it."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return ParkedWork(inputs, outputs, self._loop.create_future(), self._clock(), mark)

    def queue(self, work: ParkedWork) -> None:
        """Queue a parked request. Raises what `submit` does."""
        if self._refusal is not None:
            self._refuse(self._refusal, None, work.mark)
        self._check_room()
        if self._batching:
            work.rows, work.key = self._batch_key(work.inputs, work.outputs)
        self._turns.put(self._live, work)
        assert self._loop is not None  # `park` has set it
        self._bell.pull(self._loop)

    def _check_room(self) -> None:
        if len(self._live) >= self.queue_size:
            raise QueueFullError(
                f"model '{self.model}' version '{self.version}' has {self.queue_size} requests waiting; try again later"
            )
        if self._closing:
            raise UnavailableError(f"model '{self.model}' version '{self.version}' is closed")

    def _refuse(self, error: ModelkeepError, route: Route | None, mark: int | None) -> NoReturn:
        """It hangs: an error of its own, of one cause with all others since then."""
        self.telemetry.total.record(0.0, error=True, slow=False, batch=self._batch)
        if route is not None and route.watch:
            self.counts_for(route).record(0.0, error=True, slow=False, batch=self._batch, key=mark)
        # One error for all: with the traces of those before it would hold their frames, and what was asked.
        raise error.with_traceback(None)

    def declare_hung(self, reason: str, error: ModelkeepError) -> None:
        """Answer everything that waits, and everything that comes, with `error`; tell a runtime that can to give up."""
        self.hung, self._refusal = reason, error
        for work in tuple(self._live):
            self.withdraw(work, error, count_as_error=True)
        with suppress(IndexError):
            while True:
                self.count_dropped(self._copies.popleft())
        interrupt = getattr(self.runtime, "interrupt", None)
        if interrupt is not None:
            interrupt()

    def answers_again(self) -> None:
        """The computation that hung has come to its end after all."""
        resume = getattr(self.runtime, "resume", None)
        if resume is not None:
            resume()
        self.hung = self._refusal = None

    def withdraw(self, work: Work, reason: ModelkeepError, *, count_as_error: bool) -> None:
        """Give a request up: it is not computed if it has not begun, and its future raises `reason`.

        With `count_as_error` (it ran out of time) it counts as the version's error now; otherwise (its client is gone)
        it counts by its outcome if it is being computed already, and not at all if it is not.
        """
        if work.future.done():
            return
        work.withdrawn = True
        with suppress(ValueError):  # the worker has it already
            self._live.remove(work)
        if count_as_error:
            work.batch = self._batch
            self._count(work, self._clock() - work.enqueued, error=True)
        work.future.set_exception(reason)

    def count_output_error(self, work: Work) -> None:
        """The answer could not be encoded: after all, the version failed this request. One from the cache is none of its requests.

        A judge hears of all, since he knows how the stable version did and of whom they come. For the version's health none counts
        where what is not finite came with the request.
        """
        if cached_by(work) is not None:
            return
        if work.counts is not None:
            work.counts.record_error(work.batch, work.mark)
        if all(np.isfinite(array).all() for array in work.inputs.values() if array.dtype.kind == "f"):
            self.telemetry.total.record_error(work.batch, None)
            self.telemetry.total.error_seconds_total += work.finished - work.enqueued
            self.telemetry.askers.failed(work.asker)

    def offer(self, copy: Copy) -> bool:
        """Queue a shadow copy, where there is nothing live to do and room for it."""
        if self._closing or self._live or self.hung is not None or len(self._copies) >= self.shadow_queue_size:
            return False
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._copies.append(copy)
        self._bell.pull(self._loop)
        return True

    def count_dropped(self, copy: Copy) -> None:
        self.telemetry.total.shadow_dropped += 1
        if copy.counts is not None:
            copy.counts.shadow_dropped += 1

    async def drain(self, timeout_seconds: float) -> bool:
        """Wait until nobody holds the version. False where that took longer than `timeout_seconds`."""
        if not self.references:
            return True
        waiter = asyncio.get_running_loop().create_future()
        self._idle.append(waiter)
        done, _ = await asyncio.wait([waiter], timeout=timeout_seconds)
        return bool(done)

    def close(self) -> None:
        """Stop the worker after what it is computing; it then closes the runtime. Returns at once; `join` waits.

        What is still queued (a drain that ran out of time) fails with UnavailableError.
        """
        if self._closing:
            return
        self._closing = True
        error = UnavailableError(f"model '{self.model}' version '{self.version}' was taken out of service")
        for work in tuple(self._live):
            self.withdraw(work, error, count_as_error=False)
        with suppress(IndexError):
            while True:
                self.count_dropped(self._copies.popleft())
        self._bell.ring()

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the worker to end; blocks, so not on the event loop."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _batch_key(self, inputs: Arrays, outputs: tuple[str, ...] | None) -> tuple[int, object]:
        """(rows, what must be equal to share a batch); 0 rows where the request must be computed alone."""
        if len(inputs) != self._required:
            return 0, None  # it brings an optional input, which is for itself alone
        rows = -1
        for array in inputs.values():
            if rows < 0:
                rows = array.shape[0]
            elif array.shape[0] != rows:
                return 0, None
        if self._fixed_rows:
            return rows, outputs
        return rows, (outputs, tuple((name, inputs[name].shape[1:]) for name in sorted(inputs)))

    def _deliver(self, batch: list[Work], batches: int) -> None:
        telemetry = self.telemetry
        telemetry.batches += batches
        telemetry.last_inference_unix_seconds = time.time()
        number, self._batch = self._batch, next(_batches)
        company = len(batch)
        for work in batch:
            work.batch = number
            work.company = company
            failure = work.failure
            if work.withdrawn and failure is None and not work.answer:
                continue  # given up while others of its batch were computed again: it never was, and counts for nothing
            if not work.counted and not isinstance(failure, UsageError):
                telemetry.rows += work.rows or 1
                telemetry.queue_seconds += work.started - work.enqueued
                telemetry.model_seconds += work.finished - work.started
                self._count(work, work.finished - work.enqueued, error=failure is not None)
            future = work.future
            if not future.done():
                if failure is None:
                    future.set_result(None)
                else:
                    telemetry.out_of_memory_failed += isinstance(failure, OutOfMemoryError)
                    future.set_exception(failure)

    def _count(self, work: Work, latency_seconds: float, *, error: bool) -> None:
        work.counted = True
        threshold = work.slow_threshold_seconds
        slow = threshold is not None and latency_seconds > threshold
        # The process remembers no keys for all time: in the totals, an event is a batch.
        self.telemetry.total.record(latency_seconds, error=error, slow=slow, batch=work.batch)
        askers = self.telemetry.askers
        if work.asker != askers.last:
            askers.changed(work.asker)
        if error:
            askers.failed(work.asker)
        if work.counts is not None:
            work.counts.record(latency_seconds, error=error, slow=slow, batch=work.batch, key=work.mark)

    def _deliver_copy(self, copy: Copy, seconds: float | None, error: bool, found: Comparison) -> None:
        if seconds is None:
            self.count_dropped(copy)
            return
        # The model's time alone: a copy waits in its queue on purpose.
        threshold = copy.slow_threshold_seconds
        slow = threshold is not None and seconds > threshold
        for counts in (self.telemetry.total, copy.counts):
            if counts is not None:
                counts.record_copy(
                    error=error, slow=slow, disagrees=found.disagrees, differs=found.differs, inexact=found.inexact
                )

    # What the worker thread runs

    def _serve(self) -> None:
        live, copies, bell = self._live, self._copies, self._bell
        try:
            while True:
                if live:
                    batch = self._take()
                    if batch:
                        self._report(self._deliver, batch, self.compute(batch))
                elif copies:
                    try:
                        copy = copies.popleft()
                    except IndexError:
                        continue
                    self._compute_copy(copy)
                elif self._closing:
                    return
                else:
                    bell.wait()
        finally:
            self._end_worker()

    def _take(self) -> list[Work]:
        """The next request, and those behind it that can be computed with it."""
        live = self._live
        batch: list[Work] = []
        rows, most = 0, self.limit.rows
        while live:
            try:
                work = live[0]
                if batch and (work.key != batch[0].key or rows + work.rows > most or not work.rows):
                    break
                work = live.popleft()
            except IndexError:  # withdrawn by the event loop in between
                break
            if work.withdrawn:
                continue
            if batch and (work.key != batch[0].key or rows + work.rows > most or not work.rows):
                live.appendleft(work)
                break
            batch.append(work)
            rows += work.rows
            if not self._batching or not work.rows:
                break
        return batch

    def _compute_copy(self, copy: Copy) -> None:
        if copy.stable.queue_length:
            self._report(self._deliver_copy, copy, None, False, AGREES)
            return
        if self._mark is not None:
            self._mark(True)
        started = self._clock()
        error, found = False, AGREES
        try:
            try:
                answer = self.run(copy.inputs, copy.outputs)
            except OutOfMemoryError as shortage:  # it shall not count for what live requests are split by
                answer, _ = self.in_portions(copy.inputs, copy.outputs, lambda: False, shortage)
        except Exception as failure:  # as above; it is counted, and no client is concerned
            self.failure(failure)
            error = True
        seconds = self._clock() - started
        if self._mark is not None:
            self._mark(False)
        if not error:
            try:
                found = compare(copy.expected, answer)
            except Exception:  # an answer like no other; the worker has the next to compute
                logger.exception("what %r answered to a shadow copy cannot be compared", self)
                error = True
        self._report(self._deliver_copy, copy, seconds, error, found)

    def count_out_of_memory(self) -> None:
        self._report(self._note_out_of_memory)

    def _note_out_of_memory(self) -> None:
        self.telemetry.out_of_memory += 1

    def _end_worker(self) -> None:
        """The last that it does."""
        try:
            self.runtime.close()
        finally:
            if self._loop is None:
                self._bell.close()
            else:
                self._report(self._bell.close)

    def _report(self, callback: Callable[..., None], *values: Any) -> None:
        loop = self._loop
        assert loop is not None  # set by whoever queued
        try:
            if self._back is None:
                self._back = deliveries_of(loop)
        except RuntimeError:
            if not loop.is_closed():
                raise
            logger.debug("%r finished after the event loop had ended", self)
            return
        self._back.put(callback, values)
