"""What every command needs: the registry opened, options that many take, and a model's name that must be known."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry import names
from registry.errors import UsageError
from registry.settings import Settings, load_settings

if TYPE_CHECKING:
    from registry.database import Database
    from registry.store import ArtifactStore

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output; logs go to standard error.")]
Where = Annotated[str | None, typer.Option("--environment", help="Default: the environment of the settings.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why; it goes on record.")]


@dataclass(frozen=True, slots=True)
class Context:
    settings: Settings
    database: Database
    artifacts: ArtifactStore


@contextmanager
def opened() -> Iterator[Context]:
    """Settings, and the registry at this release's schema."""
    from registry.connect import open_database
    from registry.store import open_store

    settings = load_settings()
    database = open_database(settings)
    database.prepare()
    try:
        yield Context(settings, database, open_store(settings.artifacts))
    finally:
        database.dispose()


def known(session: Any, name: str) -> None:
    """Raise NotFoundError for a model that does not exist."""
    from registry import versions

    names.check_model_name(name)
    if not versions.listed(session, name, limit=1):
        versions.get(session, name, "")


def pair(text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark or not key:
        raise UsageError(f"--tag {text!r}: KEY=VALUE is needed")
    return key, value


def log_to_stderr(level: str) -> None:
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
