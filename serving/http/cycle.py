"""One request and its answer on a connection, as uvicorn has it but lean: what every request costs is paid here. Limits and time-outs
are serving.http.protocol's.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections.abc import Collection, Coroutine
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import httptools
import orjson
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.flow_control import FlowControl, service_unavailable
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from serving.http.heads import AT_ONCE, WHOLE, Head, head_of, raw_of

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent

_FORWARDED = b"x-forwarded-"
_CONTROLS = bytes({*range(32), 127} - {9})
"""What no value of a header may have: all control characters but the tabulator."""
_MOST_NAMES = 256
_LONGEST_KNOWN = 256
"""Of what clients ask for, no more is remembered."""
_MOST_BEHIND = 16
"""Requests that wait behind the one that is answered, before no more are read. What came with the last of them waits too."""
_names: set[bytes] = set()
"""Names of headers that were found to be good, in small letters; of those that mean nothing here."""
_MEANT = frozenset({b"content-length", b"transfer-encoding", b"connection"})


def _split(url: bytes) -> tuple[str, bytes, bytes]:
    """(path, path as it was sent, query). Raises httptools' HttpParserInvalidURLError."""
    parsed = httptools.parse_url(url)
    raw: bytes = parsed.path
    path = raw.decode("ascii")
    return (unquote(path) if "%" in path else path), raw, parsed.query or b""


_known = functools.lru_cache(maxsize=256)(_split)


class _Event:
    """An asyncio.Event that is made only if somebody waits: most requests are here whole before anybody looks."""

    __slots__ = ("_event", "_is_set")

    def __init__(self) -> None:
        self._is_set = False
        self._event: asyncio.Event | None = None

    def set(self) -> None:
        self._is_set = True
        if self._event is not None:
            self._event.set()

    def clear(self) -> None:
        self._is_set = False
        if self._event is not None:
            self._event.clear()

    async def wait(self) -> None:
        if self._is_set:
            return
        if self._event is None:
            self._event = asyncio.Event()
        await self._event.wait()


class _Flow(FlowControl):
    """uvicorn reads on with every answer: who sends requests faster than they are answered would fill the memory."""

    def __init__(self, transport: asyncio.Transport, pipeline: Collection[Any]) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if self.read_paused and len(self._pipeline) < _MOST_BEHIND:
            super().resume_reading()


