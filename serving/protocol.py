"""uvicorn's HTTP protocol with the time-outs that it lacks: slow headers, slow bodies, uploads nobody reads."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

LINGER_SECONDS = 5.0
"""How long the rest of a request may still come in after it was answered (an upload that is too long)."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 408 and closes where a request, headers and body, is not there within `receive_timeout_seconds`.

    Give the class to `uvicorn.Config(http=...)`, by way of `bounded_protocol`.
    """

    receive_timeout_seconds: ClassVar[float] = 30.0
    sweep_seconds: ClassVar[float] = 0.5
    _sweep: ClassVar[asyncio.TimerHandle | None] = None

    _receiving_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._receiving_since = self.loop.time()
        if type(self)._sweep is None:
            type(self)._sweep = self.loop.call_later(self.sweep_seconds, self._sweep_connections)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Bytes that begin no request (blank lines) have stopped uvicorn's keep-alive time-out: put ours in its place.
        if self._receiving_since is None and self.timeout_keep_alive_task is None and self._answered():
            self._receiving_since = self.loop.time()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._receiving_since = self.loop.time()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._receiving_since = None

    @property
    def receiving(self) -> bool:
        """Whether a part of a request is here and the rest is on its way."""
        return self.scope is not None and self._receiving_since is not None and not self.transport.is_closing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _sweep_connections(self) -> None:
        now = self.loop.time()
        cls = type(self)
        open_connections = [c for c in self.connections if isinstance(c, BoundedHttpProtocol)]
        for connection in open_connections:
            connection._close_if_slow(now)
        again = self.loop.call_later(self.sweep_seconds, self._sweep_connections) if open_connections else None
        cls._sweep = again

    def _close_if_slow(self, now: float) -> None:
        since = self._receiving_since
        if since is None or self.transport.is_closing():
            return
        if self.flow.read_paused:  # it is our turn, not the client's
            self._receiving_since = now
        elif self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
            if now - since > LINGER_SECONDS:
                self.transport.close()
        elif now - since > self.receive_timeout_seconds:
            if self.cycle is None or self._answered() or not self.cycle.response_started:
                self._refuse(408, f"the request was not received within {self.receive_timeout_seconds:g} seconds")
            else:
                self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        body = orjson.dumps({"error": message})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


def bounded_protocol(receive_timeout_seconds: float) -> type[BoundedHttpProtocol]:
    """A protocol class for one server: `uvicorn.Config(app, http=bounded_protocol(30))`."""
    values: dict[str, Any] = {"receive_timeout_seconds": receive_timeout_seconds, "_sweep": None}
    return type("BoundedHttpProtocol", (BoundedHttpProtocol,), values)
