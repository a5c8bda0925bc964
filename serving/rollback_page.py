"""`POST /api/v2/rollback`: go back to an earlier version, with the registry or without; `DELETE` lets go of a local hold."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from registry.actor import Who
from serving.auth import who_of
from serving.emergency import Emergency


class RollbackRequest(BaseModel):
    """Which model goes back, and to which version."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=128)
    to: str | None = Field(default=None, min_length=1, max_length=128)
    strategy: Literal["instant", "emergency"] = "emergency"
    reason: str = Field(default="", max_length=2000)
    claimed: str | None = Field(default=None, max_length=128)
    """Who asks, where no key says so: a claim, and recorded as one."""


def router(emergency: Emergency, *, lease_seconds: float) -> APIRouter:
    routes = APIRouter()

    @routes.post("/api/v2/rollback", summary="Go back to an earlier version; an emergency does without the registry")
    async def roll_back(request: Request, body: RollbackRequest) -> dict[str, Any]:
        who = _author(request, body.claimed)
        return await emergency.roll_back(
            body.model,
            body.to,
            who=who,
            reason=_said(body.reason or body.strategy, who),
            emergency=body.strategy == "emergency",
            ttl_seconds=lease_seconds,
        )

    @routes.delete("/api/v2/rollback/{model}", summary="Let go of a local hold: this server follows the route again")
    async def release(request: Request, model: str, reason: str = "") -> dict[str, Any]:
        return await emergency.release(model, who=who_of(request), reason=reason)

    return routes


def _author(request: Request, claimed: str | None) -> Who:
    who = who_of(request)
    if who.key_id is not None or claimed is None:
        return who
    return Who(who.actor, via=who.via, claimed=claimed)


def _said(reason: str, who: Who) -> str:
    return reason if who.claimed is None else f"{reason} (says {who.claimed})"
