"""No body beyond the limits reaches the pages: neither a long one nor JSON that is nested too deep. The V2 protocol looks for itself."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.depth import PAGES, is_deeper

_NO_JSON = (
    b"multipart/",
    b"image/",
    b"audio/",
    b"video/",
    b"application/octet-stream",
    b"application/x-www-form-urlencoded",
)


class BoundedBodies:
    """An ASGI application in front of another. What is too long is answered 413 with the limit, by what it declares or as soon as it
    is longer; JSON that is nested too deep 400.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int, *, depth: int = PAGES) -> None:
        self.app, self.limit_bytes, self.depth = app, limit_bytes, depth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit, size = self.limit_bytes, 0
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
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise HTTPException(413, f"the body is longer than the limit of {limit} bytes")
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

        await self.app(scope, bounded, send)
