"""Tokens to text as they come: no character is ever cut, and what has been given out never changes."""

from __future__ import annotations

from typing import Protocol

LOST = "\N{REPLACEMENT CHARACTER}"
MOST_HELD = 3
"""A character of UTF-8 has four bytes at most: so many at the end of a text may still become one."""
_LONGEST_WINDOW = 64
_COMPANY = 8


class Decoder(Protocol):
    """The part of `tokenizers.Tokenizer` that is needed."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """The text of one sequence, piece by piece.

    Each new piece is what decoding gains by a token, with a few tokens before it for company (many decoders treat the first token of
    a text differently). Bytes at the end that are no whole character yet are held back.
    """

    def __init__(self, decoder: Decoder, prompt: list[int]) -> None:
        """`prompt` is what comes before: its end is the company of the first tokens, and no part of the text."""
        self._decoder = decoder
        self._ids: list[int] = []
        for count in range(2, _COMPANY + 1):
            ids = prompt[-count:]
            if LOST not in self._decode(ids):  # it does not begin within a character
                self._ids = ids
                break
        self._read = self._company = len(self._ids)
        """`_company` tokens have a text; up to `_read` may follow some that have none."""
        self._before = self._decode(self._ids)
        self._given = 0
        """Characters given out of the window's text."""

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; often "" in the middle of a character."""
        self._ids.append(token)
        text = self._window()
        # With the first tokens of a character some decoders lose what is before it too, until it is whole.
        least = len(text) - MOST_HELD if len(self._ids) - self._read > MOST_HELD else 0
        whole = len(text)
        while whole > max(least, 0) and text[whole - 1] == LOST:
            whole -= 1
        if whole == len(text) or len(self._ids) - self._read > _LONGEST_WINDOW:
            return self._closed(text)
        piece = text[self._given : whole]
        self._given = max(self._given, whole)
        return piece

    def finish(self) -> str:
        """What was held back: bytes that became no character are given out as the replacement character."""
        return self._closed(self._window())

    def _window(self) -> str:
        """The text of the tokens that are not given out whole."""
        text = self._decode(self._ids)
        if text.startswith(self._before):
            return text[len(self._before) :]
        # Some decoders make nothing of a run of bytes as long as its end is no whole character, not even of those before.
        return self._decode(self._ids[self._read :])

    def _closed(self, text: str) -> str:
        piece = text[self._given :]
        if text:  # else they are tokens without a text, which are no company by themselves
            self._ids = self._ids[self._read :]
            self._company = len(self._ids)
        elif len(self._ids) - self._company > _LONGEST_WINDOW:
            self._ids = self._ids[: self._company]
        self._read = len(self._ids)
        self._before = self._decode(self._ids)
        self._given = 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._decoder.decode(ids, skip_special_tokens=True)
