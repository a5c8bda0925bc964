"""A loaded version that generates text: the face of every version (serving.compute.engine), and `generate`. Its worker does both kinds of work."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from registry.errors import ModelkeepError, UnavailableError, UsageError
from registry.textmodels import TextModel
from serving.compute.engine import LoadedVersion, ModelError
from serving.compute.runtimes import Runtime
from serving.figures.telemetry import WatchCounts
from serving.statuses import ClientGoneError, DeadlineError, OutOfMemoryError, QueueFullError
from serving.text.batching import Batcher, Gained, ShapeError
from serving.text.caches import Caches
from serving.text.copies import CopiedText, Copies
from serving.text.counts import TextCounts
from serving.text.sampling import NotFiniteError
from serving.text.sequences import Piece, Reason, TextSequence, Wanted
from serving.text.words import Words
from serving.traffic.routing import Route
from serving.traffic.turns import Turns

AMPLE_SECONDS = 1.0
"""Any model that is fit to serve gives a first token within it; see Generation.expire."""
_STALLED_SECONDS = 0.05
"""Between two looks whether the texts of other versions have left room; who gives something back is heard at once."""
_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (NotFiniteError, "not_finite"),
    (OutOfMemoryError, "memory"),
    (ShapeError, "shape"),
    (DeadlineError, "deadline"),
    (UnavailableError, "closed"),
)


class GenerationError(ModelError):
    """The model failed on a text. `kind` is one of TextCounts.errors."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Generation:
    """One text on its way to a client. Used on the event loop only."""

    def __init__(self, version: TextVersion, wanted: Wanted, route: Route | None, mark: int | None) -> None:
        self.version = version
        self.text = TextSequence(wanted, version.words, version.text.end_ids, owner=self)
        self.mark = mark
        self.counts: WatchCounts | None = None
        self.slow_threshold_seconds: float | None = None
        if route is not None and route.watch:
            self.counts = version.counts_for(route)
            self.slow_threshold_seconds = route.slow_threshold_seconds
        self.tokens = 0
        self.done = False
        self.reason: Reason | None = None
        self._pieces: deque[Piece] = deque()
        self._news = asyncio.Event()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The text as it comes, the last piece with a reason. Raises what the text failed with."""
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                if piece.error is not None:
                    raise piece.error
                yield piece
                if piece.reason is not None:
                    return
            self._news.clear()
            await self._news.wait()

    def take(self, piece: Piece) -> None:
        """What a step gained."""
        if self.done:
            return
        self.tokens += piece.tokens
        self.done, self.reason = piece.last, piece.reason
        self._pieces.append(piece)
        self._news.set()

    def cancel(self) -> None:
        """Its client is gone: its place is free at the next step. Whoever waits for it gets ClientGoneError."""
        if not self.done:
            self.version.leave(self)
            self.version.text_counts.ended("cancelled")
            self.take(Piece(error=ClientGoneError("the client went")))

    def expire(self, seconds: float, *, own: bool) -> None:
        """It has run out of time. `own`: of the client's; that is the version's error only where it was slow by the measure of its
        route, or, without one, where no token at all came in AMPLE_SECONDS: how many tokens were asked for is the client's affair.
        """
        threshold = self.slow_threshold_seconds
        slow = seconds > threshold if threshold is not None else not self.tokens and seconds >= AMPLE_SECONDS
        who = f"model '{self.version.model}' version '{self.version.version}'"
        error = DeadlineError(f"{who} had generated {self.tokens} tokens when the text's {seconds:g} seconds were over")
        self.fail(error, count_as_error=slow if own else True)

    def fail(self, error: ModelkeepError, *, count_as_error: bool) -> None:
        """Give the text up: whoever waits for it gets `error`."""
        if not self.done:
            self.version.leave(self)
            self.version.count_ended(self, error, count=count_as_error)
            self.take(Piece(error=error))


class TextVersion(LoadedVersion):
    """A version in memory that generates text, several texts at a time, each step by step.

    Requests of the V2 protocol get one raw run of the graph, between two steps.
    """

    def __init__(
        self,
        model: str,
        version: str,
        digest: str,
        runtime: Runtime,
        *,
        text: TextModel,
        words: Words,
        rows_independent: bool,
        max_batch: int,
        max_running: int,
        max_waiting: int,
        max_cache_bytes: int,
        caches: Caches | None = None,
        trial: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """`max_running` texts are generated at a time, `max_waiting` more wait; `options` are LoadedVersion's.

        Of the memory for `caches` of all versions (None: unlimited) several texts together take `max_cache_bytes` at most.
        Where the validation has not found that texts do not depend on each other (`rows_independent`), they take turns.
        """
        self.text, self.words, self.max_waiting = text, words, max_waiting
        self.trial = trial
        """What the generation at its load showed; see serving.text.trial."""
        self.loaded_at_unix_seconds = time.time()
        self._open: set[Generation] = set()
        self._text_turns = Turns()
        self._told = (0, 0)
        """Of the batcher's `gave_way` and `cut`, what is in the counts."""
        self.copies = Copies(self)
        """Of what the stable version was asked, where this one is the candidate in a shadow."""
        self._ended: ModelkeepError | None = None
        """What all texts were ended with: nobody would see the end of another one."""
        self._share = (caches or Caches(None)).share(text, max_cache_bytes)
        try:
            self.batcher = Batcher(
                self.run, text, runtime.signature, max_running=max_running, max_rows=max_batch if rows_independent else 1,
                share=self._share, failure=self._text_failure, ran_out=lambda error: self._ran_out(0, error),
            )  # fmt: skip
            # Raw runs are not what the validation looked at: each for itself.
            super().__init__(model, version, digest, runtime, rows_independent=False, max_batch=1, **options)
        except BaseException:  # the worker that would end it has not begun
            self._share.end()
            raise

    @property
    def queue_length(self) -> int:
        return super().queue_length + self.batcher.queued

    @property
    def claim_bytes(self) -> int:
        return super().claim_bytes + self._share.claim_bytes

    def cache_figures(self) -> dict[str, int]:
        share, batcher = self._share, self.batcher
        return {
            "bytes": batcher.cache_bytes,
            "claim_bytes": share.claim_bytes,
            "most_bytes": share.most_bytes,
            "bytes_per_token": self.text.cache_bytes_per_token,
            "computed_again": self.text_counts.computed_again,
            "cut": self.text_counts.cut,
        }

    @property
    def shadow_queue_length(self) -> int:
        return super().shadow_queue_length + len(self.copies)

    @property
    def has_clients(self) -> bool:
        """Whether a client waits for a text of this version."""
        return bool(self._open)

    @property
    def takes_texts(self) -> bool:
        return not self._closing and self._refusal is None and self._ended is None

    @property
    def text_counts(self) -> TextCounts:
        """With the other counts of this version, which outlive this object."""
        if self.telemetry.text is None:
            self.telemetry.text = TextCounts()
        return self.telemetry.text

    def generate(
        self, wanted: Wanted, route: Route | None = None, mark: int | None = None, asker: str = ""
    ) -> Generation:
        """Queue a text. `route` is what chose this version; `mark` that of the client's key, where it sent one; `asker` its API key: of
        each that waits one in turn.

        Raises UsageError where there is no prompt, or prompt and answer are longer than the model's context, QueueFullError, UnavailableError.
        """
        limit = self.text.context_length
        if not wanted.prompt:
            raise UsageError("the prompt is empty: the model needs a token at least to begin with")
        if len(wanted.prompt) + wanted.max_tokens > limit:
            raise UsageError(
                f"the prompt has {len(wanted.prompt)} tokens and max_tokens is {wanted.max_tokens}: together they may be {limit}, "
                f"the context length of model '{self.model}'"
            )
        if self._refusal is not None:
            self._refuse(self._refusal, route, mark)
        if self._closing:
            raise UnavailableError(f"model '{self.model}' version '{self.version}' is closed")
        if self._ended is not None:
            raise self._ended.with_traceback(None)
        if len(self._open) >= self.batcher.max_running + self.max_waiting:
            raise QueueFullError(
                f"model '{self.model}' version '{self.version}' has {self.max_waiting} texts waiting beside the {self.batcher.max_running} "
                "that it generates at a time; try again later"
            )
        generation = Generation(self, wanted, route, mark)
        self._open.add(generation)
        self.text_counts.prompt_tokens += len(wanted.prompt)
        generation.text.asker = asker
        self.put_text(generation.text)
        return generation

    def put_text(self, text: TextSequence) -> None:
        """Into the queue of the worker."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._text_turns.put(self.batcher.waiting, text)
        self._bell.pull(self._loop)

    def leave(self, generation: Generation) -> None:
        """It is not computed any further."""
        self._open.discard(generation)
        self.leave_text(generation.text)

    def leave_text(self, text: TextSequence) -> None:
        text.cancelled = True
        with suppress(ValueError):  # it runs already
            self.batcher.waiting.remove(text)
        if self._loop is not None:
            self._bell.pull(self._loop)

    def end_texts(self, error: ModelkeepError) -> None:
        """End every open text with `error`, which is none of the version's, and take no more."""
        self._ended = error
        self.copies.end()
        for generation in tuple(self._open):
            generation.fail(error, count_as_error=False)

    def close(self) -> None:
        super().close()
        self.end_texts(UnavailableError(f"model '{self.model}' version '{self.version}' was taken out of service"))

    def declare_hung(self, reason: str, error: ModelkeepError) -> None:
        super().declare_hung(reason, error)
        self.copies.end()
        for generation in tuple(self._open):
            generation.fail(error, count_as_error=True)

    def count_ended(self, generation: Generation, error: ModelkeepError | None, *, count: bool = True) -> None:
        """A text is at its end, or failed. `count`: as a request of the version."""
        text, telemetry = generation.text, self.telemetry
        self._open.discard(generation)
        if error is not None:
            self.text_counts.ended("error", kind_of(error))
            self.telemetry.out_of_memory_failed += isinstance(error, OutOfMemoryError)
        if not count:
            return
        now = time.perf_counter()
        latency = now - text.submitted
        if text.started is not None:
            telemetry.queue_seconds += text.started - text.submitted
            telemetry.model_seconds += now - text.started
        threshold = generation.slow_threshold_seconds
        slow = threshold is not None and latency > threshold
        failed = error is not None
        telemetry.total.record(latency, error=failed, slow=slow, batch=self._batch)
        if text.asker != telemetry.askers.last:
            telemetry.askers.changed(text.asker)
        if failed:
            telemetry.askers.failed(text.asker)
        if generation.counts is not None:
            generation.counts.record(latency, error=failed, slow=slow, batch=self._batch, key=generation.mark)

    def _deliver_texts(self, gained: Gained) -> None:
        """What a step gained, to those who wait for it."""
        counts, tokens = self.text_counts, 0
        gave_way, cut = self.batcher.gave_way, self.batcher.cut
        counts.computed_again += gave_way - self._told[0]
        counts.cut += cut - self._told[1]
        self._told = gave_way, cut
        clients = 0
        for text, piece in gained:
            if isinstance(text.owner, CopiedText):
                self.copies.take(text.owner, piece)
                continue
            clients += 1
            generation: Generation = text.owner
            if generation.done:
                continue
            tokens += piece.tokens
            if not generation.tokens and piece.tokens and text.first_at is not None:
                counts.first(text.first_at - text.submitted)
            if piece.last:
                self.count_ended(generation, piece.error)
                if piece.reason is not None:
                    counts.ended(piece.reason)
            generation.take(piece)
        counts.generated(tokens)
        self.telemetry.rows += clients
        if clients:
            self._deliver([], 1)  # a step is a run of the model: the next one has another number

    # What the worker thread runs

    def _serve(self) -> None:
        try:
            while True:
                if self._live and (batch := self._take()):
                    self._report(self._deliver, batch, self.compute(batch))
                if self.batcher.busy:
                    self._step()
                elif self._live:
                    continue
                elif self._copies:
                    with suppress(IndexError):
                        self._compute_copy(self._copies.popleft())
                elif self._closing:
                    return
                else:
                    self._bell.wait()
        finally:
            self.batcher.drop()
            self._share.end()
            self._end_worker()

    def _step(self) -> None:
        if self._mark is not None:
            self._mark(True)
        try:
            gained = self.batcher.step()
        except Exception as error:  # a fault of this server: nobody waits for an answer that cannot come
            if isinstance(error, MemoryError):
                error = OutOfMemoryError(f"no memory for the texts that are under way: {error}")
            failure = self._text_failure(error)
            gained = [*self.batcher.gained, *((text, Piece(error=failure)) for text in self.batcher.drop())]
        finally:
            if self._mark is not None:
                self._mark(False)
        if gained:
            self._report(self._deliver_texts, gained)
        if self.batcher.stalled:
            self._share.wait(_STALLED_SECONDS)

    def _text_failure(self, error: Exception) -> ModelkeepError:
        found = self.failure(error)
        return found if isinstance(error, OutOfMemoryError) else GenerationError(str(found), kind_of(error))


def kind_of(error: Exception) -> str:
    """Of TextCounts.errors."""
    if isinstance(error, GenerationError):
        return error.kind
    return next((kind for known, kind in _KINDS if isinstance(error, known)), "model")
