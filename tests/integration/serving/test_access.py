"""A real process behind all that stands in front of the application: rates, fairness, limits, TLS, CORS, the access log, slow and many clients."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest
import redis

from registry.rates import Rate
from serving.access.rates_shared import SharedBuckets
from tests.certificates import Authority
from tests.integration.serving.access_models import LARGE_BYTES, key_text
from tests.redis_server import RedisCluster, RedisServer

INFER = "/v2/models/affine/infer"
PATIENCE_SECONDS = 60.0
KEYS = (
    "alice:infer:5/hour",
    "bob:infer:none",
    "carol:infer:",
    "viewer:view:1/day",
    "admin:operate:2/hour",
    "dora:infer:3/hour",
)


@dataclass
class Running:
    url: str
    process: subprocess.Popen[bytes]
    folder: Path
    verify: ssl.SSLContext | bool = False
    """Without TLS nothing is verified, and no CAs need be read for each request."""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, method: str, path: str, key: str | None = None, **more: Any) -> httpx.Response:
        headers = {**({"X-API-Key": key_text(key)} if key else {}), **more.pop("headers", {})}
        return httpx.request(
            method, self.url + path, headers=headers, timeout=PATIENCE_SECONDS, verify=self.verify, **more
        )

    def infer(self, key: str | None = None, value: float = 1.0, model: str = "affine", **more: Any) -> httpx.Response:
        return self.ask("POST", f"/v2/models/{model}/infer", key, content=body(value), **more)

    def metric(self, line: str) -> float:
        """The value of a line of /metrics; 0 where there is none."""
        text = self.ask("GET", "/metrics", "viewer").text
        return next((float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(line + " ")), 0.0)

    def connect(self, receive_bytes: int | None = None) -> socket.socket:
        made = socket.socket()
        if receive_bytes is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        made.settimeout(PATIENCE_SECONDS)
        made.connect(("127.0.0.1", self.port))
        return made

    def talk(self, data: bytes) -> bytes:
        """Send this and read until the server closes."""
        with self.connect() as connection:
            with suppress(OSError):
                connection.sendall(data)
            return read_all(connection)


def body(value: float = 1.0) -> bytes:
    return orjson.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [value, value]}]})


def read_all(connection: socket.socket) -> bytes:
    found = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 20):
            found += chunk
    return found


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.02)
    return found


@contextmanager
def running(
    repository: Path, folder: Path, *, scheme: str = "http", files: int | None = None, **settings: str
) -> Iterator[Running]:
    folder.mkdir(exist_ok=True)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MODELKEEP_")}
    environ |= {"MODELKEEP_HOME": str(folder), "MODELKEEP_SECURITY__REQUIRE_KEYS": "true"}
    environ |= {f"MODELKEEP_{name.upper()}": value for name, value in settings.items()}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(4096)
        command = [sys.executable, "-m", "tests.integration.serving.entry_server", "--fd", str(listener.fileno())]
        command += ["--folder", str(folder), *(part for key in KEYS for part in ("--key", key))]
        limit = (files, files)
        process = subprocess.Popen(
            command,
            cwd=repository,
            env=environ,
            pass_fds=[listener.fileno()],
            preexec_fn=None if files is None else lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),
        )
        try:
            yield Running(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", process, folder)
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(
        repository,
        tmp_path_factory.mktemp("access"),
        logging__access="file",
        security__cors_origins='["https://app.example"]',
        performance__max_concurrent_requests="5",
        server__write_timeout_seconds="3",
        server__max_connections="60",
        profile="cpu",
    ) as found:
        yield found


def test_a_key_has_its_rate_and_is_told_when_to_come_again(server: Running) -> None:
    answers = [server.infer("alice") for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
    assert [answer.headers["ratelimit-remaining"] for answer in answers] == ["4", "3", "2", "1", "0", "0", "0"]
    refused = answers[-1]
    assert refused.headers["ratelimit-limit"] == "5"
    assert 600 < int(refused.headers["retry-after"]) <= 720, "5 an hour: one in twelve minutes"
    assert "key alice may make 5 inference requests" in refused.json()["error"] and "x-request-id" in refused.headers
    assert server.infer("bob").status_code == 200, "others go on"
    assert "ratelimit-limit" not in server.infer("bob").headers
    assert server.infer("carol").headers["ratelimit-limit"] == "60", "the server's own"
    line = 'modelkeep_rate_limit_hits_total{client="alice",endpoint="/v2/models/{model}/infer"}'
    assert server.metric(line) == 2
    # Reading and operating have no rate: nobody is kept from a rollback by it.
    assert [server.ask("GET", "/api/v2/model-info", "viewer").status_code for _ in range(3)] == [200] * 3
    assert [server.ask("DELETE", "/api/cache", "admin").status_code != 429 for _ in range(4)] == [True] * 4


def test_every_answer_has_an_id_and_its_time_and_is_counted_by_its_template(server: Running) -> None:
    count = 'modelkeep_http_requests_total{{endpoint="{}",method="{}",status="{}"}}'.format
    before = server.metric(count("/health", "GET", 200))
    for method, path, status in (
        ("GET", "/health", 200),
        ("GET", "/nothing", 401),
        ("POST", "/nothing", 401),
        ("PURGE", "/health", 401),
        ("GET", "/v2/health/live", 200),
        ("POST", INFER, 401),
    ):
        answer = server.ask(method, path)
        assert answer.status_code == status, path
        assert answer.headers["x-request-id"].startswith("test.012345.0.-."), path
        assert float(answer.headers["x-response-time"]) >= 0, path
    assert server.ask("GET", "/nothing", "viewer").status_code == 404
    answer = server.infer("bob", headers={"X-Request-ID": "mine"})
    assert answer.headers["x-request-id"] == "mine" and float(answer.headers["x-response-time"]) > 0
    assert server.metric(count("/health", "GET", 200)) == before + 1
    assert server.metric(count("other", "GET", 404)) >= 1
    assert server.metric(count("/v2/models/{model}/infer", "POST", 200)) >= 1
    assert 'nothing"' not in server.ask("GET", "/metrics", "viewer").text
    refused = server.talk(b"GARBAGE\r\n\r\n")
    assert b"400" in refused.splitlines()[0] and b"x-request-id: test.012345" in refused
    assert server.metric(count("other", "OTHER", 400)) >= 1


def test_no_answer_has_a_stack_trace(server: Running) -> None:
    fault = server.ask("POST", "/api/v2/update-models", "admin")
    assert fault.status_code == 500 and fault.json() == {"error": "internal error of the server; see its log"}
    broken = server.infer("bob", headers={"Inference-Header-Content-Length": "12"})
    for answer in (fault, broken, server.ask("POST", INFER, "bob", content=b"[" * 100_000)):
        assert answer.status_code >= 400 and "error" in answer.json()
        assert not any(word in answer.text for word in ("Traceback", ".py", "RuntimeError", "inside"))


def test_pages_of_a_named_origin_may_call_with_a_key(server: Running) -> None:
    asking = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    asking["Access-Control-Request-Headers"] = "x-api-key"
    for path in (INFER, "/api/v2/feedback"):
        preflight = server.ask("OPTIONS", path, headers=asking)
        assert preflight.status_code == 204, "a browser sends no key with it"
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert preflight.headers["access-control-allow-headers"] == "x-api-key"
        other = server.ask("OPTIONS", path, headers={**asking, "Origin": "https://evil.example"})
        assert other.status_code == 403 and "access-control-allow-origin" not in other.headers
    answer = server.infer("bob", headers={"Origin": "https://app.example"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "Origin" in answer.headers["vary"]
    unknown = server.infer(None, headers={"Origin": "https://app.example"})
    assert unknown.status_code == 401 and "access-control-allow-origin" in unknown.headers, "the page may read why"


def head(*headers: bytes, path: bytes = b"/v2/health/live") -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n" + b"".join(h + b"\r\n" for h in headers) + b"\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (head(*(b"x-%d: 1" % n for n in range(90))), b"200"),
        (head(*(b"x-%d: 1" % n for n in range(200))), b"431"),
        (head(b"x: " + b"y" * 30_000), b"200"),
        (head(b"x: " + b"y" * 40_000), b"431"),
        (head(b"x: " + b"y" * 3_000_000), b"431"),
        (head(b"y" * 3_000_000 + b": x"), b"431"),
        (head(path=b"/v2/health/live?" + b"q" * 8000), b"200"),
        (head(path=b"/v2/health/live?" + b"q" * 9000), b"414"),
        (head(path=b"/" + b"q" * 3_000_000), b"414"),
        (head(*(b"x-%d: %s" % (n, b"y" * 500) for n in range(90))), b"431"),
    ],
)
def test_headers_and_paths_have_an_end(server: Running, sent: bytes, status: bytes) -> None:
    with server.connect() as connection:
        with suppress(OSError):
            connection.sendall(sent.replace(b"host: x", b"host: x\r\nconnection: close"))
        answer = read_all(connection)
    # A reset may take the answer away where much is unread; a refusal it is all the same.
    assert answer.split(b" ", 2)[1:2] == [status] or (answer == b"" and len(sent) > 1_000_000), answer[:100]


def test_a_head_that_trickles_in_for_ever_is_refused_at_its_limit(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n")
        answer = b""
        for n in range(200):
            with suppress(OSError):
                connection.sendall(b"x-%d: %s\r\n" % (n, b"y" * 1000))
            if select.select([connection], [], [], 0.01)[0]:
                answer = read_all(connection)
                break
    assert b" 431 " in answer.splitlines()[0]


def test_trailers_are_ignored_and_have_an_end(server: Running) -> None:
    key = key_text("bob").encode()
    document = body()
    start = b"POST " + INFER.encode() + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n"
    chunk = b"\r\n%x\r\n%s\r\n0\r\n" % (len(document), document)
    assert b" 401 " in server.talk(start + chunk + b"x-api-key: " + key + b"\r\n\r\n").splitlines()[0]
    assert b" 200 " in server.talk(start + b"x-api-key: " + key + b"\r\n" + chunk + b"a: b\r\n\r\n").splitlines()[0]
    with server.connect() as connection:
        connection.sendall(start + b"x-api-key: " + key + b"\r\n" + chunk)
        with suppress(OSError):
            for _ in range(3000):
                connection.sendall(b"z" * 1000)
        answer = read_all(connection)
    assert answer == b"" or b" 431 " in answer.splitlines()[0], answer[:100]


def test_a_bad_request_behind_a_good_one_does_not_take_its_answer(server: Running) -> None:
    slow = b"POST /v2/models/slow/infer HTTP/1.1\r\nhost: x\r\nx-api-key: %s\r\ncontent-length: %d\r\n\r\n"
    document = body(0.3)
    first = slow % (key_text("bob").encode(), len(document)) + document
    for second in (b"GARBAGE\r\n\r\n", head(b"x: " + b"y" * 40_000), head(path=b"/" + b"q" * 9000)):
        answer = server.talk(first + second)
        assert answer.startswith(b"HTTP/1.1 200 "), answer[:60]
        assert answer.count(b"HTTP/1.1 ") == 1


def test_who_takes_nothing_of_an_answer_is_cut_off_and_its_memory_is_free(server: Running) -> None:
    process = psutil.Process(server.process.pid)
    request = b"POST /v2/models/large/infer HTTP/1.1\r\nhost: x\r\nx-api-key: %s\r\ncontent-length: %d\r\n\r\n%s"
    wanted = orjson.dumps({**orjson.loads(body()), "parameters": {"binary_data_output": True}})
    data = request % (key_text("bob").encode(), len(wanted), wanted)
    before = len(process.net_connections())
    with ExitStack() as stack:
        stuck = [stack.enter_context(server.connect(receive_bytes=4096)) for _ in range(4)]
        for connection in stuck:
            connection.sendall(data * 2)
        until(lambda: len(process.net_connections()) > before)
        until(lambda: len(process.net_connections()) <= before)
        for connection in stuck:
            assert len(read_all(connection)) < LARGE_BYTES, "it was not sent for ever"
    assert server.infer("bob").status_code == 200
    # Who reads, however late, gets all of it.
    with server.connect() as reader:
        reader.sendall(data.replace(b"host: x", b"host: x\r\nconnection: close"))
        assert len(read_all(reader)) > LARGE_BYTES


def test_idle_connections_beyond_the_limit_are_told_to_come_again(server: Running) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(300)]
        refused = []
        for connection in idle:
            # Those that are in stay silent; the others are told and closed.
            if select.select([connection], [], [], 0 if refused else 0.05)[0]:
                refused.append(read_all(connection))
        until(lambda: sum(bool(select.select([c], [], [], 0)[0]) for c in idle) >= 230)
        told = [answer for answer in refused if answer]
        assert told and all(b" 503 " in answer.splitlines()[0] and b"retry-after: 1" in answer for answer in told)
    until(lambda: _answers(server))


def _answers(server: Running) -> bool:
    with suppress(httpx.HTTPError):
        return server.ask("GET", "/health").status_code == 200
    return False


def test_a_process_without_descriptors_waits_and_does_not_spin(repository: Path, tmp_path: Path) -> None:
    with running(repository, tmp_path, files=200, server__max_connections="5000", profile="cpu") as found:
        until(lambda: _answers(found))
        process = psutil.Process(found.process.pid)
        with ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(found.connect())
            began, used = time.monotonic(), sum(process.cpu_times()[:2])
            time.sleep(1.0)  # the measure is of CPU in that time
            share = (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - began)
            assert share < 0.5, f"{share:.0%} of a core for nothing"
        until(lambda: _answers(found))


def test_a_key_that_floods_leaves_places_to_others(server: Running) -> None:
    ended = threading.Event()
    refused = 'modelkeep_places_refused_total{reason="full"}'

    def flood(_: int) -> list[int]:
        codes = []
        while not ended.is_set():
            codes.append(server.infer("bob", 0.1, "slow").status_code)
        return codes

    until(lambda: server.metric("modelkeep_requests_in_flight") == 0)
    before = server.metric(refused)
    with ThreadPoolExecutor(12) as pool:
        try:
            flooding = [pool.submit(flood, n) for n in range(12)]
            until(lambda: server.metric(refused) > before)
            mine = [server.infer("carol", 0.01, "slow").status_code for _ in range(3)]
            mine += [server.infer("carol").status_code for _ in range(3)]
        finally:
            ended.set()
        codes = [code for one in flooding for code in one.result()]
    assert mine == [200] * 6, "five places, all of them the other key's"
    assert codes.count(200) > 0 and codes.count(429) > 0 and set(codes) <= {200, 429}
    until(lambda: server.metric("modelkeep_requests_in_flight") == 0)


def test_the_access_log_has_a_line_of_each_request_and_no_secret(server: Running) -> None:
    marked = {"X-Request-ID": "the-logged-one"}
    assert server.infer("bob", 987654321.0, headers=marked).status_code == 200
    assert (
        server.ask("GET", "/secret-path?secret=query", "viewer", headers={"X-Request-ID": "the-other"}).status_code
        == 404
    )
    with server.connect() as leaving:
        document = body(3.0)
        leaving.sendall(
            b"POST /v2/models/slow/infer HTTP/1.1\r\nhost: x\r\nx-request-id: the-gone\r\nx-api-key: %s\r\n"
            b"content-length: %d\r\n\r\n%s" % (key_text("bob").encode(), len(document), document)
        )
        until(lambda: server.metric("modelkeep_requests_in_flight") == 1)
    path = server.folder / "logs" / "access.log"

    def found() -> dict[str, dict[str, Any]] | None:
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        rows = {row["id"]: row for row in map(json.loads, whole)}
        return rows if {"the-logged-one", "the-other", "the-gone"} <= rows.keys() else None

    rows = until(found)
    logged = rows["the-logged-one"]
    assert (logged["status"], logged["path"], logged["model"]) == (200, "/v2/models/{model}/infer", "affine")
    assert logged["key"] == key_text("bob")[3:15] and logged["model_seconds"] <= logged["seconds"]
    assert (rows["the-other"]["status"], rows["the-other"]["path"]) == (404, "other")
    assert (rows["the-gone"]["status"], rows["the-gone"]["model"]) == (499, "slow")
    text = path.read_text()
    assert not any(word in text for word in (key_text("bob"), "987654321", "secret"))


def test_tls_speaks_renews_and_asks_for_certificates(repository: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    trusted = ssl.create_default_context(cafile=str(authority.ca))
    files = {"server__tls_certificate": str(authority.certificate), "server__tls_key": str(authority.key)}

    def shown(port: int, context: ssl.SSLContext = trusted) -> str:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as wrapped,
        ):
            found = wrapped.getpeercert()
            assert found is not None
            return str(found["serialNumber"])

    with running(repository, tmp_path / "one", scheme="https", profile="cpu", **files) as found:
        found.verify = trusted
        assert found.infer("bob").status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{found.url}/health", timeout=PATIENCE_SECONDS)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{found.port}/health", timeout=PATIENCE_SECONDS)
        old = ssl.create_default_context(cafile=str(authority.ca))
        with pytest.warns(DeprecationWarning):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            shown(found.port, old)
        before = shown(found.port)
        with httpx.Client(base_url=found.url, verify=trusted, timeout=PATIENCE_SECONDS) as kept:
            assert kept.get("/health").status_code == 200
            authority.issue()
            until(lambda: shown(found.port) != before)
            assert kept.get("/health").status_code == 200, "a connection that was there goes on"
        assert found.ask("GET", "/api/v2/model-info", "viewer").json()["renewals"] == 1
        # One that says nothing more, not even farewell, does not hold up a stop.
        idle = trusted.wrap_socket(found.connect(), server_hostname="localhost")
        idle.sendall(head())
        assert idle.recv(12) == b"HTTP/1.1 200"
        found.process.terminate()
        assert found.process.wait(25) == 0
        idle.close()

    with running(
        repository, tmp_path / "two", scheme="https", profile="cpu", server__tls_client_ca=str(authority.ca), **files
    ) as found:
        found.verify = trusted
        with pytest.raises(httpx.HTTPError):  # no certificate
            found.ask("GET", "/health")
        found.verify = ssl.create_default_context(cafile=str(authority.ca))
        found.verify.load_cert_chain(authority.certificate, authority.key)
        assert found.ask("GET", "/health").status_code == 200


def test_servers_share_a_rate_in_redis_and_go_on_alone_without_it(
    repository: Path, tmp_path: Path, program: Callable[[str], Path], free_port: Callable[[], int]
) -> None:
    server = RedisServer(program("redis-server"), tmp_path, free_port())
    settings = {"redis_url": server.url, "profile": "cpu", "cache__redis_timeout_seconds": "0.5"}
    try:
        with (
            running(repository, tmp_path / "one", **settings) as one,
            running(repository, tmp_path / "two", **settings) as two,
        ):
            for found in (one, two):
                until(lambda found=found: found.metric("modelkeep_rate_limits_shared") == 1)
            codes = [found.infer("alice").status_code for found in (one, two, one, two, one, two, one)]
            assert codes == [200] * 5 + [429] * 2, "five of both together"
            refused = two.infer("alice")
            assert 600 < int(refused.headers["retry-after"]) <= 720

            server.signal(signal.SIGSTOP)
            assert [one.infer("carol").status_code for _ in range(5)] == [200] * 5, "nobody waits for it"
            until(lambda: one.metric("modelkeep_rate_limits_shared") == 0)
            server.signal(signal.SIGCONT)
            until(lambda: one.metric("modelkeep_rate_limits_shared") == 1)
            server.kill()
            for found in (one, two):
                codes = [found.infer("dora").status_code for _ in range(5)]
                assert codes == [200] * 3 + [429] * 2, "each server counts alone then"
    finally:
        server.close()


def test_the_script_keeps_to_the_rate_by_the_clock_of_redis_alone_and_in_a_cluster(
    program: Callable[[str], Path], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    def ready(found: SharedBuckets) -> bool:
        """Whether every node is there that has one of these keys: of a cluster, each is connected to by itself."""
        keys = (found._prefix + key for key in ("k0", "k1", "k2", "bad"))
        return found.usable and (not found._cluster or all(map(found._client.ready, keys)))

    async def scenario(url: str, poison: Callable[[str], object]) -> None:
        one, other = (SharedBuckets(url, "test", timeout_seconds=2.0) for _ in range(2))
        for found in (one, other):
            found.start()
        try:
            await soon(lambda: ready(one) and ready(other))
            rate = Rate(20, 1)
            began = time.monotonic()
            verdicts = await asyncio.gather(
                *(found.take(f"k{n % 3}", rate) for n in range(60) for found in (one, other))
            )
            took = time.monotonic() - began
            allowed = sum(v is not None and v.allowed for v in verdicts)
            assert all(v is not None for v in verdicts)
            assert 60 <= allowed <= 3 * (20 + 20 * took + 1)
            for key in ("k0", "k1", "k2"):
                refused = next(
                    v for v in [await one.take(key, rate) for _ in range(200)] if v is not None and not v.allowed
                )
                assert 0 < refused.wait_seconds <= 0.05 + 1e-6
            poison("modelkeep:rate:test:bad")
            found = await one.take("bad", rate)
            assert found is None or found.allowed, "what stands there in its place is no verdict"
        finally:
            await one.stop()
            await other.stop()

    with ExitStack() as stack:
        alone = RedisServer(program("redis-server"), tmp_path, free_port())
        stack.callback(alone.close)
        client = redis.Redis.from_url(alone.url)
        stack.callback(client.close)
        asyncio.run(scenario(alone.url, lambda name: client.set(name, "x")))
        client.flushall()
        asyncio.run(scenario(alone.url, lambda name: client.hset(name, mapping={"tokens": "nan", "at": "-inf"})))
        folder = tmp_path / "cluster"
        folder.mkdir()
        cluster = RedisCluster(program("redis-server"), folder, free_port)
        stack.callback(cluster.close)
        asyncio.run(scenario(cluster.url, lambda name: None))


async def soon(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)
