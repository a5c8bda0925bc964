"""rollback-model: make an earlier version the stable one, and see that the servers follow."""

from __future__ import annotations

import time
from typing import Any, Literal

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.common import Connections, artifact_key, connect, logger, run_id, when_unavailable
from registry import history, moments, rollbacks
from registry.errors import (
    ConflictError,
    FencedError,
    LockedError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from registry.rollbacks import Aim
from tasks import lease, rollback
from tasks.promoting import Ended, Promoting


class RollbackModel(BaseModel):
    """Which model goes back, and to which version."""

    model_config = ConfigDict(extra="forbid", title="Rollback")

    model: str = Field(description="Name of the model.")
    to: str | None = Field(
        default=None, description="The version to go back to; empty: the stable version before this one."
    )
    at: str | None = Field(
        default=None, description='Instead: to the version that was stable then ("2d ago", 2026-03-10T03:12:00Z).'
    )
    environment: str | None = Field(default=None, description="Where; empty: the environment that the settings name.")
    strategy: Literal["instant", "gradual", "emergency"] = Field(
        default="instant",
        description="instant: at once, when nothing runs on the model. gradual: share by share, stopped where the version that comes back "
        "fails. emergency: takes the model away from whatever runs on it.",
    )
    reason: str = Field(default="", description="Why; it goes on record.")


# Where it goes is decided before, and over what: to repeat it after a lost answer goes there and no further.
change = task(
    name="change-route",
    retries=5,
    retry_delay_seconds=2,
    retry_condition_fn=when_unavailable,
    persist_result=False,
    cache_policy=NO_CACHE,
)(rollback.change)
by_steps = task(name="move-traffic-back", persist_result=False, cache_policy=NO_CACHE)(rollback.gradual)
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
    description="Make an earlier version stable again, and check that every server answers by it.",
    flow_run_name="{request.model} back",
    persist_result=False,
)
def rollback_model(request: RollbackModel) -> State[Any]:
    """Ends RolledBack, Behind (a server has not followed), Stopped (a gradual one, for the version failed), Refused or Locked."""
    began, with_all = time.monotonic(), connect()
    environment = request.environment or with_all.settings.environment
    try:
        done = rollbacks.done_by(with_all.database, run_id(), environment, request.model)
        if done is not None:
            result = done
        else:
            aim = _aim(with_all, environment, request)
            carry = _gradual if request.strategy == "gradual" else _at_once
            result = carry(with_all, environment, aim, request)
    except Ended as ended:
        return Failed(name="Stopped", message=ended.reason)
    except (LockedError, FencedError) as error:
        return Failed(name="Locked", message=str(error))
    except (RefusedError, NotFoundError, UsageError, ConflictError) as error:
        return Failed(name="Refused", message=str(error))
    try:
        outcome = follow(
            with_all.database, result, artifacts=with_all.artifacts, strategy=request.strategy, began=began
        )
    except UnavailableError as error:
        told = f"{request.model} is back on {result['to']}, on record; whether the servers follow could not be seen: {error}"
        return Failed(name="Behind", message=told, data=result)
    logger().info(outcome.summary())
    create_markdown_artifact(outcome.as_markdown(), key=artifact_key("rollback", request.model), description="Rollback")
    if outcome.complete:
        return Completed(name="RolledBack", message=outcome.summary(), data=outcome.as_dict())
    return Failed(name="Behind", message=outcome.summary(), data=outcome.as_dict())


def _aim(with_all: Connections, environment: str, request: RollbackModel) -> Aim:
    """Where it goes, decided once. Raises NotFoundError, UsageError."""
    to = _target(with_all, environment, request)
    with with_all.database.read() as session:
        return rollbacks.aim(session, environment, request.model, to=to, emergency=request.strategy == "emergency")


def _target(with_all: Connections, environment: str, request: RollbackModel) -> str | None:
    if request.at is None:
        return request.to
    if request.to is not None:
        raise UsageError("to and at are both given: leave one of them empty")
    with with_all.database.read() as session:
        return history.stable_at(session, environment, request.model, moments.parse(request.at))


def _at_once(with_all: Connections, environment: str, aim: Aim, request: RollbackModel) -> dict[str, Any]:
    """Raises UnavailableError, which says how to repeat it, where the registry does not come back in time."""
    try:
        return change(
            with_all.database,
            environment=environment,
            model=request.model,
            to=aim.to,
            seen=aim.seen,
            reason=request.reason,
            ttl_seconds=with_all.settings.lease_seconds,
            emergency=request.strategy == "emergency",
            flow_run_id=run_id(),
        )
    except UnavailableError as error:
        raise UnavailableError(
            f"{error}. It may be on record all the same: repeat it with --to {aim.to}, which goes there and no further"
        ) from error


def _gradual(with_all: Connections, environment: str, aim: Aim, request: RollbackModel) -> dict[str, Any]:
    """Under a lease, on record among the promotions. A run that is started again goes on from its step."""
    settings = with_all.settings
    operation = rollback.begin_gradual(
        with_all.database,
        aim,
        environment=environment,
        model=request.model,
        policy=settings.promotion,
        ttl_seconds=settings.lease_seconds,
        reason=request.reason,
        flow_run_id=run_id(),
        tell=logger().warning,
    )
    with lease.kept(with_all.database, operation.held) as keeper:
        work = Promoting(
            with_all.database,
            with_all.artifacts,
            with_all.cache,
            operation,
            keeper,
            poll_seconds=settings.poll_seconds,
            tell=logger().info,
        )
        return rollback.carry(work, lambda work: by_steps(work, reason=request.reason))
