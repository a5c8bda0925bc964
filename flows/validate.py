"""validate-models: load every version that takes traffic once more, from the stored bytes, and hold it to its golden cases."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.common import artifact_key, connect, logger, run_id, when_unavailable
from registry.policy import resolve
from tasks import revalidation


class ValidateModels(BaseModel):
    """Which models are looked at."""

    model_config = ConfigDict(extra="forbid", title="Validation")

    model: str | None = Field(default=None, description="Only this model; empty: every model that takes traffic.")
    environment: str | None = Field(default=None, description="Where; empty: the environment that the settings name.")


check = task(
    name="validate",
    retries=3,
    retry_delay_seconds=10,
    retry_condition_fn=when_unavailable,
    cache_policy=NO_CACHE,
    persist_result=False,
)(revalidation.check)


@flow(
    name="validate-models",
    description="Verify the checksum of every version in traffic, load it in the probe, and run its golden cases.",
    persist_result=False,
)
def validate_models(request: ValidateModels | None = None) -> State[Any]:
    """Ends Completed, or Failed with the versions that did not pass."""
    request = request or ValidateModels()
    with_all = connect()
    environment = request.environment or with_all.settings.environment
    found = [
        check(
            with_all.database,
            with_all.artifacts,
            with_all.cache,
            subject,
            resolve(with_all.settings, subject.model),
            flow_run_id=run_id(),
        )
        for subject in revalidation.subjects(with_all.database, environment, request.model)
    ]
    for result in found:
        logger().info("%s: %s", result.name, result.text)
    create_markdown_artifact(
        revalidation.as_markdown(environment, found),
        key=artifact_key("validation", environment),
        description="Validation",
    )
    bad = [result.name for result in found if not result.passed]
    if bad:
        return Failed(message=f"{len(bad)} of {len(found)} versions in traffic did not pass: {', '.join(bad)}")
    return Completed(message=f"{len(found)} versions in traffic passed" if found else "no version is in traffic")
