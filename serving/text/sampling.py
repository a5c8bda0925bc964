"""Which token comes next: penalties, temperature, top-k, top-p, and the log probabilities that a client asked for. Pure numpy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import ModelkeepError

Logits = NDArray[Any]

_FIRST_FEW = 256


class NotFiniteError(ModelkeepError):
    """The graph's logits are not numbers. The version's error, answered 500."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy: the likeliest token, the lowest id among equals.

    `top_k` 0 and `top_p` 1 leave nothing out. `logprobs`: so many of the likeliest tokens are told at each step; None: none, nor the
    chosen one's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token. Log probabilities are the model's own: of its logits, before penalty and temperature."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one sequence. Its random numbers are its own, one a token: company changes nothing."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int]) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(prompt) if sampling.repetition_penalty != 1.0 else None

    def choose(self, logits: Logits) -> Chosen:
        """The next token by the logits [vocabulary]. Raises NotFiniteError."""
        how = self.sampling
        scores = np.asarray(logits, dtype=np.float32)
        best = int(scores.argmax())  # NaN counts as the largest
        if not np.isfinite(scores[best]):
            raise NotFiniteError(
                f"the model's logits are {scores[best]} at token {best}: no token can be chosen by them"
            )
        weighed = scores
        if self._seen:
            # Keskar et al. 2019, CTRL: what is there already is made less likely, whatever the sign of its logit.
            weighed = scores.copy()
            seen = np.fromiter((token for token in self._seen if token < len(scores)), dtype=np.int64)
            values = weighed[seen]
            weighed[seen] = np.where(values > 0, values / how.repetition_penalty, values * how.repetition_penalty)
            best = int(weighed.argmax())
        token = best if how.temperature == 0 else self._draw(weighed)
        if self._seen is not None:
            self._seen.add(token)
        if how.logprobs is None:
            return Chosen(token)
        return _told(token, scores, how.logprobs)

    def _draw(self, scores: Logits) -> int:
        how, point = self.sampling, self._random.random()
        weights = scores.astype(np.float64)
        with np.errstate(over="ignore"):  # a temperature near 0 makes all but the likeliest impossible
            weights = np.exp((weights - weights.max()) / how.temperature)
        candidates: NDArray[np.int64] | None = None
        if 0 < how.top_k < len(scores):
            candidates = _likeliest(scores, how.top_k)
            sums = np.cumsum(weights[candidates])
            whole = float(sums[-1])
        else:
            sums = np.cumsum(weights)
            whole = float(sums[-1])
            if how.top_p < 1.0:
                # Sorting a whole vocabulary takes longer than all the rest: the first few nearly always suffice.
                for count in (_FIRST_FEW, len(scores)):
                    candidates = _likeliest(scores, count)
                    sums = np.cumsum(weights[candidates])
                    if sums[-1] >= how.top_p * whole:
                        break
        if how.top_p < 1.0:
            # The fewest of the likeliest tokens that have top_p together; one at least.
            sums = sums[: int(np.searchsorted(sums, how.top_p * whole)) + 1]
        # Below the last sum always: a token of weight 0 behind it is never drawn.
        index = min(int(np.searchsorted(sums, point * sums[-1], side="right")), len(sums) - 1)
        return index if candidates is None else int(candidates[index])


def _likeliest(scores: Logits, count: int) -> NDArray[np.int64]:
    """The ids of the likeliest tokens, the first of equals first: what is left out does not depend on how a partition happens to lie."""
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    least = np.partition(scores, -count)[-count]
    found = np.flatnonzero(scores >= least)
    return found[np.argsort(-scores[found], kind="stable")][:count]


def _told(token: int, scores: Logits, most: int) -> Chosen:
    values = scores.astype(np.float64)
    highest = values.max()
    values = values - (highest + np.log(np.exp(values - highest).sum()))
    most = min(most, len(values))
    top: tuple[tuple[int, float], ...] = ()
    if most:
        candidates = np.argpartition(values, -most)[-most:]
        order = np.lexsort((candidates, -values[candidates]))
        top = tuple((int(candidates[k]), float(values[candidates[k]])) for k in order)
    return Chosen(token, float(values[token]), top)
