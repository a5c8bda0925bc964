"""recover: bring a backup back, from a form. The command `modelkeep recover` does the same without Prefect."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.common import artifact_key, logger, settings_alone
from registry import moments
from registry.errors import ModelkeepError
from tasks.backup import recovery


class Recover(BaseModel):
    """Which backup comes back, what of it, and where to."""

    model_config = ConfigDict(extra="forbid", title="Recovery")

    source: str | None = Field(
        default=None,
        description="A manifest (path or URL), a backup's id, or a location. Empty: the locations of the settings.",
    )
    at: str | None = Field(
        default=None,
        description='Instead: the newest verified backup before then ("2d ago"), then the shipped logs up to it.',
    )
    components: list[str] = Field(
        default=[], description="registry, database:app, database:app.TABLE, models:NAME@VERSION …; empty: everything."
    )
    into: str | None = Field(default=None, description="A folder or URL beside what is live. Empty: where it belongs.")
    dry_run: bool = Field(default=True, description="Show the plan, and change nothing.")
    force: bool = Field(
        default=False, description="Replace what is there, after it was backed up and that copy verified."
    )
    reason: str = Field(default="", description="Why; it goes on record.")


@flow(
    name="recover",
    description="Bring a backup back: everything, or a table, a version, a collection, a folder. A dry run unless told otherwise.",
    persist_result=False,
)
def recover(request: Recover | None = None) -> State[Any]:
    """Ends Planned, Recovered, Partial, or Refused with what is in the way."""
    request = request or Recover()
    settings = settings_alone()
    log = logger()
    try:
        asked = recovery.Request(
            request.source,
            None if request.at is None else moments.parse(request.at),
            tuple(request.components),
            request.into,
            request.force,
            request.reason,
        )
        prepared = recovery.prepare(settings, asked)
        create_markdown_artifact(
            recovery.shown_plan(prepared.plan), key=artifact_key("recovery", prepared.plan.manifest.backup_id)
        )
        if request.dry_run:
            problems = prepared.plan.problems
            if problems:
                return Failed(name="Refused", message="; ".join(problems))
            return Completed(
                name="Planned", message=f"{len(prepared.plan.steps)} components of {prepared.plan.manifest.backup_id}"
            )
        outcome = recovery.carry_out(prepared, asked, say=log.info)
    except ModelkeepError as error:
        return Failed(name="Refused", message=str(error))
    create_markdown_artifact(recovery.shown(outcome), key=artifact_key("recovered", outcome.plan.manifest.backup_id))
    message = f"{', '.join(outcome.restored) or 'nothing'} from {outcome.plan.manifest.backup_id}"
    if outcome.state == "recovered":
        return Completed(name="Recovered", message=message)
    return Failed(
        name="Partial", message=message + "; " + "; ".join(f"{one}: {why}" for one, why in outcome.failed.items())
    )
