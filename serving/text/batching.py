"""Continuous batching: every step gives each running text its next token, whoever's it is; texts come and go between steps.

With a cache that takes a mask and positions, texts of all lengths share one batch: the cache is padded on the left with zeros that the
mask hides, and each text keeps its own positions, so company changes nothing but the last bits of a float. Without a mask or positions
only texts of one length share a batch. Without a cache the whole texts are computed at each step, padded on the right, where a decoder
does not look. A prompt is read alone, in pieces of READ_TOKENS, so that it does not hold the others up for long.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import ModelkeepError
from registry.signature import DATATYPES, Signature
from registry.textmodels import TextModel
from serving.statuses import OutOfMemoryError
from serving.text.sampling import Logits
from serving.text.sequences import Piece, TextSequence

logger = logging.getLogger(__name__)

READ_TOKENS = 256
"""Of a prompt, in one run. Always the same borders, so that a prompt's numbers do not depend on company."""
LOGITS_BYTES = 256 << 20
"""A graph without a cache answers logits for every token of every text: so much in one run, at most."""
REGROW_STEPS = 512
"""After so many steps without running out of memory, one text more is tried in a batch."""

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Mapping[str, NDArray[Any]], tuple[str, ...] | None], Mapping[str, NDArray[Any]]]
Failure = Callable[[Exception], ModelkeepError]
Gained = list[tuple[TextSequence, Piece]]


class ShapeError(ModelkeepError):
    """The graph's answer is not of the shape that its signature promises. The version's error, answered 500."""