class Cycle(RequestResponseCycle):
    """uvicorn's, but an answer whose length is known leaves in one piece with its headers."""

    _head = b""
    _to_the_end = False
    """Whether the answer ends with the connection: HTTP/1.0 knows no chunks."""

    def __init__(self, protocol: HttpToolsProtocol, keep_alive: bool) -> None:
        self.scope = protocol.scope
        self.transport = protocol.transport
        self.flow = protocol.flow
        self.logger = protocol.logger
        self.access_logger = protocol.access_logger
        self.access_log = protocol.access_log
        self.default_headers = protocol.server_state.default_headers
        self.message_event = _Event()  # type: ignore[assignment]
        self.on_response = protocol.on_response_complete
        self.disconnected = False
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = protocol.expect_100_continue
        self.body = bytearray()
        self.more_body = True
        self.response_started = False
        self.response_complete = False
        self.chunked_encoding = None
        self.expected_content_length = 0

    async def send(self, message: ASGISendEvent) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"expected http.response.start, got {message['type']!r}")
            self.response_started = True
            self.waiting_for_100_continue = False
            head = self._head_of(message["status"], [*self.default_headers, *message.get("headers", ())])
            if self.chunked_encoding is False:
                self._head = head  # the body comes at once
                whole: Any = message.get(WHOLE)
                if whole is not None:
                    self._send_body(whole, False)
            else:
                self.transport.write(head)
        elif self.response_complete:
            raise RuntimeError(f"{message['type']!r} after the answer was complete")
        elif message["type"] != "http.response.body":
            raise RuntimeError(f"expected http.response.body, got {message['type']!r}")
        else:
            self._send_body(message.get("body", b""), message.get("more_body", False))

    def _head_of(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Status line and headers. Raises RuntimeError for names and values that would be read as something else."""
        parts = [STATUS_LINE[status]]
        closes = False
        for name, value in headers:
            if name not in _names:
                if name not in _MEANT:
                    name = _checked(name)
                if name == b"content-length":
                    if self.chunked_encoding is None:
                        self.expected_content_length = int(value)
                        self.chunked_encoding = False
                elif name == b"transfer-encoding":
                    if value.lower() == b"chunked":
                        self.expected_content_length = 0
                        self.chunked_encoding = True
                elif name == b"connection" and b"close" in [token.lower().strip() for token in value.split(b",")]:
                    self.keep_alive = False
                    closes = True
            parts += (name, b": ", value, b"\r\n")
        values = b"".join(parts[3::4])
        if len(values) != len(values.translate(None, _CONTROLS)):
            raise RuntimeError("a header of the answer has a control character in its value")
        if not self.keep_alive and not closes:
            parts.append(b"connection: close\r\n")
        if self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in (204, 304):
            if self.scope["http_version"] == "1.0":
                self._to_the_end = True
            else:
                self.chunked_encoding = True
                parts.append(b"transfer-encoding: chunked\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)

    def _send_body(self, body: bytes, more: bool) -> None:
        head, self._head = self._head, b""
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
            body = b""
        elif self.chunked_encoding:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        elif not self._to_the_end:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0:
                raise RuntimeError("the answer is longer than its Content-Length")
        if head or body:
            self.transport.write(head + body if head else body)
        if not more:
            if self.expected_content_length:
                raise RuntimeError("the answer is shorter than its Content-Length")
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()

    async def send_500_response(self) -> None:
        """What uvicorn calls where nothing was answered: the stop's time was over, or a fault that nothing before this caught."""
        stopping = isinstance(sys.exception(), asyncio.CancelledError)
        said = "the server is stopping: try again later" if stopping else "internal error of the server; see its log"
        body = orjson.dumps({"error": said})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(b"connection", b"close"), *([(b"retry-after", b"1")] if stopping else [])]
        await self.send({"type": "http.response.start", "status": 503 if stopping else 500, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def receive(self) -> ASGIReceiveEvent:
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            await self.message_event.wait()
            self.message_event.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body = bytes(self.body)
        self.body = bytearray()
        return {"type": "http.request", "body": body, "more_body": self.more_body}


def _checked(name: bytes) -> bytes:
    """A header's name in small letters. Raises RuntimeError for one that would be read as something else."""
    if HEADER_RE.search(name):
        raise RuntimeError(f"{name!r} is no name of a header")
    small = name.lower()
    if len(_names) < _MOST_NAMES and small not in _MEANT:
        _names.add(small)
    return small


class _Begun(Coroutine[Any, Any, None]):
    """A coroutine that has run until it waited for something: a task goes on with it from there.

    A task that is cancelled before its first step does not cancel what is waited for, as it would later.
    """

    __slots__ = ("_coroutine", "_handed_over", "_waits_for")

    def __init__(self, coroutine: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for, self._handed_over = waits_for, False
        if waits_for is not None:
            waits_for._asyncio_future_blocking = False  # until a task takes it, others may come to wait for the same

    def send(self, value: Any) -> Any:
        if self._handed_over:
            return self._coroutine.send(value)
        waits_for, self._waits_for, self._handed_over = self._waits_for, None, True
        if waits_for is not None:
            waits_for._asyncio_future_blocking = True  # as by its own `await`
        return waits_for

    def throw(self, *raised: Any) -> Any:
        self._waits_for, self._handed_over = None, True
        return self._coroutine.throw(*raised)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Any:
        raise NotImplementedError("for a task of its own only")


class LeanHttpToolsProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the cycle above, and one timer for as long as a connection lives: to begin and end one with every
    request would be felt.
    """

    _wishes = False
    """Whether the head that was read asks for another protocol."""
    _seen: bytes | None = None
    """The head that came last, ..."""
    _head: Head | None = None
    """... and what is known of it once it came twice."""
    _idle_since: float | None = None
    """Since when the connection waits for a request; None: one is under way, or bytes came that may become one."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)

    def data_received(self, data: bytes) -> None:
        """uvicorn's, but a request for another protocol is one of this protocol, with its body, and no client writes our log.

        The parser takes what follows such a head for the other protocol: it is told the head again, without the wish. Else the
        body would be read as the next request.
        """
        self._idle_since = None
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return
            except httptools.HttpParserUpgrade as other:
                if self._should_upgrade():
                    self.handle_websocket_upgrade()
                    return
                data = self._plain_head() + data[other.args[0] :]
                self._wishes = False
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _learn(self, data: bytes) -> None:
        """This was one whole request: with the same head the next one need not be parsed."""
        raw = raw_of(data)
        if raw is None or raw != self._seen:
            self._seen, self._head = raw, None
        elif self._head is None and self.limit_concurrency is None:
            self._head = head_of(raw, data, self.url, self.cycle, self._app_for(self.headers))

    def _take_again(self, head: Head, data: bytes) -> bool:
        """Begin a request whose head is known; whether that could be done. Called between two requests."""
        if len(data) != head.size or not data.startswith(head.raw) or not self.cycle.response_complete:
            return False
        self._idle_since = None
        self.expect_100_continue = False
        self.url, self.scope = head.url, {**head.scope, "state": self.app_state.copy()}  # type: ignore[typeddict-item]
        self.headers = self.scope["headers"]  # type: ignore[assignment]
        self.cycle = cycle = Cycle(self, True)
        cycle.body = data[len(head.raw) :]  # type: ignore[assignment]
        cycle.more_body = False
        cycle.message_event.set()
        self._start_asgi_task(cycle, head.app, head.scope["memo"].pop(AT_ONCE, False))
        return True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any, at_once: bool = False) -> None:
        """`at_once`: an answer that waits for nothing is made here and now, in the context of the connection; a task is only begun for
        one that waits. In the place of uvicorn's: its `reset_contextvars` has no effect.
        """
        running = cycle.run_asgi(app)
        if at_once:
            try:
                running = _Begun(running, running.send(None))
            except StopIteration:
                return
        task = self.loop.create_task(running)
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def _app_for(self, headers: list[tuple[bytes, bytes]]) -> Any:
        app: Any = self.app
        if type(app) is ProxyHeadersMiddleware and not any(name.startswith(_FORWARDED) for name, _ in headers):
            return app.app  # it would do nothing
        return app

    def _plain_head(self) -> bytes:
        """The head that was just read, without Upgrade."""
        scope = self.scope
        first = b"%b %b HTTP/%b\r\n" % (scope["method"].encode(), self.url, scope["http_version"].encode())
        lines = [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return first + b"".join(lines) + b"\r\n"

    def on_message_complete(self) -> None:
        if self._wishes or self.cycle.response_complete:
            return
        self.cycle.more_body = False
        self.cycle.message_event.set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._idle_since = None
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since is None or self.transport.is_closing():
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)
        else:
            self.transport.close()

    def on_headers_complete(self) -> None:
        scope, parser = self.scope, self.parser
        version = parser.get_http_version()
        scope["method"] = parser.get_method().decode("ascii")
        if version != "1.1":
            scope["http_version"] = version
            self.expect_100_continue = False
        if parser.should_upgrade():
            if scope["method"] == "CONNECT":
                raise ValueError("this is no proxy")
            self._wishes = True
            return
        url = self.url
        path, raw_path, scope["query_string"] = _known(url) if len(url) <= _LONGEST_KNOWN else _split(url)
        if self.root_path:
            path, raw_path = self.root_path + path, self.root_path.encode("ascii") + raw_path
        scope["path"], scope["raw_path"] = path, raw_path
        app = self._app_for(self.headers)
        if self.limit_concurrency is not None and (
            len(self.connections) >= self.limit_concurrency or len(self.tasks) >= self.limit_concurrency
        ):
            app = service_unavailable
            self.logger.log(logging.WARNING, "Exceeded concurrency limit.")
        before: RequestResponseCycle | None = self.cycle
        self.cycle = Cycle(self, version != "1.0" and parser.should_keep_alive())
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, app))
