"""What the steps of a promotion share: the world they work in, the time they judge by, and what a person tells them meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from registry import clock, commands, promotions
from registry.commands import Given
from registry.database import Database
from registry.errors import FencedError
from registry.policy import PromotionPolicy
from registry.promotions import Operation
from registry.store import ArtifactStore
from tasks.facts import Budget
from tasks.lease import Keeper


class Ended(Exception):
    """The promotion is over and on record. `outcome` is what registry.promotions knows: promoted, rejected, withdrawn, held."""

    def __init__(self, outcome: promotions.Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


class Stint:
    """The time of one stage on the carrier's monotonic clock: all of it, and what counts for the judgement (without pauses).

    `most` (seconds) is what one look may add: where nobody looked for longer, say because the registry was away, that time was not
    watched. `advanced` is the word of a person to pass the stage, as long as nobody has called it off.
    """

    def __init__(
        self, monotonic: Callable[[], float], *, judged: float = 0.0, total: float = 0.0, most: float = float("inf")
    ) -> None:
        self._monotonic, self._most, self._last = monotonic, most, monotonic()
        self.judged, self.total = judged, total
        self.advanced: Given | None = None

    def tick(self, *, paused: bool) -> None:
        now = self._monotonic()
        gained, self._last = min(now - self._last, self._most), now
        self.total += gained
        if not paused:
            self.judged += gained


class Promoting:
    """What the steps need of the world: the registry, the artifacts, a clock, and where the progress is told."""

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore | None,
        cache: Path,
        operation: Operation,
        keeper: Keeper,
        *,
        budget: Budget | None = None,
        poll_seconds: float = 1.0,
        tell: Callable[[str], None] = print,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.database, self._artifacts, self.cache = database, artifacts, cache
        self.operation, self.keeper, self.budget = operation, keeper, budget
        self.poll_seconds, self.tell, self.sleep, self.monotonic = poll_seconds, tell, sleep, monotonic
        self.paused: Given | None = None

    @property
    def artifacts(self) -> ArtifactStore:
        """Raises ValueError in a carrier that was given none: a watch needs no files."""
        if self._artifacts is None:
            raise ValueError("this carrier was given no artifact store: it can watch a soak, and nothing else")
        return self._artifacts

    @property
    def policy(self) -> PromotionPolicy:
        return self.operation.policy

    @property
    def name(self) -> str:
        return f"{self.operation.model} {self.operation.version}"

    def end(
        self,
        outcome: promotions.Outcome,
        title: str,
        detail: str,
        figures: dict[str, Any] | None = None,
        *,
        progress: dict[str, Any] | None = None,
        taken: Given | None = None,
    ) -> Ended:
        promotions.end(
            self.database, self.operation, outcome, title=title, detail=detail, figures=figures, progress=progress,
            taken=taken.number if taken else None,
        )  # fmt: skip
        self.tell(f"{title}: {detail}")
        return Ended(outcome, f"{title}: {detail}")

    def hear(self, stint: Stint) -> None:
        """Count the time since the last look, and take what a person has told the promotion.

        Raises FencedError once another process has ended it (a stop, a rollback) or the lease is lost.
        """
        self.keeper.check()
        stint.tick(paused=self.paused is not None)
        with self.database.read() as session:
            standing = commands.standing(session, self.operation.id)
        if standing.state not in promotions.ACTIVE:
            raise FencedError(f"promotion {self.operation.id} was ended by another process: {standing.reason}")
        # Taken with the decision that follows it. A pause that came after it has called it off.
        stint.advanced = next((given for given in standing.waiting if given.command == "advance"), None)
        for given in standing.waiting:
            if given.command != "advance" and commands.take(self.database, self.operation, given):
                self.tell(f"{given.command} by {given}")
        self.paused = standing.paused

    def rest(self) -> None:
        """Until the next look."""
        self.sleep(min(self.poll_seconds, 1.0))
        self.keeper.check()

    def wait(self, seconds: float) -> None:
        """Sleep while something else is waited for. Raises FencedError as soon as the lease is known to be lost: then it is in vain."""
        self.keeper.check()
        self.sleep(seconds)

    def has_all_traffic(self) -> None:
        """Keep when the version came to answer everything, as the first process of this promotion saw it."""
        if "all_traffic_at" not in self.operation.progress:
            promotions.remember(self.database, self.operation, {"all_traffic_at": clock.text(clock.now())})
