"""recovery-drill: is what we have enough to come back? Asked every week, of everything, with a damaged copy as the counter-test."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.common import artifact_key, logger, settings_alone
from tasks.backup import damage, drill, drill_page
from tasks.backup.progress import duration


class RecoveryDrill(BaseModel):
    """How a copy is damaged for the counter-test."""

    model_config = ConfigDict(extra="forbid", title="Recovery drill")

    damage: str | None = Field(
        default=None,
        description=f"One of {', '.join(damage.WAYS)}; empty: the next one in turn, so that each has its day.",
    )


hold = task(name="drill", persist_result=False, cache_policy=NO_CACHE)(drill.held)


@flow(
    name="recovery-drill",
    description="Restore the newest backup as if the machine were lost, serve it, compare it with what is live, measure RPO and RTO, "
    "and see that a damaged copy is found out.",
    persist_result=False,
)
def recovery_drill(request: RecoveryDrill | None = None) -> State[Any]:
    """Ends Passed; or Failed, with everything that would go wrong."""
    settings = settings_alone()
    request = request or RecoveryDrill()
    found = hold(settings, say=logger().info, way=request.damage)
    drill_page.write(settings.home / "drill.html", drill.history(settings.home))
    create_markdown_artifact(drill.as_markdown(found), key=artifact_key("recovery-drill"), description="Recovery drill")
    if not found.passed:
        return Failed(message="; ".join(found.failed))
    return Completed(
        name="Passed",
        message=f"{found.backup_id}: back in {duration(found.rto_seconds)}, at most {duration(found.rpo_seconds)} old",
    )
