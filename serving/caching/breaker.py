"""Whether a Redis that servers share is asked at all: not after some failures in a row, until it has answered in time again."""

from __future__ import annotations

import logging

from registry.redaction import redact

FAILURES = 3
"""After so many in a row requests no longer ask."""


class Breaker:
    """Used on the event loop. `counts` has *failed* and *opened*; `by_node`: a cluster, which leaves the node alone that failed."""

    def __init__(
        self, url: str, counts: dict[str, int], log: logging.Logger, *, by_node: bool, lost: str, back: str
    ) -> None:
        """`lost` and `back` are what is logged, with the URL and, for the first, the reason."""
        self.usable = False
        """Whether requests ask it now: not before the first answer."""
        self._url, self._counts, self._log, self._by_node = url, counts, log, by_node
        self._lost, self._back = lost, back
        self._failures = 0
        self._logged: bool | None = None

    def answered(self) -> None:
        self._failures = 0

    def failed(self, error: BaseException) -> None:
        self._counts["failed"] += 1
        if self._by_node:
            return
        self._failures += 1
        if self._failures >= FAILURES and self.usable:
            self.open(error)

    def open(self, error: BaseException) -> None:
        """Nobody asks from now on. Said once, until it is back."""
        if self.usable:
            self._counts["opened"] += 1
        self.usable = False
        if self._logged is not False:
            self._logged = False
            self._log.warning(self._lost, self._url, redact(str(error)) or type(error).__name__)

    def close(self) -> None:
        """It answers in time."""
        self.usable = True
        self._failures = 0
        if self._logged is not True:
            self._logged = True
            self._log.info(self._back, self._url)
