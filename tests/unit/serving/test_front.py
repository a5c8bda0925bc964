"""In front of the application: counts, ids and times of every answer, CORS, the access log, templates of paths, depth of JSON."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from registry.actor import Who
from serving.api import MOST_OF_OTHERS_BYTES
from serving.http import accesslog
from serving.http.accesslog import AccessLog, Line
from serving.http.bodies import BoundedBodies
from serving.http.cors import Cors
from serving.http.depth import is_deeper
from serving.http.endpoints import OTHER, method_label, templates
from serving.http.front import Front, HttpCounts
from tests.unit.serving.helpers import close, load, serve, until

PAGE = "https://app.example"


async def ask(
    app: ASGIApp, method: str, path: str, headers: Mapping[str, str] | None = None, chunks: tuple[bytes, ...] = (b"",)
) -> tuple[int, dict[str, list[str]], bytes]:
    """(status, headers, body); status 0 where nothing was answered."""
    waiting = list(chunks)
    sent: list[Any] = []
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        "state": {},
    }

    async def receive() -> dict[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    found: dict[str, list[str]] = {}
    for name, value in sent[0]["headers"] if sent else ():
        found.setdefault(name.decode(), []).append(value.decode())
    return (sent[0]["status"] if sent else 0), found, b"".join(m.get("body", b"") for m in sent[1:])


def answering(status: int = 200, *headers: tuple[bytes, bytes], body: bytes = b"hello") -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})

    return app


def front(app: ASGIApp, **options: Any) -> Front:
    return Front(app, name=lambda: b"made", template=lambda path: path, **options)


def samples(counts: HttpCounts) -> dict[str, float]:
    return {
        f"{s.name}{sorted(s.labels.items())}": s.value
        for family in counts.collect()
        for s in family.samples
        if not s.name.endswith("_created")
    }


def test_every_answer_has_an_id_and_says_how_long_it_took() -> None:
    async def scenario() -> None:
        app = front(answering())
        _, headers, _ = await ask(app, "GET", "/x")
        assert headers["x-request-id"] == ["made"] and float(headers["x-response-time"][0]) >= 0
        _, headers, _ = await ask(app, "GET", "/x", {"X-Request-ID": "mine"})
        assert headers["x-request-id"] == ["mine"]
        _, headers, _ = await ask(app, "GET", "/x", {"X-Request-ID": "m" * 200})
        assert headers["x-request-id"] == ["made"]
        _, headers, _ = await ask(front(answering(200, (b"a", b"b"), (b"x-request-id", b"own"))), "GET", "/x")
        assert headers["x-request-id"] == ["own"]
        _, headers, _ = await ask(front(answering(), timed=False), "GET", "/x")
        assert "x-response-time" not in headers

    asyncio.run(scenario())


def test_a_fault_is_answered_without_a_trace_and_counted() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret words of /somewhere/inside.py")

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("secret words of /somewhere/inside.py")

    async def scenario() -> None:
        counts = HttpCounts()
        status, headers, body = await ask(front(broken, counts=counts), "GET", "/x")
        assert status == 500 and b"secret" not in body and "error" in json.loads(body)
        assert headers["x-request-id"] == ["made"] and headers["content-length"] == [str(len(body))]
        with pytest.raises(RuntimeError):  # uvicorn ends the connection, so that nobody takes the half for a whole
            await ask(front(late, counts=counts), "GET", "/x")
        found = samples(counts)
        assert found["modelkeep_http_requests_total[('endpoint', '/x'), ('method', 'GET'), ('status', '500')]"] == 1
        assert found["modelkeep_http_requests_in_flight[]"] == 0

    asyncio.run(scenario())


def test_counts_have_a_histogram_and_a_client_that_left_is_499() -> None:
    async def gone(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    async def scenario() -> None:
        now = [0.0]
        counts = HttpCounts()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            now[0] += 0.03
            await answering()(scope, receive, send)

        app = front(slow, counts=counts, clock=lambda: now[0])
        for _ in range(3):
            await ask(app, "GET", "/x")
        await ask(front(gone, counts=counts), "POST", "/y")
        found = samples(counts)
        bucket = "modelkeep_http_request_duration_seconds_bucket[('endpoint', '/x'), ('le', '{}'), ('method', 'GET')]"
        assert [found[bucket.format(le)] for le in ("0.025", "0.05", "+Inf")] == [0, 3, 3]
        assert found["modelkeep_http_request_duration_seconds_sum[('endpoint', '/x'), ('method', 'GET')]"] == (
            pytest.approx(0.09)
        )
        assert found["modelkeep_http_requests_total[('endpoint', '/y'), ('method', 'POST'), ('status', '499')]"] == 1

    asyncio.run(scenario())


def test_labels_are_templates_whatever_is_asked() -> None:
    app = FastAPI(docs_url=None)

    @app.get("/api/v2/rollback/{model}")
    async def page(model: str) -> None: ...

    template = templates(app.routes, ["/api/v2/analyze-image"])
    expected = {
        "/v2": "/v2",
        "/v2/": "/v2",
        "/v2/health/ready": "/v2/health/ready",
        "/v2/models/digits/infer": "/v2/models/{model}/infer",
        "/v2/models/digits/versions/7/infer": "/v2/models/{model}/versions/{version}/infer",
        "/v2/models/digits": "/v2/models/{model}",
        "/v2/models/digits/ready": "/v2/models/{model}/ready",
        "/v2/models/stats": "/v2/models/stats",
        "/v2/repository/models/digits/load": "/v2/repository/models/{model}/load",
        "/v2/models/digits/infer/more": "/v2/other",
        "/v2/../../etc/passwd": "/v2/other",
        "/v2extra": OTHER,
        "/api/v2/rollback/digits": "/api/v2/rollback/{model}",
        "/api/v2/rollback/digits/more": OTHER,
        "/api/v2/analyze-image": "/api/v2/analyze-image",
        "/wp-login.php": OTHER,
        "/" + "x" * 5000: OTHER,
    }
    assert {path: template(path) for path in expected} == expected
    assert len({template(f"/v2/models/{n}/versions/{n}/infer") for n in range(3000)}) == 1
    assert method_label("BREW") == "OTHER"


def test_pages_of_named_origins_may_ask_and_nobody_else() -> None:
    async def scenario() -> None:
        app = Cors(answering(200, (b"vary", b"accept-encoding")), [PAGE])
        asked = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        status, headers, body = await ask(app, "OPTIONS", "/v2/models/m/infer", asked)
        assert (status, body) == (204, b"")
        assert headers["access-control-allow-origin"] == [PAGE]
        assert "POST" in headers["access-control-allow-methods"][0]
        assert headers["access-control-allow-headers"] == ["authorization, content-type"]
        assert headers["vary"][0] == "Origin" and "access-control-allow-credentials" not in headers

        status, headers, _ = await ask(app, "POST", "/v2/models/m/infer", {"Origin": PAGE})
        assert status == 200 and headers["access-control-allow-origin"] == [PAGE]
        assert "X-Model-Version" in headers["access-control-expose-headers"][0]
        assert headers["vary"] == ["accept-encoding", "Origin"]

        for origin in ("https://evil.example", PAGE + ".evil.example", "http://app.example", PAGE + ":444", "null"):
            status, headers, _ = await ask(app, "OPTIONS", "/v2", {**asked, "Origin": origin})
            assert status == 403 and "access-control-allow-origin" not in headers, origin
            _, headers, _ = await ask(app, "GET", "/v2", {"Origin": origin})
            assert "access-control-allow-origin" not in headers and "Origin" in headers["vary"], origin
        _, headers, _ = await ask(app, "GET", "/v2")
        assert "Origin" in headers["vary"], "a cache must not give it to a page"
        status, headers, _ = await ask(app, "OPTIONS", "/v2", {**asked, "Access-Control-Request-Headers": 'a"b\x7f'})
        assert "access-control-allow-headers" not in headers
        _, headers, _ = await ask(Cors(answering(), ["*"]), "GET", "/v2", {"Origin": "https://any.example"})
        assert headers["access-control-allow-origin"] == ["*"]

    asyncio.run(scenario())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_who_asked_what_and_how_it_went_and_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "logs" / "access.log"
        log = AccessLog(path)
        log.start()
        version = load(version="7")
        server = serve(version)
        server.serving.access = log
        app = server.app

        async def known(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"]["who"] = Who("key:alice", key_id="0123456789ab", via="api")
            await app(scope, receive, send)

        watched = Front(known, name=lambda: b"made", template=templates(app.pages.routes), log=log)
        body = orjson.dumps(
            {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [987654321.0, 1.0]}]}
        )
        secret = {"Authorization": "Bearer mk_secret", "X-Request-ID": 'mine "quoted"'}
        status, _, answer = await ask(watched, "POST", "/v2/models/m/infer", secret, (body,))
        assert status == 200
        await ask(watched, "GET", "/nothing-of/secret", {"X-Request-ID": "second"})
        await until(lambda: log.written == 2)
        log.end()
        first, second = lines(path)
        assert {k: first[k] for k in ("id", "method", "path", "status", "bytes", "key", "model", "version")} == {
            "id": 'mine "quoted"',
            "method": "POST",
            "path": "/v2/models/{model}/infer",
            "status": 200,
            "bytes": len(answer),
            "key": "0123456789ab",
            "model": "m",
            "version": "7",
        }
        assert 0 <= first["queue_seconds"] <= first["seconds"] and 0 <= first["model_seconds"] <= first["seconds"]
        assert first["time"].endswith("+00:00")
        assert (second["status"], second["path"], second["model"]) == (404, OTHER, None)
        text = path.read_text()
        assert all(word not in text for word in ("mk_secret", "987654321", "nothing-of"))
        close(version)

    asyncio.run(scenario())


def some_line(n: int = 0) -> Line:
    return Line(1.7e9 + n, str(n), "GET", "/health", 200, 5, 0.001, None, None, None, None, None)


def test_the_file_is_put_aside_at_its_size_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(path, max_bytes=2000, files=3)
    for n in range(60):
        log._write(some_line(n).text())
    log.end()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["access.log", "access.log.1", "access.log.2"]
    kept = [int(line["id"]) for p in ("access.log.2", "access.log.1", "access.log") for line in lines(tmp_path / p)]
    assert kept == list(range(kept[0], 60)), "no line lost or twice but the oldest"
    assert all(p.stat().st_size <= 2000 for p in tmp_path.iterdir())
    alone = AccessLog(tmp_path / "one.log", max_bytes=500, files=1)
    for n in range(20):
        alone._write(some_line(n).text())
    alone.end()
    assert [p.name for p in tmp_path.glob("one*")] == ["one.log"]


def test_a_disk_that_takes_nothing_costs_lines_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accesslog, "_AGAIN_SECONDS", 0.01)
    released = threading.Event()

    class Stuck(io.RawIOBase):
        def write(self, text: Any) -> int:
            released.wait(30)
            return len(text)

    log = AccessLog(None, stream=Stuck())
    log.start()
    for n in range(accesslog.WAITING + 5000):
        log.add(some_line(n))
    assert log.dropped >= 5000 - 512
    released.set()
    log.end()
    assert log.written + log.dropped == accesslog.WAITING + 5000

    blocked = tmp_path / "file"
    blocked.write_text("")
    full = AccessLog(blocked / "access.log")
    full.start()
    full.add(some_line())

    async def counted() -> None:
        await until(lambda: full.dropped == 1)

    asyncio.run(counted())
    blocked.unlink()
    full.add(some_line())

    async def written() -> None:
        await until(lambda: full.written == 1)

    asyncio.run(written())
    full.end()


def test_a_disk_that_takes_half_a_line_leaves_no_half_of_one(tmp_path: Path) -> None:
    class Full:
        """Takes five bytes, then none."""

        def __init__(self) -> None:
            self.real = path.open("ab", buffering=0)

        def write(self, data: bytes) -> int:
            if path.stat().st_size > len(b"a line\n"):
                raise OSError(28, "No space left on device")
            return self.real.write(data[:5])

        def truncate(self, size: int) -> int:
            return self.real.truncate(size)

    path = tmp_path / "access.log"
    path.write_bytes(b"a line\n")
    kept = AccessLog(path)
    full = Full()
    kept._file, kept._size = full, len(b"a line\n")  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        kept._write(b"another line\n")
    assert path.read_bytes() == b"a line\n"
    full.real.close()


def test_a_share_is_written_and_what_failed_here_always() -> None:
    drawn = iter([0.05, 0.5])
    log = AccessLog(None, share=0.1, random=lambda: next(drawn))
    assert [log.wants(200), log.wants(200), log.wants(503)] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        (b"", 0),
        (b"[]", 1),
        (b'{"a": [1, {"b": []}]}', 4),
        (b'{"a": "[[[[[[[[", "b": "]"}', 1),
        (rb'{"a": "\"[[[[", "b": "\\"}', 1),
        (b"[" * 30 + b"]" * 30, 30),
        (b"[[],[],[],[],[],[]]", 2),
        (b'"' + b"[" * 50, 0),
    ],
)
def test_depth_counts_brackets_outside_of_strings(text: bytes, depth: int) -> None:
    assert not is_deeper(text, depth)
    assert depth == 0 or is_deeper(text, depth - 1)


def test_deep_json_is_refused_before_anybody_builds_it() -> None:
    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        await answering(body=message["body"])(scope, receive, send)

    async def scenario() -> None:
        app = FastAPI()

        @app.post("/x")
        async def x(document: dict[str, Any]) -> dict[str, Any]:
            return document

        def nested(levels: int) -> bytes:
            return b'{"a":' * levels + b"1" + b"}" * levels

        bounded = BoundedBodies(app, 1_000_000)
        kind = {"Content-Type": "application/json"}
        assert (await ask(bounded, "POST", "/x", kind, (nested(60),)))[0] == 200
        for body in (nested(65), nested(5000), b'{"a":' * 100_000, b"[" * 999_999):
            for chunks in ((body,), tuple(body[n : n + 100_000] for n in range(0, len(body), 100_000))):
                status, _, said = await ask(bounded, "POST", "/x", kind, chunks)
                assert status == 400, (body[:20], said)
        parts = BoundedBodies(reading, 1000)
        assert (await ask(parts, "POST", "/x", kind, (b"ab", b"cd")))[2] == b"abcd"
        image = {"Content-Type": "image/png"}
        assert (await ask(parts, "POST", "/x", image, (b"[" * 500,)))[0] == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["application/json", "image/png"])
def test_bodies_that_come_slowly_take_no_more_memory_than_is_set_aside(kind: str) -> None:
    async def scenario() -> None:
        app = FastAPI()

        @app.post("/x")
        async def x(request: Request) -> dict[str, int]:
            return {"bytes": len(await request.body())}

        bounded = BoundedBodies(app, 1000, most_bytes=1500)
        rest = asyncio.Event()

        async def slowly(size: int) -> tuple[int, dict[bytes, bytes], bytes]:
            pieces = [b"[" * 10 + b" " * (size - 11), b"]"]

            async def receive() -> dict[str, Any]:
                if len(pieces) == 1:
                    await rest.wait()
                return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            lines = [(b"content-type", kind.encode())]
            scope = {"type": "http", "method": "POST", "path": "/x", "query_string": b"", "headers": lines}
            await bounded(scope, receive, send)
            return sent[0]["status"], dict(sent[0]["headers"]), b"".join(one.get("body", b"") for one in sent[1:])

        first, second = asyncio.create_task(slowly(900)), asyncio.create_task(slowly(500))
        await asyncio.sleep(0.01)
        assert bounded.bytes == 1398
        status, headers, said = await slowly(900)
        assert (status, headers[b"retry-after"]) == (503, b"1")
        assert b"1500" in said
        assert bounded.bytes == 1398
        rest.set()
        assert [(await one)[0] for one in (first, second)] == [200, 200]
        assert bounded.bytes == 0
        assert (await slowly(900))[0] == 200
        bounded.most_bytes = 100
        assert (await slowly(900))[0] == 200  # nobody else sends
        assert bounded.bytes == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("make", [lambda n: b"[" * n, lambda n: b'{"a":' * n, lambda n: b"[" * n + b"]" * n])
def test_deep_json_to_the_protocol_is_a_bad_request(make: Callable[[int], bytes]) -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version, max_body_bytes=1_000_000)
        whole = b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": %s}]}'
        more = b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}], "other": %s}'
        for levels in (65, 900, 1100, 100_000):
            for body in (make(levels), whole % make(levels), more % make(levels)):
                answer = await server.ask("POST", "/v2/models/m/infer", body, {})
                assert answer is not None and answer.status in (200, 400), (levels, answer)
                if levels > 1024:
                    assert answer.status == 400
            answer = await server.ask("POST", "/v2/repository/index", make(levels), {})
            assert answer is not None and answer.status == (400 if len(make(levels)) <= MOST_OF_OTHERS_BYTES else 413)
        assert (await server.infer(1, 2)).status == 200
        close(version)

    asyncio.run(scenario())
