"""The HTTP face of the server: the V2 protocol as plain ASGI, since FastAPI would halve its rate; FastAPI for the rest.

Statuses: 400 the request is wrong, 404 no such model or version, 405, 413 and 415 as usual, 422 an answer that JSON
cannot carry, 429 too many requests at once, 500 the model failed, 501 not built yet, 503 not loaded, 504 out of time.
504 and not 408, which says that the client was slow and makes some send again at once; a request that ran out of time
is the version's error.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import orjson
from fastapi import APIRouter, FastAPI
from starlette.types import Receive, Scope, Send

from registry.errors import (
    ModelkeepError,
    NotFoundError,
    UnavailableError,
)
from serving import request_ids, shadow
from serving.bodies import BoundedBodies
from serving.engine import LoadedVersion, Work
from serving.metrics import software_version
from serving.pages import create_pages
from serving.protocol import LINGER_SECONDS
from serving.routing import Route
from serving.state import Serving
from serving.statuses import BusyError, ClientGoneError, DeadlineError, MethodError, NotYetError, status_of
from serving.v2 import InputError, OutputError, inflate

logger = logging.getLogger(__name__)

WATCH_AFTER_SECONDS = 0.05
"""A request that waits longer than this is looked after: is its client still there, has it run out of time?"""

_JSON = (b"content-type", b"application/json")
_OCTETS = (b"content-type", b"application/octet-stream")
_RETRY_AFTER = (b"retry-after", b"1")
_EXTENSIONS = ["binary_tensor_data", "model_repository", "model_configuration", "statistics"]


class _ServerLimits(Protocol):
    @property
    def request_timeout_seconds(self) -> float: ...
    @property
    def max_body_bytes(self) -> int: ...


class _PerformanceLimits(Protocol):
    @property
    def max_concurrent_requests(self) -> int: ...


class Limits(Protocol):
    """What the API needs of the settings."""

    @property
    def server(self) -> _ServerLimits: ...
    @property
    def performance(self) -> _PerformanceLimits: ...


def create_app(
    serving: Serving,
    *,
    settings: Limits,
    nudge: Callable[[], Awaitable[dict[str, Any]]],
    info: Callable[[], dict[str, Any]],
    routers: Sequence[APIRouter] = (),
) -> Application:
    """The ASGI application. `nudge` makes the server follow the registry now; `info` says what it serves."""
    pages = create_pages(serving, nudge=nudge, info=info, routers=routers)
    return Application(V2(serving, settings), pages, max_body_bytes=settings.server.max_body_bytes)


def freeze_startup_objects() -> None:
    """Take everything that exists now out of the garbage collector's sight. Call once, when the server is built.

    A full collection walks all that the imported packages have made (60,000 containers) while every request waits: it
    was the p99 of 50 ms at 64 connections, which is 8 ms without. What is created later is collected as ever.
    """
    gc.collect()
    gc.freeze()


class Application:
    """V2 paths to the protocol, everything else to FastAPI."""

    def __init__(self, v2: V2, pages: FastAPI, *, max_body_bytes: int) -> None:
        self.v2 = v2
        self.pages = pages
        self._bounded = BoundedBodies(pages, max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path: str = scope["path"]
            if path.startswith("/v2") and path[3:4] in ("", "/"):
                await self.v2(scope, receive, send)
                return
        await self._bounded(scope, receive, send)


class _Waiting:
    """A request that waits for its version."""

    __slots__ = ("loaded", "receive", "watcher", "work")

    def __init__(self, work: Work, loaded: LoadedVersion, receive: Receive) -> None:
        self.work = work
        self.loaded = loaded
        self.receive = receive
        self.watcher: asyncio.Task[None] | None = None


class V2:
    """The V2 protocol's endpoints as an ASGI application."""

    def __init__(self, serving: Serving, settings: Limits) -> None:
        self._serving = serving
        self._timeout_seconds = settings.server.request_timeout_seconds
        self._max_body_bytes = settings.server.max_body_bytes
        self._max_concurrent = settings.performance.max_concurrent_requests
        self._id_prefix = request_ids.prefix(serving.replica_id, serving.boot_id)
        self._ids = itertools.count(1)
        self._waiting: set[_Waiting] = set()
        self._turns: deque[asyncio.Future[None]] = deque()
        self._sweeping = False
        self._software_version = software_version()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = scope["path"].rstrip("/").split("/")
        method = scope["method"]
        # Inference first: everything else can afford to be looked for.
        if method == "POST" and parts[-1] == "infer" and len(parts) in (5, 7) and parts[2] == "models":
            if len(parts) == 5:
                await self._infer(scope, receive, send, parts[3], None)
                return
            if parts[4] == "versions":
                await self._infer(scope, receive, send, parts[3], parts[5])
                return
        try:
            answer = self._describe(method, scope["path"], parts[2:])
        except ModelkeepError as error:
            await self._send_error(send, status_of(error), error, [])
            return
        body = b"" if answer is None else orjson.dumps(answer)
        await _send(send, 200, body, [_JSON])

    # Inference

    async def _infer(self, scope: Scope, receive: Receive, send: Send, model: str, version: str | None) -> None:
        serving = self._serving
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id")
        if given is not None and not _is_plain(given):
            given = None
        number = next(self._ids)
        named = [(b"x-request-id", given or self._id_prefix + b"0.-.%d" % number)]
        if serving.in_flight < self._max_concurrent:
            serving.in_flight += 1
        elif not (serving.catching_up and await self._turn()):
            serving.unrouted(429)
            busy = BusyError(f"the server has {self._max_concurrent} requests in flight, its limit; try again later")
            await self._send_error(send, 429, busy, named)
            return
        loaded: LoadedVersion | None = None
        try:
            body = await self._body(headers, receive)
            loaded, route, mark = serving.admit(model, version, headers.get(b"x-route-key"))
            if route is not None:
                if given is None:
                    named[0] = (b"x-request-id", self._named_by(loaded, route, number))
                elif route.watch:
                    serving.remembered.add(given, model, loaded.version, serving.epoch, route.generation)
            named.append((b"x-model-version", loaded.version_header))
            try:
                request = loaded.codec.decode(body, _header_length(headers))
                work = loaded.submit(request.inputs, request.outputs, route, mark)
                await self._wait(work, loaded, receive)
                try:
                    answer, header_length = loaded.codec.encode(
                        model, loaded.version, request, work.answer, _times(work)
                    )
                except OutputError:
                    loaded.count_output_error(work)
                    raise
            finally:
                loaded.release()
        except ClientGoneError:
            self._count(loaded, 499)
            return
        except ModelkeepError as error:
            status = status_of(error)
            self._count(loaded, status)
            await self._send_error(send, status, error, named, unread=receive if status == 413 else None)
            return
        except Exception:
            # A fault of this server, not of the model: the client learns no more than that, the log has it all.
            logger.exception("an inference request failed inside the server")
            self._count(loaded, 500)
            await self._send_error(send, 500, ModelkeepError("internal error of the server; see its log"), named)
            return
        finally:
            self._leave()
        loaded.telemetry.answered(200)
        if header_length is None:
            named.append(_JSON)
        else:
            named += (_OCTETS, (b"inference-header-content-length", b"%d" % header_length))
        await _send(send, 200, answer, named)
        if route is None or loaded.version != route.stable:
            return
        if serving.capture is not None and serving.capture.wants():
            serving.capture.offer(loaded.model, body, _header_length(headers))
        if route.shadow and route.candidate is not None:
            candidate = serving.loaded.get((model, route.candidate))
            if candidate is not None and (route.shadow_share >= 1 or serving.random() < route.shadow_share):
                shadow.offer(route, loaded, candidate, request.inputs, request.outputs, work.answer)

    def _named_by(self, loaded: LoadedVersion, route: Route, number: int) -> bytes:
        """The id of a request that a route gave to a version: any server can tell from it where its verdict belongs."""
        generation, named = loaded.id_part
        if generation != route.generation:
            named = b"%d.%s." % (route.generation, request_ids.quoted(loaded.version))
            loaded.id_part = (route.generation, named)
        return self._id_prefix + named + b"%d" % number

    async def _turn(self) -> bool:
        """Wait for the place of a request that ends. False where none came free within a request's time."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await turn
        except TimeoutError:
            return not turn.cancelled()  # it may have come in the same moment
        return True

    def _leave(self) -> None:
        """Give the place to whoever waits for one, else give it back."""
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._serving.in_flight -= 1

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The body, unpacked. Raises InputError as soon as it is too long, whatever the client still sends."""
        limit = self._max_body_bytes
        declared = headers.get(b"content-length")
        if declared is not None and int(declared) > limit:
            raise InputError(f"the body has {int(declared)} bytes, the limit is {limit}", status=413)
        message = await receive()
        body: bytes = message.get("body", b"")
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client went while it was sending")
        if message.get("more_body"):
            chunks = [body]
            size = len(body)
            while message.get("more_body"):
                if size > limit:
                    break
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError("the client went while it was sending")
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
            body = b"".join(chunks)
        if len(body) > limit:
            raise InputError(f"the body is longer than the limit of {limit} bytes", status=413)
        encoding = headers.get(b"content-encoding")
        if encoding is not None and encoding != b"identity":
            return inflate(body, encoding.decode("latin-1").strip().lower(), limit)
        return body

    async def _wait(self, work: Work, loaded: LoadedVersion, receive: Receive) -> None:
        """Until the version has answered. Raises ModelError, DeadlineError, ClientGoneError, UnavailableError."""
        waiting = _Waiting(work, loaded, receive)
        self._waiting.add(waiting)
        if not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, self._sweep)
        try:
            await work.future
        finally:
            self._waiting.discard(waiting)
            if waiting.watcher is not None:
                waiting.watcher.cancel()

    def _sweep(self) -> None:
        """One timer for all requests: a timer or a task for each would cost more than the rest of the dispatch."""
        now = time.perf_counter()
        for waiting in tuple(self._waiting):
            waited = now - waiting.work.enqueued
            if waited > self._timeout_seconds:
                loaded = waiting.loaded
                who = f"model '{loaded.model}' version '{loaded.version}'"
                error = DeadlineError(f"{who} did not answer within {self._timeout_seconds:g} seconds")
                loaded.withdraw(waiting.work, error, count_as_error=True)
            elif waiting.watcher is None and waited > WATCH_AFTER_SECONDS / 2:
                waiting.watcher = asyncio.create_task(self._watch(waiting))
        self._sweeping = bool(self._waiting)
        if self._sweeping:
            asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, self._sweep)

    async def _watch(self, waiting: _Waiting) -> None:
        message = await waiting.receive()
        if message["type"] == "http.disconnect":
            waiting.loaded.withdraw(waiting.work, ClientGoneError("the client went"), count_as_error=False)

    def _count(self, loaded: LoadedVersion | None, status: int) -> None:
        if loaded is None:
            self._serving.unrouted(status)
        else:
            loaded.telemetry.answered(status)

    async def _send_error(
        self,
        send: Send,
        status: int,
        error: ModelkeepError,
        headers: list[tuple[bytes, bytes]],
        unread: Receive | None = None,
    ) -> None:
        headers = [*headers, _JSON]
        if status == 429:
            headers.append(_RETRY_AFTER)
        if isinstance(error, MethodError):
            headers.append((b"allow", error.allowed.encode()))
        body = orjson.dumps({"error": str(error)})
        if unread is None:
            await _send(send, status, body, headers)
            return
        # Closing with bytes unread would reset the connection, and the client might never see the answer: let the rest
        # come and throw it away for a while.
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (await unread()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})

    # Everything that is asked with little and answered at once

    def _describe(self, method: str, path: str, parts: list[str]) -> Any:
        """The JSON answer, None for an empty one. `parts` are those of the path behind /v2."""
        serving = self._serving
        match parts:
            case []:
                _only(path, method, "GET")
                return {"name": "modelkeep", "version": self._software_version, "extensions": _EXTENSIONS}
            case ["health", "live"]:
                _only(path, method, "GET")
                if not serving.live:
                    raise UnavailableError("the server is not live")
                return None
            case ["health", "ready"]:
                _only(path, method, "GET")
                if not serving.ready:
                    raise UnavailableError("the server is not ready for traffic")
                return None
            case ["repository", "index"]:
                _only(path, method, "POST")
                return [
                    {"name": model, "version": version, "state": "READY", "reason": ""}
                    for model, version in sorted(serving.loaded)
                ]
            case ["repository", "models", _, "load" | "unload" as action]:
                _only(path, method, "POST")
                raise NotYetError(
                    f"{action} by the V2 protocol is not available yet; what is loaded follows the registry "
                    f"(modelkeep promote)"
                )
            case ["models", model, "versions", version, *rest]:
                return self._describe_model(method, path, model, version, rest)
            case ["models", "stats"]:
                _only(path, method, "GET")
                return {"model_stats": [_statistics(loaded) for _, loaded in sorted(serving.loaded.items())]}
            case ["models", model, *rest]:
                return self._describe_model(method, path, model, None, rest)
        raise NotFoundError(f"{path} is not a path of the V2 protocol")

    def _describe_model(self, method: str, path: str, model: str, version: str | None, rest: list[str]) -> Any:
        serving = self._serving
        if rest == ["infer"]:
            _only(path, method, "POST")
        if rest not in ([], ["ready"], ["config"], ["stats"]):
            raise NotFoundError(f"{path} is not a path of the V2 protocol")
        _only(path, method, "GET")
        if rest == ["stats"]:
            return {"model_stats": [_statistics(loaded) for loaded in serving.versions(model, version)]}
        loaded = serving.default_version(model) if version is None else serving.versions(model, version)[0]
        if rest == ["ready"]:
            route = serving.routes.get(model)
            if version is None and (route is None or (model, route.stable or route.candidate) not in serving.loaded):
                raise UnavailableError(f"model '{model}' has no version in traffic that is loaded")
            return None
        return _metadata(loaded, serving.versions(model)) if not rest else _config(loaded)


