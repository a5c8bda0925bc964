"""The head of a request that a connection brings again and again: who keeps a connection mostly sends the same one, and it is read once.

What follows from a head alone is kept beside it, in the scope's `memo`, by those who found it out (`by_name`, the guard). Whether a key
is still good, or has requests left, does not follow from a head.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

if TYPE_CHECKING:
    from starlette.types import Scope
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

WHOLE = "whole"
"""In the message that begins an answer: its body, in the place of a message of its own. Where the scope has a memo, and the headers say
the length.
"""
AT_ONCE = "at_once"
"""In a memo: whether the last such request was answered from memory. Then the next one begins without a task, and gets one where it has to
wait; what needs one before that asks for it (`in_a_task`). One that is computed is slower so: batches become smaller.
"""
_LONGEST_BYTES = 4096
"""Of a head that is kept: every connection may have one."""
_END = b"\r\n\r\n"


class Head:
    """One that was read. `app` is what answers it, `size` its bytes and those of the body that belongs to it."""

    __slots__ = ("app", "raw", "scope", "size", "url")

    def __init__(self, raw: bytes, size: int, url: bytes, scope: Scope, app: Any) -> None:
        self.raw, self.size, self.url, self.app = raw, size, url, app
        self.scope = {**scope, "memo": {}}


def raw_of(data: bytes) -> bytes | None:
    """The head at the begin of what came in; None where that has no end, or is too long to be kept."""
    end = data.find(_END, 0, _LONGEST_BYTES)
    return None if end < 0 else data[: end + len(_END)]


def head_of(raw: bytes, data: bytes, url: bytes, cycle: RequestResponseCycle, app: Any) -> Head | None:
    """For the next requests like `data`, of which `cycle` is what the parser made. None for all but a whole plain request of HTTP/1.1: what
    belongs to it must follow from its head.
    """
    scope: Scope = cycle.scope  # type: ignore[assignment]
    if not cycle.keep_alive or scope["http_version"] != "1.1" or cycle.waiting_for_100_continue:
        return None
    if len(cycle.body) > HIGH_WATER_LIMIT or cycle.more_body or cycle.body != data[len(raw) :]:
        return None
    if any(name in (b"transfer-encoding", b"upgrade") for name, _ in scope["headers"]):
        return None
    return Head(raw, len(data), url, scope, app)


async def in_a_task() -> None:
    """Before what asyncio does for tasks only (its time-outs): a request that was begun without one gets it here."""
    if asyncio.current_task() is None:
        await asyncio.sleep(0)


def by_name(scope: Scope) -> dict[bytes, bytes]:
    """The headers of a request by name, of several of one name the last. Not to be changed."""
    memo = scope.get("memo")
    if memo is None:
        return dict(scope["headers"])
    found: dict[bytes, bytes] | None = memo.get("by_name")
    if found is None:
        found = memo["by_name"] = dict(scope["headers"])
    return found
