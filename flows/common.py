"""What every flow needs: its connections, its run's id, and retries that are safe."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import MissingContextError
from prefect.runtime import flow_run
from prefect.tasks import Task
from rich.console import Console

from blocks.connections import Artifacts, RegistryDatabase
from registry import client_tls
from registry.connect import facts_of
from registry.database import Database
from registry.errors import UnavailableError
from registry.settings import Settings, load_settings
from registry.store import ArtifactStore


@dataclass(frozen=True, slots=True)
class Connections:
    """The blocks, resolved to what tasks take."""

    settings: Settings
    database: Database
    artifacts: ArtifactStore
    cache: Path


def settings_alone() -> Settings:
    """For what must work without the registry. Raises SettingsError."""
    outlive_readers()
    settings = load_settings()
    client_tls.publish(settings.client)
    return settings


def connect() -> Connections:
    """Resolve the blocks that the settings describe. Raises SettingsError, UnavailableError."""
    settings = settings_alone()
    artifacts = Artifacts.from_settings(settings)
    database = RegistryDatabase.from_settings(settings).connect()
    database.facts = facts_of(settings)
    return Connections(settings, database, artifacts.connect(), artifacts.cache)


def outlive_readers() -> None:
    """Rich ends a process whose output nobody reads any more, and the worker that reads ours may be killed: then only Prefect's API has the log."""
    named = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    for handler in {handler for one in (logging.root, *named) for handler in one.handlers}:
        console = getattr(handler, "console", None)
        if isinstance(console, Console):
            console.on_broken_pipe = partial(setattr, console, "quiet", True)  # type: ignore[method-assign]


def run_id() -> str | None:
    identity = flow_run.id
    return str(identity) if identity else None


def logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    try:
        return get_run_logger()
    except MissingContextError:  # a task's function called on its own
        return logging.getLogger("modelkeep.flows")


def when_unavailable(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry only where something did not answer: every step can be taken up again, none is worth repeating when it decided."""
    try:
        state.result(raise_on_failure=True)
    except UnavailableError:
        return True
    except Exception:
        return False
    return False


def artifact_key(*parts: str) -> str:
    """Prefect allows small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
