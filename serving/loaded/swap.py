"""Versions that do not fit the memory side by side: the old one is drained and let go, then the new one comes, and its requests wait meanwhile.

Where both fit, nothing of this happens: the new version is loaded beside the old one and the route is flipped (serving.follow.reconcile).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from registry import budget
from registry.errors import UnavailableError
from registry.settings import Settings
from serving.compute.engine import LoadedVersion
from serving.loaded.caretaker import Caretaker
from serving.loaded.laststate import LastState, Wanted
from serving.process.tasks import all_of
from serving.state import Serving
from serving.traffic.routing import Route

log = logging.getLogger("modelkeep.swap")
Key = tuple[str, str]


class Room:
    """Who must go before others can come, by the memory that versions take here."""

    def __init__(self, budget_bytes: int | None) -> None:
        self.budget_bytes = budget_bytes
        """Memory for models (registry.budget); None: not known, so nobody ever has to go."""
        self._measured: dict[str, int] = {}
        self._failed: dict[Key, tuple[str, tuple[str, int], str]] = {}
        self.owed: dict[str, Wanted] = {}
        """See Exchange."""
        self._warned: set[str] = set()

    @classmethod
    def of_this_machine(cls, settings: Settings) -> Room:
        try:
            return cls(budget.of_this_machine(settings))
        except UnavailableError as error:
            log.warning("no budget of memory for models, so versions are always loaded side by side: %s", error)
            return cls(None)

    def note(self, loaded: LoadedVersion) -> None:
        """Remember what a version took."""
        self._measured[loaded.digest] = loaded.claim_bytes

    def forget_all_but(self, versions: Iterable[Wanted]) -> None:
        """Only these may come again: of the others nothing is kept, else every version there ever was would leave something."""
        known = {(version.model, version.version): version.digest for version in versions}
        digests = set(known.values())
        for digest in list(self._measured):  # a load on its thread may add one meanwhile
            if digest not in digests:
                self._measured.pop(digest, None)
        self._warned &= digests
        self._failed = {key: why for key, why in self._failed.items() if key in known}

    def failed(self, version: Wanted, change: tuple[str, int], error: str) -> None:
        """Others had to go for it, and it did not load: they shall not have to go again for the same."""
        self._failed[version.model, version.version] = (version.digest, change, error)

    def refuses(self, version: Wanted, change: tuple[str, int]) -> str | None:
        """Why this version is not tried again while its route stays as it is (epoch, generation); None where it may be."""
        digest, then, error = self._failed.get((version.model, version.version), ("", ("", -1), ""))
        if (digest, then) != (version.digest, change):
            return None
        return f"{error}; the version before had to go for that try, so there is no other until the route changes"

    def need(self, version: Wanted) -> int:
        """Bytes: as measured here, else by the validation's probe, else the size of its files."""
        files = sum(int(file["size_bytes"]) for file in version.files)
        return self._measured.get(version.digest) or max(version.memory_bytes or 0, files)

    def over(self, missing: Collection[Wanted], there: Iterable[LoadedVersion]) -> int:
        """By how many bytes the missing versions and those that are there are more than the budget; 0 or less where they fit."""
        if self.budget_bytes is None or not missing:
            return 0
        return sum(v.claim_bytes for v in there) + sum(map(self.need, missing)) - self.budget_bytes

    def leaving(
        self,
        missing: Collection[Wanted],
        loaded: Mapping[Key, LoadedVersion],
        staying: Collection[Key],
        asleep: Collection[str] = (),
    ) -> list[LoadedVersion]:
        """Which loaded versions go before the missing ones are loaded; none where all fit.

        Only what need not stay goes: first the models `asleep`, for which that is decided, then of the models that get another version,
        then what was asked least recently.
        """
        over = self.over(missing, loaded.values())
        if over <= 0:
            return []
        models = {version.model for version in missing}
        needless = [version for key, version in loaded.items() if key not in staying]
        needless.sort(
            key=lambda v: (
                v.model not in asleep, v.model not in models, v.telemetry.last_inference_unix_seconds or 0.0,
            )
        )  # fmt: skip
        going = []
        for version in needless:
            if over <= 0:
                break
            going.append(version)
            over -= version.claim_bytes
        if over > 0:
            self._warn(missing, over)
        return going

    def _warn(self, missing: Collection[Wanted], over: int) -> None:
        """What is wanted is loaded all the same: whether it may be was decided by the gates of its promotion."""
        for version in missing:
            if version.digest not in self._warned:
                self._warned.add(version.digest)
                log.warning(
                    "with %s %s the models that are wanted here take %d MB more than the budget of %d MB (gpu.max_memory_mb, "
                    "gpu.memory_fraction); it is loaded all the same",
                    version.model, version.version, over >> 20, (self.budget_bytes or 0) >> 20,
                )  # fmt: skip


def in_place(serving: Serving, wanted: Wanted) -> bool:
    """Whether this very version is loaded, with these bytes."""
    current = serving.loaded.get((wanted.model, wanted.version))
    return current is not None and current.digest == wanted.digest


def serves(serving: Serving, model: str) -> bool:
    """Whether the model has a stable version here that answers."""
    route = serving.routes.get(model)
    return route is not None and route.stable is not None and (model, route.stable) in serving.loaded


def staying(
    serving: Serving, routes: Collection[Route], versions: Collection[Key], missing: Collection[Wanted]
) -> set[Key]:
    """What may not go: all that is wanted, and what serves a model now whose stable version is not about to come.

    The second is another one than the first where a wanted version did not load and the one before it serves on.
    """
    coming = {(version.model, version.version) for version in missing}
    replaced = {route.model for route in routes if (route.model, route.stable) in coming}
    present = {
        (route.model, now.stable)
        for route in routes
        if route.model not in replaced
        and (now := serving.routes.get(route.model)) is not None
        and now.stable is not None
    }
    return {*versions, *present}


