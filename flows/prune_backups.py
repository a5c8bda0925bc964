"""prune-backups: delete what the retention policy lets go, and the objects and shipped logs that no kept backup needs any more."""

from __future__ import annotations

import datetime as dt
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.common import artifact_key, logger, run_id, settings_alone
from registry import clock
from tasks.backup import prune as pruning
from tasks.backup.repository import open_repository


class PruneBackups(BaseModel):
    """Whether to delete, or to show only."""

    model_config = ConfigDict(extra="forbid", title="Retention")

    apply: bool = Field(
        default=True, description="Delete what the policy lets go; without it only the preview is made."
    )


look = task(name="preview", persist_result=False, cache_policy=NO_CACHE)(pruning.preview)
delete = task(name="prune", persist_result=False, cache_policy=NO_CACHE)(pruning.carry_out)


@flow(
    name="prune-backups",
    description="Show which backups stay and which go, each with its rule; delete those, and the objects and shipped logs that no kept backup needs.",
    persist_result=False,
)
def prune_backups(request: PruneBackups | None = None) -> State[Any]:
    """Ends Completed, or Failed where a place failed, kept a backup that was to go or a log that is not locked, or a manifest or the
    documents of logs cannot be read."""
    request = request or PruneBackups()
    settings = settings_alone()
    repository, now = open_repository(settings), clock.now()
    if request.apply:
        found = delete(settings, repository, now=now, say=logger().info, flow_run_id=run_id())
    else:
        found = look(repository, pruning.policy_of(settings), now, dt.timedelta(hours=settings.backup.gc_grace_hours))
    create_markdown_artifact(found.as_markdown(), key=artifact_key("retention"), description="Retention of backups")
    return (Failed if found.troubles else Completed)(message=found.summary)
