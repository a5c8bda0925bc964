"""One text that is being generated: its tokens, what of it was given out, and when. The batches are serving.text.batching's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray

from registry.errors import ModelkeepError
from serving.text.detokenizer import Decoder, Detokenizer
from serving.text.sampling import Chosen, Logits, Sampler, Sampling
from serving.text.stops import StopScanner

Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Told:
    """A token of the answer, as log probabilities tell of it. `offset` counts the characters before it."""

    token: int
    text: str
    offset: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Piece:
    """What one step gained of a text. `reason`: it is at its end; `error`: it has failed."""

    text: str = ""
    told: tuple[Told, ...] = ()
    tokens: int = 0
    reason: Reason | None = None
    error: ModelkeepError | None = None

    @property
    def last(self) -> bool:
        return self.reason is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asks for: the prompt's tokens and how to go on. `max_tokens` is 1 or more."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    ignore_end: bool = False
    """Go on after the token that ends a text, up to max_tokens."""


class TextSequence:
    """Touched by the worker's thread only, but for `cancelled`, which anybody may set."""

    __slots__ = (
        "_detokenizer", "_length", "_sampler", "_scanner", "_told", "_told_length", "asker",
        "cache", "cancelled", "ends", "fed", "finished", "first_at", "ids", "owner", "round", "started", "submitted", "wanted",
    )  # fmt: skip

    def __init__(
        self,
        wanted: Wanted,
        decoder: Decoder,
        ends: Sequence[int],
        *,
        clock: Callable[[], float] = time.perf_counter,
        owner: Any = None,
    ) -> None:
        self.wanted = wanted
        self.ids = list(wanted.prompt)
        self.ends = frozenset() if wanted.ignore_end else frozenset(ends)
        self.fed = 0
        """Tokens that are in the cache."""
        self.cache: list[NDArray[Any]] = []
        """Its own, while the prompt is being read: each [1, heads, fed, size]."""
        self.cancelled = False
        self.owner = owner
        self.asker = ""
        self.round = 0
        """Its place among those that wait; see serving.traffic.turns."""
        self.submitted = clock()
        self.started: float | None = None
        self.first_at: float | None = None
        self.finished: float | None = None
        self._sampler = Sampler(wanted.sampling, wanted.prompt)
        self._detokenizer = Detokenizer(decoder, self.ids)
        self._scanner = StopScanner(wanted.stops)
        self._told: list[Told] = []
        self._told_length = 0
        self._length = 0

    @property
    def generated(self) -> int:
        return len(self.ids) - len(self.wanted.prompt)

    @property
    def most(self) -> int:
        """Tokens that it may have in the end."""
        return len(self.wanted.prompt) + self.wanted.max_tokens

    def advance(self, logits: Logits, now: float) -> Piece:
        """Choose the next token by the logits [vocabulary]. Raises NotFiniteError."""
        chosen = self._sampler.choose(logits)
        if self.first_at is None:
            self.first_at = now
        if chosen.token in self.ends:
            # It is no part of the text, but it was computed and is paid for.
            return self._ended(Piece(tokens=1), "stop", now)
        self.ids.append(chosen.token)
        text = self._detokenizer.add(chosen.token)
        self._note(chosen, text)
        piece = Piece(self._scanner.feed(text), tokens=1)
        if self._scanner.found is not None:
            return self._ended(piece, "stop", now)
        if self.generated >= self.wanted.max_tokens:
            return self._ended(piece, "length", now)
        self._length += len(piece.text)
        piece.told = self._ready(self._length)
        return piece

    def end_here(self, now: float) -> Piece:
        """There is no room for more of it: what its client has not got yet, and the end, as at max_tokens."""
        return self._ended(Piece(), "length", now)

    def _ended(self, piece: Piece, reason: Reason, now: float) -> Piece:
        self.finished = now
        if self._scanner.found is None:
            piece.text += self._scanner.feed(self._detokenizer.finish())
            if self._scanner.found is not None:
                reason = "stop"
            piece.text += self._scanner.finish()
        piece.reason = reason
        self._length += len(piece.text)
        # The tokens of a stop string, and what came with them, are not told.
        piece.told = self._ready(self._length, last=self._scanner.found is None)
        return piece

    def _note(self, chosen: Chosen, text: str) -> None:
        if chosen.logprob is not None:
            self._told.append(Told(chosen.token, text, self._told_length, chosen.logprob, chosen.top))
            self._told_length += len(text)

    def _ready(self, length: int, *, last: bool = False) -> tuple[Told, ...]:
        """What may be told of the tokens whose text is given out: those that begin before `length`."""
        if not self._told:
            return ()
        count = len(self._told) if last else 0
        while count < len(self._told) and self._told[count].offset + len(self._told[count].text) <= length:
            count += 1
        ready, self._told = tuple(self._told[:count]), self._told[count:]
        return ready
