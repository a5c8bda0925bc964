"""The HTTP face of the server: the V2 protocol as plain ASGI, since FastAPI would halve its rate; FastAPI for the rest.

Statuses: 400 the request is wrong, 404 no such model or version, 405, 413 and 415 as usual, 422 an answer that JSON
cannot carry, 429 too many requests at once, 500 the model failed, 501 not built yet, 503 not loaded, 504 out of time.
504 and not 408, which says that the client was slow and makes some send again at once; a request that ran out of time
is the version's error.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import orjson
from fastapi import APIRouter, FastAPI
from starlette.types import Message, Receive, Scope, Send

from registry.aliases import Alias
from registry.errors import ModelkeepError
from serving.access.places import Place, key_of
from serving.admission import admitted
from serving.compute.engine import LoadedVersion
from serving.compute.waiting import Waits
from serving.compute.work import Work, cached_by
from serving.http import request_ids
from serving.http.bodies import INSTANT_SECONDS, BoundedBodies, too_long
from serving.http.compression import WORTH_BYTES, inflate, packed
from serving.http.heads import AT_ONCE, WHOLE, by_name, in_a_task
from serving.http.protocol import LINGER_SECONDS
from serving.state import Serving
from serving.statuses import BusyError, ClientGoneError, MethodError, kind_of, status_of
from serving.traffic import shadow
from serving.traffic.routing import Route
from serving.views.backup_metrics import BackupMetrics
from serving.views.descriptions import describe
from serving.views.pages import create_pages
from serving.wire.aliases import Aliases, Translator
from serving.wire.classification import INLINE_ELEMENTS
from serving.wire.tensors import InputError, OutputError
from serving.wire.v2 import InferRequest

logger = logging.getLogger(__name__)

_JSON = (b"content-type", b"application/json")
_OCTETS = (b"content-type", b"application/octet-stream")
_RETRY_AFTER = (b"retry-after", b"1")
_VARY = (b"vary", b"accept-encoding")


class _ServerLimits(Protocol):
    @property
    def request_timeout_seconds(self) -> float: ...
    @property
    def max_body_bytes(self) -> int: ...
    @property
    def max_receiving_mb(self) -> int: ...


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
    aliases: Sequence[Alias] = (),
    backups: BackupMetrics | None = None,
) -> Application:
    """The ASGI application. `nudge` makes the server follow the registry now; `info` says what it serves."""
    own_paths = Aliases(aliases)
    pages = create_pages(serving, nudge=nudge, info=info, routers=routers, aliases=own_paths, backups=backups)
    limit = settings.server.max_body_bytes
    return Application(V2(serving, settings), pages, max_body_bytes=limit, aliases=own_paths.by_path)


class Application:
    """V2 paths and aliases to the protocol, everything else to FastAPI."""

    def __init__(self, v2: V2, pages: FastAPI, *, max_body_bytes: int, aliases: Mapping[str, Translator]) -> None:
        self.v2 = v2
        self.pages = pages
        self._aliases = aliases
        self._bounded = BoundedBodies(pages, max_body_bytes, most_bytes=v2.max_receiving_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path: str = scope["path"]
            # Inference first: everything else can afford to be looked for.
            if scope["method"] == "POST" and (named := inference_of(path)) is not None:
                await self.v2.infer(scope, receive, send, *named)
                return
            if path.startswith("/v2") and path[3:4] in ("", "/"):
                await self.v2(scope, receive, send)
                return
            if (alias := self._aliases.get(path)) is not None:
                await self.v2.infer_by(alias, scope, receive, send)
                return
            if scope["method"] == "HEAD":  # FastAPI answers it nowhere; who sends the answer leaves its body out
                scope = {**scope, "method": "GET"}
        await self._bounded(scope, receive, send)


class _Asked:
    """An inference request that has its version."""

    __slots__ = ("key", "mark", "model", "receive", "route", "scope", "spent")

    def __init__(
        self,
        model: str,
        scope: Scope,
        receive: Receive,
        key: str,
        route: Route | None,
        mark: int | None,
        spent: float,
    ) -> None:
        self.model = model
        self.scope = scope
        self.receive = receive
        self.key = key
        self.route = route
        self.mark = mark
        self.spent = spent


MOST_OF_OTHERS_BYTES = 1 << 16
"""Of a body that is no inference: nothing bounds all of them together."""


class V2:
    """The V2 protocol's endpoints as an ASGI application."""

    def __init__(self, serving: Serving, settings: Limits) -> None:
        self._serving = serving
        self._timeout_seconds = settings.server.request_timeout_seconds
        self._max_body_bytes = settings.server.max_body_bytes
        most = settings.performance.max_concurrent_requests
        serving.places.resize(most)
        self.max_receiving_bytes = serving.uploads.most_bytes = settings.server.max_receiving_mb << 20
        serving.gate.most_waiting = self._most_waiting
        self._id_prefix = request_ids.prefix(serving.replica_id, serving.boot_id)
        self._ids = itertools.count(1)
        self._waits = Waits(self._timeout_seconds)

    def _most_waiting(self) -> int:
        """How many requests may wait for versions that are on their way: all places where there is one model only; as many as leave the
        last places free where nobody asks for one that is here; else half of them.
        """
        serving, places = self._serving, self._serving.places
        if len(serving.routes) <= 1:
            return places.capacity
        return places.ample if places.asked() <= serving.gate.closed.keys() else (places.capacity + 1) // 2

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """All but inference."""
        try:
            asked = await self._body(dict(scope["headers"]), receive) if scope["method"] == "POST" else b""
            answer = await self._describe(scope, scope["path"].rstrip("/").split("/"), asked)
        except ClientGoneError:
            return
        except ModelkeepError as error:
            await self._send_error(send, status_of(error), error, [], unread=receive if _unread(error) else None)
            return
        await _send(send, 200, orjson.dumps(answer), [_JSON])

    async def _describe(self, scope: Scope, parts: list[str], asked: bytes) -> Any:
        serving = self._serving
        match parts[2:] if serving.orders is not None and scope["method"] == "POST" else []:
            case ["repository", "models", model, "load" | "unload" as action] | [
                "repository", _, "models", model, "load" | "unload" as action
            ]:  # fmt: skip
                return await serving.orders.obey(action, model, asked, scope)  # type: ignore[union-attr]
        match parts[2:] if serving.gate.closed else []:
            # Who asks what a model takes is about to ask it: one that sleeps is woken. Its readiness and statistics let it sleep.
            case ["models", model] | ["models", model, "config"] | ["models", model, "versions", _] | [
                "models", model, "versions", _, "config"
            ]:  # fmt: skip
                await serving.gate.wait(model, self._timeout_seconds)
        return describe(serving, scope["method"], scope["path"], asked)

    # Inference

    async def infer_by(self, alias: Translator, scope: Scope, receive: Receive, send: Send) -> None:
        """A request to an application's own path."""
        if scope["method"] != "POST":
            wrong = MethodError(alias.path, scope["method"], "POST")
            await self._send_error(send, wrong.status, wrong, [])
            return
        await self.infer(scope, receive, send, alias.model, None, alias)

    async def infer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        model: str,
        version: str | None,
        alias: Translator | None = None,
    ) -> None:
        serving = self._serving
        headers = by_name(scope)
        given = headers.get(b"x-request-id")
        if given is not None and not request_ids.is_plain(given):
            given = None
        number = next(self._ids)
        named = [(b"x-request-id", given or self._id_prefix + b"0.-.%d" % number)]
        places, key = serving.places, key_of(scope)
        place: Place | None = None
        loaded: LoadedVersion | None = None
        failed: ModelkeepError | None = None
        spent = 0.0
        try:
            message = await self._first(headers, receive, self._max_body_bytes)
            if message.get("more_body"):
                # Who sends slowly holds no place meanwhile.
                enter = partial(self._turn, key, model)
                body, place, spent = await serving.uploads.receive(message, receive, self._max_body_bytes, enter)
            else:
                body = message.get("body", b"")
                place = places.enter(key, model)
                if place is None:
                    began = time.perf_counter()
                    place = await self._turn(key, model, receive)
                    spent = time.perf_counter() - began
            if len(body) > self._max_body_bytes or b"content-encoding" in headers:
                body = self._unpacked(body, headers)
            if serving.gate.closed and model in serving.gate.closed:
                await in_a_task()
                began, sticky = time.perf_counter(), headers.get(b"x-route-key")
                left = max(0.0, self._timeout_seconds - spent)
                loaded, route, mark = await admitted(serving, model, version, sticky, left, receive)
                spent += time.perf_counter() - began
            else:
                loaded, route, mark = serving.admit(model, version, headers.get(b"x-route-key"))
            if route is not None:
                if given is None:
                    named[0] = (b"x-request-id", self._named_by(loaded, route, number))
                elif route.watch:
                    serving.remembered.add(given, model, loaded.version, serving.epoch, route.generation)
            named.append((b"x-model-version", loaded.version_header))
            if serving.access is not None:
                scope["state"]["asked"] = (loaded, None)
            asked = _Asked(model, scope, receive, key, route, mark, spent)
            try:
                if alias is None:
                    length = _header_length(headers)
                    answer, header_length, request, work = await self._answer(loaded, asked, body, length)
                else:
                    began = time.perf_counter()
                    left = max(0.0, self._timeout_seconds - spent)
                    translated = await alias.request(loaded.codec, body, headers, left)
                    if (took := time.perf_counter() - began) > INSTANT_SECONDS:
                        asked.spent += took
                    body, length, header_length = translated.body, translated.header_length, None
                    request = loaded.codec.decode(body, length)
                    work = await self._computed(loaded, asked, request)
                    try:
                        answer = await alias.answer(loaded.codec, work.answer, one_row=translated.one_row)
                    except OutputError:
                        loaded.count_output_error(work)
                        raise
                    named += _time_headers(work)
            finally:
                loaded.release()
            if len(answer) >= WORTH_BYTES and (accepts := headers.get(b"accept-encoding")) is not None:
                answer, coding = await packed(answer, accepts)
                if coding is not None:
                    named += (_VARY, (b"content-encoding", coding))
        except ClientGoneError as error:
            self._count(loaded, 499, error)
            return
        except ModelkeepError as error:
            failed = error.with_traceback(None)  # which would hold this frame, and what was asked
        except Exception:
            # A fault of this server, not of the model: the client learns no more than that, the log has it all.
            logger.exception("an inference request failed inside the server")
            failed = ModelkeepError("internal error of the server; see its log")
        finally:
            if place is not None:
                places.leave(place)
        if failed is not None:  # who reads its answer slowly holds no place meanwhile
            status = status_of(failed)
            self._count(loaded, status, failed)
            await self._send_error(send, status, failed, named, unread=receive if _unread(failed) else None)
            return
        assert loaded is not None  # else something failed
        loaded.telemetry.answered(200)
        if header_length is None:
            named.append(_JSON)
        else:
            named += (_OCTETS, (b"inference-header-content-length", b"%d" % header_length))
        if (memo := scope.get("memo")) is not None:
            memo[AT_ONCE] = request is None
            named.append((b"content-length", b"%d" % len(answer)))
            await send({"type": "http.response.start", "status": 200, "headers": named, WHOLE: answer})
        else:
            await _send(send, 200, answer, named)
        if route is None or loaded.version != route.stable:
            return
        if serving.capture is not None and serving.capture.wants():
            serving.capture.offer(loaded.model, body, length)
        if route.shadow and route.candidate is not None:
            candidate = serving.loaded.get((model, route.candidate))
            if (
                request is not None
                and candidate is not None
                and (route.shadow_share >= 1 or serving.random() < route.shadow_share)
            ):
                shadow.offer(route, loaded, candidate, request.inputs, request.outputs, work.answer)

    async def _answer(
        self, loaded: LoadedVersion, asked: _Asked, body: bytes, length: int | None
    ) -> tuple[bytes, int | None, InferRequest | None, Work]:
        """(body of the answer, length of its JSON part where it is binary, what was asked, what became of it).

        What was asked is None where the very bytes are known: then nothing was decoded.
        """
        answers = loaded.answers
        if answers is not None and (known := answers.recall(body, length, asked.route)) is not None:
            answer, header_length, work = known
            if self._serving.access is not None:
                asked.scope["state"]["asked"] = (loaded, work)
            return answer, header_length, None, work
        request = loaded.codec.decode(body, length)
        work = await self._computed(loaded, asked, request)
        encode, words = loaded.codec.encode, (asked.model, loaded.version, request, work.answer, _times(work))
        try:
            if request.classes and _is_long(request.classes, work):
                answer, header_length = await asyncio.to_thread(encode, *words)
            else:
                answer, header_length = encode(*words)
        except OutputError:
            loaded.count_output_error(work)
            raise
        if answers is not None and not request.id:  # an id comes once
            answers.remember(body, length, work, answer, header_length)
        return answer, header_length, request, work

    async def _computed(self, loaded: LoadedVersion, asked: _Asked, request: InferRequest) -> Work:
        """Through the version's queue, or its cache. Raises what `Waits.wait` does."""
        if asked.spent:
            self._waits.check(loaded, request.timeout_seconds, asked.spent)
        queue = loaded if loaded.answers is None else loaded.answers
        work = queue.submit(request.inputs, request.outputs, asked.route, asked.mark, asked.key)
        if self._serving.access is not None:
            asked.scope["state"]["asked"] = (loaded, work)
        if not work.future.done():
            await self._waits.wait(work, loaded, asked.receive, request.timeout_seconds, asked.spent)
        return work

    def _named_by(self, loaded: LoadedVersion, route: Route, number: int) -> bytes:
        """The id of a request that a route gave to a version: any server can tell from it where its verdict belongs."""
        generation, named = loaded.id_part
        if generation != route.generation:
            named = b"%d.%s." % (route.generation, request_ids.quoted(loaded.version))
            loaded.id_part = (route.generation, named)
        return self._id_prefix + named + b"%d" % number

    async def _turn(self, key: str, model: str, receive: Receive) -> Place:
        """A place, once there is one. Raises BusyError, ClientGoneError."""
        places, patient = self._serving.places, self._serving.catching_up
        place = places.enter(key, model)
        if place is None:
            # Those who connected while no server was there wait for their turn, whatever they hold.
            place = await places.turn(key, model, self._timeout_seconds, patient=patient, receive=receive)
        if place is None:
            raise BusyError(places.words(key, model))
        return place

    async def _first(self, headers: dict[bytes, bytes], receive: Receive, limit: int) -> Message:
        """The first piece of the body. Raises InputError where it says that it is too long, ClientGoneError."""
        declared = headers.get(b"content-length")
        if declared is not None and int(declared) > limit:
            raise InputError(f"the body has {int(declared)} bytes, the limit is {limit}", status=413, unread=True)
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client went while it was sending")
        return message

    def _unpacked(self, body: bytes, headers: dict[bytes, bytes]) -> bytes:
        """Raises InputError for a body that is too long, also once unpacked."""
        if len(body) > self._max_body_bytes:
            raise too_long(self._max_body_bytes, unread=False)
        encoding = headers.get(b"content-encoding")
        if encoding is not None and encoding != b"identity":
            return inflate(body, encoding.decode("latin-1").strip().lower(), self._max_body_bytes)
        return body

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The body of what is no inference. Raises InputError as soon as it is too long, whatever the client still sends."""
        limit = min(MOST_OF_OTHERS_BYTES, self._max_body_bytes)
        message = await self._first(headers, receive, limit)
        body = bytearray(message.get("body", b""))
        while message.get("more_body"):
            if len(body) > limit:
                raise too_long(limit, unread=True)
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError("the client went while it was sending")
            body += message.get("body", b"")
        if len(body) > limit:
            raise too_long(limit, unread=False)
        return self._unpacked(bytes(body), headers)

    def _count(self, loaded: LoadedVersion | None, status: int, error: ModelkeepError) -> None:
        errors = self._serving.unrouted_errors if loaded is None else loaded.telemetry.errors
        kind = kind_of(error)
        errors[kind] = errors.get(kind, 0) + 1
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
        if status in (429, 503):
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


@functools.lru_cache(maxsize=256)
def inference_of(path: str) -> tuple[str, str | None] | None:
    """(model, version or None) of a path of inference; None of any other."""
    parts = path.rstrip("/").split("/")
    if parts[:1] + parts[2:3] + parts[-1:] != ["", "models", "infer"] or parts[1] != "v2":
        return None
    if len(parts) == 5:
        return parts[3], None
    return (parts[3], parts[5]) if len(parts) == 7 and parts[4] == "versions" else None


def _unread(error: ModelkeepError) -> bool:
    return isinstance(error, InputError) and error.unread


def _times(work: Work) -> dict[str, Any]:
    # To the microsecond: `round` would print and parse each number.
    times = {
        "queue_seconds": int((work.started - work.enqueued) * 1e6 + 0.5) / 1e6,
        "model_seconds": int((work.finished - work.started) * 1e6 + 0.5) / 1e6,
    }
    cached = cached_by(work)
    return times if cached is None else {**times, "cache": cached}


def _is_long(classes: dict[str, int], work: Work) -> bool:
    """Whether ranking the outputs of a request would hold up all others."""
    return any(work.answer[name].size > INLINE_ELEMENTS for name in classes)


def _time_headers(work: Work) -> list[tuple[bytes, bytes]]:
    """What the V2 protocol has in `parameters`, for answers that are the application's own."""
    return [(b"x-" + name.replace("_", "-").encode(), str(value).encode()) for name, value in _times(work).items()]


def _header_length(headers: dict[bytes, bytes]) -> int | None:
    value = headers.get(b"inference-header-content-length")
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        shown = value[:40].decode("latin-1")
        raise InputError(f"Inference-Header-Content-Length must be a number of bytes, it is {shown!r}")
    return int(value)


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
