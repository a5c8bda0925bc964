"""Make this process serve what the registry wants: poll or be nudged, load, flip, drain, report. Requests never wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from registry import clock, leases, promotions, replicas, store, unfit
from registry.database import Database
from registry.errors import ModelkeepError, UnavailableError
from registry.settings import Settings
from registry.signature import Signature
from serving import laststate
from serving.backstop import Backstop
from serving.caretaker import Caretaker, Unfit
from serving.crashmark import Slot
from serving.desired import desired
from serving.engine import LoadedVersion
from serving.keyring import Keyring
from serving.laststate import LastState, Wanted
from serving.reporting import Reporter, Said
from serving.routing import Route, servable
from serving.runtimes import load_runtime
from serving.state import Serving
from serving.swap import Exchange, Plan, Room, plan_of, staying

log = logging.getLogger("modelkeep.reconcile")
T = TypeVar("T")
Key = tuple[str, str]

_RETRY_FIRST_SECONDS, _RETRY_MOST_SECONDS = 1.0, 60.0
_PATIENCE_SECONDS, _PATIENCE_WITH_LAST_STATE_SECONDS = 10.0, 2.0
_FIRST_REPORT_SECONDS, _LAST_REPORT_SECONDS = 1.0, 2.0
_JOIN_SECONDS = 10.0


class Reconciler:
    """Owns the way from the registry's desired state to what `serving` holds. One a process."""

    def __init__(
        self,
        serving: Serving,
        settings: Settings,
        database: Database,
        artifacts: store.ArtifactStore,
        *,
        state_folder: Path,
        address: str,
        keyring: Keyring | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.serving, self.settings, self.database, self.artifacts = serving, settings, database, artifacts
        self.address = address
        self.state_file = state_folder / "last-state.json"
        self.cache = state_folder / "artifacts"
        self.keyring = Keyring(state_folder / "keys.json", address) if keyring is None else keyring
        self.caretaker = Caretaker(state_folder, settings.health, monotonic=monotonic)
        self.backstop = Backstop(
            database, artifacts, folder=state_folder, environment=serving.environment, replica_id=serving.replica_id
        )
        self.room = Room.of_this_machine(settings)
        self.errors: dict[Key, str] = {}
        self.registry_error: str | None = None
        self.started_at = clock.now()
        self._monotonic = monotonic
        self._observer = leases.Observer(monotonic)
        # Two: a registry that does not answer holds its thread, and nothing shall wait for it that is on the disk.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._drains: set[asyncio.Task[None]] = set()
        self._leaving: set[LoadedVersion] = set()
        # A registry that does not answer holds its round; who changes what is served meanwhile shall not wait for it.
        self._round = asyncio.Lock()
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._prepared = False
        self._last: LastState | None = None
        self.applied: LastState | None = None  # as the registry wanted it, without the holds
        self._tidying: asyncio.Task[None] | None = None
        self._retry: tuple[float, float] | None = None  # (when, pause) of the next try to load what failed
        self.reporter = Reporter(serving, database, monotonic=monotonic)

    async def start(self) -> None:
        """Serve what the registry says; where it does not answer in time, what was served last."""
        self._last = self._recall()
        self.backstop.recall()
        self.keyring.recall()
        self.caretaker.starting()
        patience = _PATIENCE_SECONDS if self._last is None else _PATIENCE_WITH_LAST_STATE_SECONDS
        await self.once(patience_seconds=patience, report=False)
        if self.registry_error is not None and not self.serving.routes:
            if self._last is None:
                log.error("the registry does not answer and there is no last state: nothing to serve yet")
            else:
                log.warning("serving the last good state, generation %d", self._last.generation)
                await self._apply(self._last, remember=False)
        if self.registry_error is None:
            # Whoever asks the registry for servers shall find this one; a registry that is locked does not keep it from serving.
            await self.once(patience_seconds=_FIRST_REPORT_SECONDS)
        self.caretaker.started()
        self._wake.set()
        self.serving.ready = True

    async def run(self) -> None:
        """Poll until cancelled. A failure is logged, shown in model-info, and tried again."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.settings.poll_seconds)
            self._wake.clear()
            await self.once()
            try:
                await self._care()
            except Exception:
                log.exception("the versions could not be looked after; trying again at the next poll")

    async def nudge(self) -> dict[str, Any]:
        """Reconcile now; the answer says how far this replica is."""
        await self.once()
        return self.info()

    async def once(self, *, patience_seconds: float | None = None, report: bool = True) -> None:
        """One round. Never raises what the registry or a model did wrong: that is reported.

        `patience_seconds` is for the registry to answer in; loading takes as long as it takes.
        """
        async with self._round:
            try:
                async with asyncio.timeout(patience_seconds):
                    state = await self._wanted()
                if state is not None:
                    async with self._lock:
                        await self._apply(state, remember=True)
                if report:
                    async with asyncio.timeout(patience_seconds):
                        await self.keyring.agree(self.database, self.serving.replica_id, self._in_thread)
                        await self.reporter.report(self._in_thread, self._said)
                if self.applied is not None:
                    self.backstop.look(self.applied, lambda: {v.digest for v in self.serving.loaded.values()})
            except TimeoutError:
                log.error(
                    "the registry did not answer within %g s; going on with the last good state", patience_seconds
                )
                self.registry_error = f"no answer within {patience_seconds:g} s"
            except ModelkeepError as error:
                if self.registry_error is None:
                    log.error("going on with the last good state: %s", error)
                self.registry_error = str(error)
            except Exception:
                log.exception("reconciling failed; going on with what is served")
                self.registry_error = "reconciling failed with an unexpected error, see the log"
            else:
                if self.registry_error is not None:
                    log.info("the registry answers again")
                self.registry_error = None

    async def stop(self) -> None:
        """Tell the registry what was counted and said last, and let the versions that were on their way out finish."""
        if self._prepared:
            try:
                async with asyncio.timeout(_LAST_REPORT_SECONDS), self._round:
                    await self.reporter.report(self._in_thread, self._said)
            except (TimeoutError, ModelkeepError) as error:
                waiting = len(self.serving.feedback)
                log.error(
                    "the last counts and %d verdicts did not reach the registry: %s", waiting, error or "no answer"
                )
        if self._tidying is not None:
            self._tidying.cancel()
        await self.backstop.stop()
        for thread in (self._thread, self._loader):
            thread.shutdown(wait=False, cancel_futures=True)
        if self._drains:
            await asyncio.wait(self._drains)

    def info(self) -> dict[str, Any]:
        """What this replica serves and how far it has come. JSON-able."""
        serving = self.serving
        return {
            "replica": serving.replica_id,
            "boot_id": serving.boot_id,
            "environment": serving.environment,
            "address": self.address,
            "epoch": serving.epoch,
            "generation": serving.generation,
            "ready": serving.ready,
            "keys": None if self.keyring.seen is None else self.keyring.seen[1],
            "registry": "ok" if self.registry_error is None else self.registry_error,
            **self._serving(),
        }

    def _said(self) -> Said:
        """What the next report says."""
        return Said(self.address, self.started_at, self._serving(), self.errors)

    def _serving(self) -> dict[str, Any]:
        return {
            **self.serving.served(),
            "errors": {
                **{f"{model}/{version}": error for (model, version), error in sorted(self.errors.items())},
                **self.backstop.holds.errors(),
                **self.reporter.refused,
            },
            "exchanges": self.serving.gate.as_dict(),
            **self.backstop.info(),
            **self.caretaker.as_dict(),
        }

    async def _wanted(self) -> LastState | None:
        """What the registry wants, None where this process is there already. Ends leases that stand still on the way."""
        if not self._prepared:
            await self._in_thread(self._prepare)
            self._prepared = True
        pulse = await self._in_thread(self._pulse)
        for beat in self._observer.stale(pulse.beats if pulse else ()):
            ended = await self._in_thread(partial(self._expire, beat))
            if ended is not None:
                log.warning("withdrew promotion %s: its lease on %s stood still", ended, beat.subject)
                pulse = await self._in_thread(self._pulse)
        if pulse is None:
            if self._last is not None:
                raise UnavailableError(
                    f"the registry knows nothing of environment {self.serving.environment}, of which this server has served generation "
                    f"{self._last.generation}: it is another one, or it was emptied. Restore it, or promote a version in this one"
                )
            await self.keyring.follow(self.database, "", None, self._in_thread)
            return None
        await self.keyring.follow(self.database, pulse.epoch, pulse.keys, self._in_thread)
        if await self.backstop.write_back((pulse.epoch, pulse.generation)):
            pulse = await self._in_thread(self._pulse) or pulse
        due = self._retry is not None and self._monotonic() >= self._retry[0]
        due |= self.caretaker.take_back_due()
        if not due and (pulse.epoch, pulse.generation) == (self.serving.epoch, self.serving.generation):
            return None
        state = await self._in_thread(self._desired)
        for crashed in self.caretaker.crashed(state.routes, state.by_key()):
            if await self._take_out(crashed):
                state = await self._in_thread(self._desired)
        return state

    async def _take_out(self, what: Unfit) -> bool:
        """Have the registry take a version out of its route. False where it stays, since nothing else can serve."""
        observer = f"replica:{self.serving.replica_id}"
        environment, model, version = self.serving.environment, what.model, what.version
        done = await self._in_thread(
            lambda: unfit.take_out(self.database, environment, model, version, observer=observer, reason=what.reason)
        )
        self.caretaker.told(what)
        if done is None:
            log.error("%s %s stays, for nothing else can serve: %s", model, version, what.reason)
            return False
        log.error("%s, for %s: %s", done, version, what.reason)
        return True

    async def _care(self) -> None:
        """Look after the health of what is served: load an unhealthy version again once, then have it taken out."""
        serving = self.serving
        todo = self.caretaker.look(serving.loaded, serving.routes)
        serving.health = {key: result.as_dict() for key, result in self.caretaker.results.items()}
        if not self.settings.health.act or self.applied is None:
            return
        for what, sick in todo:
            try:
                if what == "reload":
                    log.error("%s %s is loaded again, for it is %s", sick.model, sick.version, sick.reason)
                    async with self._lock:
                        await self._apply(self.applied, remember=False, anew=(sick.model, sick.version))
                    self.caretaker.reloaded(sick)
                elif await self._take_out(sick):
                    await self.once()
            except ModelkeepError as error:
                log.error("nothing could be done about %s %s yet: %s", sick.model, sick.version, error)

    def _prepare(self) -> None:
        """Bring the registry to this release's schema. An empty one is made only where no other can have been lost."""
        path = self.database.url.database
        if self.database.sqlite and self._last is not None and path and not Path(path).exists():
            raise UnavailableError(
                f"the registry {path} is gone, and this server has served from it: restore it from a backup; to begin with an empty "
                "one instead: modelkeep db upgrade"
            )
        self.database.prepare()

    def _expire(self, beat: leases.Beat) -> str | None:
        observer = f"replica:{self.serving.replica_id}"
        return promotions.expire(self.database, self.serving.environment, beat, observer=observer)

    def _pulse(self) -> replicas.Pulse | None:
        with self.database.read() as session:
            return replicas.pulse(session, self.serving.environment)

    def _desired(self) -> LastState:
        return desired(self.database, self.serving.environment)

    async def _apply(self, state: LastState, *, remember: bool, anew: Key | None = None) -> None:
        """Load what is missing (and `anew` again), then flip all routes at once, then let go of what nobody needs.

        Where the memory does not hold old and new together, the old goes first, and the requests of its model wait at the gate.
        """
        wanted = state
        plan = self._plan(wanted)
        if self._leaving and self.room.over(plan.missing, [*self.serving.loaded.values(), *self._leaving]) > 0:
            # Nobody has to go for what is going already. An emergency may put a hold while that is waited for.
            await asyncio.wait(self._drains, timeout=self.settings.server.drain_seconds)
            plan = self._plan(wanted)
        stay = staying(self.serving, plan.state.routes, plan.versions, plan.missing)
        exchange = Exchange(
            self.serving, self.caretaker, self.room.leaving(plan.missing, self.serving.loaded, stay), self.room.owed,
            self._known(), drain=self._drain, let_go=self.let_go, load=self._loaded,
        )  # fmt: skip
        async with exchange:
            errors = await self._load_and_flip(wanted, plan, exchange, remember=remember, anew=anew)
        for key, error in errors.items():
            if key[0] in exchange.models and key not in plan.refused:
                self.room.failed(plan.versions[key], plan.change(key[0]), error)

    def _plan(self, wanted: LastState) -> Plan:
        return plan_of(self.backstop.over(wanted), self.serving, self.caretaker, self.room)

    async def _load_and_flip(
        self,
        wanted: LastState,
        plan: Plan,
        exchange: Exchange,
        *,
        remember: bool,
        anew: Key | None,
    ) -> dict[Key, str]:
        """Returns what of the wanted versions does not load, with the reason."""
        loaded: dict[Key, LoadedVersion] = {}
        errors: dict[Key, str] = {}
        for key, version in plan.versions.items():
            current = self.serving.loaded.get(key)
            if current is not None and current.digest == version.digest:
                loaded[key] = current
                if key != anew:
                    continue
            elif key in plan.held_back:
                continue
            elif key in plan.refused:
                errors[key] = plan.refused[key]
                continue
            try:
                loaded[key] = await self._loaded(version)
            except ModelkeepError as error:
                errors[key] = _plain(str(error))
            except Exception as error:
                log.exception("%s %s does not load", *key)
                errors[key] = _plain(f"does not load: {type(error).__name__}: {error}")
        stable_ones = {(route.model, route.stable) for route in plan.state.routes}
        brought = await exchange.bring_back({key[0] for key in errors if key in stable_ones})
        self._note_errors(errors | {key: _plain(why) for key, why in brought.items()})
        state = self.backstop.over(wanted)  # somebody may have put a hold while this was loading
        routes = {
            route.model: servable(
                route, errors | plan.held_back, self.serving.routes.get(route.model), self.serving.loaded
            )
            for route in state.routes
        }
        for route in routes.values():
            # A route that had to stay on the old version keeps that version loaded.
            for name in filter(None, (route.stable, route.candidate)):
                if (route.model, name) not in loaded and (route.model, name) in self.serving.loaded:
                    loaded[route.model, name] = self.serving.loaded[route.model, name]
        self.reporter.supersede(routes)
        unneeded = self.serving.install(routes, loaded, state.epoch, state.generation)
        behind = sorted(
            route.model
            for route in wanted.routes
            if routes[route.model] != route
            or any((route.model, name) not in loaded for name in (route.stable, route.candidate) if name)
        )
        self.reporter.reached(replicas.Reached(state.epoch, state.generation, clock.now(), tuple(behind)))
        self.applied = wanted
        self.caretaker.settled(state.routes, routes, loaded)
        self.let_go(unneeded, loaded)
        if remember and not errors:
            self._last = wanted
            try:
                await self._in_thread(lambda: laststate.write(self.state_file, wanted), self._loader)
            except OSError as error:
                log.error("the last state could not be kept in %s: %s", self.state_file, error)
        return errors

    def _known(self) -> list[Wanted]:
        """Versions whose files this server knows."""
        states = [state for state in (self.applied, self._last) if state is not None]
        return [*(v for state in states for v in state.versions), *self.backstop.kept.versions.values()]

    async def _loaded(self, version: Wanted) -> LoadedVersion:
        return await self._in_thread(partial(self.load, version), self._loader)

    def switch(self, route: Route, version: LoadedVersion) -> None:
        """Send a model's traffic elsewhere now, against its route. What that makes needless goes when the round under way is over."""
        self.serving.gate.open([version.model])
        loaded = {**self.serving.loaded, (version.model, version.version): version}
        routes, epoch, generation = (
            {**self.serving.routes, route.model: route},
            self.serving.epoch,
            self.serving.generation,
        )
        self.let_go(self.serving.install(routes, loaded, epoch, generation), loaded)
        self.reporter.reached(replicas.Reached(epoch, generation, clock.now(), (route.model,)))
        if self._tidying is None or self._tidying.done():
            self._tidying = asyncio.create_task(self.again())

    async def again(self) -> None:
        """Serve what the registry wanted last, with the holds as they are now."""
        async with self._lock:
            if self.applied is not None:
                await self._apply(self.applied, remember=False)

    def let_go(self, unneeded: list[LoadedVersion], loaded: Collection[Key]) -> None:
        for old in unneeded:
            self.caretaker.leaving(old, replaced=(old.model, old.version) in loaded)
            self._leaving.add(old)
            task = asyncio.create_task(self._drain(old))
            self._drains.add(task)
            task.add_done_callback(self._drains.discard)

    def load(self, version: Wanted) -> LoadedVersion:
        slot = self.caretaker.begin(version)
        try:
            return self._load_marked(version, slot)
        except Exception as error:
            self.caretaker.failed(version, slot, str(error))
            raise

    def _load_marked(self, version: Wanted, slot: Slot) -> LoadedVersion:
        started = self._monotonic()
        files = [store.StoredFile.from_dict(file) for file in version.files]
        path = store.materialise(self.backstop.kept.store, files, self.cache)
        signature = None if version.signature is None else Signature.from_dict(version.signature)
        self.caretaker.loading(version, slot)
        runtime = load_runtime(path, version.format, signature=signature, threads=self.settings.server.threads)
        loaded = LoadedVersion(
            version.model,
            version.version,
            version.digest,
            runtime,
            rows_independent=version.rows_independent,
            max_batch=self.settings.performance.batch_size,
            queue_size=self.settings.performance.queue_size,
            deterministic=version.deterministic,
            mark=slot.mark,
        )
        self.caretaker.keep(loaded, slot)
        self.room.note(loaded)
        log.info("loaded %s %s in %.3f s", version.model, version.version, self._monotonic() - started)
        return loaded

    def _note_errors(self, errors: dict[Key, str]) -> None:
        for key in errors.keys() - self.errors.keys():
            log.error("%s %s: %s", *key, errors[key])
        self.errors = self.serving.load_errors = errors
        if not errors:
            self._retry = None
        else:
            pause = min(self._retry[1] * 2, _RETRY_MOST_SECONDS) if self._retry else _RETRY_FIRST_SECONDS
            self._retry = (self._monotonic() + pause, pause)

    async def _drain(self, version: LoadedVersion) -> None:
        if not await version.drain(self.settings.server.drain_seconds):
            seconds = self.settings.server.drain_seconds
            log.error("%s %s still had requests after %g s", version.model, version.version, seconds)
        version.close()
        if not await asyncio.to_thread(version.join, _JOIN_SECONDS):
            log.error("%s %s still computes: its memory is not free yet", version.model, version.version)
        self._leaving.discard(version)
        self.caretaker.gone(version)

    def _recall(self) -> LastState | None:
        """What was served last, from the disk."""
        try:
            return laststate.read(self.state_file)
        except (OSError, ValueError) as error:
            log.error("the last state cannot be used, going on without it: %s", error)
            return None

    async def _in_thread(self, work: Callable[[], T], thread: ThreadPoolExecutor | None = None) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread or self._thread, work)


def _plain(text: str) -> str:
    """Without control characters: no database shall refuse what a model's error says."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
