"""Which version answers a request: the route of a model and the draw between its stable version and its candidate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from hashlib import blake2b

from registry.errors import NotFoundError

log = logging.getLogger("modelkeep.reconcile")


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
    shadow_share: float = 1.0
    """Share of the stable version's requests that the candidate sees copies of, where `shadow` is on."""
    promotion: str | None = None
    """Whose route it is: another promotion draws other keys."""


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


def mark_of(route: Route, key: bytes) -> int:
    """64 bits of a client's key (header X-Route-Key), the same on every server while one promotion lasts.

    Keyed by the model and the promotion: the next one draws other keys, so that the same users are not always the first.
    """
    salt = f"{route.model}/{route.promotion or route.candidate or route.stable}/".encode()
    return int.from_bytes(blake2b(salt + key, digest_size=8).digest(), "big")


def position_of(mark: int) -> float:
    """Where a key stands, in [0, 1): below the weight it gets the candidate. As the weight grows, who had it keeps it."""
    return (mark >> 11) / (1 << 53)


def servable(
    route: Route,
    errors: Collection[tuple[str, str]],
    before: Route | None,
    loaded: Collection[tuple[str, str]],
) -> Route:
    """The route as far as it can be served: without a candidate that does not load, and never with a stable version that does not
    while the one before it is here.

    `errors` and `loaded` are of (model, version); `before` is the route as it is served now.
    """
    stable, candidate = route.stable, route.candidate
    if candidate is not None and (route.model, candidate) in errors:
        candidate = None
    kept = None if before is None else before.stable
    if stable is not None and (route.model, stable) in errors and kept is not None and (route.model, kept) in loaded:
        log.error("%s stays on version %s: version %s does not load", route.model, kept, stable)
        stable = kept
    if candidate == stable:
        candidate = None
    if (stable, candidate) == (route.stable, route.candidate):
        return route
    weight, shadow = (route.weight, route.shadow) if candidate is not None else (0.0, False)
    return replace(route, stable=stable, candidate=candidate, weight=weight, shadow=shadow)
