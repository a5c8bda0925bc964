"""Generating text without a server: the trial at a load, and the face that the probe measures a text model by."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import ModelkeepError, RefusedError, UsageError
from registry.sections import TextSection
from registry.signature import Signature, TensorSpec
from registry.textmodels import TextModel, beside
from serving.compute.runtimes import Runtime, first_line, load_runtime
from serving.text import agreement, asked
from serving.text.batching import Batcher
from serving.text.caches import COPIES, claim_at_rest, unlimited
from serving.text.sampling import Sampling
from serving.text.sequences import Reason, TextSequence, Wanted
from serving.text.words import Words

PROMPT = "Test prompt"
TOKENS = 10
_ROWS = 16
_GREEDY = Sampling(temperature=0.0)

SIGNATURE = Signature(
    (TensorSpec("prompt", "BYTES", (-1,)), TensorSpec("max_tokens", "INT64", (-1,), optional=True)),
    (TensorSpec("text", "BYTES", (-1,)),),
)
"""A text model as its golden cases see it: a prompt goes in, its greedy continuation comes out."""


def generated(runtime: Runtime, model: TextModel, wanted: Wanted, words: Words) -> tuple[list[int], Reason | None]:
    """The tokens of one text, and how it ended. Raises what the graph raises, UsageError where it is longer than the context."""
    failures: list[Exception] = []

    def failure(error: Exception) -> ModelkeepError:
        failures.append(error)
        return RefusedError(first_line(error))

    if not wanted.prompt:
        raise UsageError("a prompt is empty: the model needs a token at least to begin with")
    if len(wanted.prompt) + wanted.max_tokens > model.context_length:
        raise UsageError(
            f"{len(wanted.prompt)} tokens and {wanted.max_tokens} to come are more than the model's {model.context_length}"
        )
    batcher = Batcher(
        runtime.run, model, runtime.signature, max_running=1, max_rows=1, share=unlimited(model), failure=failure
    )
    text, reason = TextSequence(wanted, words, model.end_ids), None
    batcher.waiting.append(text)
    while batcher.busy:
        for _, piece in batcher.step():
            reason = piece.reason or reason
    if failures:
        raise failures[0]
    return text.ids[len(wanted.prompt) :], reason


def greedy(runtime: Runtime, model: TextModel, words: Words, prompts: Sequence[str], most: Sequence[int]) -> list[str]:
    """The greedy continuation of each prompt, all at the same time, by at most so many tokens. Raises what the graph raises."""
    failures: list[Exception] = []

    def failure(error: Exception) -> ModelkeepError:
        failures.append(error)
        return RefusedError(first_line(error))

    batcher = Batcher(
        runtime.run,
        model,
        runtime.signature,
        max_running=_ROWS,
        max_rows=_ROWS,
        share=unlimited(model),
        failure=failure,
    )
    texts = []
    for prompt, count in zip(prompts, most, strict=True):
        ids = words.encode(prompt)
        if not ids:
            raise UsageError("a prompt is empty: the model needs a token at least to begin with")
        if len(ids) + count > model.context_length:
            raise UsageError(
                f"the prompt {prompt[:40]!r} and {count} tokens are more than the model's {model.context_length}"
            )
        texts.append(TextSequence(Wanted(tuple(ids), count, _GREEDY), words, model.end_ids))
    batcher.waiting.extend(texts)
    answers = {id(text): "" for text in texts}
    while batcher.busy:
        for text, piece in batcher.step():
            answers[id(text)] += piece.text
        if failures:
            raise failures[0]
    return [answers[id(text)] for text in texts]


def try_out(runtime: Runtime, model: TextModel, words: Words) -> dict[str, Any]:
    """A real generation before a version takes traffic. Raises RefusedError where it fails.

    The answer says how long it took in seconds; JSON-able.
    """
    most = min(TOKENS, model.context_length - len(words.encode(PROMPT)))
    if most < 1:
        raise RefusedError(
            f"the context of {model.context_length} tokens holds no more than the prompt {PROMPT!r}: no text can follow"
        )
    began = time.perf_counter()
    try:
        greedy(runtime, model, words, [PROMPT], [most])
    except Exception as error:  # whatever a graph raises: it cannot generate
        raise RefusedError(f"the text model does not continue {PROMPT!r}: {first_line(error)}") from error
    return {"prompt": PROMPT, "max_tokens": most, "seconds": round(time.perf_counter() - began, 6), "at": time.time()}


class TextRuntime:
    """A text model behind the protocol of serving.compute.runtimes, by SIGNATURE: for golden cases, which are prompts and texts."""

    platform = "modelkeep_text"
    signature = SIGNATURE

    def __init__(self, runtime: Runtime, model: TextModel, words: Words) -> None:
        self.graph, self._model, self.words = runtime, model, words
        """`graph` is for raw requests."""
        # As a server would reckon, by the usual setting.
        most = TextSection.model_fields["max_cache_mb"].default << 20
        self.memory_bytes = runtime.memory_bytes + COPIES * claim_at_rest(model, most)

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        """Raises UsageError for prompts that are no text or too long."""
        prompts = []
        for value in inputs["prompt"].tolist():
            try:
                prompts.append(value.decode() if isinstance(value, bytes) else str(value))
            except UnicodeDecodeError as error:
                raise UsageError(f"a prompt is not UTF-8: {error.reason}") from error
        most = [int(n) for n in inputs["max_tokens"].tolist()] if "max_tokens" in inputs else [TOKENS] * len(prompts)
        if len(most) != len(prompts) or any(n < 1 for n in most):
            raise UsageError("'max_tokens' needs a number above 0 for each prompt")
        texts = greedy(self.graph, self._model, self.words, prompts, most)
        return {"text": np.array([*(text.encode() for text in texts), b""], dtype=object)[:-1]}

    def kept(self, body: bytes) -> dict[str, NDArray[Any]]:
        """Answer a captured request for a text (serving.text.asked.keep), as `agreement.answer`. Raises UsageError."""
        said = asked.kept(body)
        prompt = tuple(self.words.encode(said.prompt)) if isinstance(said.prompt, str) else said.prompt
        if any(not 0 <= token < self._model.vocabulary for token in prompt):
            raise UsageError(f"prompt: tokens are numbers from 0 to {self._model.vocabulary - 1}")
        wanted = Wanted(prompt, said.max_tokens, said.sampling, said.stops, said.ignore_end)
        return agreement.answer(*generated(self.graph, self._model, wanted, self.words))

    def close(self) -> None:
        self.graph.close()


def load(path: Path, format: str, *, signature: Signature | None, threads: int = 1) -> Runtime:
    """What `serving.compute.runtimes.load_runtime` loads; a text model as a TextRuntime. Raises RefusedError."""
    runtime = load_runtime(path, format, signature=signature, threads=threads)
    model = beside(path, runtime.signature)
    if model is None:
        return runtime
    words = Words.read(model.tokenizer)
    try_out(runtime, model, words)
    return TextRuntime(runtime, model, words)
