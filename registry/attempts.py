"""A rollback asked of a registry that may not answer: what it was about to do is known to whoever stops waiting for it."""

from __future__ import annotations

import threading
from typing import Any

from registry import rollbacks
from registry.actor import Who
from registry.database import Database
from registry.errors import UnavailableError
from registry.rollbacks import Aim


class Attempt:
    """One try, on a thread of its own, that another thread waits for only so long.

    It says where it goes before it changes anything. So who gives up knows what may still come to be on record, and asks others for
    the same; where that is not known yet, nothing will be changed any more.
    """

    def __init__(self, aim: Aim | None = None) -> None:
        self._aim, self._lock, self._given_up = aim, threading.Lock(), False

    def decided(self, aim: Aim) -> None:
        """From now on the registry may be changed. Raises UnavailableError where nobody waits any more."""
        with self._lock:
            if self._given_up:
                raise UnavailableError("the registry answered too late, so nothing was changed")
            self._aim = aim

    def give_up(self) -> Aim | None:
        """Stop waiting. Where the rollback goes that may be on record, None where it is certain that none is."""
        with self._lock:
            self._given_up = True
            return self._aim

    def decide(self, database: Database, *, environment: str, model: str, to: str | None, emergency: bool) -> Aim:
        """Find out where the rollback goes, unless it was given that. Raises NotFoundError, and what `decided` raises."""
        aim = self._aim
        if aim is None:
            with database.read() as session:
                aim = rollbacks.aim(session, environment, model, to=to, emergency=emergency)
        self.decided(aim)
        return aim

    def roll_back(
        self,
        database: Database,
        *,
        environment: str,
        model: str,
        to: str | None,
        reason: str,
        ttl_seconds: float,
        emergency: bool,
        who: Who,
    ) -> dict[str, Any]:
        """Raises what `decide` and registry.rollbacks.roll_back raise."""
        aim = self.decide(database, environment=environment, model=model, to=to, emergency=emergency)
        return rollbacks.roll_back(
            database, environment=environment, model=model, to=aim.to, seen=aim.seen, reason=reason,
            ttl_seconds=ttl_seconds, emergency=emergency, who=who,
        )  # fmt: skip
