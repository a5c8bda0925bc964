"""What this process serves now: routes, loaded versions and their counts. It never reads the registry itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from random import random as uniform
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from registry.errors import NotFoundError, UnavailableError
from serving.access.places import Places
from serving.access.rates import Limiter
from serving.caching.cache import ResponseCache
from serving.compute.engine import LoadedVersion
from serving.figures.telemetry import VersionTelemetry, WatchCounts
from serving.http.accesslog import AccessLog
from serving.http.bodies import Uploads
from serving.http.front import HttpCounts
from serving.traffic.capture import Capture
from serving.traffic.feedback import Inbox, Remembered
from serving.traffic.gate import Gate
from serving.traffic.routing import Route, choose, mark_of, position_of

if TYPE_CHECKING:
    from serving.device.memory import MemoryOptimizer
    from serving.follow.orders import Orders
    from serving.http.handshakes import Handshakes
    from serving.loaded.loader import Loader
    from serving.loaded.residency import Residency
    from serving.text.version import TextVersion

_TELEMETRY_KEPT = 64
_NAMED_IN_ERRORS = 20


class Serving:
    """Changed and read on the event loop only, so that a request sees one state or the next and nothing in between."""

    def __init__(
        self, *, environment: str, replica_id: str, boot_id: str, random: Callable[[], float] = uniform
    ) -> None:
        self.environment = environment
        self.replica_id = replica_id
        self.boot_id = boot_id
        self.random = random
        self.routes: dict[str, Route] = {}
        self.loaded: dict[tuple[str, str], LoadedVersion] = {}
        self.epoch = ""
        self.generation = 0
        self.ready = False
        self.live = True
        self.load_errors: Mapping[tuple[str, str], str] = {}
        """Why versions that should be here did not load."""
        self.places = Places(known=self._has)
        """For inference requests between their first byte and the last of their answer."""
        self.uploads = Uploads(self.places, 0)
        """The bodies of inference requests that are on their way."""
        self.catching_up = False
        """Whether those who connected while no server was there are being worked off: they wait for their turn."""
        self.unrouted_codes: dict[int, int] = {}
        self.unrouted_errors: dict[str, int] = {}
        """Inference requests that never reached a version, by `serving.statuses.kind_of`."""
        """Answers by status of requests that never reached a version."""
        self.auth_failures: dict[str, int] = {}
        """Requests that the guard refused, by reason."""
        self.health: dict[tuple[str, str], dict[str, Any]] = {}
        """What was last found of the health of each loaded version; see serving.loaded.health."""
        self.feedback = Inbox()
        """Verdicts on answers, on their way to the registry."""
        self.remembered = Remembered()
        """Who answered the requests that came with an id of their own, while their route is watched."""
        self.gate = Gate()
        """Holds back the requests of models whose version is being exchanged."""
        self.sleeping: dict[str, str] = {}
        """Models with a route that are loaded at their first request, with the reason; see serving.loaded.residency."""
        self.unloaded: Mapping[str, str] = {}
        """Models that this server was told not to serve, with who said so and why; see serving.follow.unloads."""
        self.residency: Residency | None = None
        """Who decides which models sleep; for the metrics."""
        self.loader: Loader | None = None
        """Who loads versions; for the metrics and the health page."""
        self.orders: Orders | None = None
        """Who loads and unloads models by the V2 protocol."""
        self.capture: Capture | None = None
        """Where requests are kept for replays."""
        self.memory: MemoryOptimizer | None = None
        """Looks after the memory that models compute in."""
        self.cache: ResponseCache | None = None
        """Answers of deterministic versions; none where the settings have caching off."""
        self.limiter: Limiter | None = None
        """The rates of keys; none where nobody asks for keys."""
        self.http: HttpCounts | None = None
        """What was asked of all endpoints; none where metrics are off."""
        self.handshakes: Handshakes | None = None
        """Connections that have not agreed on TLS yet; none where it is not spoken."""
        self.access: AccessLog | None = None
        """The access log; none where the settings want none."""
        self.writing: WeakSet[TextVersion] = WeakSet()
        """Versions that were asked for a text: among them those that are on their way out, and finish what they have."""
        self._telemetry: dict[tuple[str, str], VersionTelemetry] = {}
        self._watch: dict[tuple[str, str], dict[int, WatchCounts]] = {}

    @property
    def in_flight(self) -> int:
        """Inference requests that are not answered yet."""
        return self.places.in_flight

    def _has(self, model: str) -> bool:
        return model in self.routes or any(name == model for name, _ in self.loaded)

    def install(
        self,
        routes: Mapping[str, Route],
        loaded: Mapping[tuple[str, str], LoadedVersion],
        epoch: str,
        generation: int,
    ) -> list[LoadedVersion]:
        """Swap everything in one step. Returns the versions no longer needed, for the caller to drain and close.

        Requests that were routed before the step hold their version and finish on it. Counts go on under a new object
        of the same version; a new epoch starts new ones, because its generations are other changes.
        """
        if epoch != self.epoch:
            self._watch = {}
        kept = {id(version) for version in loaded.values()}
        removed = [version for version in self.loaded.values() if id(version) not in kept]
        for key, version in loaded.items():
            known = self._telemetry.pop(key, None)
            version.telemetry = self._telemetry[key] = known if known is not None else version.telemetry
            if epoch != self.epoch:
                version.watch = {}
            version.watch = self._watch.setdefault(key, version.watch)
        self.routes = dict(routes)
        self.loaded = dict(loaded)
        if self.cache is not None:
            self.cache.follow(self.loaded.values())
        self.epoch = epoch
        self.generation = generation
        self._watch = {key: windows for key, windows in self._watch.items() if windows or key in self.loaded}
        gone = [key for key in self._telemetry if key not in self.loaded]
        for key in gone[: max(0, len(gone) - _TELEMETRY_KEPT)]:
            del self._telemetry[key]
        return removed

    def served(self) -> dict[str, Any]:
        """Routes and loaded versions, for model-info and the report to the registry. JSON-able."""
        return {
            "models": {
                name: {
                    "stable": route.stable,
                    "candidate": route.candidate,
                    "weight": route.weight,
                    "shadow": route.shadow,
                    "generation": route.generation,
                }
                for name, route in sorted(self.routes.items())
            },
            "loaded": [
                {
                    "model": model,
                    "version": version,
                    "digest": loaded.digest,
                    "memory_bytes": loaded.runtime.memory_bytes,
                    "signature": loaded.runtime.signature.as_dict(),
                    "figures": loaded.telemetry.total.summary(),
                }
                for (model, version), loaded in sorted(self.loaded.items())
            ],
        }

    def admit(
        self, model: str, version: str | None, key: bytes | None = None
    ) -> tuple[LoadedVersion, Route | None, int | None]:
        """The version that answers, held for the caller (who must release it), the route if that was what chose, and the mark
        of the client's key, by which every server chooses the same.

        Raises NotFoundError for a model or version that is not here, UnavailableError for one that should be.
        """
        route = mark = None
        if version is None:
            route = self.routes.get(model)
            if route is None:
                raise NotFoundError(self._unknown(model))
            if key is None:
                name = choose(route, self.random)
            else:
                mark = mark_of(route, key)
                name = choose(route, lambda: position_of(mark))
            loaded = self.loaded.get((model, name))
            if (loaded is None or loaded.hung is not None) and name == route.candidate and route.stable is not None:
                loaded = self.loaded.get((model, route.stable))
            if loaded is None:
                self._check_served(model)
                raise UnavailableError(self._not_there(model, name))
        else:
            loaded = self.loaded.get((model, version))
            if loaded is None:
                self._check_served(model)
                raise NotFoundError(self._unknown(model, version))
        loaded.acquire()
        return loaded, route, mark

    def versions(self, model: str, version: str | None = None) -> list[LoadedVersion]:
        """The loaded versions of a model, or the one that is named. Raises NotFoundError where there are none."""
        if version is not None:
            found = self.loaded.get((model, version))
            if found is None:
                self._check_served(model)
                raise NotFoundError(self._unknown(model, version))
            return [found]
        versions = [loaded for (name, _), loaded in sorted(self.loaded.items()) if name == model]
        if not versions:
            self._check_served(model)
            if model in self.gate.closed:
                raise UnavailableError(f"model '{model}' is being exchanged for another version; try again in a moment")
            if (route := self.routes.get(model)) is not None and route.stable is not None:
                raise UnavailableError(self._not_there(model, route.stable))
            raise NotFoundError(self._unknown(model))
        return versions

    def default_version(self, model: str) -> LoadedVersion:
        """The stable version where it is loaded, else the first. Raises NotFoundError where there are none."""
        versions = self.versions(model)
        route = self.routes.get(model)
        stable = route.stable if route is not None else None
        return next((loaded for loaded in versions if loaded.version == stable), versions[0])

    def telemetry(self) -> list[tuple[str, str, VersionTelemetry]]:
        """(model, version, telemetry) of every version that is loaded, and of the last ones that were."""
        return [(model, version, telemetry) for (model, version), telemetry in self._telemetry.items()]

    def watch_counts(self) -> list[dict[str, Any]]:
        """The counts of every window since they were last forgotten, also those of versions that are gone."""
        return [
            {"model": model, "version": version, "epoch": self.epoch, "generation": generation, **counts.as_dict()}
            for (model, version), windows in self._watch.items()
            for generation, counts in windows.items()
        ]

    def forget_counts(self, model: str, generations: Iterable[int]) -> None:
        """Drop the counts of these generations of a model: their last report is in the registry and judged."""
        dead = set(generations)
        for (name, version), windows in list(self._watch.items()):
            if name != model:
                continue
            for generation in dead.intersection(windows):
                del windows[generation]
            if not windows and (name, version) not in self.loaded:
                del self._watch[(name, version)]

    def unrouted(self, code: int) -> None:
        self.unrouted_codes[code] = self.unrouted_codes.get(code, 0) + 1

    def _check_served(self, model: str) -> None:
        """Raises UnavailableError for a model that is not in memory on purpose."""
        if (why := self.unloaded.get(model)) is not None:
            raise UnavailableError(f"model '{model}' is unloaded on this server: {why}")
        if (why := self.sleeping.get(model)) is not None:
            raise UnavailableError(f"model '{model}' is not in memory now ({why}); its next request loads it")

    def _not_there(self, model: str, version: str) -> str:
        if (why := self.load_errors.get((model, version))) is not None:
            return f"model '{model}' version '{version}' is not loaded: {why}"
        return f"model '{model}' version '{version}' is not loaded yet; try again later"

    def _unknown(self, model: str, version: str | None = None) -> str:
        versions = sorted(v for m, v in self.loaded if m == model)
        if version is not None and versions:
            return f"model '{model}' has no version '{version}' loaded; loaded are {_named(versions)}"
        models = sorted({*self.routes, *(m for m, _ in self.loaded)})
        known = f"this server has {_named(models)}" if models else "this server has no models yet"
        return f"model '{model}' is not known; {known}"


def _named(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_NAMED_IN_ERRORS])
    return shown if len(names) <= _NAMED_IN_ERRORS else f"{shown} and {len(names) - _NAMED_IN_ERRORS} more"
