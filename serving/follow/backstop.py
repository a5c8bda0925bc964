"""What this server can do without the registry: hold an earlier version, keep its files near, and bring the hold home when it answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from registry import clock, figures, points, rollbacks, routes, store
from registry.actor import Who
from registry.database import Database
from registry.errors import ModelkeepError, NotFoundError, RefusedError, StorageError, UnavailableError
from registry.rollbacks import Hold
from registry.schema import Version
from serving.follow.holds import Holds, Refused
from serving.loaded.keeping import Kept
from serving.loaded.laststate import LastState, Wanted
from serving.traffic.routing import Route

log = logging.getLogger("modelkeep.backstop")
T = TypeVar("T")

_AGAIN_SECONDS = 0.5
_LOOK_SECONDS = 60.0
"""How often the points are read again though no route has changed: they may have been let go, or a file was missing."""
_REFUSED_FIRST_SECONDS, _REFUSED_MOST_SECONDS = 2.0, 300.0
"""Between the tries to write a hold back that the registry refuses: doubled each time, since a person has to do something first."""


class Backstop:
    """Owned by the reconciler. Changed on the event loop only."""

    def __init__(
        self,
        database: Database,
        artifacts: store.ArtifactStore,
        *,
        folder: Path,
        environment: str,
        replica_id: str,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.database, self.environment, self.replica_id = database, environment, replica_id
        self.holds = Holds(folder / "holds.json")
        self.kept = Kept(artifacts, folder / "artifacts", folder / "points.json")
        self._monotonic = monotonic
        # Neither a registry that hangs nor a large copy may stand before an emergency.
        self._urgent = ThreadPoolExecutor(2, thread_name_prefix="hold")
        self._background = ThreadPoolExecutor(1, thread_name_prefix="keep")
        self._saving = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._done: tuple[str, int] | None = None
        self._looked = float("-inf")

    def recall(self) -> None:
        """What a process before this one held and kept."""
        self.kept.recall()
        self.holds.recall()
        for hold in self.holds.by_model.values():
            log.warning("%s is held on version %s since %s: %s", hold.model, hold.to, hold.at, hold.reason)

    def over(self, state: LastState) -> LastState:
        """The state as it is to be served: with the holds over it."""
        return self.holds.over(state, self.kept.version)

    async def write_back(self, seen: tuple[str, int]) -> bool:
        """Bring the holds into the registry, which answers. Whether there was something to do.

        `seen` is the epoch and generation that it has now. One that it refused is tried again after a growing pause, or once the
        route of its model has changed. Raises UnavailableError, StorageError.
        """
        done = False
        for hold in self.holds.to_write_back():
            if not await self._due(hold, seen):
                continue
            write = partial(rollbacks.write_back, self.database, hold, replica=self.replica_id)
            try:
                outcome = await self._in(self._urgent, write)
            except (UnavailableError, StorageError):
                raise
            except ModelkeepError as error:
                await self._note_refused(hold, seen, str(error))
                continue
            except Exception as error:
                # A reason that cannot be written, say: it shall not keep this server from following its routes.
                await self._note_refused(hold, seen, f"{type(error).__name__}: {error}", unexpected=error)
                continue
            log.warning("the hold of %s on version %s is over: %s", hold.model, hold.to, outcome)
            self.holds.came_home(hold)
            done = True
        return done

    async def settle(self, served: LastState) -> None:
        """What the registry wanted is served as far as it goes: let go of the holds whose place that takes."""
        if self.holds.drop_replaced(served):
            await self._save()

    async def _due(self, hold: Hold, seen: tuple[str, int]) -> bool:
        refused = self.holds.refused.get(hold.model)
        if refused is None or self._monotonic() >= refused.due:
            return True
        if seen == refused.seen:
            return False
        route = await self._in(self._urgent, partial(self._route, hold.model, seen[0]))
        refused.seen = seen  # the change was of another model, or it is tried now
        if route != refused.route:
            self.holds.refused.pop(hold.model, None)
            return True
        return False

    async def _note_refused(
        self, hold: Hold, seen: tuple[str, int], why: str, *, unexpected: Exception | None = None
    ) -> None:
        route = await self._in(self._urgent, partial(self._route, hold.model, seen[0]))
        before = self.holds.refused.get(hold.model)
        pause = _REFUSED_FIRST_SECONDS if before is None else min(2 * before.pause_seconds, _REFUSED_MOST_SECONDS)
        if before is None or (before.pause_seconds, before.why) != (pause, why):
            log.error(
                "the hold of %s on %s stays, the registry does not take it: %s; asked again in %g s",
                hold.model, hold.to, why, pause, exc_info=unexpected,
            )  # fmt: skip
        if self.holds.by_model.get(hold.model) == hold:  # else there is a newer one, or it was released meanwhile
            self.holds.refused[hold.model] = Refused(why, route, seen, pause, self._monotonic() + pause)

    def _route(self, model: str, epoch: str) -> tuple[str, int | None]:
        with self.database.read() as session:
            found = routes.read(session, self.environment, model)
            return epoch, None if found is None else found.generation

    def target(self, state: LastState, model: str, to: str | None) -> tuple[Route, str, Wanted]:
        """The route to hold, the version to hold it on, and what it takes to load that.

        Without a version, as registry.rollbacks: a candidate that has traffic is taken out, else it is the stable version before this
        one. Raises NotFoundError, RefusedError.
        """
        route = next((route for route in state.routes if route.model == model), None)
        if route is None or route.stable is None:
            raise NotFoundError(f"{model} serves nothing on this server: there is nothing to roll back")
        now = self.holds.of(route, state.epoch)
        found: str | None = to
        if found is None:
            exposed = now is None and route.candidate is not None and route.weight > 0
            found = route.stable if exposed else self.kept.below(model, now.to if now else route.stable)
            if found is None and now is None and route.candidate is not None:
                found = route.stable
        if found is None:
            raise NotFoundError(
                f"this server knows no stable version of {model} before {route.stable}: name one with --to VERSION"
            )
        wanted = self.kept.version(model, found)
        if wanted is None and found == route.stable:
            wanted = next((w for w in state.versions if (w.model, w.version) == (model, found)), None)
        if wanted is None or not (
            found == route.stable or any(step.version == found for step in self.kept.steps.get(model, []))
        ):
            have = ", ".join(name for name in self.kept.names(model) if name != route.candidate)
            raise RefusedError(
                f"this server keeps no {model} {found} to go back to without the registry; it keeps {have or 'none'}: name one of them with --to"
            )
        return route, found, wanted

    async def put(
        self, state: LastState, route: Route, to: str, *, who: Who, reason: str, serve: Callable[[Hold], None]
    ) -> tuple[Hold, str | None]:
        """Hold a route, have it served, and keep the hold on the disk.

        Returns it, and why it could not be kept (a restart would forget it).
        """
        hold = Hold(
            model=route.model,
            environment=self.environment,
            to=to,
            before=route.stable,
            epoch=state.epoch,
            generation=route.generation,
            actor=who.actor,
            key_id=who.key_id,
            claimed=who.claimed,
            reason=reason,
            at=clock.text(clock.now()),
        )
        self.holds.put(hold)
        serve(hold)
        log.warning("%s is held on version %s by %s: %s", hold.model, hold.to, hold.actor, hold.reason)
        return hold, await self._save()

    async def release(self, model: str, *, who: Who, reason: str) -> Hold:
        """Let go of a hold by hand. On record where the registry answers, else in the log only. Raises NotFoundError."""
        hold = self.holds.by_model.get(model)
        if hold is None:
            raise NotFoundError(f"{model} is not held on this server")
        self.holds.drop(hold)
        await self._save()
        log.warning("the hold of %s on version %s was released by %s: %s", hold.model, hold.to, who.actor, reason)
        return hold

    def look(self, state: LastState, wanted: Callable[[], Collection[Wanted]], loaded: Callable[[], set[str]]) -> None:
        """See in the background that what the points need is here, and that nothing else is. For after the routes are served.

        `wanted` gives the versions that are wanted by then, also by a round under way, `loaded` the digests of what is in memory.
        """
        fresh = (state.epoch, state.generation) != self._done
        if self._task is not None or self._monotonic() - self._looked < (_AGAIN_SECONDS if fresh else _LOOK_SECONDS):
            return
        self._task = asyncio.create_task(self._look(state, wanted, loaded))

    async def _look(
        self, state: LastState, wanted: Callable[[], Collection[Wanted]], loaded: Callable[[], set[str]]
    ) -> None:
        try:
            steps, versions = await self._in(self._background, lambda: self._needed(state))
            await self._in(self._background, lambda: self.kept.bring(steps, versions))
            needed = [*versions, *wanted()]  # asked now: bringing copies takes minutes
            files = {str(file["digest"]) for version in needed for file in version.files}
            artifacts = {version.digest for version in needed} | loaded()
            dropped = await self._in(self._background, lambda: self.kept.clean(artifacts, files))
            if dropped:
                log.info("dropped %d artifacts that no route and no rollback point needs", len(dropped))
            self._done = (state.epoch, state.generation)
        except ModelkeepError as error:
            log.error("the rollback points could not be looked at: %s", error)
        except Exception:
            log.exception("the rollback points could not be looked at")
        finally:
            self._looked, self._task = self._monotonic(), None

    def _needed(self, state: LastState) -> tuple[dict[str, list[points.Step]], list[Wanted]]:
        with self.database.read() as session:
            steps = points.needed(session, self.environment)
            names = {(model, step.version) for model, found in steps.items() for step in found if step.version}
            known = {(wanted.model, wanted.version) for wanted in state.versions}
            rows = points.versions_of(session, names - known)
            return steps, [*state.versions, *(wanted_of(row) for row in rows)]

    async def _save(self) -> str | None:
        """Keep the holds on the disk. Returns why that failed, None where it did not."""
        # Who gives up waiting does not end the writing: what comes next shall not be overtaken by it.
        return await asyncio.shield(asyncio.ensure_future(self._save_in_turn()))

    async def _save_in_turn(self) -> str | None:
        async with self._saving:
            try:
                await self._in(self._urgent, self.holds.save)
            except OSError as error:
                log.error("the holds could not be kept in %s, a restart would forget them: %s", self.holds.path, error)
                return f"{self.holds.path} could not be written: {error.strerror or error}"
        return None

    async def stop(self) -> None:
        for thread in (self._urgent, self._background):
            thread.shutdown(wait=False, cancel_futures=True)
        if self._task is not None:
            self._task.cancel()

    def info(self) -> dict[str, Any]:
        """For model-info."""
        return {
            "holds": self.holds.as_list(),
            "kept": [f"{model}/{version}" for model, version in sorted(self.kept.versions)],
            "not_kept": {f"{model}/{version}": why for (model, version), why in sorted(self.kept.errors.items())},
        }

    @staticmethod
    async def _in(thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread, work)


def wanted_of(row: Version) -> Wanted:
    memory = ((row.validation or {}).get("candidate") or {}).get("memory_bytes")
    return Wanted(
        row.model,
        row.version,
        row.digest,
        row.format,
        tuple(row.files),
        row.signature,
        bool(row.rows_independent),
        memory,
        deterministic=row.facts.get("deterministic") is True,
        labels=row.facts.get("labels"),
        max_batch=row.facts.get("max_batch"),
        golden=row.golden_digest,
        quality=figures.quality(row) or None,
    )
