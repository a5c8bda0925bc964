"""uvicorn's HTTP protocol with the limits that it lacks: slow or endless requests, answers nobody takes, too many connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from serving.http.cycle import LeanHttpToolsProtocol

LINGER_SECONDS = 5.0
"""How long the rest of a request may still come in after it was answered (an upload that is too long)."""
FAREWELL_SECONDS = 2.0
"""How long a client may take to end TLS once all is said; many never do."""
PROGRESS_BYTES = 16_384
"""Less of an answer taken in `write_timeout_seconds` is as good as nothing."""
_REFUSED_LINGER_SECONDS = 1.0
_REFUSED_AT_A_TIME = 32
"""They take descriptors of those that are kept for files (serving.entry)."""
_TOO_MANY = "the server has as many connections as it takes; try again later"
_TOO_LARGE = "the headers of the request are longer than {limit} bytes"

Refused = Callable[[int], "list[tuple[bytes, bytes]]"]
"""Told the status of a request that was refused before the application saw it; gives headers to add."""


class _RejectedError(Exception):
    """Ends the parser: a limit was passed."""


class BoundedHttpProtocol(LeanHttpToolsProtocol):
    """Answers 408 and closes where a request, headers and body, is not there within `receive_timeout_seconds`; 414 and 431 where its
    path or its headers are longer than the limits; 503 to connections beyond `max_connections`. Who takes nothing of an answer for
    `write_timeout_seconds` is cut off.

    Give the class to `uvicorn.Config(http=...)`, by way of `bounded_protocol`.
    """

    receive_timeout_seconds: ClassVar[float] = 30.0
    write_timeout_seconds: ClassVar[float] = 30.0
    max_header_bytes: ClassVar[int] = 32_768
    max_headers: ClassVar[int] = 100
    max_url_bytes: ClassVar[int] = 8192
    max_connections: ClassVar[int] = 100_000
    refused: ClassVar[Refused | None] = None
    sweep_seconds: ClassVar[float] = 0.5
    _sweep: ClassVar[asyncio.TimerHandle | None] = None
    _lingering: ClassVar[int] = 0
    """Connections that were refused and are not closed yet."""

    _receiving_since: float | None = None
    _running: RequestResponseCycle | None = None
    """The request that is being answered, or was last; those behind it wait in `pipeline`."""
    _rejected: tuple[int, str] | None = None
    _lingers: RequestResponseCycle | None = None
    """The request that is answered and whose rest still comes."""
    _deaf = False
    """Whether what comes in is thrown away: the connection ends with the answer that is on its way."""
    _in_head = False
    _serial = 0
    _chunk = 0
    """Bytes that came in last, and ..."""
    _head_bytes = 0
    """... those before them of a head that is not whole."""
    _body_seen = False
    _idle_bytes = 0
    """Bytes behind the head that were no body: chunk sizes, trailers."""
    _stuck_since: float | None = None
    _stuck_size = 0
    _last = False
    """Whether the server stops: the connection ends with the request that is coming in."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.max_connections:
            self._turn_away(transport)
            return
        super().connection_made(transport)
        self._receiving_since = self.loop.time()
        if type(self)._sweep is None:
            type(self)._sweep = self.loop.call_later(self.sweep_seconds, self._sweep_connections)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.pipeline.clear()
        running = self._running
        if running is not None and not running.response_complete:  # uvicorn tells only the last of several
            running.disconnected = True
            running.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any, at_once: bool = False) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app, at_once)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        between = self._receiving_since is None
        if between and self._head is not None and not self._last and self._take_again(self._head, data):
            return
        serial, self._chunk, self._body_seen = self._serial, len(data), False
        super().data_received(data)
        if self._receiving_since is not None:
            self._look_at_size(serial)
        elif between and self._serial == serial + 1 and self.cycle is self._running:
            self._learn(data)  # it is one whole request, and nothing else
        # Bytes that begin no request (blank lines) have stopped uvicorn's keep-alive time-out: put ours in its place.
        elif self._idle_since is None and self._answered():
            self._receiving_since = self.loop.time()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._receiving_since = self.loop.time()
        self._in_head = True
        self._serial += 1
        self._head_bytes = self._idle_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer: it comes behind the body, when all was decided by the headers
            return
        name = name.lower()  # as uvicorn does; a call of its own for each header would be felt
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if len(self.url) > self.max_url_bytes:
            self._reject(414, f"the path with its query has {len(self.url)} bytes, the limit is {self.max_url_bytes}")
        if len(self.headers) > self.max_headers:
            self._reject(431, f"the request has {len(self.headers)} headers, the limit is {self.max_headers}")
        limit = self.max_header_bytes
        if self._head_bytes + self._chunk > limit:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > limit:
                self._reject(431, _TOO_LARGE.format(limit=limit))
        super().on_headers_complete()
        self._in_head = False
        if self._last and not self._wishes:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._body_seen = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._receiving_since = None
        if self._last and not self._wishes and self._answered():
            self.transport.close()

    @property
    def receiving(self) -> bool:
        """Whether a part of a request is here and the rest is on its way."""
        return self.scope is not None and self._receiving_since is not None and not self.transport.is_closing()

    def shutdown(self) -> None:
        """Called at a stop. Who is sending a request has it answered, or may send on what was answered already. Who asks nothing is
        not bidden farewell by TLS, which would wait for his.
        """
        if self.receiving and (self._in_head or self._answered()):
            self._last = True
        elif self._answered() and self.scheme == "https" and not self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(*(self._rejected or (400, msg)))

    def _reject(self, status: int, message: str) -> None:
        self._rejected = (status, message)
        raise _RejectedError(message)

    def _look_at_size(self, serial: int) -> None:
        """Refuse a head that does not end within its limit, and what goes on behind it without being a body."""
        if self.transport.is_closing() or self._deaf:
            return
        if self._in_head:
            if serial == self._serial:
                self._head_bytes += self._chunk
            if self._head_bytes > self.max_header_bytes:
                if len(self.url) > self.max_url_bytes:
                    self._refuse(414, f"the path with its query is longer than the limit of {self.max_url_bytes} bytes")
                else:
                    self._refuse(431, _TOO_LARGE.format(limit=self.max_header_bytes))
        elif self._body_seen or serial != self._serial:
            self._idle_bytes = 0
        else:
            self._idle_bytes += self._chunk
            if self._idle_bytes > self.max_header_bytes:
                self._refuse(
                    431, f"more than {self.max_header_bytes} bytes follow the body, or stand between its chunks"
                )

    def _answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _sweep_connections(self) -> None:
        now = self.loop.time()
        cls = type(self)
        open_connections = [c for c in self.connections if isinstance(c, BoundedHttpProtocol)]
        for connection in open_connections:
            if not connection._cut_off_if_stuck(now):
                connection._close_if_slow(now)
        again = self.loop.call_later(self.sweep_seconds, self._sweep_connections) if open_connections else None
        cls._sweep = again

    def _cut_off_if_stuck(self, now: float) -> bool:
        """End a connection whose client takes nothing of what was written; a closed one too, which else would wait for ever."""
        size = self.transport.get_write_buffer_size()
        if not size:
            if not self.transport.is_closing():
                self._stuck_since = None
            elif self._stuck_size or self._stuck_since is None:
                self._stuck_since, self._stuck_size = now, 0
            elif now - self._stuck_since > FAREWELL_SECONDS:
                self.transport.abort()
                return True
            return False
        since = self._stuck_since
        if since is None or size > self._stuck_size or self._stuck_size - size >= PROGRESS_BYTES:
            self._stuck_since, self._stuck_size = now, size
        elif now - since > self.write_timeout_seconds:
            self.transport.abort()
            return True
        return False

    def _close_if_slow(self, now: float) -> None:
        since = self._receiving_since
        if since is None or self.transport.is_closing() or self._deaf:
            return
        if self.flow.read_paused:  # it is our turn, not the client's
            self._receiving_since = now
        elif self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
            if self._lingers is not self.cycle:
                # Its answer has just gone out: the time runs from now on, however long the request took to come.
                self._lingers, self._receiving_since = self.cycle, now
            elif now - since > LINGER_SECONDS:
                self.transport.close()
        elif now - since > self.receive_timeout_seconds:
            if self.cycle is None or self._answered() or not self.cycle.response_started:
                self._refuse(408, f"the request was not received within {self.receive_timeout_seconds:g} seconds")
            else:
                self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        running = self._running
        if running is not None and not running.response_complete and (self._in_head or running is not self.cycle):
            # A request before this one is not answered yet: our words would be taken for its answer. It is the last one here.
            self._deaf = True
            if not self._in_head:
                self.pipeline.popleft()  # this one waits for its turn, and the rest of it never comes
            (self.pipeline[0][0] if self.pipeline else running).keep_alive = False
            return
        self._deaf = True
        if self._in_head or self.cycle is None or not self.cycle.response_started or not self.cycle.more_body:
            self.transport.write(
                self._answer(status, message)
            )  # else it has an answer: a second would be the next one's
        self.transport.close()

    def _turn_away(self, transport: asyncio.Transport) -> None:
        """Say so and close. Reading on for a moment, or the system would take the answer back with the connection."""
        self.transport, self._deaf = transport, True
        cls = type(self)
        transport.write(self._answer(503, _TOO_MANY, b"retry-after: 1\r\n"))
        if cls._lingering >= _REFUSED_AT_A_TIME:
            transport.close()
            return
        cls._lingering += 1
        with suppress(NotImplementedError):  # TLS has no half
            transport.write_eof()
        self.loop.call_later(_REFUSED_LINGER_SECONDS, self._let_go, transport)

    def _let_go(self, transport: asyncio.Transport) -> None:
        type(self)._lingering -= 1
        transport.abort()

    def _answer(self, status: int, message: str, more: bytes = b"") -> bytes:
        body = orjson.dumps({"error": message})
        told = type(self).refused
        added = told(status) if told is not None else []
        head = b"".join(b"%s: %s\r\n" % pair for pair in added) + more
        head += b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        return STATUS_LINE[status] + head + body


def bounded_protocol(receive_timeout_seconds: float, **limits: Any) -> type[BoundedHttpProtocol]:
    """A protocol class for one server: `uvicorn.Config(app, http=bounded_protocol(30))`. `limits` are its attributes by name."""
    refused = limits.pop("refused", None)
    values: dict[str, Any] = {
        "receive_timeout_seconds": receive_timeout_seconds,
        "refused": staticmethod(refused) if refused is not None else None,
        "_sweep": None,
        "_lingering": 0,
    }
    return type("BoundedHttpProtocol", (BoundedHttpProtocol,), values | limits)