class Group:
    """Texts that are computed together. `cache` holds [texts, heads, width, size] each; text i has its tokens at the right end."""

    __slots__ = ("cache", "rows", "width")

    def __init__(self, rows: list[TextSequence], cache: list[NDArray[Any]], width: int) -> None:
        self.rows, self.cache, self.width = rows, cache, width

    def select(self, indices: Sequence[int]) -> Group:
        """Some of its texts, without the padding that only the others needed."""
        rows = [self.rows[i] for i in indices]
        width = max((row.fed for row in rows), default=0)
        begin = self.width - width
        cache = [np.ascontiguousarray(part[list(indices), :, begin:, :]) for part in self.cache]
        return Group(rows, cache, width)

    @classmethod
    def joined(cls, groups: Sequence[Group]) -> Group:
        if len(groups) == 1:
            return groups[0]
        rows = [row for group in groups for row in group.rows]
        width = max(group.width for group in groups)
        cache = []
        for number in range(len(groups[0].cache)):
            parts = [group.cache[number] for group in groups]
            _, heads, _, size = parts[0].shape
            together = np.zeros((len(rows), heads, width, size), dtype=parts[0].dtype)
            at = 0
            for part in parts:
                together[at : at + len(part), :, width - part.shape[2] :, :] = part
                at += len(part)
            cache.append(together)
        return cls(rows, cache, width)


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
        max_cache_bytes: int,
        failure: Failure,
        ran_out: Callable[[OutOfMemoryError], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`run` computes the graph; `failure` makes of what it raises the error that the client gets.

        Of `max_running` texts under way at most `max_rows` share a batch. `ran_out` is told when memory did.
        """
        self.model = model
        self.max_running = max_running
        self.most_rows = self._rows_allowed = 1 if model.one_by_one else min(max_rows, max_running)
        """Texts in one batch, at most: fewer after the memory has run out."""
        self.waiting: deque[TextSequence] = deque()
        self.steps = self.rows = 0
        self.running = self.cache_bytes = 0
        """Texts under way, and what their caches take, after the last step: for whoever asks from another thread."""
        self._max_cache_bytes = max_cache_bytes
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
        return bool(self.waiting or self._reading or self._groups)

    def step(self) -> Gained:
        """One step of all: who left goes, who waits comes, prompts are read, and every text whose prompt is read gets a token."""
        gained: Gained = []
        self._let_go()
        self._admit()
        self._read(gained)
        self._gather()
        groups, self._groups = self._groups, []
        advanced: list[Group] = []
        try:
            for group in groups:
                advanced += self._advance(group, gained)
        except BaseException:  # a fault of this server: whoever drops the texts shall find all of them
            self._groups = groups
            raise
        self._groups = advanced
        self._regrow()
        self.running = self._count()
        own = sum(part.nbytes for text in self._reading for part in text.cache)
        self.cache_bytes = own + sum(part.nbytes for group in self._groups for part in group.cache)
        return gained

    def drop(self) -> list[TextSequence]:
        """Forget all texts; they are returned, none of them at its end."""
        dropped = [*self._reading, *(row for group in self._groups for row in group.rows)]
        while self.waiting:
            try:
                dropped.append(self.waiting.popleft())
            except IndexError:
                break
        self._reading.clear()
        self._groups.clear()
        self.running = self.cache_bytes = 0
        return dropped

    # Who takes part

    def _count(self) -> int:
        return len(self._reading) + sum(len(group.rows) for group in self._groups)

    def _let_go(self) -> None:
        if any(text.cancelled for text in self._reading):
            self._reading = deque(text for text in self._reading if not text.cancelled)
        self._groups = [
            left for group in self._groups if (left := _kept(group, lambda text: not text.cancelled)) is not None
        ]

    def _admit(self) -> None:
        while self.waiting and self._count() < self.max_running:
            try:
                text = self.waiting[0]
                if not text.cancelled and not self._fits(text):
                    return
                text = self.waiting.popleft()
            except IndexError:  # taken back in between
                return
            if text.cancelled:
                continue
            text.started = self._clock()
            if self.model.cache:
                text.cache = self._empty
                self._reading.append(text)
            else:
                self._groups.append(Group([text], [], 0))

    def _fits(self, text: TextSequence) -> bool:
        """Whether the cache of all, each as long as it may become, stays within its limit. One alone always may run."""
        per_token = self.model.cache_bytes_per_token
        if not per_token or not self._count():
            return True
        texts = [text, *self._reading, *(row for group in self._groups for row in group.rows)]
        return len(texts) * max(one.most for one in texts) * per_token <= self._max_cache_bytes

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
        self._groups = [Group.joined(shelf) for shelves in places.values() for shelf in shelves]

    def _regrow(self) -> None:
        if self.most_rows < self._rows_allowed:
            self._steps_since_full += 1
            if self._steps_since_full >= REGROW_STEPS:
                self.most_rows, self._steps_since_full = self.most_rows + 1, 0

    # What is computed

    def _read(self, gained: Gained) -> None:
        """Go on with the prompts that wait to be read, first come first served, READ_TOKENS and what is left of a piece."""
        room = READ_TOKENS
        while self._reading and room > 0:
            text = self._reading[0]
            piece = text.ids[text.fed : text.fed + READ_TOKENS]
            room -= len(piece)
            end = text.fed + len(piece)
            inputs = self._inputs([piece], np.ones((1, end)), np.arange(text.fed, end)[None, :], text.cache)
            try:
                logits, cache = self._compute(inputs, 1, len(piece), end)
            except Exception as error:  # whatever a graph raises is its failure on this text
                if isinstance(error, OutOfMemoryError) and self._ran_out is not None:
                    self._ran_out(error)
                self._reading.popleft()
                gained.append((text, Piece(error=self._failure(error))))
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
            return [left for half in _halves(group) for left in self._advance(half, gained)]
        try:
            logits, cache = self._next(group)
        except Exception as error:  # as above
            if isinstance(error, OutOfMemoryError) and self._ran_out is not None:
                self._ran_out(error)
            if count == 1:
                gained.append((group.rows[0], Piece(error=self._failure(error))))
                return []
            if isinstance(error, OutOfMemoryError):
                self.most_rows, self._steps_since_full = max(1, count // 2), 0
                logger.warning("no memory for %d texts together: %d from now on", count, self.most_rows)
            wanted = _kept(group, lambda text: not text.cancelled)
            if wanted is None or len(wanted.rows) == 1:
                return self._advance(wanted, gained) if wanted is not None else []
            return [left for half in _halves(wanted) for left in self._advance(half, gained)]
        self.steps += 1
        self.rows += count
        if self.model.cache:
            for text in group.rows:
                text.fed += 1
            group = Group(group.rows, cache, group.width + 1)
        going_on = [self._choose(text, logits[number], gained) for number, text in enumerate(group.rows)]
        if all(going_on):
            return [group]
        kept = [number for number, goes in enumerate(going_on) if goes]
        return [group.select(kept)] if kept else []

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
            cache.append(part)
        return logits[:, -1, : self.model.vocabulary], cache

    def _choose(self, text: TextSequence, logits: Logits, gained: Gained) -> bool:
        """Give a text its next token. False where it is at its end, or failed."""
        try:
            piece = text.advance(logits, self._clock())
        except Exception as error:  # whatever sampling or decoding raise is of this text; the others go on
            piece = Piece(error=self._failure(error))
        gained.append((text, piece))
        return not piece.last


def _kept(group: Group, stays: Callable[[TextSequence], bool]) -> Group | None:
    kept = [number for number, text in enumerate(group.rows) if stays(text)]
    if len(kept) == len(group.rows):
        return group
    return group.select(kept) if kept else None


def _halves(group: Group) -> list[Group]:
    count = len(group.rows)
    return [group.select(range(count // 2)), group.select(range(count // 2, count))]


def _checked(logits: Logits, shape: tuple[int, int]) -> Logits:
    if logits.ndim != 3 or logits.shape[:2] != shape:
        raise ShapeError(f"the logits are {list(logits.shape)}, not {[*shape, 'vocabulary']}")
    return logits
