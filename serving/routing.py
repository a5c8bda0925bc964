"""Which version answers a request: the route of a model and the draw between its stable version and its candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from registry.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class Route:
    """A model's route as this server follows it. `generation` is that of the route's last change."""

    model: str
    generation: int
    stable: str | None
    candidate: str | None = None
    weight: float = 0.0
    shadow: bool = False
    slow_threshold_seconds: float | None = None
    watch: bool = False


def choose(route: Route, random: Callable[[], float]) -> str:
    """The version that answers; `random` draws from [0, 1). Raises NotFoundError where the route names no version."""
    candidate = route.candidate
    # At weight 1 nothing is drawn, so that no rounding of a random number can send a request to the stable version.
    if candidate is not None and route.weight > 0 and (route.weight >= 1 or random() < route.weight):
        return candidate
    if route.stable is None:
        raise NotFoundError(
            f"model '{route.model}' has no version in traffic; promote one, or name a version in the path"
        )
    return route.stable
