"""Local holds: what this server serves against its last route, because somebody said so while the registry did not answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from registry.rollbacks import Hold
from serving.loaded.laststate import LastState, Wanted
from serving.process import documents
from serving.traffic.routing import Route

log = logging.getLogger("modelkeep.holds")

_FORMAT = 1


@dataclass(slots=True)
class Refused:
    """A hold that the registry did not take: why, when it is tried again, and over which route it was refused."""

    why: str
    route: tuple[str, int | None]
    """Epoch, and the generation of the model's route, as the registry had them."""
    seen: tuple[str, int]
    """Epoch and generation of the environment when that was last looked at."""
    pause_seconds: float
    due: float


class Holds:
    """The holds of this replica, one a model, on its disk. Changed on the event loop; `save` may run on any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_model: dict[str, Hold] = {}
        self.refused: dict[str, Refused] = {}
        """Those that the registry did not take over, though it answers."""
        self._home: dict[str, Hold] = {}
        """Those that the registry has decided about. They stay until the route that takes their place is served: it may go away again
        before it has said which that is."""

    def recall(self) -> None:
        """Read what a process before this one held. A file that cannot be read is said loudly: what it held is not held."""
        try:
            document = json.loads(self.path.read_text())
            if document.get("format") != _FORMAT:
                raise ValueError(f"{self.path} is of format {document.get('format')!r}")
            self.by_model = {value["model"]: Hold(**value) for value in document["holds"]}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.error("the local holds cannot be read, so none is in force: %s", error)

    def put(self, hold: Hold) -> None:
        self.by_model[hold.model] = hold
        self._forget(hold.model)

    def drop(self, hold: Hold) -> None:
        """Let go of this very hold; one that was put in its place meanwhile stays."""
        if self.by_model.get(hold.model) == hold:
            del self.by_model[hold.model]
            self._forget(hold.model)

    def came_home(self, hold: Hold) -> None:
        """The registry has decided about this very hold: it is not asked again."""
        if self.by_model.get(hold.model) == hold:
            self._forget(hold.model)
            self._home[hold.model] = hold

    def to_write_back(self) -> list[Hold]:
        """Those that the registry has not decided about."""
        return [hold for model, hold in self.by_model.items() if model not in self._home]

    def drop_replaced(self, served: LastState) -> bool:
        """Let go of those that the registry has decided about, where another route is served by now. Whether there were any."""
        in_force = {hold.model for route in served.routes if (hold := self.of(route, served.epoch)) is not None}
        over = [hold for model, hold in self._home.items() if model not in in_force]
        for hold in over:
            self.drop(hold)
        return bool(over)

    def _forget(self, model: str) -> None:
        """What was known of the hold before."""
        self.refused.pop(model, None)
        self._home.pop(model, None)

    def save(self) -> None:
        """Replace the file in one step, on the disk when this returns. Raises OSError."""
        holds = [hold.as_dict() for _, hold in sorted(self.by_model.items())]
        documents.replace(self.path, {"format": _FORMAT, "holds": holds})

    def of(self, route: Route, epoch: str) -> Hold | None:
        """The hold over this very route. One over a route that has changed since is not in force: the registry wins."""
        hold = self.by_model.get(route.model)
        return hold if hold is not None and (hold.epoch, hold.generation) == (epoch, route.generation) else None

    def over(self, state: LastState, find: Callable[[str, str], Wanted | None]) -> LastState:
        """The state with the held routes in their places, and the versions that they need. `find` knows those on the disk."""
        if not self.by_model:
            return state
        routes, versions = [], {(wanted.model, wanted.version): wanted for wanted in state.versions}
        for route in state.routes:
            hold = self.of(route, state.epoch)
            if hold is None:
                routes.append(route)
                continue
            routes.append(held(route, hold))
            wanted = versions.get((hold.model, hold.to)) or find(hold.model, hold.to)
            if wanted is None:
                log.error("%s is held on version %s, which is not on this server's disk", hold.model, hold.to)
            else:
                versions[hold.model, hold.to] = wanted
        named = {(route.model, name) for route in routes for name in (route.stable, route.candidate)}
        return replace(
            state, routes=tuple(routes), versions=tuple(wanted for key, wanted in versions.items() if key in named)
        )

    def as_list(self) -> list[dict[str, object]]:
        """For model-info."""
        return [
            {**hold.as_dict(), "not_written_back": refused.why if (refused := self.refused.get(model)) else None}
            for model, hold in sorted(self.by_model.items())
        ]

    def errors(self) -> dict[str, str]:
        """For the errors in model-info: what the registry refuses, and how often it is asked again."""
        return {
            f"hold of {model}": f"the registry does not take it: {refused.why}; asked again every {refused.pause_seconds:g} s, or when "
            "its route changes"
            for model, refused in sorted(self.refused.items())
        }


def held(route: Route, hold: Hold) -> Route:
    """The route as the hold wants it: all traffic to one version, nothing copied, nothing counted."""
    return Route(model=route.model, generation=route.generation, stable=hold.to)
