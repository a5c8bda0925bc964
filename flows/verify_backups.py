"""verify-backups: restore backups into private places and compare them; nothing counts as a backup before that."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.common import artifact_key, logger, run_id, settings_alone
from registry.errors import ModelkeepError, NotFoundError, RefusedError, UsageError
from tasks.backup import states, verify
from tasks.backup.repository import open_repository


class VerifyBackups(BaseModel):
    """Which backups are checked, and how much of them."""

    model_config = ConfigDict(extra="forbid", title="Verification")

    backup: str | None = Field(
        default=None,
        description="Only this one; empty: each full one that is not verified yet, and a sample of the others.",
    )
    sample: float | None = Field(
        default=None, gt=0, le=1, description="With one named: read back this share of it, instead of restoring all."
    )


@flow(
    name="verify-backups",
    description="Restore backups into private servers and folders, in fresh processes on the CPU, and compare them with their manifests.",
    persist_result=False,
)
def verify_backups(request: VerifyBackups | None = None) -> State[Any]:
    """Ends Completed; Failed where anything differs or could not be checked, or with the name Refused."""
    request = request or VerifyBackups()
    settings = settings_alone()
    reports: list[verify.Report] = []
    problems: list[str] = []
    try:
        named = request.backup
        of_others = settings.backup.sample_share
        due = verify.due(open_repository(settings), of_others) if named is None else [(named, request.sample)]
    except (RefusedError, UsageError) as error:
        return Failed(name="Refused", message=str(error))
    for backup_id, share in due:
        try:
            report = verify.verify(settings, backup_id, share=share, tell=logger().info, flow_run_id=run_id())
        except (UsageError, NotFoundError, RefusedError) as error:
            if request.backup is not None:
                return Failed(name="Refused", message=str(error))
            problems.append(f"{backup_id}: {error}")
        except ModelkeepError as error:
            problems.append(f"{backup_id}: {error}")
        else:
            reports.append(report)
            (logger().error if report.exit_code == 1 else logger().info)(report.summary())
    text = "\n\n".join(["# Verification of backups", *(one.as_markdown() for one in reports), *problems])
    create_markdown_artifact(text, key=artifact_key("backups-verified"), description="Verification of backups")
    data = [one.as_dict() for one in reports]
    problems += [one.summary() for one in reports if one.exit_code == 1]
    if problems:
        return Failed(message="; ".join(problems), data=data)
    unverifiable = [one.backup_id for one in reports if one.of(states.UNVERIFIABLE)]
    said = f"{len(reports)} backups were checked" if reports else "no backup was due"
    if unverifiable:
        said += f"; not all of {', '.join(unverifiable)} can be verified here"
    return Completed(message=said, data=data)
