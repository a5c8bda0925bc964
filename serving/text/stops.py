"""Stop strings: where a text ends, also across the borders of tokens. No part of a stop string is ever given out."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Takes a text in pieces, and gives it out as far as no stop string can begin in it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def feed(self, piece: str) -> str:
        """What may be given out now. After `found` is set, nothing comes any more."""
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        # The first to be complete ends the text, as if it came sign by sign: where the tokens' borders are changes nothing.
        places = [(text.find(stop), stop) for stop in self._stops]
        hits = [(place + len(stop), place, stop) for place, stop in places if place >= 0]
        if hits:
            _, place, self.found = min(hits)
            self._held = ""
            return text[:place]
        kept = self._possible(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back: the text ends here, so no stop string can come."""
        held, self._held = self._held, ""
        return held if self.found is None else ""

    def _possible(self, text: str) -> int:
        """The length of the longest end of `text` that a stop string begins with."""
        longest = min(max(map(len, self._stops)) - 1, len(text))
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
