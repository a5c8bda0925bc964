"""Verdicts on answers, between the client that gives them and the registry that counts them. Nothing of it is on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from registry.errors import ModelkeepError
from registry.feedback import Verdict

INBOX_SIZE = 10_000
REMEMBERED = 20_000


class InboxFullError(ModelkeepError):
    """As many verdicts wait for the registry as the server holds. Answered 429."""

    status = 429


class Inbox:
    """Verdicts that the registry has not got yet. Used on the event loop only."""

    def __init__(self, size: int = INBOX_SIZE) -> None:
        self.size = size
        self.counts: dict[str, int] = {"accepted": 0, "refused": 0}
        """By what became of them: accepted, refused, and the outcomes of registry.feedback.record."""
        self._waiting: deque[Verdict] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, verdicts: list[Verdict]) -> None:
        """Take all of them or, raising InboxFullError, none."""
        if len(self._waiting) + len(verdicts) > self.size:
            self.counts["refused"] += len(verdicts)
            raise InboxFullError(
                f"{len(self._waiting)} verdicts wait for the registry, {self.size} are held at most; try again later"
            )
        self._waiting.extend(verdicts)
        self.counts["accepted"] += len(verdicts)

    def peek(self, most: int) -> list[Verdict]:
        """The next ones, still waiting: they are let go when the registry has them."""
        return [self._waiting[k] for k in range(min(most, len(self._waiting)))]

    def done(self, number: int, outcome: Iterable[tuple[str, int]]) -> None:
        """The first `number` are in the registry; `outcome` says what became of how many."""
        for _ in range(number):
            self._waiting.popleft()
        for what, count in outcome:
            self.counts[what] = self.counts.get(what, 0) + count


class Answered(NamedTuple):
    model: str
    version: str
    epoch: str
    generation: int


class Remembered:
    """Who answered requests with an id of the client's own: the last REMEMBERED of them."""

    def __init__(self, size: int = REMEMBERED) -> None:
        self.size = size
        self._known: dict[bytes, Answered] = {}

    def add(self, request_id: bytes, model: str, version: str, epoch: str, generation: int) -> None:
        known = self._known
        known.pop(request_id, None)  # a repeated id belongs to its last answer, and is the newest again
        known[request_id] = Answered(model, version, epoch, generation)
        if len(known) > self.size:
            del known[next(iter(known))]

    def get(self, request_id: str) -> Answered | None:
        return self._known.get(request_id.encode())
