"""What to bring back, as it is typed: "registry", "database:app.TABLE", "models:NAME@VERSION", "vectors:COLLECTION", "files:FOLDER/below" …"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from registry.errors import UsageError
from tasks.backup.manifest import FAILED, Component, Manifest

ALL = "all"
GROUPS = ("registry", "models", "database", "vectors", "queues", "files", "config")
NAMED = ("database", "files")
"""Groups of which there may be several components, each with a name; of the others there is one."""
EXAMPLES = "registry, database:app, database:app.TABLE, models:NAME@VERSION, vectors:COLLECTION, files:FOLDER"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A component of a manifest, and what of it: nothing named is all of it."""

    component: Component
    only: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.component.name + (f" ({', '.join(self.only)})" if self.only else "")


def choose(manifest: Manifest, asked: Iterable[str]) -> list[Chosen]:
    """The components that are asked for, in the order of the manifest; each of `asked` may hold several with commas between.

    Raises UsageError for what is no such thing, for what the backup does not hold (it says what it holds), and for a component
    that failed when the backup was taken.
    """
    names = [name.strip() for text in asked for name in text.split(",") if name.strip()] or [ALL]
    wanted: dict[str, list[str] | None] = {}
    for name in names:
        for component, only in _resolve(manifest, name):
            if only is None:
                wanted[component] = None
            elif (before := wanted.setdefault(component, [])) is not None and only not in before:
                before.append(only)
    chosen = []
    for one in manifest.components:
        if one.name not in wanted:
            continue
        if one.state == FAILED:
            if ALL in names and not any(name != ALL for name in names):
                continue  # the plan says that it is missing
            raise UsageError(
                f"{one.name} is not in backup {manifest.backup_id}: it failed then ({one.error}); take another backup"
            )
        chosen.append(Chosen(one, tuple(wanted[one.name] or ())))
    return chosen


def _resolve(manifest: Manifest, name: str) -> list[tuple[str, str | None]]:
    """[(name of a component, what of it or None)]."""
    there = [one.name for one in manifest.components]
    if name == ALL:
        return [(one, None) for one in there]
    group, _, rest = name.partition(":")
    if group not in GROUPS:
        raise UsageError(f"{name!r} names no component: {EXAMPLES}")
    of_group = [one for one in there if one.partition(":")[0] == group]
    if not of_group:
        raise UsageError(f"backup {manifest.backup_id} holds no {group}: it holds {', '.join(there) or 'nothing'}")
    if not rest:
        return [(one, None) for one in of_group]
    if group not in NAMED:
        if group in ("registry", "config"):
            raise UsageError(f"{name!r}: {group} comes back as a whole; leave ':{rest}' out")
        return [(group, rest)]
    mark = "." if group == "database" else "/"
    entry, _, only = rest.partition(mark)
    if f"{group}:{entry}" not in there:
        raise UsageError(f"{name!r}: backup {manifest.backup_id} holds {', '.join(of_group)}")
    return [(f"{group}:{entry}", only or None)]