def _metadata(loaded: LoadedVersion, versions: list[LoadedVersion]) -> dict[str, Any]:
    return {
        "name": loaded.model,
        "versions": [other.version for other in versions],
        "platform": loaded.runtime.platform,
        **loaded.runtime.signature.as_dict(),
    }


def _config(loaded: LoadedVersion) -> dict[str, Any]:
    """The model configuration as Triton words it: with batching, the dimensions leave the batch's out."""
    first = 1 if loaded.batching else 0

    def tensors(specs: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "data_type": "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}",
                "dims": list(spec.shape[first:]),
            }
            for spec in specs
        ]

    signature = loaded.runtime.signature
    return {
        "name": loaded.model,
        "platform": loaded.runtime.platform,
        "max_batch_size": loaded.max_batch if loaded.batching else 0,
        "input": tensors(signature.inputs),
        "output": tensors(signature.outputs),
    }


def _statistics(loaded: LoadedVersion) -> dict[str, Any]:
    """Cumulative figures in the words of Triton's statistics extension: counts and nanoseconds."""
    telemetry, total = loaded.telemetry, loaded.telemetry.total
    last = telemetry.last_inference_unix_seconds

    def part(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": int(seconds * 1e9)}

    return {
        "name": loaded.model,
        "version": loaded.version,
        "last_inference": 0 if last is None else int(last * 1000),
        "inference_count": telemetry.rows,
        "execution_count": telemetry.batches,
        "inference_stats": {
            "success": {"count": total.requests - total.errors},
            "fail": {"count": total.errors},
            "request": part(total.requests, total.latency_seconds_total),
            "queue": part(total.requests, telemetry.queue_seconds),
            "compute_infer": part(total.requests, telemetry.model_seconds),
        },
    }


def _times(work: Work) -> dict[str, float]:
    return {"queue_seconds": round(work.queue_seconds, 6), "model_seconds": round(work.model_seconds, 6)}


def _header_length(headers: dict[bytes, bytes]) -> int | None:
    value = headers.get(b"inference-header-content-length")
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        shown = value[:40].decode("latin-1")
        raise InputError(f"Inference-Header-Content-Length must be a number of bytes, it is {shown!r}")
    return int(value)


def _is_plain(request_id: bytes) -> bool:
    return 0 < len(request_id) <= 128 and request_id.isascii() and request_id.decode("ascii").isprintable()


def _only(path: str, method: str, allowed: str) -> None:
    if method != allowed and not (method == "HEAD" and allowed == "GET"):
        raise MethodError(path, method, allowed)


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
