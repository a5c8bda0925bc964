"""A rollback asked of this server: through the registry where it answers at once, else held here."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from registry import rollbacks
from registry.actor import Who
from registry.database import Database
from registry.errors import ModelkeepError, StorageError, UnavailableError
from serving.holds import held
from serving.reconcile import Reconciler

log = logging.getLogger("modelkeep.emergency")

REGISTRY_SECONDS = 1.0
"""What the registry gets to answer in before an emergency goes on without it."""
_FOLLOW_SECONDS = 3.0


class Emergency:
    """The rollbacks of one server. `quick` is the registry, opened so that it gives up soon."""

    def __init__(self, reconciler: Reconciler, quick: Database, *, registry_seconds: float = REGISTRY_SECONDS) -> None:
        self._reconciler, self._quick, self._seconds = reconciler, quick, registry_seconds

    async def roll_back(
        self, model: str, to: str | None, *, who: Who, reason: str, emergency: bool, ttl_seconds: float
    ) -> dict[str, Any]:
        """Go back, and say by what: "registry" for all servers, or "hold" for this one alone.

        Raises what registry.rollbacks.roll_back raises; UnavailableError for what is no emergency while the registry does not
        answer; NotFoundError and RefusedError for what this server cannot go back to by itself.
        """
        began = time.monotonic()
        environment = self._reconciler.serving.environment
        call = partial(
            rollbacks.roll_back, self._quick, environment=environment, model=model, to=to, reason=reason,
            ttl_seconds=ttl_seconds, emergency=emergency, who=who,
        )  # fmt: skip
        try:
            done = await self._registry(call)
        except (UnavailableError, StorageError) as error:
            if not emergency:
                raise UnavailableError(
                    f"{error}. Only an emergency goes on without the registry: give strategy emergency"
                ) from error
            return {**await self._hold(model, to, who=who, reason=reason, why=str(error)), "seconds": _since(began)}
        await self._follow()
        route = self._reconciler.serving.routes.get(model)
        return {
            **done, "by": "registry", "replica": self._reconciler.serving.replica_id,
            "stable": None if route is None else route.stable, "seconds": _since(began),
        }  # fmt: skip

    async def release(self, model: str, *, who: Who, reason: str) -> dict[str, Any]:
        """Let go of a hold by hand; on record where the registry answers. Raises NotFoundError."""
        hold = await self._reconciler.backstop.release(model, who=who, reason=reason)
        await self._reconciler.again()
        replica, recorded = self._reconciler.serving.replica_id, True
        try:
            await self._registry(
                partial(rollbacks.released, self._quick, hold, replica=replica, who=who, reason=reason)
            )
        except ModelkeepError as error:
            log.error("the release of the hold of %s by %s is not on record: %s", model, who.actor, error)
            recorded = False
        return {"released": hold.as_dict(), "replica": replica, "recorded": recorded}

    async def _registry(self, call: Any) -> Any:
        """Raises UnavailableError where the registry does not answer in time. What it then still does is found when it answers: a
        hold over a route that has changed to what the hold wants is met."""
        if self._reconciler.registry_error is not None:
            raise UnavailableError(f"the registry does not answer: {self._reconciler.registry_error}")
        path = self._quick.url.database
        if self._quick.sqlite and path and not Path(path).exists():
            raise UnavailableError(f"the registry {path} is gone")
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.to_thread(call)
        except TimeoutError:
            raise UnavailableError(f"the registry did not answer within {self._seconds:g} s") from None

    async def _hold(self, model: str, to: str | None, *, who: Who, reason: str, why: str) -> dict[str, Any]:
        reconciler = self._reconciler
        backstop = reconciler.backstop
        while True:
            state = reconciler.applied
            if state is None:
                raise UnavailableError("this server serves nothing yet: there is nothing to roll back")
            route, target, wanted = backstop.target(state, model, to)
            loaded = reconciler.serving.loaded.get((model, target))
            if loaded is None or loaded.digest != wanted.digest:
                loaded = await backstop.urgent(partial(reconciler.load, wanted))
            if reconciler.applied is not None and route in reconciler.applied.routes:
                break  # else the registry came back while this was loading, with another route
        before = reconciler.serving.routes.get(model)
        hold, not_kept = await backstop.put(state, route, target, who=who, reason=reason)
        reconciler.switch(held(route, hold), loaded)
        return {
            "model": model,
            "environment": hold.environment,
            "from": None if before is None else before.stable,
            "to": target,
            "withdrawn": None if before is None else before.candidate,
            "generation": route.generation,
            "by": "hold",
            "registry": why,
            "not_kept": not_kept,
            "replica": reconciler.serving.replica_id,
            "stable": reconciler.serving.routes[model].stable,
        }

    async def _follow(self) -> None:
        """Serve what the registry says now; a registry that goes away in this very moment does not hold the answer up."""
        task = asyncio.ensure_future(self._reconciler.once())
        done, _ = await asyncio.wait({task}, timeout=_FOLLOW_SECONDS)
        if not done:
            log.error("the rollback is on record, but the registry does not say so yet; following when it does")


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
