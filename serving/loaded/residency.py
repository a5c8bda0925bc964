"""Which models are in memory, and which sleep until somebody asks for them.

A model with a route is loaded at the start, in the background or at its first request (the settings `models`). Where not all fit the
memory for models or their number, what was asked least recently sleeps: its requests wait at the gate while it is loaded again. The
versions of a model come and go together. Who goes is decided here, before every change of what is served; the reconciler loads,
drains and lets go.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.errors import UnavailableError
from registry.profiles import MEBIBYTE
from registry.sections import ModelsSection
from serving.compute.engine import LoadedVersion
from serving.loaded.laststate import LastState, Wanted
from serving.loaded.swap import Room
from serving.loaded.use import Use
from serving.state import Serving
from serving.traffic.routing import Route

log = logging.getLogger("modelkeep.residency")
Key = tuple[str, str]

LEAST_STAY_SECONDS = 0.1
STAY_BY_LOADING = 2.0
"""A model that was loaded stays at least so many times as long as its loading took: of models asked in turns, each serves most of the time."""
_AGAIN_FIRST_SECONDS, _AGAIN_MOST_SECONDS = 1.0, 300.0

_ASLEEP = (9.0,)
_NOT_YET = "not loaded since the start"
_LEAST_USED = "others were asked more recently"
_NO_ROOM = "there was no room for it"


@dataclass(slots=True)
class Figures:
    """Of one model, since the start."""

    loads: int = 0
    evictions: int = 0
    failures: int = 0
    load_seconds: float = 0.0
    """Of the last load."""


@dataclass(slots=True)
class Failed:
    """A model that did not wake: asked again before `until` its requests are told so at once."""

    until: float
    pause_seconds: float
    why: str


@dataclass(slots=True)
class _Rank:
    model: str
    order: tuple[float, ...]
    count: int
    need: int
    must: bool = False
    """In memory whatever the limits say."""
    here: bool = False


class Residency:
    """Owned by the reconciler. Changed on the event loop only."""

    def __init__(
        self,
        serving: Serving,
        room: Room,
        settings: ModelsSection,
        path: Path,
        *,
        state: Callable[[], LastState | None],
        patience_seconds: float = 30.0,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._serving, self._room, self.settings = serving, room, settings
        self.state = state
        """What is wanted now, with the holds."""
        self._patience_seconds = patience_seconds
        """How long a request may wait."""
        self._monotonic = monotonic
        self.sleeping: dict[str, str] = serving.sleeping
        """Models with a route that are not in memory, with the reason. What is served knows it as well."""
        self.queue: dict[str, None] = {}
        """Models that are to wake, in the order in which they were asked for."""
        self.waking: str | None = None
        self.coming: set[str] = set()
        """Models that are not here, and whose load goes on though the round that began it is over."""
        self.fetching: set[str] = set()
        """Models whose files take so long to come that others wake meanwhile."""
        self.later: list[str] = []
        """To be loaded in the background while there is room, in this order."""
        self.failed: dict[str, Failed] = {}
        self.figures: dict[str, Figures] = {}
        self.rung = asyncio.Event()
        self._began: float | None = None
        self._must: set[str] = set()
        self._held: set[str] = set()
        self._here: set[str] = set()
        self._slept: set[str] = set()
        self.use = Use(serving, path, monotonic=monotonic, clock=clock)
        self._since: dict[str, tuple[float, float]] = {}
        """When a model came (monotonic), and how long it stays at least."""
        self._evicted: dict[str, list[str]] = {}
        self._warned: set[str] = set()
        serving.gate.knock = self.knock

    # What requests do

    def knock(self, model: str) -> None:
        """A request waits for this model. Raises UnavailableError where it would wait in vain."""
        if model in self.sleeping:  # else it is being exchanged
            self.check(model)
            if model != self.waking and model not in self.fetching:
                self.ask(model)

    def wakes(self, model: str) -> bool:
        """Whether a model is not here but would be for a request. Raises UnavailableError where it does not load."""
        if model in self.sleeping:
            self.check(model)
            return True
        return model == self.waking and not any(key[0] == model for key in self._serving.loaded)

    def check(self, model: str) -> None:
        """Whether a model that sleeps would wake for a request. Raises UnavailableError that says why not."""
        failed = self.failed.get(model)
        if failed is not None and self._monotonic() < failed.until:
            pause = max(1, round(failed.until - self._monotonic()))
            raise UnavailableError(f"model '{model}' does not load: {failed.why}; it is tried again in {pause} s")
        if model not in self.queue and model != self.waking and (why := self._barred(model)) is not None:
            raise UnavailableError(f"model '{model}' is not loaded: {why}")

    def ask(self, model: str) -> None:
        """Wake this model as soon as its turn comes."""
        if model not in self.queue:
            self.queue[model] = None
            self.rung.set()

    def forgive(self, model: str) -> None:
        """Somebody wants it now: a pause after a failure is over."""
        if (failed := self.failed.get(model)) is not None:
            failed.until = float("-inf")

    def _barred(self, model: str) -> str | None:
        """Why a model cannot wake although it is asked for: without swapping nobody goes for it."""
        if self.settings.enable_model_swapping or self.fits(model):
            return None
        return (
            "there is no room, and models.enable_model_swapping is off: raise models.max_concurrent_models or the memory for models, or "
            "unload another (POST /v2/repository/models/MODEL/unload)"
        )

    # What the reconciler asks before it changes what is served

    def starting(self, routes: Iterable[Route]) -> None:
        """Before the first models are loaded: the settings say whether all are, or none until it is asked for."""
        self._began = None if self._serving.ready else self._monotonic()
        if not self.settings.preload_models and not self.settings.prewarm:
            self.sleeping.update({route.model: _NOT_YET for route in routes if not _judged(route)})

    def started(self) -> None:
        """From now on nothing is postponed: a server that is not ready later on is about to end."""
        self._began = None

    def postpones(self, model: str) -> bool:
        """While the server starts, before each load: whether this model is loaded in the background instead, when it is ready."""
        if self.settings.preload_models or self._began is None or model in self._must:
            return False
        if self._monotonic() - self._began < self.settings.prewarm_seconds:
            return False
        if model not in self.later:
            self.later.append(model)
            self.sleeping[model] = _NOT_YET
        return True

    def ordered(self, versions: Mapping[Key, Wanted], routes: Iterable[Route]) -> list[tuple[Key, Wanted]]:
        """Who is loaded first: what a promotion waits for, then what was asked last."""
        judged = {route.model for route in routes if _judged(route)}
        return sorted(versions.items(), key=lambda item: (item[0][0] not in judged, -self.use.at(item[0][0])))

    def next(self) -> str | None:
        """The model that is to wake now, None where there is none. What is only loaded ahead comes after what is waited for."""
        while self.queue:
            model = next(iter(self.queue))
            if model not in self.sleeping or self._barred(model) is None:
                return model
            # There was room when it was asked for, and another one came first: who waits for it is told so.
            del self.queue[model]
            self._serving.gate.look_again([model])
        while self.later:
            model = self.later[0]
            if model in self.sleeping and model not in self.failed and self.fits(model):
                return model
            self.later.pop(0)
        return None

    def begin(self, model: str) -> None:
        self.waking = model
        self.queue.pop(model, None)
        if model in self.later:
            self.later.remove(model)

    def decide(
        self,
        state: LastState,
        *,
        held: Collection[str] = (),
        unloaded: Collection[str] = (),
        later: Collection[str] = (),
    ) -> None:
        """Who sleeps from now on, if this is to be served: all that does not fit, by use.

        First what must be here: models under judgement (a candidate, a watch), those that an emergency holds, those here whose route
        changed, the one that is being woken, those whose load goes on. Then others with a new route, then those that came just now, then
        the rest of what is here, the one that was asked last first, then what has not been loaded yet. Without swapping those that are
        here go before new ones. Where not even those fit that must be here, they are loaded all the same, with a warning. Those that come
        `later`, in another round, neither sleep nor does anybody go for them yet.
        """
        named, here = state.by_key(), {key[0] for key in self._serving.loaded}
        self._held = set(held)
        self.use.look()
        for model in self.sleeping.keys() - {route.model for route in state.routes}:
            self.forget(model)
        ranks = [
            self._rank(route, named, here, route.model in held)
            for route in state.routes
            if route.model not in unloaded and route.model not in later
        ]
        ranks.sort(key=lambda rank: (not rank.must, rank.order))
        self._must = {rank.model for rank in ranks if rank.must}
        limit, bytes_, count, asleep = self.limit_bytes(), 0, 0, dict[str, str]()
        for rank in ranks:
            fits = count + rank.count <= self.settings.max_concurrent_models and (
                limit is None or bytes_ + rank.need <= limit
            )
            if rank.order == _ASLEEP or not (rank.must or fits or not count):
                asleep[rank.model] = self.sleeping.get(rank.model) or (_LEAST_USED if rank.here else _NO_ROOM)
                continue
            if not fits and rank.model not in self.coming:  # that one is not here yet, and others go when it has come
                self._warn(rank.model)
            bytes_, count = bytes_ + rank.need, count + rank.count
        fresh = [model for model in asleep if model not in self.sleeping]
        for model in self.sleeping.keys() - asleep.keys():
            del self.sleeping[model]
        self.sleeping.update(asleep)
        if self.waking is not None and fresh:
            self._evicted[self.waking] = fresh
        for model in unloaded:
            self.forget(model)

    def _rank(self, route: Route, named: Mapping[Key, Wanted], here: Collection[str], held: bool) -> _Rank:
        model, serving, now = route.model, self._serving, self._serving.routes.get(route.model)
        keys = [(model, name) for name in (route.stable, route.candidate) if name]
        wanted = [named[key] for key in keys if key in named]
        rank = _Rank(model, _ASLEEP, len(wanted), sum(map(self._room.need, wanted)))
        rank.here = model in here
        changed = serving.ready and (now is None or now.generation != route.generation)
        # Its wanted version does not load, and the one that serves instead could not come back.
        instead = now is not None and now.stable != route.stable and (model, now.stable) in serving.loaded
        recent = -self.use.at(model)
        if held or _judged(route) or model == self.waking or (rank.here and (changed or instead)):
            rank.must, rank.order = True, (0.0,)
        elif model in self.coming:  # its load cannot be ended, and would be thrown away
            rank.must, rank.order = True, (0.5,)
        elif changed:
            rank.order = (1.0 if self.settings.enable_model_swapping else 4.0, recent)
        elif rank.here:
            rank.order = (2.0 if self.stays_for(model) > 0 else 3.0, recent)
        elif model not in self.sleeping:
            rank.order = (5.0, recent)
        return rank

    def _state(self, model: str) -> str:
        if model in self._serving.unloaded:
            return "unloaded"
        if model == self.waking or model in self.coming:
            return "loading"
        return "dormant" if model in self.sleeping else "resident"

    def limit_bytes(self) -> int | None:
        """Memory for all models that are here, above which the least used goes. None: not known."""
        bounds = [] if self._room.budget_bytes is None else [self._room.budget_bytes]
        if self.settings.swap_threshold_mb is not None:
            bounds.append(self.settings.swap_threshold_mb * MEBIBYTE)
        return min(bounds, default=None)

    def _warn(self, model: str) -> None:
        if model not in self._warned:
            self._warned.add(model)
            log.warning(
                "%s is loaded beyond the limits (models.max_concurrent_models, models.swap_threshold_mb, the memory for models): nothing "
                "else can go for it", model,
            )  # fmt: skip

    # Waking

    def pause_before(self, model: str) -> float:
        """Seconds until this model may take the place of others, since those that came just now stay for a while. 0: it may now."""
        young = {
            key[0]: rest for key in self._serving.loaded if key[0] != model and (rest := self.stays_for(key[0])) > 0
        }
        fixed = {name for name, route in self._serving.routes.items() if _judged(route)}
        if not young.keys() - fixed or self._fits_beside(model, young.keys() | fixed):
            return 0.0
        return min(rest for name, rest in young.items() if name not in fixed)

    def fits(self, model: str) -> bool:
        """Whether a model that sleeps fits beside all that is here or on its way."""
        return self._fits_beside(model, {key[0] for key in self._serving.loaded})

    def _fits_beside(self, model: str, others: Collection[str]) -> bool:
        state = self.state()
        coming = [] if state is None else [v for v in state.versions if v.model == model or v.model in self.coming]
        there = [v for v in self._serving.loaded.values() if v.model != model and v.model in others]
        if not there and not self.coming - {model}:
            return True
        limit = self.limit_bytes()
        bytes_ = sum(v.claim_bytes for v in there) + sum(map(self._room.need, coming))
        return len(there) + len(coming) <= self.settings.max_concurrent_models and (limit is None or bytes_ <= limit)

    def came(self, model: str, seconds: float) -> None:
        """A model was loaded, which took so long."""
        now = self._monotonic()
        most = self._patience_seconds / 4 / max(1, len(self.queue))
        self._since[model] = (now, min(max(LEAST_STAY_SECONDS, STAY_BY_LOADING * seconds), most))
        figures = self.figures.setdefault(model, Figures())
        figures.loads, figures.load_seconds = figures.loads + 1, seconds
        self.failed.pop(model, None)
        self._evicted.pop(model, None)

    def stays_for(self, model: str) -> float:
        """Seconds for which a model stays though another one wants its place."""
        since, stay = self._since.get(model, (float("-inf"), 0.0))
        return max(0.0, since + stay - self._monotonic())

    def did_not_wake(self, model: str, why: str) -> None:
        """It sleeps on, and is tried again when it is asked for after a pause that grows. Who went for it comes back."""
        if model in self._serving.unloaded:  # meanwhile
            return
        before = self.failed.get(model)
        pause = _AGAIN_FIRST_SECONDS if before is None else min(2 * before.pause_seconds, _AGAIN_MOST_SECONDS)
        self.failed[model] = Failed(self._monotonic() + pause, pause, why)
        self.coming.discard(model)
        self.figures.setdefault(model, Figures()).failures += 1
        self.sleeping.setdefault(model, _NOT_YET)
        log.error("%s does not load: %s; tried again when it is asked for after %g s", model, why, pause)
        for other in self._evicted.pop(model, []):
            self.ask(other)

    def settled(self, routes: Iterable[Route], errors: dict[Key, str], took: Mapping[str, float]) -> dict[Key, str]:
        """What was loaded, and what was not. Returns the errors of those that are tried again without being asked for."""
        for model, seconds in took.items():
            self.came(model, seconds)
        for route in routes:
            # One that went on loading when its turn was over may have had others go, too.
            if (
                route.model not in (self.waking, *self._evicted)
                or (why := errors.get((route.model, route.stable or ""))) is None
            ):
                continue
            if (now := self._serving.routes.get(route.model)) is None or (
                route.model,
                now.stable,
            ) not in self._serving.loaded:
                self.did_not_wake(route.model, why)
                errors = {key: error for key, error in errors.items() if key[0] != route.model}
        return errors

    def errors(self, state: LastState) -> dict[Key, str]:
        """Why models do not wake, by version; and which versions are away because somebody unloaded them."""
        found: dict[Key, str] = {}
        for route in state.routes:
            if (failed := self.failed.get(route.model)) is not None and route.stable is not None:
                found[route.model, route.stable] = failed.why
            if (unloaded := self._serving.unloaded.get(route.model)) is not None:
                for name in filter(None, (route.stable, route.candidate)):
                    found[route.model, name] = f"{route.model} is unloaded on this server {unloaded}"
        return found

    def behind(self, model: str) -> bool:
        """Whether a model is not served as its route wants, though it would be if all were well."""
        return model in self.failed or model in self._serving.unloaded

    def settle(self, shut: Collection[str]) -> None:
        """What is served has been changed: the gates of those that sleep are closed, all others open but those in `shut`."""
        gate, loaded = self._serving.gate, {key[0] for key in self._serving.loaded}
        for model in self._here - loaded:
            if model in self.sleeping:
                self.figures.setdefault(model, Figures()).evictions += 1
                log.info("%s sleeps: %s", model, self.sleeping[model])
            self._since.pop(model, None)
        self._here = loaded
        gate.close(self.sleeping)
        gate.open([m for m in gate.closed if m not in self.sleeping and m not in shut])
        # Who waits for one that was on its way or exchanged, and sleeps now, has not knocked for that.
        gate.look_again([m for m in self.sleeping if m in self.failed or m not in self._slept])
        self._slept = set(self.sleeping)

    def woke(self, model: str) -> None:
        """It is here, by another way: an emergency brought it."""
        self.sleeping.pop(model, None)
        self.queue.pop(model, None)
        self.failed.pop(model, None)
        self.coming.discard(model)
        self._serving.gate.open([model])

    def evict_for(self, version: Wanted) -> list[LoadedVersion]:
        """Who goes so that this one can come at once, without waiting for them: for an emergency. They are out of what is served then."""
        serving, limit = self._serving, self.limit_bytes()
        if limit is None or not self.settings.enable_model_swapping:
            return []
        over = sum(v.claim_bytes for v in serving.loaded.values()) + self._room.need(version) - limit
        state = self.state()
        wanted = {} if state is None else {route.model: route.stable for route in state.routes}
        models = {
            name
            for name in {key[0] for key in serving.loaded} - self._held - {version.model}
            # One that serves in the place of a version that does not load could not come back.
            if (route := serving.routes.get(name)) is not None
            and not _judged(route)
            and route.stable == wanted.get(name)
        }
        going: list[LoadedVersion] = []
        self.use.look()
        for model in sorted(models, key=self.use.at):
            if over <= 0:
                break
            found = [v for key, v in serving.loaded.items() if key[0] == model]
            going += found
            over -= sum(v.claim_bytes for v in found)
            self.sleeping[model] = "an emergency needed its memory"
        if going:
            rest = {key: v for key, v in serving.loaded.items() if v not in going}
            serving.install(serving.routes, rest, serving.epoch, serving.generation)
            self.settle(set(serving.gate.closed))
        return going

    def forget(self, model: str) -> None:
        """It has no route here any more, or was unloaded."""
        self.sleeping.pop(model, None)
        self.queue.pop(model, None)
        self.failed.pop(model, None)
        self.coming.discard(model)
        if model in self.later:
            self.later.remove(model)

    def as_dict(self) -> dict[str, Any]:
        """What model-info tells."""
        now, serving = self._monotonic(), self._serving
        self.use.look()
        limit = self.limit_bytes()
        return {
            "memory_bytes": sum(v.claim_bytes for v in serving.loaded.values()),
            "limit_bytes": limit,
            "versions": len(serving.loaded),
            "most_versions": self.settings.max_concurrent_models,
            "loading": self.waking,
            "waiting_to_load": [*self.queue, *(m for m in self.later if m not in self.queue)],
            "models": {
                model: {
                    "state": self._state(model),
                    "why": self.sleeping.get(model),
                    "last_used_unix_seconds": self.use.at(model) or None,
                    "loads": (found := self.figures.get(model, Figures())).loads,
                    "evictions": found.evictions,
                    "failures": found.failures,
                    "last_load_seconds": round(found.load_seconds, 3),
                    "error": None if (failed := self.failed.get(model)) is None else failed.why,
                    "tried_again_in_seconds": None if failed is None else round(max(0.0, failed.until - now), 1),
                }
                for model in sorted(serving.routes)
            },
        }


def _judged(route: Route) -> bool:
    """Whether a promotion, a soak or the like depends on this model being here."""
    return route.watch or route.shadow or route.candidate is not None
