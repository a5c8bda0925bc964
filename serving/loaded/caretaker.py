"""Looks after the versions of this process: which crashed it, which are unhealthy, what is to be done about each. The reconciler does it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serving.compute.engine import LoadedVersion
from serving.loaded.health import HealthLimits, HealthResult, HealthStatus, ModelHealth
from serving.loaded.laststate import Wanted
from serving.loaded.lifecycle import Lifecycle, ModelState
from serving.process.crashmark import Crashes, CrashMarks, Slot
from serving.traffic.routing import Route

log = logging.getLogger("modelkeep.care")
Key = tuple[str, str]

PAUSE_SECONDS = 2.0
"""How long a candidate that was computing at a crash stays away, so that the stable version answers first."""

CRASHES_OF_A_CANDIDATE = 2
"""With the second crash a version under judgement (a candidate, or a promoted one in its soak) is withdrawn."""

CRASHES_OF_A_STABLE = 3
"""A version that nobody judges any more has stood its tests: it takes one more, within the last hour, to suspect it."""


Action = Literal["reload", "take out", "withdraw"]


@dataclass(frozen=True, slots=True)
class Unfit:
    """A version to be taken out of its route, and why."""

    model: str
    version: str
    reason: str


class Caretaker:
    """One a process. Its files are in the replica's folder; where that cannot be written, crashes are not told apart: logged."""

    def __init__(self, folder: Path, limits: HealthLimits, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self.lifecycle = Lifecycle()
        self.health = ModelHealth(limits, monotonic)
        self._window_seconds = limits.window_seconds
        self.results: dict[Key, HealthResult] = {}
        self.held_back: dict[Key, str] = {}
        self._slots: dict[int, Slot] = {}
        self._told: set[Key] = set()
        self._reloaded: dict[Key, float] = {}  # when, by our own clock
        self._crashes = Crashes(folder / "crashes.json")
        self._until: dict[Key, float] = {}
        self._starting = False
        try:
            self._marks: CrashMarks | None = CrashMarks(folder / "computing.mark")
        except OSError as error:
            log.error("no crash mark in %s, so a crash will not say which version it was: %s", folder, error)
            self._marks = None
            return
        self._crashes.note(self._marks.computing_at_death)
        for crash in self._marks.computing_at_death:
            self._until[crash.model, crash.version] = monotonic() + PAUSE_SECONDS

    def end(self) -> None:
        """The process ends because it was told to: nothing that is computing now will count as a crash."""
        if self._marks is None:
            return
        try:
            self._marks.end()
        except OSError as error:
            log.error("the crash mark could not be taken away, so this stop may be taken for a crash: %s", error)

    # Loading

    def begin(self, version: Wanted) -> Slot:
        """A version is about to be loaded: marked as computing until it is, for loading can crash as well."""
        self.lifecycle.move((version.model, version.version), ModelState.DOWNLOADING)
        if self._marks is None:
            return Slot(None, 0)
        return self._marks.take(version.model, version.version, version.digest)

    def loading(self, version: Wanted, slot: Slot) -> None:
        key = (version.model, version.version)
        self.lifecycle.move(key, ModelState.DOWNLOADING)  # an emergency may have loaded it meanwhile, on another thread
        self.lifecycle.move(key, ModelState.LOADING)
        slot.mark(True)

    def failed(self, version: Wanted, slot: Slot, error: str) -> None:
        slot.free()
        self.lifecycle.move_if_legal((version.model, version.version), ModelState.ERROR, error=error)

    def keep(self, loaded: LoadedVersion, slot: Slot) -> None:
        """The slot is the loaded version's until `gone`."""
        slot.mark(False)
        self._slots[id(loaded)] = slot

    def leaving(self, loaded: LoadedVersion, *, replaced: bool) -> None:
        """It finishes what it has. `replaced`: the same version was loaded again, and that one's state counts; so it does while it is
        being loaded again.
        """
        if not replaced:
            self.lifecycle.move_if_legal((loaded.model, loaded.version), ModelState.UNLOADING)

    def gone(self, loaded: LoadedVersion) -> None:
        slot = self._slots.pop(id(loaded), None)
        if slot is not None:
            slot.free()
        if self.lifecycle.state((loaded.model, loaded.version)) is ModelState.UNLOADING:
            self.lifecycle.move((loaded.model, loaded.version), ModelState.ARCHIVED)

    def settled(self, wanted: Iterable[Route], routes: Mapping[str, Route], loaded: Iterable[Key]) -> None:
        """The routes were changed to these. `wanted` is what the registry names, whatever of it can be served."""
        in_use = {(r.model, r.stable) for r in routes.values() if r.stable is not None and r.weight < 1}
        in_use |= {(r.model, r.candidate) for r in routes.values() if r.candidate is not None and r.weight > 0}
        self.lifecycle.settle(loaded, in_use)
        named = {(r.model, name) for r in wanted for name in (r.stable, r.candidate) if name is not None}
        self._crashes.forget_all_but(named)
        self._told &= named
        self._reloaded = {key: at for key, at in self._reloaded.items() if key in named}

    # Crashes

    def hold_back(self, routes: Iterable[Route], versions: Mapping[Key, Wanted]) -> dict[Key, str]:
        """The candidates that shall not be loaded now, each with its reason."""
        self.held_back = {}
        for route in routes:
            key = (route.model, route.candidate or "")
            if route.candidate is None or route.stable is None or key not in versions:
                continue
            crashes = self._crashes.count(*key, versions[key].digest)
            if crashes >= CRASHES_OF_A_CANDIDATE:
                self.held_back[key] = f"the server died {crashes} times while it was computing: not loaded again"
            elif self._monotonic() < self._until.get(key, 0.0):
                self.held_back[key] = "the server died while it was computing; it is loaded again in a moment"
            elif self._starting:
                self.held_back[key] = "the server has just started: it is loaded once the stable version answers"
        return self.held_back

    def starting(self) -> None:
        """Candidates wait until `started`: one that takes long to load shall not keep the stable version from answering."""
        self._starting = True

    def started(self) -> None:
        """The stable versions answer from now on: what waited for that is due, if nothing else holds it back."""
        self._starting = False
        for key in self.held_back:
            self._until.setdefault(key, self._monotonic())

    def take_back_due(self) -> bool:
        """Whether the pause of a candidate that was held back is over. True once for each."""
        over = [key for key, until in self._until.items() if self._monotonic() >= until]
        for key in over:
            del self._until[key]
        return any(key in self.held_back for key in over)

    def crashed(self, routes: Iterable[Route], versions: Mapping[Key, Wanted]) -> list[Unfit]:
        """What crashed this server too often to go on with. Each is named once a process."""
        found = []
        for route in routes:
            for name in filter(None, (route.candidate, route.stable)):
                key = (route.model, name)
                judged = name == route.candidate or route.watch
                if key in self._told or key not in versions:
                    continue
                crashes = self._crashes.count(*key, versions[key].digest)
                if crashes >= (CRASHES_OF_A_CANDIDATE if judged else CRASHES_OF_A_STABLE):
                    why = f"the server died {crashes} times within an hour while it was computing"
                    found.append(Unfit(route.model, name, why))
        return found

    def told(self, unfit: Unfit) -> None:
        """The registry has been asked to take it out."""
        self._told.add((unfit.model, unfit.version))

    # Health

    def look(self, loaded: Mapping[Key, LoadedVersion], routes: Mapping[str, Route]) -> list[tuple[Action, Unfit]]:
        """Judge every version; what is to be done about those that are unhealthy and that nobody else judges now.

        One that hangs says more than counts do: under judgement it is withdrawn, as one that crashes the server is. A stable one is
        loaded again beside its candidate too, and again and again where nothing else can serve: else nobody answers for that model.
        """
        self.results = self.health.look(loaded)
        todo: list[tuple[Action, Unfit]] = []
        for key, result in self.results.items():
            route = routes.get(key[0])
            # Well over a whole window: the first few requests after a reload say little, and would have it loaded for ever.
            whole = self._monotonic() - self._reloaded.get(key, 0.0) >= self._window_seconds
            if result.status is HealthStatus.HEALTHY and whole and key not in self._told:
                self._reloaded.pop(key, None)
            if result.status is not HealthStatus.UNHEALTHY or route is None:
                continue
            hangs = loaded[key].hung is not None
            unfit = Unfit(*key, f"unhealthy: {'; '.join(result.reasons)}")
            if hangs and (key[1] == route.candidate or (route.watch and route.candidate is None)):
                if key not in self._told:
                    todo.append(("withdraw", unfit))
            elif route.watch and not hangs:
                continue  # while a route is watched, the judge of its promotion decides
            elif key not in self._reloaded or (hangs and key in self._told):
                todo.append(("reload", unfit))
            elif key not in self._told:
                todo.append(("take out", unfit))
        return todo

    def reloaded(self, unfit: Unfit) -> None:
        """It was loaded again: it begins anew, but not with another chance."""
        key = (unfit.model, unfit.version)
        self._reloaded[key] = self._monotonic()
        self.health.begin_anew(key)

    def as_dict(self) -> dict[str, Any]:
        """What model-info tells."""
        return {
            "states": self.lifecycle.as_list(),
            "held_back": {f"{model}/{version}": why for (model, version), why in sorted(self.held_back.items())},
            "crashes": self._crashes.as_list(),
        }
