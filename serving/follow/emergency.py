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
from registry.attempts import Attempt
from registry.database import Database
from registry.errors import ConflictError, ModelkeepError, RefusedError, StorageError, UnavailableError, UsageError
from registry.rollbacks import Aim, Seen
from serving.compute.engine import LoadedVersion
from serving.follow.holds import held
from serving.follow.reconcile import Reconciler
from serving.loaded.laststate import LastState, Wanted
from serving.loaded.lifecycle import ModelState
from serving.traffic.routing import Route

log = logging.getLogger("modelkeep.emergency")

REGISTRY_SECONDS = 1.0
"""What the registry gets to answer in before an emergency goes on without it."""
_FOLLOW_SECONDS = 3.0


class Emergency:
    """The rollbacks of one server. `quick` is the registry, opened so that it gives up soon."""

    def __init__(self, reconciler: Reconciler, quick: Database, *, registry_seconds: float = REGISTRY_SECONDS) -> None:
        self._reconciler, self._quick, self._seconds = reconciler, quick, registry_seconds

    async def aim(self, model: str, *, emergency: bool) -> dict[str, Any]:
        """Where a rollback would go, and what that was decided over: with both it can be asked for again and again.

        Raises NotFoundError, and as `roll_back` where the registry does not answer.
        """
        environment, reconciler = self._reconciler.serving.environment, self._reconciler
        try:
            found = await self._registry(partial(self._read_aim, environment, model, emergency))
            by: dict[str, Any] = {"by": "registry"}
        except (UnavailableError, StorageError) as error:
            if not emergency:
                raise
            state = self._state()
            route, to, _ = reconciler.backstop.target(state, model, None)
            found = Aim(to, Seen(state.epoch, route.generation, str(route.stable), route.candidate))
            by = {"by": "hold", "registry": str(error)}
        return {"model": model, "environment": environment, "to": found.to, "seen": found.seen.as_dict(), **by}

    async def roll_back(
        self,
        model: str,
        to: str | None,
        *,
        who: Who,
        reason: str,
        emergency: bool,
        ttl_seconds: float,
        seen: Seen | None = None,
    ) -> dict[str, Any]:
        """Go back, and say by what: "registry" for all servers, or "hold" for this one alone.

        `to` and `seen` as `aim` said them: then what is done already is not done again. Raises what
        registry.rollbacks.roll_back raises; UnavailableError for what is no emergency while the registry does not answer;
        NotFoundError and RefusedError for what this server cannot go back to by itself.
        """
        began = time.monotonic()
        environment = self._reconciler.serving.environment
        if seen is not None and to is None:
            raise UsageError(
                "`seen` says what `to` was decided over: give both, as GET /api/v2/rollback/MODEL says them"
            )
        attempt = Attempt(None if seen is None or to is None else Aim(to, seen))
        call = partial(
            attempt.roll_back, self._quick, environment=environment, model=model, to=to, reason=reason,
            ttl_seconds=ttl_seconds, emergency=emergency, who=who,
        )  # fmt: skip
        try:
            done = await self._registry(call)
        except (UnavailableError, StorageError) as error:
            aim = attempt.give_up()  # what it had decided may still come to be on record: the hold wants the same
            if not emergency:
                unsure = (
                    ""
                    if aim is None
                    else f" It may be on record all the same: before you repeat it, see what is stable, or give to {aim.to}."
                )
                raise UnavailableError(
                    f"{error}.{unsure} Only an emergency goes on without the registry: give strategy emergency"
                ) from error
            found = await self._hold(
                model, to if aim is None else aim.to, None if aim is None else aim.seen, who=who, reason=reason,
                why=str(error),
            )  # fmt: skip
            return {**found, "seconds": _since(began)}
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

    def left(self, model: str) -> str:
        """What there is left to do after a fault, for people."""
        serving, kept = self._reconciler.serving, self._reconciler.backstop.kept
        route = serving.routes.get(model)
        now = "nothing" if route is None else f"version {route.stable}"
        have = ", ".join(kept.names(model)) or "no version"
        return (
            f"This server serves {now} of {model} and keeps {have} on its disk: name another one (to), ask another server, or "
            f"change the registry: modelkeep rollback {model} --to VERSION --strategy emergency"
        )

    async def _registry(self, call: Any) -> Any:
        """Raises UnavailableError where the registry does not answer in time. What a rollback then still does is what the hold
        wants, so that the hold is met when the registry answers."""
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

    def _read_aim(self, environment: str, model: str, emergency: bool) -> Aim:
        with self._quick.read() as session:
            return rollbacks.aim(session, environment, model, to=None, emergency=emergency)

    def _state(self) -> LastState:
        """What this server serves, as the registry wanted it. Raises UnavailableError."""
        if (state := self._reconciler.applied) is None:
            raise UnavailableError("this server serves nothing yet: there is nothing to roll back")
        return state

    async def _hold(
        self, model: str, to: str | None, seen: Seen | None, *, who: Who, reason: str, why: str
    ) -> dict[str, Any]:
        reconciler = self._reconciler
        backstop = reconciler.backstop
        spare: LoadedVersion | None = None  # loaded here, and not served yet
        try:
            while True:
                state = self._state()
                if (order := reconciler.unloads.by_model.get(model)) is not None:
                    raise RefusedError(
                        f"{model} is unloaded on this server {order.why()}: load it first (POST /v2/repository/models/{model}/load)"
                    )
                route, target, wanted = backstop.target(state, model, to)
                if seen is not None and _done_since(state, route, seen, target):
                    return self._result(route, seen.stable, target, by="registry", registry=why)
                if to is None:  # decided once: should the registry come back meanwhile, it is not asked for one further
                    to, seen = target, Seen(state.epoch, route.generation, str(route.stable), route.candidate)
                chosen = reconciler.serving.loaded.get((model, target))
                if chosen is None or chosen.digest != wanted.digest:
                    chosen = spare
                if chosen is not None and (chosen.version, chosen.digest) == (target, wanted.digest):
                    break
                self._let_go(spare)
                spare = None
                # Room is made where others can go, but an emergency does not wait until they have gone.
                make_room_at_once(reconciler, wanted)
                spare = await reconciler.loader.load(wanted, urgent=True)
                # The registry may have come back while this was loading, with another route: so from the beginning.
            before, version = reconciler.serving.routes.get(model), chosen

            def serve(hold: rollbacks.Hold) -> None:
                nonlocal spare
                if version is spare:
                    spare = None
                reconciler.switch(held(route, hold), version)

            # Served before it is on the disk: no round of the reconciler comes between, and no slow disk keeps requests waiting.
            _, not_kept = await backstop.put(state, route, target, who=who, reason=reason, serve=serve)
        finally:
            self._let_go(spare)
        return {
            **self._result(route, None if before is None else before.stable, target, by="hold", registry=why),
            "withdrawn": None if before is None else before.candidate,
            "not_kept": not_kept,
        }

    def _result(self, route: Route, before: str | None, to: str, *, by: str, registry: str) -> dict[str, Any]:
        serving = self._reconciler.serving
        now = serving.routes.get(route.model)
        return {
            "model": route.model,
            "environment": serving.environment,
            "from": before,
            "to": to,
            "withdrawn": None,
            "generation": route.generation,
            "by": by,
            "registry": registry,
            "not_kept": None,
            "replica": serving.replica_id,
            "stable": None if now is None else now.stable,
        }

    def _let_go(self, spare: LoadedVersion | None) -> None:
        """What was loaded and is not served: its memory and its thread go."""
        if spare is None:
            return
        key, lifecycle = (spare.model, spare.version), self._reconciler.caretaker.lifecycle
        log.warning("%s %s was loaded in vain and is let go of", *key)
        if key not in self._reconciler.serving.loaded and lifecycle.state(key) is ModelState.LOADING:
            # Not ARCHIVED: a round of the reconciler may be about to serve one that it has loaded itself.
            lifecycle.move(key, ModelState.ERROR, error="let go of: its route changed while it was loaded")
        self._reconciler.let_go([spare], [key])

    async def _follow(self) -> None:
        """Serve what the registry says now; a registry that goes away in this very moment does not hold the answer up."""
        task = asyncio.ensure_future(self._reconciler.once())
        done, _ = await asyncio.wait({task}, timeout=_FOLLOW_SECONDS)
        if not done:
            log.error("the rollback is on record, but the registry does not say so yet; following when it does")


def make_room_at_once(reconciler: Reconciler, version: Wanted) -> None:
    """The least recently used models go for this version, as far as they have to, and nobody waits until they have gone."""
    reconciler.hurry_for(version)
    going = reconciler.residency.evict_for(version)
    if going:
        models = ", ".join(sorted({v.model for v in going}))
        log.warning("%s go at once for %s %s", models, version.model, version.version)
        reconciler.let_go(going, reconciler.serving.loaded)


def _done_since(state: LastState, route: Route, seen: Seen, to: str) -> bool:
    """Whether the registry said before it went away that the rollback decided over `seen` is done.

    Raises ConflictError where it said something else.
    """
    if state.epoch == seen.epoch and route.generation <= seen.generation:
        return False
    if route.stable == to and route.candidate is None:
        return True
    if route.stable not in (seen.stable, seen.candidate, to):
        raise ConflictError(
            f"{route.model} {route.stable} is stable on this server, not {seen.stable}, over which this rollback to {to} was "
            "decided: nothing was done; look at it (GET /api/v2/model-info), then ask for a new rollback"
        )
    return False


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
