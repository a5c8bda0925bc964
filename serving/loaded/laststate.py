"""The last good state, on disk: what to serve when the registry does not answer at start."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from serving.process import documents
from serving.traffic.routing import Route

log = logging.getLogger("modelkeep.reconcile")

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """A version that a route names: all that is needed to load it without the registry."""

    model: str
    version: str
    digest: str
    format: str
    files: tuple[dict[str, Any], ...]
    signature: dict[str, Any] | None
    rows_independent: bool
    memory_bytes: int | None = None
    """As the validation measured it; None: it did not."""
    deterministic: bool = False
    """Whether its answers may be kept and given again."""
    labels: dict[str, Any] | None = None
    """Of its outputs' classes, as registry.labels has them."""
    max_batch: int | None = None
    """The most rows that its author lets be computed together; None: the settings alone say it."""
    golden: str | None = None
    """The digest of its golden cases, by which half precision is decided."""
    quality: dict[str, float] | None = None
    """What the last validation measured on them, by metric (registry.figures.quality); None: nothing."""


@dataclass(frozen=True, slots=True)
class LastState:
    epoch: str
    generation: int
    routes: tuple[Route, ...]
    versions: tuple[Wanted, ...]

    def by_key(self) -> dict[tuple[str, str], Wanted]:
        """The versions by (model, version)."""
        return {(version.model, version.version): version for version in self.versions}


def as_it_loads(state: LastState, errors: Collection[tuple[str, str]], before: LastState | None) -> LastState:
    """The state without the versions that do not load here, which are `errors`, by (model, version).

    Of their models it has the stable version alone, and where that one does not load, the one of the state `before`. Its generation is
    one that the registry never has again: who starts with it has not followed yet, and tries the rest when the registry answers.
    """
    if not errors:
        return state
    versions, earlier = state.by_key(), {} if before is None else before.by_key()
    stable_before = {} if before is None else {route.model: route.stable for route in before.routes}
    failing, routes = {model for model, _ in errors}, []
    for route in state.routes:
        if route.model in failing:
            route = replace(route, candidate=None, weight=0.0, shadow=False)
            key = (route.model, stable_before.get(route.model) or "")
            if (route.model, route.stable) in errors and key in earlier:
                versions[key] = earlier[key]
                route = replace(route, stable=key[1])
        routes.append(route)
    named = {(route.model, name) for route in routes for name in (route.stable, route.candidate)}
    kept = tuple(version for key, version in versions.items() if key in named)
    return LastState(state.epoch, state.generation - 1, tuple(routes), kept)


def write(path: Path, state: LastState) -> None:
    """Replace the file in one step: a kill leaves the old or the new one."""
    document = {
        "format": _FORMAT,
        "epoch": state.epoch,
        "generation": state.generation,
        "routes": [asdict(route) for route in state.routes],
        "versions": [asdict(version) for version in state.versions],
    }
    documents.replace(path, document)


def read(path: Path) -> LastState | None:
    """The state, None where there is none. Raises ValueError where the file is not one of ours (the caller says so and goes on)."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError(f"{path} is no state of format {_FORMAT}")
    try:
        return LastState(
            epoch=str(document["epoch"]),
            generation=int(document["generation"]),
            routes=tuple(_route(route) for route in document["routes"]),
            versions=tuple(Wanted(**{**version, "files": tuple(version["files"])}) for version in document["versions"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def recall(path: Path) -> LastState | None:
    """As `read`; None as well, and logged, where it cannot be used."""
    try:
        return read(path)
    except (OSError, ValueError) as error:
        log.error("the last state cannot be used, going on without it: %s", error)
        return None


def _route(value: dict[str, Any]) -> Route:
    """Raises TypeError where a field is missing, unknown, or of another kind."""
    route = Route(**value)
    kinds: dict[str, type | tuple[type, ...]] = {
        "model": str,
        "generation": int,
        "stable": (str, type(None)),
        "candidate": (str, type(None)),
        "weight": (int, float),
        "shadow": bool,
        "slow_threshold_seconds": (int, float, type(None)),
        "watch": bool,
        "shadow_share": (int, float),
        "promotion": (str, type(None)),
    }
    for name, kind in kinds.items():
        if not isinstance(getattr(route, name), kind):
            raise TypeError(f"{name} = {getattr(route, name)!r}")
    return route
