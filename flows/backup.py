"""backup: the registry, models, databases, vectors, queues, files and configuration, as one set under one manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.common import artifact_key, logger, run_id, settings_alone
from registry.errors import FencedError, LockedError, RefusedError, StorageError, UsageError
from tasks.backup import kinds, progress, run
from tasks.backup.progress import Moment

_SHOW_EACH = 0.02
"""A share: the page's bar is moved in steps of at least that."""


class Backup(BaseModel):
    """What is backed up."""

    model_config = ConfigDict(extra="forbid", title="Backup")

    components: str = Field(
        default=kinds.ALL,
        description="all; daily: registry, models and databases; or of registry, models, database, vectors, queues, files, config, with "
        "commas between; database:NAME and files:NAME take one of several.",
    )
    reason: str = Field(default="", description="Why; it goes into the manifest and on record.")


def _named() -> str:
    """The form may be empty."""
    request = (flow_run.parameters or {}).get("request")
    return f"backup of {getattr(request, 'components', None) or kinds.ALL}"


@flow(
    name="backup",
    description="Back up what is asked for, under one manifest that is written last. A component that fails makes it partial.",
    flow_run_name=_named,
    persist_result=False,
)
def backup(request: Backup | None = None) -> State[Any]:
    """Ends Complete; or Failed with the name Partial, Failed, Locked (another runs) or Refused."""
    request = request or Backup()
    settings = settings_alone()
    try:
        with _page() as view, progress.viewed(view):
            asked = run.Request(kinds.wanted(request.components), request.reason, run_id())
            outcome = run.back_up(settings, asked, tell=logger().info, show=progress.show)
    except (LockedError, FencedError) as error:
        return Failed(name="Locked", message=str(error))
    except (RefusedError, UsageError) as error:
        return Failed(name="Refused", message=str(error))
    except StorageError as error:
        return Failed(name="Failed", message=str(error), data=None)
    try:
        text = outcome.as_markdown()
        create_markdown_artifact(text, key=artifact_key("backup"), description=f"Backup: {outcome.state}")
    except (httpx.HTTPError, PrefectException) as error:  # it went away meanwhile, and the backup is there
        logger().warning("the page of the backup could not be written: %s", error)
    if outcome.exit_code == 0:
        return Completed(name="Complete", message=outcome.summary(), data=outcome.as_dict())
    name = "Failed" if outcome.exit_code == 1 else "Partial"
    return Failed(name=name, message=outcome.summary(), data=outcome.as_dict())


@contextmanager
def _page() -> Iterator[Callable[[Moment], None]]:
    """A bar on the run's page. Prefect's server may go while we run: the backup does not need it."""
    # In a flow that is no coroutine it gives the id itself, whatever its type says.
    made = create_progress_artifact(progress=0.0, key=artifact_key("backup-progress"), description="Backup")
    artifact = cast(UUID, made)
    told = 0.0

    def view(moment: Moment) -> None:
        nonlocal told
        share = moment.share
        if share is None or share - told < _SHOW_EACH:
            return
        told = share
        try:
            update_progress_artifact(artifact, progress=100 * share, description=moment.text())
        except (httpx.HTTPError, PrefectException) as error:
            logger().warning("the progress could not be shown: %s", error)

    yield view
