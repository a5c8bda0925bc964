"""A decoder in a few lines of numpy, whose next token depends on every token before it and on its place: a wrong mask, position or row shows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.signature import Signature, TensorSpec
from registry.textmodels import CacheTensor, TextModel
from serving.statuses import OutOfMemoryError
from serving.text.words import Words
from tests.unit.serving.limited import Pool

VOCABULARY = 96
END = 0
FIRST = 32
"""Token n is the character FIRST + n - 1; token 0 ends a text."""


class Letters(Words):
    """Each character from the blank on is a token."""

    def __init__(self) -> None:
        pass

    def encode(self, text: str) -> list[int]:
        return [ord(sign) - FIRST + 1 for sign in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(FIRST + token - 1) for token in ids if token != END)

    def name(self, token: int) -> str:
        return self.decode([token])


def toy_model(*, cached: bool = True, padded: bool = True, context_length: int = 400) -> TextModel:
    return TextModel(
        tokenizer=Path("tokenizer.json"),
        context_length=context_length,
        end_ids=(END,),
        vocabulary=VOCABULARY,
        input_ids="input_ids",
        attention_mask="attention_mask" if padded else None,
        position_ids="position_ids" if padded else None,
        logits="logits",
        cache=(CacheTensor("past.0", "present.0", "FP32", 1, 2),) if cached else (),
        one_by_one=False,
    )


class Toy:
    """A runtime. `most_rows`: more run out of memory; `poison`: a text that holds this token cannot be computed; `lost`: gets NaN."""

    platform = "toy"
    memory_bytes = 1000

    def __init__(self, model: TextModel) -> None:
        self.model = model
        names = [model.input_ids, *filter(None, (model.attention_mask, model.position_ids))]
        self.signature = Signature(
            (
                *(TensorSpec(name, "INT64", (-1, -1)) for name in names),
                *(TensorSpec(tensor.past, "FP32", (-1, 1, -1, 2)) for tensor in model.cache),
            ),
            (
                TensorSpec(model.logits, "FP32", (-1, -1, VOCABULARY)),
                *(TensorSpec(tensor.present, "FP32", (-1, 1, -1, 2)) for tensor in model.cache),
            ),
        )
        self.most_rows: int | None = None
        self.poison: int | None = None
        self.lost: int | None = None
        self.pool: Pool | None = None
        """Where there is one, the caches that go in and come out are taken from it for as long as a run takes."""
        self.rows: list[int] = []
        """Texts in each run."""
        self.gate: threading.Semaphore | None = None
        """Where there is one, each run takes one from it."""
        self.choose: Callable[[NDArray[Any]], int] | None = None
        """The token after these numbers, where it shall not be the usual one."""
        self.closed = False

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        if self.gate is not None:
            self.gate.acquire()
        ids = inputs["input_ids"]
        rows, new = ids.shape
        self.rows.append(rows)
        if self.most_rows is not None and rows > self.most_rows:
            raise OutOfMemoryError(f"no room for {rows} rows")
        if self.poison is not None and (ids == self.poison).any():
            raise ValueError(f"token {self.poison} is poison")
        if self.pool is not None:
            tokens = inputs["past.0"].shape[2] * 2 + new
            with self.pool.buffer(rows * tokens * self.model.cache_bytes_per_token):
                return self._answer(inputs)
        return self._answer(inputs)

    def _answer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        ids = inputs["input_ids"]
        rows, new = ids.shape
        past = inputs["past.0"] if self.model.cache else np.zeros((rows, 1, 0, 2), dtype=np.float32)
        before = past.shape[2]
        places = inputs.get("position_ids", np.broadcast_to(np.arange(before, before + new), (rows, new)))
        mask = inputs.get("attention_mask", np.ones((rows, before + new)))
        assert mask.shape == (rows, before + new), (mask.shape, rows, before, new)
        fresh = np.stack([ids, places], axis=-1).astype(np.float32)[:, None]
        present = np.concatenate([past, fresh], axis=2)
        logits = np.full((rows, new, VOCABULARY), -5.0, dtype=np.float32)
        for row in range(rows):
            for column in range(new):
                seen = present[row, 0, : before + column + 1][mask[row, : before + column + 1] > 0]
                logits[row, column, self._next(seen)] = 5.0
            if self.lost is not None and (ids[row] == self.lost).any():
                logits[row] = np.nan
        answer = {"logits": logits}
        if self.model.cache:
            answer["present.0"] = present
        return answer

    def _next(self, seen: NDArray[Any]) -> int:
        if self.choose is not None:
            return self.choose(seen[:, 0].astype(int))
        return int((seen[:, 0] * (seen[:, 1] + 3)).sum()) % (VOCABULARY - 1) + 1

    def close(self) -> None:
        self.closed = True
