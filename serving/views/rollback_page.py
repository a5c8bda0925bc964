"""`POST /api/v2/rollback`: go back to an earlier version, with the registry or without; `GET` says where to; `DELETE` ends a local hold."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from registry.actor import Who
from registry.errors import ModelkeepError
from registry.rollbacks import Seen
from serving.access.auth import who_of
from serving.follow.emergency import Emergency

log = logging.getLogger("modelkeep.emergency")


class BrokenError(ModelkeepError):
    """A fault of this server, in the middle of an emergency. Answered 500."""

    status = 500


class SeenRoute(BaseModel):
    """What a rollback was decided over, as `GET` said it."""

    model_config = ConfigDict(extra="forbid")

    epoch: str = Field(max_length=64)
    generation: int
    stable: str = Field(max_length=128)
    candidate: str | None = Field(default=None, max_length=128)


class RollbackRequest(BaseModel):
    """Which model goes back, and to which version."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=128)
    to: str | None = Field(default=None, min_length=1, max_length=128)
    seen: SeenRoute | None = None
    """With `to`: the rollback may be asked for again, for what is done already is not done twice."""
    strategy: Literal["instant", "emergency"] = "emergency"
    reason: str = Field(default="", max_length=2000)
    claimed: str | None = Field(default=None, max_length=128)
    """Who asks, where no key says so: a claim, and recorded as one."""


def router(emergency: Emergency, *, lease_seconds: float) -> APIRouter:
    routes = APIRouter()

    @routes.get("/api/v2/rollback/{model}", summary="Where a rollback would go, and what that is decided over")
    async def aim(model: str, strategy: Literal["instant", "emergency"] = "emergency") -> dict[str, Any]:
        return await _understood(emergency.aim(model, emergency=strategy == "emergency"), emergency, model)

    @routes.post("/api/v2/rollback", summary="Go back to an earlier version; an emergency does without the registry")
    async def roll_back(request: Request, body: RollbackRequest) -> dict[str, Any]:
        who = _author(request, body.claimed)
        asked = emergency.roll_back(
            body.model,
            body.to,
            who=who,
            reason=_said(body.reason or body.strategy, who),
            emergency=body.strategy == "emergency",
            ttl_seconds=lease_seconds,
            seen=None if body.seen is None else Seen(**body.seen.model_dump()),
        )
        return await _understood(asked, emergency, body.model)

    @routes.delete("/api/v2/rollback/{model}", summary="Let go of a local hold: this server follows the route again")
    async def release(request: Request, model: str, reason: str = "") -> dict[str, Any]:
        return await _understood(emergency.release(model, who=who_of(request), reason=reason), emergency, model)

    return routes


async def _understood(answer: Awaitable[dict[str, Any]], emergency: Emergency, model: str) -> dict[str, Any]:
    """The answer. A fault that nobody foresaw is logged, and whoever asks in an emergency is told what there is left to do."""
    try:
        return await answer
    except ModelkeepError:
        raise
    except Exception as error:
        log.exception("a rollback of %s failed", model)
        raise BrokenError(
            f"an unexpected error, whose trace is in the log of this server: {type(error).__name__}: {error}. {emergency.left(model)}"
        ) from error


def _author(request: Request, claimed: str | None) -> Who:
    who = who_of(request)
    if who.key_id is not None or claimed is None:
        return who
    return Who(who.actor, via=who.via, claimed=claimed)


def _said(reason: str, who: Who) -> str:
    return reason if who.claimed is None else f"{reason} (says {who.claimed})"
