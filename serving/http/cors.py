"""Pages of other origins: those that the settings name may call the API from a browser, nobody else. Not in the way where none is named."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = b"GET, HEAD, POST, DELETE"
EXPOSED = (
    b"X-Request-ID, X-Response-Time, X-Model-Version, Inference-Header-Content-Length, Retry-After, "
    b"RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset"
)
"""What a page's script may read of an answer, beside what browsers show anyhow."""
MAX_AGE_SECONDS = 600
_VARY = (b"vary", b"Origin")
_TOKENS = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~,\t -]{0,1024}")
_ANY = "*"


class Cors:
    """An ASGI application in front of the guard: a browser asks first, without a key, whether it may ask with one.

    Keys travel in headers that a page's script sets; cookies and what a browser adds by itself (credentials) are not allowed.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self.app = app
        self._any = _ANY in origins
        self._origins = frozenset(origin.lower().encode("latin-1", "replace") for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        origin = wanted = asked = None
        for name, value in scope["headers"]:
            if name == b"origin":
                origin = value
            elif name == b"access-control-request-method":
                wanted = value
            elif name == b"access-control-request-headers":
                asked = value
        allowed = origin is not None and (self._any or origin.lower() in self._origins)
        if scope["method"] == "OPTIONS" and origin is not None and wanted is not None:
            await self._preflight(send, origin if allowed else None, asked)
            return
        added = [_VARY]
        if allowed and origin is not None:
            added += [self._allowed(origin), (b"access-control-expose-headers", EXPOSED)]

        def sending(message: Message) -> Any:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *added]
            return send(message)

        await self.app(scope, receive, sending)

    def _allowed(self, origin: bytes) -> tuple[bytes, bytes]:
        return (b"access-control-allow-origin", b"*" if self._any else origin)

    async def _preflight(self, send: Send, origin: bytes | None, asked: bytes | None) -> None:
        if origin is None:
            body = orjson.dumps({"error": "pages of this origin may not call this server: see security.cors_origins"})
            headers = [_VARY, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        headers = [
            _VARY,
            (b"vary", b"Access-Control-Request-Method, Access-Control-Request-Headers"),
            self._allowed(origin),
            (b"access-control-allow-methods", METHODS),
            (b"access-control-max-age", b"%d" % MAX_AGE_SECONDS),
        ]
        if asked is not None and _TOKENS.fullmatch(asked):
            headers.append((b"access-control-allow-headers", asked))
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
