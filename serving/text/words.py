"""Texts to tokens and back, as the tokenizer beside a model does it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import ModelkeepError, UsageError
from registry.textmodels import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


LONG = 2000
"""Characters from which on a text is encoded on a thread; see serving.text.exchange."""


class Words:
    """A tokenizer. Its methods may be called from several threads: its Rust holds no state between calls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def read(cls, path: Path) -> Words:
        """Raises RefusedError."""
        return cls(read_tokenizer(path))

    def encode(self, text: str) -> list[int]:
        """With what the tokenizer puts at the beginning of a text. Raises UsageError for what is no text to it."""
        try:
            if len(text) < LONG:
                return self._tokenizer.encode(text).ids
            # Alone it would hold the interpreter's lock for as long as it takes; in a batch, be it of one, it does not.
            return self._tokenizer.encode_batch_fast([text])[0].ids
        except BaseException as error:  # half a surrogate pair is no text to it; a panic of its Rust is no Exception
            _raise_if_ours(error)
            raise UsageError(f"the prompt is no text that the model's tokenizer takes: {str(error)[:200]}") from error

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Raises ModelkeepError where the tokenizer breaks down."""
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        except BaseException as error:  # as above
            _raise_if_ours(error)
            raise ModelkeepError(f"the tokenizer makes no text of its tokens: {str(error)[:200]}") from error

    def name(self, token: int) -> str:
        """The text of one token, for log probabilities."""
        return self.decode([token], skip_special_tokens=False)


def _raise_if_ours(error: BaseException) -> None:
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise error
