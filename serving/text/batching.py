"""Continuous batching: every step gives each running text its next token, whoever's it is; texts come and go between steps.

With a cache that takes a mask and positions, texts of all lengths share one batch: the cache is padded on the left with zeros that the
mask hides, and each text keeps its own positions, so company changes nothing but the last bits of a float. Without a mask or positions
only texts of one length share a batch. Without a cache the whole texts are computed at each step, padded on the right, where a decoder
does not look. A prompt is read alone, in pieces of READ_TOKENS, so that it does not hold the others up for long.

Texts come as long as what they have now fits the memory (serving.text.caches). Where they outgrow it, or an allocator refuses, the
youngest gives way: its cache is dropped, and it is computed again, prompt and answer so far, when there is room; nobody sees more of that
than a pause. A text that outgrows the memory alone ends there, as one does that has reached its max_tokens.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import ModelkeepError
from registry.signature import DATATYPES, Signature
from registry.textmodels import TextModel
from serving.statuses import OutOfMemoryError
from serving.text.caches import Share
from serving.text.groups import Group, halves, kept
from serving.text.sampling import Logits
from serving.text.sequences import Piece, TextSequence

logger = logging.getLogger(__name__)

READ_TOKENS = 256
"""Of a prompt, in one run. Always the same borders, so that a prompt's numbers do not depend on company."""
LOGITS_BYTES = 256 << 20
"""A graph without a cache answers logits for every token of every text: so much in one run, at most."""
REGROW_STEPS = 512
"""After so many steps without running out of memory, one text more is tried in a batch, and caches as large as they may be."""
AHEAD_TOKENS = 32
"""A text comes where each of those under way has room for so many more tokens: else it would have to give way at once."""

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Mapping[str, NDArray[Any]], tuple[str, ...] | None], Mapping[str, NDArray[Any]]]
Failure = Callable[[Exception], ModelkeepError]
Gained = list[tuple[TextSequence, Piece]]
Computed = tuple[Logits, list[NDArray[Any]]]


class ShapeError(ModelkeepError):
    """The graph's answer is not of the shape that its signature promises. The version's error, answered 500."""


