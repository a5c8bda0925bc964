"""Bodies that come in: none beyond the limits reaches the pages, neither a long one nor JSON that is nested too deep; and those of
inference requests, which have no place until they are there.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access.places import Place, Places
from serving.http.depth import PAGES, is_deeper
from serving.statuses import ClientGoneError
from serving.wire.tensors import InputError

_NO_JSON = (
    b"multipart/",
    b"image/",
    b"audio/",
    b"video/",
    b"application/octet-stream",
    b"application/x-www-form-urlencoded",
)


Enter = Callable[[Receive], Awaitable[Place]]
"""Gives a request its place; told how to learn that its client goes."""

INSTANT_SECONDS = 0.001
"""What takes no longer was not waited for."""


class Uploads:
    """Bodies of inference requests that come in more than one piece. Who sends slowly holds no place of others meanwhile, as long as
    all such bodies together take no more than `most_bytes`; beyond that a request takes its place while it is still sending.
    """

    def __init__(self, places: Places, most_bytes: int) -> None:
        self.places, self.most_bytes = places, most_bytes
        self.count = 0
        self.bytes = 0
        """Of those that have no place."""

    async def receive(self, first: Message, receive: Receive, limit: int, enter: Enter) -> tuple[bytes, Place, float]:
        """The whole body, of which `first` was the first piece; the place of its request, which the caller gives back; and how many seconds
        it waited for that place with its body whole.

        Raises InputError as soon as it is longer than `limit` bytes, ClientGoneError, and what `enter` does.
        """
        body, message, place = bytearray(), first, None
        kept: list[Message] = []

        async def watched() -> Message:
            message = await receive()
            if message["type"] != "http.disconnect":
                kept.append(message)
            return message

        counted = 0
        self.count += 1
        try:
            while True:
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_long(limit, unread=bool(message.get("more_body")))
                if place is None:
                    self.bytes += len(body) - counted
                    counted = len(body)
                if not message.get("more_body"):
                    break
                if place is None and self.bytes > self.most_bytes:
                    place = await enter(watched)
                    self.bytes, counted = self.bytes - counted, 0
                message = kept.pop(0) if kept else await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError("the client went while it was sending")
            began = time.perf_counter()
            if place is None:
                place = await enter(receive)
            waited = time.perf_counter() - began
            return bytes(body), place, waited if waited > INSTANT_SECONDS else 0.0
        except BaseException:
            if place is not None:
                self.places.leave(place)
            raise
        finally:
            self.bytes -= counted
            self.count -= 1


def too_long(limit: int, *, unread: bool) -> InputError:
    """`unread`: more of it may be on its way."""
    return InputError(f"the body is longer than the limit of {limit} bytes", status=413, unread=unread)


class BoundedBodies:
    """An ASGI application in front of another. What is too long is answered 413 with the limit, by what it declares or as soon as it
    is longer; JSON that is nested too deep 400; 503 where bodies that are still coming would take more than `most_bytes` together.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int, *, depth: int = PAGES, most_bytes: int | None = None) -> None:
        self.app, self.limit_bytes, self.depth = app, limit_bytes, depth
        self.most_bytes = most_bytes
        self.bytes = 0
        """Of bodies that are still coming."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit, size, held = self.limit_bytes, 0, 0
        declared = kind = b""
        for name, value in scope["headers"]:
            if name == b"content-length":
                declared = value
            elif name == b"content-type":
                kind = value.lower()
        if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
            said = {"error": f"the body has {declared[:30].decode()} bytes, the limit is {limit}"}
            await JSONResponse(said, status_code=413)(scope, receive, send)
            return
        whole = kind.startswith(_NO_JSON)  # whether it may go on in parts

        async def counted() -> Message:
            nonlocal size, held
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise HTTPException(413, f"the body is longer than the limit of {limit} bytes")
            now = size if message.get("more_body") else 0
            self.bytes, held = self.bytes + now - held, now
            if self.most_bytes is not None and self.most_bytes < self.bytes != held:  # one alone may always come
                raise HTTPException(
                    503,
                    f"bodies of {self.bytes - held} bytes are still coming in, and all together may have "
                    f"{self.most_bytes}; try again later",
                    {"Retry-After": "1"},
                )
            return message

        async def bounded() -> Message:
            nonlocal whole
            message = await counted()
            if whole:
                return message
            chunks = [message.get("body", b"")]
            while message["type"] == "http.request" and message.get("more_body"):
                message = await counted()
                chunks.append(message.get("body", b""))
            whole = True
            if message["type"] != "http.request":
                return message
            body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            if is_deeper(body, self.depth):
                raise HTTPException(400, f"the JSON of the request is nested deeper than {self.depth} levels")
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self.app(scope, bounded, send)
        finally:
            self.bytes -= held
