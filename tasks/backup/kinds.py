"""The kinds of components by name, and the parts of this installation that the settings describe, in the order of a backup."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from registry.errors import ModelkeepError, UsageError
from registry.settings import Settings
from tasks.backup.components import Captured, Kind, Part, Sink
from tasks.backup.manifest import ManifestError

ALL = "all"
DAILY = "daily"
"""Registry, models, and what databases there are: what the schedule takes each night. It restores together, and costs what changed."""
_DAILY_GROUPS = ("registry", "models", "database")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "registry": ("tasks.backup.registry_part",),
    "models": ("tasks.backup.models",),
    "database": ("tasks.backup.mariadb", "tasks.backup.postgresql", "tasks.backup.sqlite"),
    "vectors": ("tasks.backup.vectors",),
    "queues": ("tasks.backup.queues",),
    "files": ("tasks.backup.folders",),
    "config": ("tasks.backup.config_part",),
}
"""What can be asked for, with the modules that find its parts. The order is that of a backup, and it matters: see docs/GUIDE.md."""

MODULES: Mapping[str, str] = {
    "registry": "tasks.backup.registry_part",
    "models": "tasks.backup.models",
    "mariadb": "tasks.backup.mariadb",
    "mysql": "tasks.backup.mariadb",
    "postgresql": "tasks.backup.postgresql",
    "sqlite": "tasks.backup.sqlite",
    "vectors": "tasks.backup.vectors",
    "queues": "tasks.backup.queues",
    "files": "tasks.backup.folders",
    "config": "tasks.backup.config_part",
}
"""Who restores and verifies a component, by its kind in the manifest."""

_SETTING = {
    "database": "[[databases]]",
    "vectors": "[vectors] url or the setting chroma",
    "queues": "[queues] url or the setting redis_url",
    "files": "[[files]]",
}


@dataclass(frozen=True, slots=True)
class Unready:
    """A part that is described, and whose module could not even begin: it fails when its turn comes, and is not left out."""

    name: str
    kind: str
    error: ModelkeepError

    def capture(self, sink: Sink) -> Captured:
        raise self.error


def kind(name: str) -> Kind:
    """The module of a kind. Raises ManifestError for one that this release does not know."""
    if name not in MODULES:
        raise ManifestError(
            f"components of kind {name!r} are unknown to this release: use the one that wrote the backup"
        )
    return cast(Kind, importlib.import_module(MODULES[name]))


def group(component: str) -> str:
    """ "database" of "database:app"."""
    return component.partition(":")[0]


def wanted(text: str) -> tuple[str, ...]:
    """`--components` as it is typed: names with commas between, each once. Raises UsageError for what does not exist."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"--components is empty: all, or of {', '.join(GROUPS)}")
    for name in names:
        if name not in (ALL, DAILY) and group(name) not in GROUPS:
            raise UsageError(
                f"--components {name!r}: there are all, daily, {', '.join(GROUPS)}, and database:NAME, files:NAME"
            )
    return names


def parts(settings: Settings, names: Sequence[str] = (ALL,)) -> list[Part]:
    """The parts to back up, in order. `all` and `daily` ask for what is configured; what is named must be.

    Raises UsageError for a name that nothing in the settings answers to.
    """
    whole = set(GROUPS if ALL in names else _DAILY_GROUPS if DAILY in names else ())
    named = [name for name in names if name not in (ALL, DAILY)]
    known = {one: _of_group(settings, one) for one in GROUPS if one in whole | {group(name) for name in named}}
    for name in named:
        found = [part.name for part in known[group(name)]]
        if not found:
            setting = _SETTING.get(group(name), "the settings")
            raise UsageError(
                f"--components {name}: nothing of it is configured ({setting}), see: modelkeep config show"
            )
        if name != group(name) and name not in found:
            raise UsageError(f"--components {name}: it is not in the settings; there are {', '.join(found)}")
    return [part for one, found in known.items() for part in found if one in whole or {one, part.name} & set(named)]


def _of_group(settings: Settings, name: str) -> list[Part]:
    found: list[Part] = []
    for path in GROUPS[name]:
        module: Any = importlib.import_module(path)
        try:
            found += module.parts(settings)
        except ModelkeepError as error:
            found.append(Unready(name, path.rpartition(".")[2], error))
    return found
