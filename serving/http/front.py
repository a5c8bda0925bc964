"""In front of everything that the server answers: counts and times for /metrics, a request id and a time on every answer, the access log.

No exception leaves it as words to a client.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import orjson
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.accesslog import AccessLog, Line
from serving.http.endpoints import OTHER, method_label
from serving.http.heads import WHOLE
from serving.http.request_ids import is_plain

logger = logging.getLogger("modelkeep.serve")

BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CLIENT_GONE = 499
_ID = b"x-request-id"
_V2_MODELS = "/v2/models/"
_PATHS = 512
_LONGEST_PATH = 200
_FAULT = orjson.dumps({"error": "internal error of the server; see its log"})


class _Endpoint:
    __slots__ = ("codes", "latency", "seconds")

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}
        self.latency = [0] * (len(BUCKETS_SECONDS) + 1)
        self.seconds = 0.0


class HttpCounts:
    """What was asked, by method and template of the path. On the event loop only."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._by_endpoint: dict[tuple[str, str], _Endpoint] = {}
        self._by_path: dict[tuple[str, str], _Endpoint] = {}
        """As clients wrote them: the first so many, so that most need no look for their template."""

    def of(self, method: str, path: str, template: Callable[[str], str]) -> _Endpoint:
        found = self._by_path.get((method, path))
        if found is None:
            found = self._endpoint(method_label(method), template(path))
            if len(self._by_path) < _PATHS and len(path) <= _LONGEST_PATH:
                self._by_path[method, path] = found
        return found

    def _endpoint(self, method: str, path: str) -> _Endpoint:
        found = self._by_endpoint.get((method, path))
        if found is None:
            found = self._by_endpoint[method, path] = _Endpoint()
        return found

    @staticmethod
    def add(found: _Endpoint, status: int, seconds: float) -> None:
        found.codes[status] = found.codes.get(status, 0) + 1
        found.latency[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        found.seconds += seconds

    def refused(self, status: int) -> None:
        """Count a request that could not be read, so that nobody knows what it asked."""
        self.add(self._endpoint("OTHER", OTHER), status, 0.0)

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "modelkeep_http_requests",
            "Answers of all endpoints (499: the client was gone before).",
            labels=["method", "endpoint", "status"],
        )
        duration = HistogramMetricFamily(
            "modelkeep_http_request_duration_seconds",
            "Seconds from a request's headers to the end of its answer.",
            labels=["method", "endpoint"],
        )
        for (method, path), found in self._by_endpoint.items():
            for status, count in found.codes.items():
                requests.add_metric([method, path, str(status)], count)
            total, buckets = 0, []
            for bound, count in zip((*BUCKETS_SECONDS, None), found.latency, strict=True):
                total += count
                buckets.append(("+Inf" if bound is None else str(bound), float(total)))
            duration.add_metric([method, path], buckets, found.seconds)
        yield from (requests, duration)
        yield GaugeMetricFamily(
            "modelkeep_http_requests_in_flight", "Requests of all endpoints not yet answered.", float(self.in_flight)
        )


class Front:
    """An ASGI application in front of another. `name` makes an id for a request that has none; `template` is serving.http.endpoints'.

    `counts`, `log` and `timed` (X-Response-Time) may each be left out.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        name: Callable[[], bytes],
        template: Callable[[str], str],
        counts: HttpCounts | None = None,
        log: AccessLog | None = None,
        timed: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.app, self.counts, self.log = app, counts, log
        self._name, self._template, self._timed, self._clock = name, template, timed, clock
        self._idle = counts is None and log is None and not timed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._idle and scope["path"].startswith(_V2_MODELS):  # the protocol does all that is left by itself
            await self.app(scope, receive, send)
            return
        clock, timed, counts, log = self._clock, self._timed, self.counts, self.log
        began = clock()
        status, size, identity = 0, 0, b""

        def sending(message: Message) -> Any:  # no coroutine of its own: every answer comes this way
            nonlocal status, size, identity
            if message["type"] == "http.response.start":
                status = message["status"]
                if log is not None:
                    size += len(message.get(WHOLE, b""))
                headers = message.get("headers")
                if type(headers) is not list:
                    headers = message["headers"] = list(headers or ())
                # The V2 protocol has it first.
                identity = headers[0][1] if headers and headers[0][0] == _ID else self._identify(headers, scope)
                if timed:
                    headers.append((b"x-response-time", b"%.6f" % (clock() - began)))
            elif log is not None:
                size += len(message.get("body", b""))
            return send(message)

        if counts is not None:
            counts.in_flight += 1
        try:
            await self.app(scope, receive, sending)
        except Exception:
            if status:  # the answer is on its way: uvicorn ends the connection
                raise
            logger.exception("a request failed inside the server")
            length = (b"content-length", b"%d" % len(_FAULT))
            start = {"type": "http.response.start", "status": 500}
            await sending({**start, "headers": [(b"content-type", b"application/json"), length]})
            await sending({"type": "http.response.body", "body": _FAULT})
        finally:
            seconds = clock() - began
            if counts is not None:
                counts.in_flight -= 1
                endpoint = counts.of(scope["method"], scope["path"], self._template)
                counts.add(endpoint, status or CLIENT_GONE, seconds)
            if log is not None and log.wants(status):
                log.add(self._line(scope, identity, status or CLIENT_GONE, size, seconds))

    def refuse(self, status: int) -> list[tuple[bytes, bytes]]:
        """What the protocol tells of a request that it refused itself; see serving.http.protocol."""
        identity = self._name()
        if self.counts is not None:
            self.counts.refused(status)
        if self.log is not None and self.log.wants(status):
            self.log.add(_line_of_refused(identity, status))
        return [(_ID, identity)]

    def _identify(self, headers: list[tuple[bytes, bytes]], scope: Scope) -> bytes:
        """The id of an answer: its own, else the client's, else a new one, which is put into the headers."""
        for name, value in headers:
            if name == _ID:
                return value
        given = _given(scope)
        identity = self._name() if given is None else given
        headers.append((_ID, identity))
        return identity

    def _line(self, scope: Scope, identity: bytes, status: int, size: int, seconds: float) -> Line:
        state = scope.get("state") or {}
        who, asked = state.get("who"), state.get("asked")
        queue = model = name = version = None
        if asked is not None:
            loaded, work = asked
            name, version = loaded.model, loaded.version
            if work is not None:
                queue, model = work.queue_seconds, work.model_seconds
        return Line(
            time.time(),
            (identity or _given(scope) or self._name()).decode("latin-1"),
            method_label(scope["method"]),
            self._template(scope["path"]),
            status,
            size,
            seconds,
            queue,
            model,
            None if who is None else who.key_id,
            name,
            version,
        )


def _given(scope: Scope) -> bytes | None:
    """The client's own id, where it sent one that can be used."""
    found: bytes | None = next((value for name, value in scope["headers"] if name == _ID), None)
    return found if found is not None and is_plain(found) else None


def _line_of_refused(identity: bytes, status: int) -> Line:
    return Line(time.time(), identity.decode("latin-1"), "OTHER", OTHER, status, 0, 0.0, None, None, None, None, None)
