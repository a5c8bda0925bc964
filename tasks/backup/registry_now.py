"""The registry as a backup finds it: there, or away with a reason; one that has vanished is not made anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from registry.connect import open_database
from registry.database import Database
from registry.errors import ModelkeepError
from registry.settings import Settings


@dataclass(frozen=True, slots=True)
class RegistryNow:
    """The registry, or why it is not to be had: then the rest is backed up all the same."""

    database: Database | None
    why: str | None = None


@contextlib.contextmanager
def registry_of(settings: Settings) -> Iterator[RegistryNow]:
    """One that has vanished is not made anew: an empty one would be backed up as if it were right."""
    database = open_database(settings)
    try:
        if (why := vanished(settings, database)) is None:
            try:
                database.prepare()
            except ModelkeepError as error:
                why = str(error)
        yield RegistryNow(database if why is None else None, why)
    finally:
        database.dispose()


def vanished(settings: Settings, database: Database) -> str | None:
    """Why there is no registry where there was one; None where there is, or never was."""
    anchors = settings.home / "audit.anchors"
    if not database.sqlite or not anchors.exists() or not anchors.stat().st_size:
        return None
    path = Path(str(database.url.database))
    if path.exists() and path.stat().st_size:
        return None
    return f"the registry {path} is gone, and {anchors} says that there was one: bring it back with modelkeep recover"
