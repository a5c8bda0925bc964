"""`POST /api/v2/feedback`: verdicts on answers, by the id of the request. They reach the registry with the next report."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from registry.feedback import Verdict
from serving.access.auth import who_of
from serving.http import request_ids
from serving.state import Serving
from serving.traffic.feedback import InboxFullError

MOST_VERDICTS = 1000
"""In one request."""


class Given(BaseModel):
    """A verdict on one answered request."""

    model_config = ConfigDict(extra="forbid")

    request_id: str = Field(
        min_length=1, max_length=512, pattern=r"^[\x20-\x7e]+$", description="The X-Request-ID of the answer."
    )
    verdict: Literal["good", "bad"]
    reason: str | None = Field(default=None, max_length=500, pattern=r"^[^\x00]*$")


Many = Annotated[list[Given], Field(min_length=1, max_length=MOST_VERDICTS)]


def router(serving: Serving) -> APIRouter:
    """Needs the role infer."""
    found = APIRouter()

    @found.post(
        "/api/v2/feedback",
        status_code=202,
        summary='Verdicts on answers by their X-Request-ID: {"request_id", "verdict": "good" | "bad", "reason"?}, or a list of them',
    )
    async def feedback(request: Request, given: Given | Many) -> JSONResponse:
        verdicts, unknown = [], []
        key_id = who_of(request).key_id
        for one in given if isinstance(given, list) else [given]:
            verdict = _verdict(serving, one, key_id)
            if isinstance(verdict, str):
                unknown.append({"request_id": one.request_id, "reason": verdict})
            else:
                verdicts.append(verdict)
        if not verdicts:
            text = "; ".join(f"{one['request_id']}: {one['reason']}" for one in unknown[:5])
            return JSONResponse({"error": text, "unknown": unknown}, status_code=404)
        try:
            serving.feedback.put(verdicts)
        except InboxFullError as error:
            return JSONResponse({"error": str(error)}, status_code=429, headers={"retry-after": "1"})
        answer: dict[str, Any] = {"accepted": len(verdicts)}
        if unknown:
            answer["unknown"] = unknown
        return JSONResponse(answer, status_code=202)

    return found


def _verdict(serving: Serving, given: Given, key_id: str | None) -> Verdict | str:
    """The verdict with the version that it is on, or why that cannot be told."""
    bad = given.verdict == "bad"
    answered = serving.remembered.get(given.request_id)
    if answered is not None:
        return Verdict(
            given.request_id,
            answered.version,
            answered.generation,
            bad,
            model=answered.model,
            epoch=answered.epoch,
            reason=given.reason,
            key_id=key_id,
        )
    parsed = request_ids.parse(given.request_id)
    if parsed is None:
        return (
            "no server made this id, and this one did not answer a request of that id lately while its model was watched; post it "
            "to the server that answered, or leave X-Request-ID out and use the id of the answer"
        )
    if parsed.generation == 0:
        return "this request was not given to a version by a route, so no promotion can count it"
    return Verdict(given.request_id, parsed.version, parsed.generation, bad, reason=given.reason, key_id=key_id)
