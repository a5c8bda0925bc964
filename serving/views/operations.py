"""Promotions over the server's API: read them, approve or reject, tell one to pause, go on, advance or stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator

from registry.database import Database
from registry.errors import UnavailableError
from serving.access.auth import who_of
from serving.statuses import BusyError

T = TypeVar("T")

ANSWER_SECONDS = 10.0
"""How long the registry is waited for."""
_AT_A_TIME = 2
_WAITING = 16
_LONGEST_TEXT = 2000

Verdict = Literal["approve", "reject"]
Command = Literal["pause", "resume", "advance", "stop"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if isinstance(value, str) and any(ord(letter) < 32 and letter not in "\n\t" for letter in value):
            raise ValueError("holds control characters")
        return value


class Note(_Body):
    """What goes on record with an approval or a rejection."""

    note: str = Field("", max_length=_LONGEST_TEXT)
    seen: str | None = Field(
        None,
        max_length=64,
        description="The fingerprint of the question that is answered, where it was looked at before.",
    )


class Reason(_Body):
    """What goes on record with a command."""

    reason: str = Field("", max_length=_LONGEST_TEXT)


class RegistryThreads:
    """Runs what asks the registry beside the event loop, and waits for it only so long."""

    def __init__(self, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        self._answer_seconds = answer_seconds
        self._threads = ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="operations")
        self._busy = 0

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Raises UnavailableError where it takes too long, BusyError where too much waits already."""
        if self._busy >= _WAITING:
            raise BusyError(f"{self._busy} requests wait for the registry already; try again later")
        self._busy += 1
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        running.add_done_callback(self._done)
        try:
            return await asyncio.wait_for(asyncio.shield(running), self._answer_seconds)
        except TimeoutError:
            raise UnavailableError(
                f"the registry did not answer within {self._answer_seconds:g} s: look what is on record before you try again"
            ) from None

    def _done(self, running: asyncio.Future[Any]) -> None:
        self._busy -= 1
        if not running.cancelled():
            running.exception()  # nobody waits for it any more, where it took too long


def router(database: Database, *, threads: RegistryThreads | None = None) -> APIRouter:
    """The endpoints. Who may use them is decided before, by serving.access.auth."""
    found = APIRouter(prefix="/api/v2/promotions")
    registry = RegistryThreads() if threads is None else threads

    @found.get("", summary="Promotions, the newest first")
    async def promotions_list(
        model: Annotated[str | None, Query(max_length=128)] = None,
        environment: Annotated[str | None, Query(max_length=128)] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
    ) -> dict[str, Any]:
        return {"promotions": await registry.run(partial(_listed, database, model, environment, limit))}

    @found.get("/{promotion}", summary="What one promotion decided, step by step, and what it waits for")
    async def promotions_show(promotion: str) -> dict[str, Any]:
        return await registry.run(partial(_shown, database, promotion))

    def answer(verdict: Verdict) -> Callable[..., Any]:
        async def give(request: Request, promotion: str, body: Note | None = None) -> dict[str, Any]:
            from registry import approvals

            said, who = body or Note(), who_of(request)
            return await registry.run(
                lambda: approvals.give(database, promotion, verdict=verdict, who=who, note=said.note, seen=said.seen)
            )

        return give

    def tell(command: Command) -> Callable[..., Any]:
        async def give(request: Request, promotion: str, body: Reason | None = None) -> dict[str, Any]:
            from registry import commands

            reason, who = (body or Reason()).reason, who_of(request)
            return await registry.run(
                lambda: commands.give(database, promotion, command=command, who=who, reason=reason)
            )

        return give

    verdicts: dict[Verdict, str] = {
        "approve": "Approve what waits for it",
        "reject": "Reject what waits for an approval",
    }
    for verdict, summary in verdicts.items():
        found.post(f"/{{promotion}}/{verdict}", summary=summary, name=verdict)(answer(verdict))
    orders: dict[Command, str] = {
        "pause": "Stay at this stage",
        "resume": "Go on after a pause",
        "advance": "Go to the next stage now",
        "stop": "Take the candidate out",
    }
    for command, summary in orders.items():
        found.post(f"/{{promotion}}/{command}", summary=summary, name=command)(tell(command))
    return found


def _listed(database: Database, model: str | None, environment: str | None, limit: int) -> list[dict[str, Any]]:
    from registry import stories

    with database.read() as session:
        return stories.listed(session, model=model, environment=environment, limit=limit)


def _shown(database: Database, promotion: str) -> dict[str, Any]:
    from registry import accounts

    with database.read() as session:
        return accounts.of(session, promotion)
