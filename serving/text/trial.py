"""Generating text without a server: the trial at a load, and the face that the probe measures a text model by."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import ModelkeepError, RefusedError, UsageError
from registry.signature import Signature, TensorSpec
from registry.textmodels import TextModel, beside
from serving.runtimes import Runtime, first_line, load_runtime
from serving.text.batching import Batcher
from serving.text.sampling import Sampling
from serving.text.sequences import TextSequence, Wanted
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
        max_cache_bytes=1 << 62,
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
    """A text model behind the protocol of serving.runtimes, by SIGNATURE: for golden cases, which are prompts and texts."""

    platform = "modelkeep_text"
    signature = SIGNATURE

    def __init__(self, runtime: Runtime, model: TextModel, words: Words) -> None:
        self._runtime, self._model, self._words = runtime, model, words
        self.memory_bytes = runtime.memory_bytes

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
        texts = greedy(self._runtime, self._model, self._words, prompts, most)
        return {"text": np.array([*(text.encode() for text in texts), b""], dtype=object)[:-1]}

    def close(self) -> None:
        self._runtime.close()


def load(path: Path, format: str, *, signature: Signature | None, threads: int = 1) -> Runtime:
    """What `serving.runtimes.load_runtime` loads; a text model as a TextRuntime. Raises RefusedError."""
    runtime = load_runtime(path, format, signature=signature, threads=threads)
    model = beside(path, runtime.signature)
    if model is None:
        return runtime
    words = Words.read(model.tokenizer)
    try_out(runtime, model, words)
    return TextRuntime(runtime, model, words)
