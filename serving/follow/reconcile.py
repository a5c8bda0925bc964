"""Make this process serve what the registry wants: poll or be nudged, load, flip, drain, report. Requests never wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from registry import clock, replicas, store
from registry.database import Database
from registry.errors import ModelkeepError, UnavailableError
from registry.settings import Settings
from serving.access.keyring import Keyring
from serving.compute.engine import LoadedVersion
from serving.device import memory
from serving.follow.backstop import Backstop
from serving.follow.desired import Upstream
from serving.follow.reporting import Reporter, Said
from serving.follow.unloads import Unloads
from serving.loaded import laststate
from serving.loaded.caretaker import Caretaker
from serving.loaded.laststate import LastState, Wanted
from serving.loaded.leaving import Leaving
from serving.loaded.loader import Loader, StillLoadingError
from serving.loaded.loading import Loading
from serving.loaded.residency import Residency
from serving.loaded.swap import Exchange, Plan, Room, going_for, plan_of, serves
from serving.loaded.waking import Waker
from serving.loaded.watchdog import Watchdog
from serving.state import Serving
from serving.traffic.routing import Route, servable

log = logging.getLogger("modelkeep.reconcile")
T = TypeVar("T")
Key = tuple[str, str]

_RETRY_FIRST_SECONDS, _RETRY_MOST_SECONDS = 1.0, 60.0
_PATIENCE_SECONDS, _PATIENCE_WITH_LAST_STATE_SECONDS = 10.0, 2.0
_FIRST_REPORT_SECONDS, _LAST_REPORT_SECONDS = 1.0, 2.0


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
        self.memory = memory.of_this_machine(settings, serving, self.room.budget_bytes)
        self.loading = Loading(
            settings, self.cache, caretaker=self.caretaker, kept=self.backstop.kept, room=self.room, memory=self.memory,
            monotonic=monotonic,
        )  # fmt: skip
        self.residency = serving.residency = Residency(
            serving, self.room, settings.models, state_folder / "used.json", state=self._served,
            patience_seconds=settings.server.request_timeout_seconds, monotonic=monotonic,
        )  # fmt: skip
        self.unloads = Unloads(
            state_folder / "unloaded.json", environment=serving.environment, replica_id=serving.replica_id
        )
        self.errors: dict[Key, str] = {}
        self.registry_error: str | None = None
        self.started_at = clock.now()
        self._monotonic = monotonic
        # Two: a registry that does not answer holds its thread, and nothing shall wait for it that is on the disk.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._upstream = Upstream(database, serving, self.caretaker, self._in_thread, monotonic=monotonic)
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self.loader = serving.loader = Loader(
            lambda version: self.load(version), self.loading.fetch, limit_seconds=self.loading.limit_seconds
        )
        self._leaving = Leaving(
            self.caretaker, drain_seconds=settings.server.drain_seconds, text_seconds=settings.text.timeout_seconds
        )
        self.watchdog = Watchdog.of(settings, serving, self._leaving.versions, self.room.budget_bytes)
        self._leaving.left_behind = self.watchdog.left_behind
        self.watchdog.abandoned = lambda: self.loader.abandoned(self._served(), self.room.need)
        # A registry that does not answer holds its round; who changes what is served meanwhile shall not wait for it.
        self._round = asyncio.Lock()
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self.loader.found, self.loader.changed = self.loading.hangs, self._wake.set
        self._last: LastState | None = None
        self.applied: LastState | None = None  # as the registry wanted it, without the holds
        self._planned: Collection[Wanted] = ()  # by the last round, or the one under way
        self._behind: list[str] = []
        self._tidying: asyncio.Task[None] | None = None
        self._due = False  # whether a candidate that was held back is to come
        self._retry: tuple[float, float] | None = None  # (when, pause) of the next try to load what failed
        self.reporter = Reporter(serving, database, monotonic=monotonic)
        self._waker = Waker(self)

    async def start(self) -> None:
        """Serve what the registry says; where it does not answer in time, what was served last."""
        self._last = laststate.recall(self.state_file)
        self.backstop.recall()
        self.residency.use.recall()
        self.unloads.recall()
        self.serving.unloaded = self.unloads.reasons()
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
        self._waker.start()

    async def run(self) -> None:
        """Poll until cancelled. A failure is logged, shown in model-info, and tried again."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.poll_seconds):  # wait_for can lose a cancellation
                    await self._wake.wait()
            self._wake.clear()
            await self.once()
            try:
                if self.loader.take_news():
                    await self.again()
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
                if self.applied is not None:
                    await self.backstop.settle(self.applied)
                if report:
                    async with asyncio.timeout(patience_seconds):
                        await self.keyring.agree(self.database, self.serving.replica_id, self._in_thread)
                        await self.reporter.report(self._in_thread, self._said)
                await self.residency.use.keep()
                if self.applied is not None:
                    self.backstop.look(
                        self.applied, self._needed_here, lambda: {v.digest for v in self.serving.loaded.values()}
                    )
            except TimeoutError as error:
                # The system's own, of a file system or a connection, where nobody set one here.
                late = f"in time ({error})" if patience_seconds is None else f"within {patience_seconds:g} s"
                log.error("the registry did not answer %s; going on with the last good state", late)
                self.registry_error = f"no answer {late}"
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
        if self._upstream.prepared:
            try:
                async with asyncio.timeout(_LAST_REPORT_SECONDS), self._round:
                    await self.reporter.report(self._in_thread, self._said)
            except Exception as error:  # whatever it is, the rest is to be ended too
                expected = isinstance(error, (TimeoutError, ModelkeepError))
                log.error(
                    "the last counts and %d verdicts did not reach the registry: %s",
                    len(self.serving.feedback),
                    str(error) or "no answer",
                    exc_info=None if expected else error,
                )
        self._waker.stop()
        if self._tidying is not None:
            self._tidying.cancel()
        await self.residency.use.keep(now=True)
        await self.backstop.stop()
        self.loader.stop()
        for thread in (self._thread, self._disk):
            thread.shutdown(wait=False, cancel_futures=True)
        await self._leaving.wait()

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
            "residency": self.residency.as_dict(),
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
            "unloaded": self.unloads.as_list(),
            "watchdog": self.watchdog.as_dict(),
            "loading": self.loader.as_list(),
            **self.backstop.info(),
            **self.caretaker.as_dict(),
        }

    async def _wanted(self) -> LastState | None:
        """What the registry wants, None where this process is there already. Ends leases that stand still on the way."""
        await self._upstream.prepare(self._last)
        pulse = await self._upstream.pulse()
        if pulse is None:
            if self._last is not None:
                raise UnavailableError(
                    f"the registry knows nothing of environment {self.serving.environment}, of which this server has served generation "
                    f"{self._last.generation}: it is another one, or it was emptied. Restore it, or promote a version in this one"
                )
            await self.keyring.follow(self.database, "", None, self._in_thread)
            return None
        await self.keyring.follow(self.database, pulse.epoch, pulse.keys, self._in_thread)
        await self.unloads.tell(self.database, self._in_thread)
        if await self.backstop.write_back((pulse.epoch, pulse.generation)):
            pulse = await self._upstream.pulse() or pulse
        # The caretaker says it once, and the registry may go away before it has given the state.
        self._due |= self.caretaker.take_back_due()
        due = self._due or (self._retry is not None and self._monotonic() >= self._retry[0])
        if not due and (pulse.epoch, pulse.generation) == (self.serving.epoch, self.serving.generation):
            return None
        state = await self._upstream.desired()
        for crashed in self.caretaker.crashed(state.routes, state.by_key()):
            if await self._upstream.take_out(crashed):
                state = await self._upstream.desired()
        self._due = False
        return state

    async def _care(self) -> None:
        """Look after the health of what is served: load an unhealthy version again once, then have it taken out."""
        serving = self.serving
        todo = self.caretaker.look(serving.loaded, serving.routes)
        serving.health = {key: result.as_dict() for key, result in self.caretaker.results.items()}
        if self.applied is None:
            return
        for what, sick in todo:
            if what != "withdraw" and not self.settings.health.act:
                continue
            try:
                if what == "reload":
                    if not self.watchdog.fits_again(serving.loaded.get((sick.model, sick.version))):
                        continue
                    log.error("%s %s is loaded again, for it is %s", sick.model, sick.version, sick.reason)
                    async with self._lock:
                        await self._apply(self.applied, remember=False, anew=(sick.model, sick.version))
                    self.caretaker.reloaded(sick)
                elif await self._upstream.take_out(sick):
                    await self.once()
            except ModelkeepError as error:
                log.error("nothing could be done about %s %s yet: %s", sick.model, sick.version, error)

    async def _apply(self, state: LastState, *, remember: bool, anew: Key | None = None) -> None:
        """Load what is missing (and `anew` again), then flip all routes at once, then let go of what nobody needs.

        Where the memory does not hold old and new together, the old goes first, and the requests of its model wait at the gate.
        """
        wanted = state
        if self.applied is None:
            self.residency.starting(state.routes)
        plan = self._plan(wanted)
        gone = self._leaving.versions
        if gone and self.room.over(plan.missing, [*self.serving.loaded.values(), *gone]) > 0:
            # Nobody has to go for what is going already. An emergency may put a hold while that is waited for.
            await self._leaving.wait(self.settings.server.drain_seconds)
            plan = self._plan(wanted)
        going = going_for(plan, self.serving, self.room, anew)
        exchange = Exchange(
            self.serving, self.caretaker, going, self.room.owed,
            self._known(), drain=self._leaving.drain, let_go=self.let_go, load=self.loader.load,
        )  # fmt: skip
        try:
            async with exchange:
                # Where others went for it, or all shall be here first, there is nothing to go on with.
                self.loader.patient = bool(going) or (self.settings.models.preload_models and not self.serving.ready)
                errors = await self._load_and_flip(wanted, plan, exchange, remember=remember, anew=anew)
        except Exception:
            self._retry = self._retry or (self._monotonic() + _RETRY_FIRST_SECONDS, _RETRY_FIRST_SECONDS)
            raise
        for key, error in errors.items():
            if key[0] in exchange.models and key not in plan.refused:
                self.room.failed(plan.versions[key], plan.change(key[0]), error)

    def _plan(self, wanted: LastState) -> Plan:
        state = self.backstop.over(wanted)
        self.serving.unloaded = self.unloads.reasons()
        self._decide(state)
        plan = plan_of(state, self.serving, self.caretaker, self.room)
        self._planned = plan.versions.values()
        return plan

    def _decide(self, state: LastState, *, later: Collection[str] = ()) -> None:
        self.residency.decide(state, held=self.backstop.holds.by_model, unloaded=self.serving.unloaded, later=later)

    def _served(self) -> LastState | None:
        """What is wanted, with the holds over it."""
        return None if self.applied is None else self.backstop.over(self.applied)

    async def _load_and_flip(
        self,
        wanted: LastState,
        plan: Plan,
        exchange: Exchange,
        *,
        remember: bool,
        anew: Key | None,
    ) -> dict[Key, str]:
        """Returns what of the wanted versions does not load, with the reason. What takes very long comes in a later round."""
        stayed, loaded = dict[Key, LoadedVersion](), dict[Key, LoadedVersion]()
        pending: dict[Key, str] = {}
        errors: dict[Key, str] = {}
        took: dict[str, float] = {}
        for key, version in self.residency.ordered(plan.versions, plan.state.routes):
            current = self.serving.loaded.get(key)
            if current is not None and current.digest == version.digest:
                stayed[key] = current
                if key != anew and not self.loader.loaded(version):
                    continue
            elif key in plan.held_back:
                continue
            elif key in plan.refused:
                errors[key] = plan.refused[key]
                continue
            elif self.residency.postpones(key[0]):
                continue
            try:
                loaded[key] = await self.loader.load(version, patient=self.loader.patient)
                took[key[0]] = took.get(key[0], 0.0) + loaded[key].load_seconds
            except StillLoadingError as error:
                pending |= {} if key in stayed else {key: str(error)}
            except ModelkeepError as error:
                errors[key] = _plain(str(error))
            except Exception as error:
                log.exception("%s %s does not load", *key)
                errors[key] = _plain(f"does not load: {type(error).__name__}: {error}")
        stable_ones = {(route.model, route.stable) for route in plan.state.routes}
        brought = await exchange.bring_back({key[0] for key in errors if key in stable_ones})
        state = self.backstop.over(wanted)  # somebody may have put a hold while this was loading
        errors = self.residency.settled(state.routes, errors, took)
        later = {model for model, name in pending if (model, name) in stable_ones and not serves(self.serving, model)}
        if later:  # who was to go for them, and is here still, serves on until they have come
            self._decide(state, later=later)
        self._note_errors(state, errors | {key: _plain(why) for key, why in brought.items()})
        routes = {
            route.model: servable(
                route, errors | plan.held_back | pending, self.serving.routes.get(route.model), self.serving.loaded
            )
            for route in state.routes
        }
        away = {*self.serving.sleeping, *self.serving.unloaded}  # nor may it be as it was when this began
        for route in routes.values():
            if route.model in away:
                continue
            # A route that had to stay on the old version keeps that version loaded.
            for name in filter(None, (route.stable, route.candidate)):
                if (route.model, name) not in loaded and (route.model, name) in self.serving.loaded:
                    loaded[route.model, name] = self.serving.loaded[route.model, name]
        self.reporter.supersede(routes)
        vain = [loaded.pop(key) for key in list(loaded) if key[0] in away]
        # What was here when this began may have been let go of since.
        loaded = {k: v for k, v in stayed.items() if self.serving.loaded.get(k) is v and k[0] not in away} | loaded
        unneeded = self.serving.install(routes, loaded, state.epoch, state.generation) + vain
        coming = {model for model, _ in pending if not serves(self.serving, model)}
        self.serving.gate.close(coming)
        self.residency.coming = coming
        self.residency.settle(exchange.closed | coming)
        self._behind = sorted(
            route.model
            for route in wanted.routes
            if routes[route.model] != route
            or self.residency.behind(route.model)
            or (
                route.model not in self.serving.sleeping
                and any((route.model, name) not in loaded for name in (route.stable, route.candidate) if name)
            )
        )
        self.reporter.reached(replicas.Reached(state.epoch, state.generation, clock.now(), tuple(self._behind)))
        self.applied = wanted
        for version in state.versions:
            if (here := loaded.get((version.model, version.version))) is not None:
                here.quality = version.quality or {}
        self.caretaker.settled(state.routes, routes, loaded)
        self.loading.forget_all_but([*self._known(), *self.room.owed.values()])
        self.let_go(unneeded + self.loader.unclaimed(plan.versions.values()), loaded)
        if remember:
            self._last = last = laststate.as_it_loads(wanted, errors, self._last)
            try:
                await self._in_thread(lambda: laststate.write(self.state_file, last), self._disk)
            except OSError as error:
                log.error("the last state could not be kept in %s: %s", self.state_file, error)
        return errors

    def _known(self) -> list[Wanted]:
        """Versions whose files this server knows."""
        states = [state for state in (self.applied, self._last) if state is not None]
        return [*(v for state in states for v in state.versions), *self.backstop.kept.versions.values()]

    def _needed_here(self) -> list[Wanted]:
        """Versions whose files are needed now: those that are known, and those of a round or a load under way."""
        return [*self._known(), *self._planned, *(attempt.version for attempt in self.loader.attempts)]

    def switch(self, route: Route, version: LoadedVersion) -> None:
        """Send a model's traffic elsewhere now, against its route. What that makes needless goes when the round under way is over."""
        self.residency.woke(version.model)
        loaded = {**self.serving.loaded, (version.model, version.version): version}
        routes = {**self.serving.routes, route.model: route}
        self.let_go(self.serving.install(routes, loaded, self.serving.epoch, self.serving.generation), loaded)
        self._said_behind(route.model)
        self._tidy()

    def take_down(self, model: str) -> None:
        """A model was unloaded here: no request reaches it from now on; who is being answered is answered."""
        serving = self.serving
        serving.unloaded = self.unloads.reasons()
        self.residency.forget(model)
        serving.gate.open([model])
        rest = {key: version for key, version in serving.loaded.items() if key[0] != model}
        self.let_go(serving.install(serving.routes, rest, serving.epoch, serving.generation), rest)
        self._said_behind(model)
        self._tidy()

    def bring_up(self, model: str) -> None:
        """An unloaded model is to be served again: it is loaded as one that is asked for."""
        self.serving.unloaded = self.unloads.reasons()
        self.residency.sleeping[model] = "it was unloaded"
        self.serving.gate.close([model])
        self.residency.ask(model)

    def _said_behind(self, model: str) -> None:
        serving, behind = self.serving, sorted({*self._behind, model})
        self.reporter.reached(replicas.Reached(serving.epoch, serving.generation, clock.now(), tuple(behind)))

    def _tidy(self) -> None:
        if self._tidying is None or self._tidying.done():
            self._tidying = asyncio.create_task(self.again())

    async def again(self) -> None:
        """Serve what the registry wanted last, with the holds as they are now."""
        async with self._lock:
            if self.applied is not None:
                await self._apply(self.applied, remember=False)

    def let_go(self, unneeded: list[LoadedVersion], loaded: Collection[Key]) -> None:
        self._leaving.let_go(unneeded, loaded)

    def hurry_for(self, version: Wanted) -> None:
        """Give those that are on their way out no more time than a stop gives, where the memory for this version is theirs."""
        gone = self._leaving.versions
        if gone and self.room.over([version], [*self.serving.loaded.values(), *gone]) > 0:
            self._leaving.hurry()

    def load(self, version: Wanted) -> LoadedVersion:
        return self.loading.load(version)

    def _note_errors(self, state: LastState, errors: dict[Key, str]) -> None:
        """`errors` are of what is tried again by itself; what sleeps or is unloaded waits to be asked for."""
        known = errors | self.residency.errors(state)
        for key in known.keys() - self.errors.keys():
            log.error("%s %s: %s", *key, known[key])
        self.errors = self.serving.load_errors = known
        if not errors:
            self._retry = None
        else:
            pause = min(self._retry[1] * 2, _RETRY_MOST_SECONDS) if self._retry else _RETRY_FIRST_SECONDS
            self._retry = (self._monotonic() + pause, pause)

    async def _in_thread(self, work: Callable[[], T], thread: ThreadPoolExecutor | None = None) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread or self._thread, work)


def _plain(text: str) -> str:
    """Without control characters: no database shall refuse what a model's error says."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
