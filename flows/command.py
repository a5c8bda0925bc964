"""command-promotion: tell a promotion under way to pause, resume, advance or stop, from a form."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.common import connect, logger
from registry import actor, commands
from registry.actor import Who
from registry.errors import NotFoundError, RefusedError, UsageError


class CommandPromotion(BaseModel):
    """Which promotion, and what it is told."""

    model_config = ConfigDict(extra="forbid", title="Command")

    promotion: str = Field(description="Its id, as in `modelkeep promotions` or on the page of its run.")
    command: Literal["pause", "resume", "advance", "stop"] = Field(
        description="pause: shares and time stand still, a bad version is still taken back. resume: go on. advance: pass this stage now, "
        "unless the evidence says that the version is bad. stop: take the candidate out; in the soak, stop watching and keep the version."
    )
    reason: str = Field(default="", description="Why; it goes on record.")
    name: str = Field(
        default="", max_length=128, description="Who you are. Nobody checks it: it is recorded as claimed."
    )


@flow(
    name="command-promotion",
    description="Tell a promotion under way to pause, resume, advance or stop. What it is told is on record, and a stop happens at once.",
    flow_run_name="{request.command} {request.promotion}",
    persist_result=False,
)
def command_promotion(request: CommandPromotion) -> State[Any]:
    """Ends Told, or Refused where the promotion has ended or the command makes no sense now."""
    with_all = connect()
    who = Who(actor.current(), via="form", claimed=request.name or None)
    try:
        told = commands.give(
            with_all.database, request.promotion, command=request.command, who=who, reason=request.reason
        )
    except (RefusedError, NotFoundError, UsageError) as error:
        return Failed(name="Refused", message=str(error))
    logger().info("promotion %s, %s: %s", told["promotion"], told["command"], told["message"])
    return Completed(name="Told", message=told["message"])