class Batcher:
    """The texts of one version. Used by one thread; `waiting` is filled by another."""

    def __init__(
        self,
        run: Run,
        model: TextModel,
        signature: Signature,
        *,
        max_running: int,
        max_rows: int,
        share: Share,
        failure: Failure,
        ran_out: Callable[[OutOfMemoryError], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`run` computes the graph; `failure` makes of what it raises the error that the client gets.

        Of `max_running` texts under way at most `max_rows` share a batch. `share` says what their caches may take; `ran_out` is told when
        memory did.
        """
        self.model = model
        self.max_running = max_running
        self.most_rows = self._rows_allowed = 1 if model.one_by_one else min(max_rows, max_running)
        """Texts in one batch, at most: fewer after the memory has run out."""
        self.waiting: deque[TextSequence] = deque()
        self.steps = self.rows = 0
        self.running = self.cache_bytes = 0
        """Texts under way, and what their caches take, after the last step: for whoever asks from another thread."""
        self.gave_way = self.cut = 0
        """How often a text gave way to be computed again, and how many ended because the memory held no more of them."""
        self.gained: Gained = []
        """By a step that failed, until it did: a text that is at its end by that is in no group any more, so `drop` does not return it."""
        self.stalled = False
        """Nothing runs, and who waits does not fit beside the texts of other versions: `share.wait`, then another step."""
        self._share = share
        self._learnt_bytes: int | None = None
        """Caches so large at rest went with a run that found no memory, but for a byte."""
        self._later: deque[TextSequence] = deque()
        """Who gave way, the oldest first: before all that wait."""
        self._under_way = 0
        self._apart = False
        """Memory has run out: caches are copied out of what the graph computes in."""
        self._short = False
        self._run = run
        self._failure = failure
        self._ran_out = ran_out
        self._clock = clock
        self._reading: deque[TextSequence] = deque()
        self._groups: list[Group] = []
        self._steps_since_full = 0
        self._types = {spec.name: DATATYPES[spec.datatype] for spec in signature.inputs}
        self._outputs = (model.logits, *(tensor.present for tensor in model.cache))
        self._empty = [
            np.zeros((1, tensor.heads, 0, tensor.size), dtype=DATATYPES[tensor.datatype]) for tensor in model.cache
        ]

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self._later or self._reading or self._groups)

    @property
    def queued(self) -> int:
        """Texts that wait: for their turn, or to be computed again."""
        return len(self.waiting) + len(self._later)

    def step(self) -> Gained:
        """One step of all: who left goes, who waits comes, prompts are read, and every text whose prompt is read gets a token."""
        gained = self.gained = []
        self._let_go()
        self._make_room(gained)
        self._admit(gained)
        self._read(gained)
        self._gather()
        self._under_way = self._count()
        groups, self._groups = self._groups, []
        advanced: list[Group] = []
        try:
            for group in groups:
                advanced += self._advance(group, gained)
        except BaseException:  # a fault of this server: whoever drops the texts shall find all of them
            self._groups = groups
            raise
        self._groups = advanced
        if self._short:
            self._learn()
            self._short = False
        self._regrow()
        self.running = self._count()
        own = sum(part.nbytes for text in self._reading for part in text.cache)
        self.cache_bytes = own + sum(part.nbytes for group in self._groups for part in group.cache)
        if not self.running:
            self._share.take(0)
        self.gained = []
        return gained

    def drop(self) -> list[TextSequence]:
        """Forget all texts; they are returned, none of them at its end."""
        dropped = [*self._reading, *(row for group in self._groups for row in group.rows), *self._later]
        while self.waiting:
            try:
                dropped.append(self.waiting.popleft())
            except IndexError:
                break
        self._reading.clear()
        self._groups.clear()
        self._later.clear()
        self.running = self.cache_bytes = 0
        self._share.take(0)
        return dropped

    # Who takes part

    def _count(self) -> int:
        return len(self._reading) + sum(len(group.rows) for group in self._groups)

    def _let_go(self) -> None:
        if any(text.cancelled for text in self._reading):
            self._reading = deque(text for text in self._reading if not text.cancelled)
        if any(text.cancelled for text in self._later):
            self._later = deque(text for text in self._later if not text.cancelled)
        self._groups = [
            left for group in self._groups if (left := kept(group, lambda text: not text.cancelled)) is not None
        ]

    def _admit(self, gained: Gained) -> None:
        self.stalled = False
        while (self._later or self.waiting) and (count := self._count()) < self.max_running:
            queue = self._later or self.waiting
            try:
                text = queue[0]
                if not text.cancelled and not self._fits(text):
                    if self._ever_fits(text):
                        self.stalled = not count
                        return
                    text.cancelled = True  # whoever takes it from the queue: it is told here
                    gained.append((text, self._too_large(text)))
                text = queue.popleft()
            except IndexError:  # taken back in between
                return
            if text.cancelled:
                continue
            if text.started is None:
                text.started = self._clock()
            if self.model.cache:
                text.cache = self._empty
                self._reading.append(text)
            else:
                self._groups.append(Group([text], [], 0))

    # What their caches take

    def _texts(self) -> list[TextSequence]:
        return [*self._reading, *(row for group in self._groups for row in group.rows)]

    def _at_rest(self, texts: Sequence[TextSequence], ahead: int) -> int:
        """The caches of these texts after a step (so many tokens later, if a text may become that long). In a batch all are of one width."""
        lengths = [min(len(text.ids) + ahead, text.most) for text in texts]
        tokens = len(lengths) * max(lengths, default=0) if self.model.padded else sum(lengths)
        return tokens * self.model.cache_bytes_per_token

    def _fits(self, text: TextSequence) -> bool:
        """Whether this one may come beside those under way."""
        if not self.model.cache:
            return True
        texts = [*self._texts(), text]
        return self._taken(self._at_rest(texts, AHEAD_TOKENS if len(texts) > 1 else 0), alone=len(texts) == 1)

    def _ever_fits(self, text: TextSequence) -> bool:
        return self._share.ever_fits(self._at_rest([text], 0))

    def _taken(self, at_rest: int, *, alone: bool) -> bool:
        """Whether caches of this size may be; they are taken, if so."""
        if not alone and self._learnt_bytes is not None and at_rest > self._learnt_bytes:
            return False
        return self._share.fits(at_rest, alone=alone)

    def _make_room(self, gained: Gained) -> None:
        """Before a step: as long as it would not fit, the youngest gives way. One alone ends, where it would never fit."""
        if not self.model.cache:
            return
        while texts := self._texts():
            if self._taken(self._at_rest(texts, 0), alone=len(texts) == 1):
                return
            youngest = max(texts, key=lambda text: text.submitted)
            self._take_out(youngest)
            if len(texts) == 1 and not self._ever_fits(youngest):
                gained.append((youngest, self._too_large(youngest)))
            else:
                self._later_again(youngest)
        self._share.take(0)

    def _take_out(self, text: TextSequence) -> None:
        self._reading = deque(other for other in self._reading if other is not text)
        self._groups = [
            left for group in self._groups if (left := kept(group, lambda other: other is not text)) is not None
        ]

    def _later_again(self, text: TextSequence) -> None:
        """Its cache is dropped; its tokens and its random numbers stay, so that it goes on as if nothing had been."""
        text.fed, text.cache = 0, []
        self.gave_way += 1
        self._later = deque(sorted((*self._later, text), key=lambda one: one.submitted))

    def _learn(self) -> None:
        """Memory ran out with these caches: fewer, for a while."""
        now = self._at_rest(self._texts(), 0) - 1
        self._learnt_bytes = now if self._learnt_bytes is None else min(now, self._learnt_bytes)
        self._steps_since_full = 0

    def _too_large(self, text: TextSequence, error: OutOfMemoryError | None = None) -> Piece:
        """The memory holds no more of a text, although it is alone: what there is of it is its end, if there is anything."""
        if text.generated:
            self.cut += 1
            try:
                return text.end_here(self._clock())
            except Exception as failure:  # as in _choose
                return Piece(error=self._failure(failure))
        needed = self._at_rest([text], 0)
        return Piece(
            error=self._failure(
                error
                or OutOfMemoryError(
                    f"the cache of a text with {len(text.ids)} tokens takes {needed >> 20} MB, and the memory for models has no room for it: "
                    "send a shorter prompt",
                    needed,
                )
            )
        )

    def _gather(self) -> None:
        """Put groups together as far as they may share a batch."""
        if len(self._groups) < 2:
            return
        apart = bool(self.model.cache) and not self.model.padded
        places: dict[int, list[list[Group]]] = {}
        for group in self._groups:
            shelves = places.setdefault(group.width if apart else 0, [])
            for shelf in shelves:
                if sum(len(other.rows) for other in shelf) + len(group.rows) <= self.most_rows:
                    shelf.append(group)
                    break
            else:
                shelves.append([group])
        self._groups = [group for shelves in places.values() for shelf in shelves for group in self._joined(shelf)]

    def _joined(self, shelf: list[Group]) -> list[Group]:
        try:
            return [Group.joined(shelf)]
        except MemoryError as error:  # apart they stand already
            if self._ran_out is not None:
                self._ran_out(OutOfMemoryError(f"no memory to put {len(shelf)} batches of texts together: {error}"))
            return shelf

    def _regrow(self) -> None:
        if self.most_rows < self._rows_allowed or self._learnt_bytes is not None or self._apart:
            self._steps_since_full += 1
            if self._steps_since_full >= REGROW_STEPS:
                self.most_rows = min(self.most_rows + 1, self._rows_allowed)
                self._steps_since_full, self._learnt_bytes, self._apart = 0, None, False

    # What is computed

    def _read(self, gained: Gained) -> None:
        """Go on with the prompts that wait to be read, first come first served, READ_TOKENS and what is left of a piece."""
        room = READ_TOKENS
        while self._reading and room > 0:
            text = self._reading[0]
            piece = text.ids[text.fed : text.fed + READ_TOKENS]
            room -= len(piece)
            end = text.fed + len(piece)
            try:
                logits, cache = self._once_more(lambda: self._next_piece(text, piece), text)  # noqa: B023
            except Exception as error:  # whatever a graph raises is its failure on this text
                if isinstance(error, OutOfMemoryError):
                    if self._count() > 1:
                        self._learn()
                        self._later_again(self._reading.popleft())
                        return
                    gained.append((text, self._too_large(text, error)))
                else:
                    gained.append((text, Piece(error=self._failure(error))))
                self._reading.popleft()
                continue
            text.fed, text.cache = end, cache
            if end < len(text.ids):
                continue
            self._reading.popleft()
            group = Group([text], cache, end)
            text.cache = []
            if self._choose(text, logits[0], gained):
                self._groups.append(group)

    def _advance(self, group: Group, gained: Gained) -> list[Group]:
        """One token for each text of a group; what is left of it. Where that fails it is split, so that one text fails alone."""
        count = len(group.rows)
        if count > self.most_rows:
            parts, group.cache = halves(group), []
            return [left for half in parts for left in self._advance(half, gained)]
        try:
            logits, cache = self._once_more(lambda: self._next(group), group)
        except Exception as error:  # as above
            if count == 1 and isinstance(error, OutOfMemoryError) and self.model.cache:
                if (
                    self._under_way > 1
                ):  # this one keeps what it has; the youngest of all gives way before the next step
                    self._short = True
                    return [group]
                gained.append((group.rows[0], self._too_large(group.rows[0], error)))
                return []
            if count == 1:
                gained.append((group.rows[0], Piece(error=self._failure(error))))
                return []
            if isinstance(error, OutOfMemoryError):
                self.most_rows, self._steps_since_full = max(1, count // 2), 0
                logger.warning("no memory for %d texts together: %d from now on", count, self.most_rows)
            wanted = kept(group, lambda text: not text.cancelled)
            if wanted is None or len(wanted.rows) == 1:
                return self._advance(wanted, gained) if wanted is not None else []
            parts = halves(wanted)
            group.cache, wanted.cache = [], []  # whoever called this still has the group
            return [left for half in parts for left in self._advance(half, gained)]
        self.steps += 1
        self.rows += count
        if self.model.cache:
            for text in group.rows:
                text.fed += 1
            group = Group(group.rows, cache, group.width + 1)
        going_on = [self._choose(text, logits[number], gained) for number, text in enumerate(group.rows)]
        if all(going_on):
            return [group]
        left = [number for number, goes in enumerate(going_on) if goes]
        return [group.select(left)] if left else []

    def _once_more(self, compute: Callable[[], Computed], what: Group | TextSequence) -> Computed:
        """Where memory runs out, an allocator that holds the caches of all steps, each larger than the last, has it in pieces that fit none.

        So they are taken out of it from now on, and it gives back what it holds, before the run is tried again.
        """
        try:
            return compute()
        except OutOfMemoryError as error:
            if self._ran_out is None:
                raise
            self._ran_out(error)
        self._apart, self._steps_since_full = True, 0
        for one in (what, *self._groups, *self._reading):
            one.cache = [part.copy() for part in one.cache]
        if self.model.cache:  # an arena gives back what it does not use at the end of a run that succeeds
            with suppress(OutOfMemoryError):
                self._compute(self._inputs([[0]], np.ones((1, 1)), np.zeros((1, 1)), self._empty), 1, 1, 1)
        return compute()

    def _next_piece(self, text: TextSequence, piece: list[int]) -> Computed:
        end = text.fed + len(piece)
        inputs = self._inputs([piece], np.ones((1, end)), np.arange(text.fed, end)[None, :], text.cache)
        return self._compute(inputs, 1, len(piece), end)

    def _next(self, group: Group) -> tuple[Logits, list[NDArray[Any]]]:
        """The logits [texts, vocabulary] after the last token of each text, and the cache with it."""
        texts, width = group.rows, group.width
        if not self.model.cache:
            return self._whole(texts), []
        mask = np.ones((len(texts), width + 1))
        for number, text in enumerate(texts):
            mask[number, : width - text.fed] = 0
        ids = [text.ids[text.fed :] for text in texts]
        positions = np.array([[text.fed] for text in texts])
        return self._compute(self._inputs(ids, mask, positions, group.cache), len(texts), 1, width + 1)

    def _whole(self, texts: list[TextSequence]) -> Logits:
        """As `_next`, without a cache."""
        longest = max(len(text.ids) for text in texts)
        at_once = max(1, LOGITS_BYTES // (4 * longest * self.model.vocabulary))
        found: list[Logits] = []
        for begin in range(0, len(texts), at_once):
            part = texts[begin : begin + at_once]
            lengths = [len(text.ids) for text in part]
            longest = max(lengths)
            ids = [text.ids + [0] * (longest - len(text.ids)) for text in part]
            mask = (np.arange(longest)[None, :] < np.array(lengths)[:, None]).astype(np.float64)
            positions = np.broadcast_to(np.arange(longest), (len(part), longest))
            answer = self._run(self._inputs(ids, mask, positions, []), self._outputs)
            logits = _checked(answer[self.model.logits], (len(part), longest))
            found.append(logits[np.arange(len(part)), np.array(lengths) - 1, : self.model.vocabulary])
        return np.concatenate(found)

    def _inputs(
        self, ids: list[list[int]], mask: NDArray[Any], positions: NDArray[Any], cache: Iterable[NDArray[Any]]
    ) -> Arrays:
        model, types = self.model, self._types
        inputs: Arrays = {model.input_ids: np.array(ids, dtype=types[model.input_ids])}
        if model.attention_mask is not None:
            inputs[model.attention_mask] = mask.astype(types[model.attention_mask])
        if model.position_ids is not None:
            inputs[model.position_ids] = np.ascontiguousarray(positions, dtype=types[model.position_ids])
        for tensor, part in zip(model.cache, cache, strict=True) if model.cache else ():
            inputs[tensor.past] = part
        return inputs

    def _compute(self, inputs: Arrays, texts: int, tokens: int, width: int) -> tuple[Logits, list[NDArray[Any]]]:
        answer = self._run(inputs, self._outputs)
        logits = _checked(answer[self.model.logits], (texts, tokens))
        cache = []
        for tensor in self.model.cache:
            part = answer[tensor.present]
            if part.shape != (texts, tensor.heads, width, tensor.size):
                raise ShapeError(
                    f"the cache comes out of '{tensor.present}' as {list(part.shape)}, not as {[texts, tensor.heads, width, tensor.size]}: "
                    "it must hold what went in and the new tokens behind it"
                )
            cache.append(part.copy() if self._apart else part)
        return logits[:, -1, : self.model.vocabulary], cache

    def _choose(self, text: TextSequence, logits: Logits, gained: Gained) -> bool:
        """Give a text its next token. False where it is at its end, or failed."""
        try:
            piece = text.advance(logits, self._clock())
        except Exception as error:  # whatever sampling or decoding raise is of this text; the others go on
            piece = Piece(error=self._failure(error))
        gained.append((text, piece))
        return not piece.last


def _checked(logits: Logits, shape: tuple[int, int]) -> Logits:
    if logits.ndim != 3 or logits.shape[:2] != shape:
        raise ShapeError(f"the logits are {list(logits.shape)}, not {[*shape, 'vocabulary']}")
    return logits
