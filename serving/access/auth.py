"""Who asks, and whether he may: the guard in front of everything that this server answers. The keys that it knows are serving.access.keyring."""

from __future__ import annotations

import base64
import binascii
import functools
import ipaddress
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry import keys
from registry.actor import Who
from registry.keys import INTERNAL, PREFIX, Failure, Principal, Role
from registry.redaction import redact
from serving.access.keyring import Keyring, mark_of
from serving.access.rates import Limiter
from serving.statuses import error_body

log = logging.getLogger("modelkeep.auth")

ANONYMOUS = Who("anonymous", via="api")

OPEN = frozenset({"/", "/health", "/v2/health/live", "/v2/health/ready", "/favicon.ico"})
"""What anybody may read: load balancers have no keys."""
_UNCHECKED = OPEN - {"/"}
_FEEDBACK = "/api/v2/feedback"
_NUDGE = "/api/v2/update-models"
_CAPTURED = "/api/v2/captured/"
_INDEX = "/v2/repository/index"
_TEXTS = ("/v1/generate", "/v1/completions")
_TEXT_MODELS = "/v1/models"
_LONGEST_KEY = 256
_LOG_EVERY_SECONDS = 10.0
_READING = ("GET", "HEAD", "OPTIONS")
_FORWARDED = frozenset(
    {b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip", b"forwarded", b"via"}
)
"""What proxies add. Any of them may be there several times."""
_LOOKED_AT = frozenset({b"authorization", b"x-api-key", b"host", b"origin"}) | _FORWARDED
_POLICY_VIOLATION = 1008

_FAILURES: dict[Failure, str] = {
    "wrong": "the API key is not known here, or is mistyped",
    "revoked": "the API key was revoked",
    "expired": "the API key has expired",
}


def who_of(request: Request) -> Who:
    """The author of a request, as the guard in front of all pages found him."""
    found = request.scope.get("state", {}).get("who")
    return found if isinstance(found, Who) else ANONYMOUS


def role_of(request: Request) -> Role | None:
    """What the author may do; None where the path is open to anybody and he showed no key. All of it where no guard stands in front."""
    role: Role | None = request.scope.get("state", {}).get("role", "operate")
    return role


@functools.lru_cache(maxsize=1024)
def role_needed(method: str, path: str) -> Role | None:
    """The role for a path; None where it is open. What nobody thought of needs the most.

    `path` is what the pages go by too: decoded once, neither folded nor lowered, so that both read the same.
    """
    if (method == "POST" and path in _TEXTS) or (method in ("GET", "HEAD") and path.startswith(_TEXT_MODELS)):
        return "infer"
    if method == "POST":
        if path.startswith("/v2/models/") and path.rstrip("/").endswith("/infer"):
            return "infer"
        if path == _FEEDBACK:
            return "infer"
        return "view" if path.rstrip("/") == _INDEX else "operate"
    if path.startswith(_CAPTURED):
        return "operate"  # what clients sent
    if method in _READING:
        return None if path in OPEN and method != "OPTIONS" else "view"
    return "operate"


@dataclass(frozen=True, slots=True)
class Rules:
    """Whom the guard lets in without a key. `local`: the socket cannot be reached from other machines."""

    local: bool
    require_keys: bool = False
    allow_unauthenticated: bool = False
    origins: tuple[str, ...] = ()
    aliases: frozenset[str] = frozenset()
    """Paths of applications, which are inference."""

    @property
    def open(self) -> bool:
        """Whether a request without a key may do everything."""
        return self.allow_unauthenticated or (self.local and not self.require_keys)


def is_local(name: Any) -> bool:
    """Whether a socket of this name (`getsockname()`) is reached from this machine only: loopback, or a path."""
    if not isinstance(name, tuple):
        return True
    return ipaddress.ip_address(str(name[0]).partition("%")[0]).is_loopback


class _Refusal(NamedTuple):
    status: int
    reason: str
    text: str
    """Never holds any part of a key."""


class _Malformed(Exception):
    """Headers that can be read in two ways."""


class Guard:
    """An ASGI application in front of another. Fills `scope["state"]` with `who` and `role`, or answers itself."""

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring,
        rules: Rules,
        *,
        failures: dict[str, int] | None = None,
        limiter: Limiter | None = None,
        template: Callable[[str], str] = str,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self.keyring, self.rules = app, keyring, rules
        self.failures = {} if failures is None else failures
        """Refused requests by reason, for /metrics."""
        self.limiter = limiter
        """Where keys have rates; `template` names a path for what it counts."""
        self._template = template
        self._open = rules.open
        self._aliases = rules.aliases
        self._local_only = rules.local and not rules.allow_unauthenticated
        self._monotonic = monotonic
        self._logged_at = float("-inf")
        self._unlogged = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self._judge(scope, "GET" if kind == "websocket" else scope["method"], kind)
        if refusal is None:
            if self.limiter is not None and (principal := scope["state"].pop("counted", None)) is not None:
                await self._limited(self.limiter, principal, scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return
        self._note(scope, refusal)
        if kind == "http":
            await _answer(send, refusal, path=scope["path"])
        else:
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": refusal.text[:120]})

    async def _limited(
        self, limiter: Limiter, principal: Principal, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Go on where the key's rate allows it, with what is left of it in the headers of the answer."""
        found = await limiter.take(principal)
        if found is None:
            await self.app(scope, receive, send)
            return
        headers = found.headers()
        if not found.allowed:
            limiter.count(principal, self._template(scope["path"]))
            seconds = found.retry_after
            text = (
                f"key {principal.name} may make {found.rate.count} inference requests in {found.rate.unit_seconds} s "
                f"({found.rate}), and has: try again in {seconds} s"
            )
            await _answer(
                send, _Refusal(429, "rate", text), (*headers, (b"retry-after", b"%d" % seconds)), path=scope["path"]
            )
            return

        def sending(message: Message) -> Any:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *headers]
            return send(message)

        await self.app(scope, receive, sending)

    def _judge(self, scope: Scope, method: str, kind: str) -> _Refusal | None:
        path: str = scope["path"]
        needed = role_needed(method, path)
        if self._aliases and method == "POST" and path in self._aliases:
            needed = "infer"
        if kind != "http":
            needed = "view"
        elif needed is None and path in _UNCHECKED:
            scope.setdefault("state", {})["role"] = None
            return None
        try:
            memo = scope.get("memo")
            known = None if memo is None else memo.get("guard")
            if known is None:
                read, mark = self._read(scope["headers"]), None
                if memo is not None:
                    memo["guard"] = read, None if read[0] is None else mark_of(read[0])
            else:
                read, mark = known
            text, by_browser, host, origin, forwarded = read
        except _Malformed as error:
            return _Refusal(400, "malformed", str(error))
        principal: Principal | None = None
        if text is not None:
            if self.keyring.seen is None:
                return _Refusal(
                    503, "unknown", "no key can be checked yet: the registry has not answered this server; try again"
                )
            found = self.keyring.check(text, mark)
            if not isinstance(found, Principal):
                return _Refusal(401, found, f"{_FAILURES[found]}; {_how(needed or 'view', self.keyring.empty)}")
            principal = found
        elif not self._open and needed is not None:
            return _Refusal(401, "missing", f"this server asks for an API key; {_how(needed, self.keyring.empty)}")
        elif forwarded and self._local_only and needed is not None and self._open:
            return _Refusal(
                401,
                "forwarded",
                "a proxy passes this request on, so it may come from anywhere: send an API key, and set "
                "MODELKEEP_SECURITY__REQUIRE_KEYS=true; where the proxy itself decides who may come in, set "
                "MODELKEEP_SECURITY__ALLOW_UNAUTHENTICATED=true",
            )
        elif self._open and self._local_only and not _names_this_machine(host):
            return _Refusal(
                403,
                "host",
                "without an API key this server answers under the names of this machine only (127.0.0.1, localhost): use one of them, "
                "or send a key; behind a proxy set MODELKEEP_SECURITY__REQUIRE_KEYS=true",
            )
        if (
            origin is not None
            and (principal is None or by_browser)
            and (method not in _READING or kind != "http")
            and not self._same(origin, host)
        ):
            return _Refusal(
                403,
                "origin",
                "a page of another origin may not do this: send an API key by header, or see security.cors_origins",
            )
        state: dict[str, Any] = scope.setdefault("state", {})
        if principal is None:
            trusted = self._open and not (forwarded and self._local_only)
            state["who"], state["role"] = ANONYMOUS, "operate" if trusted else None
            return None
        # A promotion of ours hurries the servers, and replays what they have captured.
        ours = principal.key_id == INTERNAL and (
            (method == "POST" and path == _NUDGE) or (method == "GET" and path.startswith(_CAPTURED))
        )
        if needed is not None and not ours and not keys.allows(principal.role, needed):
            return _Refusal(
                403,
                "role",
                f"key {principal.name} has role {principal.role}, this needs {needed}: modelkeep keys create NAME --role {needed}",
            )
        state["who"] = principal.asking
        state["role"] = principal.role
        if self.limiter is not None and needed == "infer" and method == "POST" and path != _FEEDBACK:
            state["counted"] = principal
        return None

    def _read(
        self, headers: Sequence[tuple[bytes, bytes]]
    ) -> tuple[str | None, bool, bytes | None, bytes | None, bool]:
        """The key, whether a browser may have added it by itself, Host and Origin, and whether a proxy passed the request on.

        Raises _Malformed where there are two of one.
        """
        seen: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in _LOOKED_AT:
                if name in seen and name not in _FORWARDED:
                    raise _Malformed(f"the request has more than one {name.decode()} header: send one")
                seen[name] = value
        if not seen:
            return None, False, None, None, False
        text, by_browser = None, False
        if (authorization := seen.get(b"authorization")) is not None:
            text, by_browser = self._credentials(authorization)
        if (header := seen.get(b"x-api-key")) is not None:
            other = header[: _LONGEST_KEY + 1].decode("latin-1").strip()
            if text is not None and text != other:
                raise _Malformed("the request has two different keys, in Authorization and X-API-Key: send one")
            text, by_browser = other, False
        if text is not None and self.rules.allow_unauthenticated and not text.startswith(PREFIX):
            text = None  # it is meant for what stands in front, which has let it in
        return text, by_browser, seen.get(b"host"), seen.get(b"origin"), not _FORWARDED.isdisjoint(seen)

    @staticmethod
    def _credentials(value: bytes) -> tuple[str, bool]:
        """The key in an Authorization header, and whether it came by Basic, which browsers send by themselves."""
        scheme, _, rest = value.partition(b" ")
        kind = scheme.lower()
        if kind == b"basic":
            try:
                decoded = base64.b64decode(rest.strip()[: 4 * _LONGEST_KEY], validate=True)
            except (binascii.Error, ValueError):
                decoded = b""
            text = decoded.partition(b":")[2][: _LONGEST_KEY + 1].decode("latin-1")
        else:
            text = rest[: _LONGEST_KEY + 1].decode("latin-1").strip() if kind == b"bearer" else ""
        return text, kind == b"basic"

    def _same(self, origin: bytes, host: bytes | None) -> bool:
        """Whether a page of this origin may act here."""
        text = origin.decode("latin-1").lower()
        if "*" in self.rules.origins or text in self.rules.origins:
            return True
        return host is not None and text.partition("://")[2] == host.decode("latin-1").lower()

    def _note(self, scope: Scope, refusal: _Refusal) -> None:
        """Count a refusal, and say so in the log, though not as often as somebody likes."""
        self.failures[refusal.reason] = self.failures.get(refusal.reason, 0) + 1
        self._unlogged += 1
        now = self._monotonic()
        if now - self._logged_at < _LOG_EVERY_SECONDS:
            return
        client = scope.get("client")
        log.warning(
            "refused (%s): %s %.200r from %s; %d refused since this was last said",
            refusal.reason,
            scope.get("method", scope["type"]),
            redact(scope["path"]),
            client[0] if client else "a local socket",
            self._unlogged,
        )
        self._logged_at, self._unlogged = now, 0


def _how(needed: Role, empty: bool) -> str:
    """The remedy."""
    none_yet = "no key exists yet: " if empty else ""
    return (
        f"send one of role {needed} as 'Authorization: Bearer mk_…' or 'X-API-Key: mk_…'; "
        f"{none_yet}make one with: modelkeep keys create NAME --role {needed}"
    )


@functools.lru_cache(maxsize=64)
def _names_this_machine(host: bytes | None) -> bool:
    """Whether a Host header means this machine. A page that had its own name point here (DNS rebinding) sends that name."""
    if host is None:  # no browser leaves it out
        return True
    text = host.decode("latin-1").lower()
    name = text[1:].partition("]")[0] if text.startswith("[") and "]" in text else text.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _answer(send: Send, refusal: _Refusal, more: Sequence[tuple[bytes, bytes]] = (), *, path: str) -> None:
    body = orjson.dumps(error_body(path, refusal.status, refusal.text))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *more]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="modelkeep"'))
    elif refusal.status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
