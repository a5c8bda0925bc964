"""No body beyond the limit reaches the pages: refused by what it declares, or as soon as it is longer. The V2 protocol looks for itself."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BoundedBodies:
    """An ASGI application in front of another. What is too long is answered 413, with the limit."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self.app, self.limit_bytes = app, limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit, size = self.limit_bytes, 0
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if declared.isdigit() and int(declared) > limit:
            said = {"error": f"the body has {int(declared)} bytes, the limit is {limit}"}
            await JSONResponse(said, status_code=413)(scope, receive, send)
            return

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise HTTPException(413, f"the body is longer than the limit of {limit} bytes")
            return message

        await self.app(scope, bounded, send)
