"""rollback-model: make an earlier version the stable one, and see that the servers follow."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.common import artifact_key, connect, logger, run_id, when_unavailable
from registry.errors import LockedError, NotFoundError, RefusedError, UsageError
from tasks import rollback


class RollbackModel(BaseModel):
    """Which model goes back, and to which version."""

    model_config = ConfigDict(extra="forbid", title="Rollback")

    model: str = Field(description="Name of the model.")
    to: str | None = Field(
        default=None, description="The version to go back to; empty: the stable version before this one."
    )
    environment: str | None = Field(default=None, description="Where; empty: the environment that the settings name.")
    strategy: Literal["instant", "emergency"] = Field(
        default="instant",
        description="instant waits for its turn; emergency takes the model away from whatever runs on it.",
    )
    reason: str = Field(default="", description="Why; it goes on record.")


# The change is one transaction that either happened or did not, so repeating it after "no answer" is not safe; following is.
change = task(name="change-route", persist_result=False, cache_policy=NO_CACHE)(rollback.change)
follow = task(
    name="follow",
    retries=5,
    retry_delay_seconds=2,
    retry_condition_fn=when_unavailable,
    persist_result=False,
    cache_policy=NO_CACHE,
)(rollback.follow)


@flow(
    name="rollback-model",
    description="Make an earlier version stable again at once, and check that every server answers by it.",
    flow_run_name="{request.model} back",
    persist_result=False,
)
def rollback_model(request: RollbackModel) -> State[Any]:
    """Ends RolledBack, Behind (a server has not followed) or Locked."""
    with_all = connect()
    environment = request.environment or with_all.settings.environment
    try:
        result = change(
            with_all.database,
            environment=environment,
            model=request.model,
            to=request.to,
            reason=request.reason,
            ttl_seconds=with_all.settings.lease_seconds,
            emergency=request.strategy == "emergency",
            flow_run_id=run_id(),
        )
    except LockedError as error:
        return Failed(name="Locked", message=str(error))
    except (RefusedError, NotFoundError, UsageError) as error:
        return Failed(name="Refused", message=str(error))
    outcome = follow(with_all.database, result)
    logger().info(outcome.summary())
    create_markdown_artifact(outcome.as_markdown(), key=artifact_key("rollback", request.model), description="Rollback")
    if outcome.complete:
        return Completed(name="RolledBack", message=outcome.summary())
    return Failed(name="Behind", message=outcome.summary())