@dataclass(slots=True)
class Plan:
    """What one round of a server is to come to."""

    state: LastState
    versions: dict[Key, Wanted]
    held_back: dict[Key, str]
    """Candidates that shall not be loaded now, with the reason."""
    refused: dict[Key, str]
    """Versions that are not tried again while their route stays as it is, with the reason."""
    missing: list[Wanted]

    def change(self, model: str) -> tuple[str, int]:
        """(epoch, generation) of the model's route."""
        return self.state.epoch, next((r.generation for r in self.state.routes if r.model == model), -1)


def plan_of(state: LastState, serving: Serving, caretaker: Caretaker, room: Room) -> Plan:
    """What of the wanted state is not here yet, and what of that is not to be tried now. Models that sleep are left out."""
    away = {*serving.sleeping, *serving.unloaded}
    versions = {key: version for key, version in state.by_key().items() if key[0] not in away}
    plan = Plan(state, versions, caretaker.hold_back(state.routes, versions), {}, [])
    for key, version in versions.items():
        why = room.refuses(version, plan.change(version.model)) if serves(serving, version.model) else None
        if why is not None:
            plan.refused[key] = why
        elif key not in plan.held_back and not in_place(serving, version):
            plan.missing.append(version)
    return plan


def going_for(plan: Plan, serving: Serving, room: Room, anew: Key | None) -> list[LoadedVersion]:
    """Which loaded versions go before the missing ones are loaded, and before `anew` is loaded again; none where all fit."""
    away = {*serving.sleeping, *serving.unloaded}
    routes = [route for route in plan.state.routes if route.model not in away]
    stay = staying(serving, routes, plan.versions, plan.missing)
    going = room.leaving(plan.missing, serving.loaded, stay, away)
    if anew is None or (sick := serving.loaded.get(anew)) is None or (wanted := plan.versions.get(anew)) is None:
        return going
    if room.over([*plan.missing, wanted], serving.loaded.values()) > 0:
        going.append(sick)  # both do not fit: its requests wait while it is loaded again
    return going


class Exchange:
    """One exchange of versions that do not fit side by side: closes the gate of their models, makes room, and opens it at the end.

    A gate is closed only where the version goes that serves the model's traffic. `owed` are such versions, kept until their
    successor is there, by model.
    """

    def __init__(
        self,
        serving: Serving,
        caretaker: Caretaker,
        going: list[LoadedVersion],
        owed: dict[str, Wanted],
        known: Iterable[Wanted],
        *,
        drain: Callable[[LoadedVersion], Awaitable[None]],
        let_go: Callable[[list[LoadedVersion], Collection[Key]], None],
        load: Callable[[Wanted], Awaitable[LoadedVersion]],
    ) -> None:
        self._serving, self._caretaker, self._going, self._owed = serving, caretaker, going, owed
        self._drain, self._let_go, self._load = drain, let_go, load
        self.models = {
            version.model
            for version in going
            if (route := serving.routes.get(version.model)) is not None and route.stable == version.version
        }
        """Models that have no version until this is over."""
        self.closed = self.models - serving.gate.closed.keys()
        files = {(wanted.model, wanted.version, wanted.digest): wanted for wanted in known}
        for version in going:
            if version.model in self.models and serving.routes[version.model].stable == version.version:
                wanted = files.get((version.model, version.version, version.digest))
                if wanted is not None:
                    owed[version.model] = wanted
                else:
                    owed.pop(version.model, None)

    async def __aenter__(self) -> Exchange:
        """The versions that go finish what they have, and free their memory."""
        serving, names = self._serving, {(version.model, version.version) for version in self._going}
        serving.gate.close(self.closed)
        try:
            if names:
                rest = {key: version for key, version in serving.loaded.items() if key not in names}
                serving.install(serving.routes, rest, serving.epoch, serving.generation)
            for version in self._going:
                log.info("%s %s goes before others come: they do not all fit", version.model, version.version)
                self._caretaker.leaving(version, replaced=False)
            await all_of(self._drain(version) for version in self._going)
        except BaseException:
            serving.gate.open(self.closed - serving.sleeping.keys())
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        gate = self._serving.gate
        gate.open(self.closed - self._serving.sleeping.keys())
        if self.closed:
            log.info(
                "the requests of %s go on; held back until now: %s", ", ".join(sorted(self.closed)), gate.as_dict()
            )

    async def bring_back(self, failed: Collection[str]) -> dict[Key, str]:
        """Load again what served the models whose new stable version does not load. Returns the errors of what does not load either.

        What is owed to a model that does not fail is owed no longer.
        """
        errors: dict[Key, str] = {}
        for model in [model for model in self._owed if model not in failed]:
            del self._owed[model]
        for model, wanted in list(self._owed.items()):
            serving, key = self._serving, (model, wanted.version)
            if serves(serving, model):  # an emergency was quicker
                del self._owed[model]
                continue
            try:
                again = await self._load(wanted)
            except Exception as error:
                log.exception("%s %s had to go for a version that does not load, and does not load again", *key)
                errors[key] = f"does not load again: {error}"
                continue
            del self._owed[model]
            if serves(serving, model):
                self._let_go([again], serving.loaded)
                continue
            loaded, routes = {**serving.loaded, key: again}, dict(serving.routes)
            if (route := routes.get(model)) is not None and route.stable != wanted.version:
                # An earlier round could not bring it back, and left the route at what does not load.
                routes[model] = replace(route, stable=wanted.version, candidate=None, weight=0.0, shadow=False)
            self._let_go(serving.install(routes, loaded, serving.epoch, serving.generation), loaded)
        return errors
