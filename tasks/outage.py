"""A registry that goes away in the middle of a promotion: it is waited for, and the promotion goes on from what is on record then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.orm import Session

from registry import promotions
from registry.database import Database
from registry.errors import FencedError, UnavailableError
from registry.schema import Promotion
from tasks.promoting import Promoting

T = TypeVar("T")

PATIENCE_SECONDS = 900.0
"""How long a registry is waited for."""

RECOVERED_SECONDS = 120.0
"""Work that went on for longer than this met another outage, not the one before. Longer than a statement is waited for."""

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 10.0


class Outage:
    """One time without a registry, on this process's clock: told once, ended by an answer or by the end of the patience."""

    def __init__(
        self,
        *,
        tell: Callable[[str], None],
        patience_seconds: float = PATIENCE_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell, self._patience, self._sleep, self._monotonic = tell, patience_seconds, sleep, monotonic
        self._since: float | None = None
        self._told = False
        self._pause = _FIRST_PAUSE_SECONDS

    def met(self, error: UnavailableError) -> None:
        """Wait a little before the next try. Raises the error where the patience is over."""
        now = self._monotonic()
        if self._since is None:
            self._since = now
        if now - self._since >= self._patience:
            raise error
        if not self._told:
            self._tell(f"{error}; it is waited for, {self._patience / 60:g} minutes at most")
            self._told = True
        self._sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)

    def answers(self) -> None:
        """It answers again. The patience goes on being used up until what follows shows that it lasts."""
        if self._told and self._since is not None:
            self._tell(f"the registry answers again, after {self._monotonic() - self._since:.0f} s")
        self._told = False

    def over(self) -> None:
        """What followed shows that it lasted."""
        self._since, self._told, self._pause = None, False, _FIRST_PAUSE_SECONDS


def answered(database: Database, ask: Callable[[Session], T], outage: Outage) -> T:
    """What a query finds, however long it takes to get an answer. Raises UnavailableError when the patience is over."""
    while True:
        try:
            with database.read() as session:
                return ask(session)
        except UnavailableError as error:
            outage.met(error)


def steadfast(
    work: Promoting, steps: Callable[[Promoting], T | None], *, most_seconds: float = PATIENCE_SECONDS
) -> T | None:
    """Do the steps of a promotion, and again from the record whenever the registry did not answer.

    A change whose commit got no answer is on record as a whole or not at all, so what this process believes is thrown away
    and read anew; steps that are on record are not repeated. Meanwhile nobody loses the lease: who watches it counts only time in
    which it could look. None where it waits for an approval. Raises UnavailableError when the patience is over, FencedError where
    the promotion is not ours any more, and what the steps raise.
    """
    outage = Outage(tell=work.tell, patience_seconds=most_seconds, sleep=work.sleep, monotonic=work.monotonic)
    while True:
        began = work.monotonic()
        try:
            return steps(work)
        except UnavailableError as error:
            if work.monotonic() - began > RECOVERED_SECONDS:
                outage.over()
            outage.met(error)
        state = answered(work.database, lambda session: _recall(session, work), outage)
        outage.answers()
        if state == promotions.AWAITING:
            return None  # its lease needs no beat any more, so the keeper may well have missed it
        work.keeper.check()


def _recall(session: Session, work: Promoting) -> str:
    """Bring the operation to what is on record. Returns its state."""
    operation = work.operation
    row = session.get(Promotion, operation.id)
    if row is None:
        raise FencedError(
            f"the registry knows no promotion {operation.id} any more: it is another one, or it went back in time"
        )
    if row.state not in promotions.ACTIVE:
        raise FencedError(f"promotion {operation.id} has ended: {row.reason}")
    operation.step, operation.progress = row.step, dict(row.progress)
    return row.state
