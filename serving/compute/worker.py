"""What the worker thread of a version does with a batch: together, one by one where that fails, less at a time where memory runs out.

Queues, counts and everything else of a version that the event loop touches are serving.compute.engine's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import ModelkeepError, UsageError
from serving.compute.portions import equal_rows, in_portions
from serving.compute.runtimes import Runtime, first_line
from serving.compute.shapes import PromisedShapes
from serving.compute.work import Arrays, Work
from serving.device.memory_limits import BatchLimit
from serving.statuses import OutOfMemoryError

logger = logging.getLogger("serving.compute.engine")

_FAILURES_LOGGED_EVERY_SECONDS = 1.0


class ModelError(ModelkeepError):
    """The model failed on an input. Answered 500 and counted as the version's error."""

    kind = "model"


class Computing:
    """The part of a version that computes. One thread at a time calls `compute` and `run`."""

    def __init__(
        self,
        model: str,
        version: str,
        runtime: Runtime,
        limit: BatchLimit,
        *,
        divisible: bool,
        mark: Callable[[bool], None] | None,
        clean_up: Callable[[str], None] | None,
        clock: Callable[[], float],
    ) -> None:
        """`divisible`: the rows are independent, and the first dimension of what goes in and comes out varies."""
        self.model = model
        self.version = version
        self.runtime = runtime
        self.limit = limit
        self.computing = 0
        """The number of the run of the model that its worker is at; 0 where it is at none. The watchdog looks at it."""
        self._promised = PromisedShapes(runtime.signature)
        self._required = len(runtime.signature.required)
        self._divisible = divisible
        self._batching = divisible and limit.most > 1
        self._mark = mark
        self._clean_up = clean_up
        self._clock = clock
        self._runs = 0
        self._logged_at = -_FAILURES_LOGGED_EVERY_SECONDS

    def compute(self, batch: list[Work]) -> int:
        """Compute a batch into its works; the number of runs that it took."""
        if self._mark is not None:
            self._mark(True)
        started = self._clock()
        for work in batch:
            work.started = started
        try:
            runs = self._compute_single(batch[0]) if len(batch) == 1 else self._compute_together(batch)
        except Exception as error:
            runs = 1  # it was beside the model, where memory may run out too: the thread has the next to compute
            for work in batch:
                if not work.answer and work.failure is None:
                    work.failure, work.finished = self.failure(error), self._clock()
        if self._mark is not None:
            self._mark(False)
        return runs

    def run(self, inputs: Arrays, outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        """One run of the model, whose number the watchdog sees."""
        self._runs = self.computing = self._runs + 1
        try:
            answer = self.runtime.run(inputs, outputs)
        finally:
            self.computing = 0
        self._promised.check(answer)
        return answer

    def failure(self, error: Exception) -> ModelkeepError:
        """What the client is told. The log has the stack trace, once a second at most."""
        if isinstance(error, UsageError):
            return error
        now = self._clock()
        if now - self._logged_at >= _FAILURES_LOGGED_EVERY_SECONDS:
            self._logged_at = now
            logger.warning("%r failed on an input", self, exc_info=error)
        who = f"model '{self.model}' version '{self.version}'"
        if isinstance(error, OutOfMemoryError):
            text = f"{who}: this request does not fit the memory, also by itself: {first_line(error)}"
            return OutOfMemoryError(text, error.requested_bytes)
        return ModelError(f"{who} failed on this input: {first_line(error)}")

    def _compute_single(self, work: Work) -> int:
        runs = 1
        try:
            if self.limit.learnt is not None:
                work.answer, runs = self.in_portions(work.inputs, work.outputs, lambda: work.withdrawn)
            else:
                try:
                    work.answer = self.run(work.inputs, work.outputs)
                except OutOfMemoryError as error:
                    work.answer, more = self.in_portions(work.inputs, work.outputs, lambda: work.withdrawn, error)
                    runs += more
        except Exception as error:  # whatever a model raises is its failure, and no reason to stop serving
            work.failure = self.failure(error)
        work.finished = self._clock()
        return runs

    def _compute_each(self, works: Sequence[Work]) -> int:
        waiting = [work for work in works if not work.withdrawn]
        if len(waiting) > 1:
            return self._compute_together(waiting)
        return self._compute_single(waiting[0]) if waiting else 0

    def _compute_together(self, batch: list[Work]) -> int:
        names = batch[0].inputs
        total = sum(work.rows for work in batch)
        try:
            inputs = {name: np.concatenate([work.inputs[name] for work in batch]) for name in names}
            answer = self.run(inputs, batch[0].outputs)
        except OutOfMemoryError as error:
            self._ran_out(total, error)
            half = len(batch) // 2
            return 1 + self._compute_each(batch[:half]) + self._compute_each(batch[half:])
        except Exception as error:  # as above; computed again one by one, which finds out whose input it was
            logger.debug("%r: a batch of %d failed: %s", self, len(batch), first_line(error))
            return 1 + sum(self._compute_single(work) for work in batch if not work.withdrawn)
        if any(not array.shape or array.shape[0] != total for array in answer.values()):
            logger.warning("%r does not answer a row for every row: it is no longer batched", self)
            self._batching = self._divisible = False
            return 1 + sum(self._compute_single(work) for work in batch if not work.withdrawn)
        finished = self._clock()
        start = 0
        for work in batch:
            end = start + work.rows
            work.answer = {name: array[start:end] for name, array in answer.items()}
            work.finished = finished
            start = end
        if self.limit.learnt is not None:
            self.limit.succeeded(total)
        return 1

    # Where memory runs out

    def in_portions(
        self,
        inputs: Arrays,
        outputs: Sequence[str] | None,
        gone: Callable[[], bool],
        error: OutOfMemoryError | None = None,
    ) -> tuple[dict[str, NDArray[Any]], int]:
        """The answer to a request in portions that fit, and the runs that it took; `error` is what came of it as a whole, just now.

        Raises what `serving.compute.portions.in_portions` does.
        """
        # Independent rows of the required inputs can be divided, nothing else.
        rows = equal_rows(inputs) if self._divisible and len(inputs) == self._required else 0
        if error is not None:
            self._ran_out(rows, error)
        tried = error is not None
        return in_portions(self.run, inputs, outputs, rows, self.limit, ran_out=self._ran_out, gone=gone, tried=tried)

    def _ran_out(self, rows: int, error: OutOfMemoryError) -> None:
        """Learn from it, and make room. A single row, or what cannot be divided, says nothing about how many rows fit."""
        if rows > 1:
            self.limit.ran_out(rows)
        logger.warning(
            "%r ran out of memory with %s: %s", self, f"{rows} rows" if rows else "a request", first_line(error)
        )
        self.count_out_of_memory()
        trim = getattr(self.runtime, "trim", None)
        if trim is not None:
            trim()
        if self._clean_up is None:
            return
        try:
            self._clean_up(f"{self.model} {self.version}")
        except Exception:  # a device in trouble raises what it likes: no reason to end the worker
            logger.exception("%r: the clean-up after memory ran out failed", self)

    def count_out_of_memory(self) -> None:
        """A run did not fit. Called on the worker thread."""
        raise NotImplementedError
