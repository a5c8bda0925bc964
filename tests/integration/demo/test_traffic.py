"""The client as a process of its own, against a server that answers, fails, breaks off and refuses on request."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from modelkeep.demo import data
from modelkeep.demo.answers import TrafficLog, read_log

SCORES = np.arange(10, dtype=np.float32)
Respond = Callable[[int, bytes, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """A raw HTTP server in a thread: one request a connection, answered by `respond`."""

    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        self.requests: list[bytes] = []
        self.connections = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self.port = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._started.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        self._server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length"))
            body = await reader.readexactly(length)
            self.requests.append(head + body)
            await self.respond(len(self.requests) - 1, head, writer)
            await reader.read()  # until the client closes
        except ConnectionError:
            pass  # the client closes by a reset, once it has its answer
        finally:
            writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


async def answer(_: int, head: bytes, writer: asyncio.StreamWriter) -> None:
    output: dict[str, object] = {"name": "scores", "datatype": "FP32", "shape": [1, 10]}
    extra, tail = "", b""
    binary = b"Inference-Header-Content-Length" in head
    output |= {"parameters": {"binary_data_size": 40}} if binary else {"data": SCORES.tolist()}
    body = json.dumps({"model_name": "digits", "model_version": "1", "outputs": [output]}).encode()
    if binary:
        extra, tail = f"Inference-Header-Content-Length: {len(body)}\r\n", SCORES.tobytes()
    lines = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body + tail)}\r\nX-Model-Version: 1\r\n{extra}\r\n"
    writer.write(lines.encode())
    await writer.drain()
    writer.write(body + tail)
    await writer.drain()


@pytest.fixture
def serve() -> Iterator[Callable[[Respond], Server]]:
    servers: list[Server] = []

    def start(respond: Respond) -> Server:
        servers.append(Server(respond))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.write_traffic(tmp_path_factory.mktemp("traffic") / "traffic.npz")


def command(port: int, log: Path, images: Path, *more: str) -> list[str]:
    client = [sys.executable, "-m", "modelkeep.demo.traffic", "--url", f"http://127.0.0.1:{port}"]
    return [*client, "--log", str(log), "--data", str(images), *more]


def run(port: int, log: Path, images: Path, *more: str) -> TrafficLog:
    subprocess.run(command(port, log, images, *more), check=True, timeout=60)
    return read_log(log)


def test_each_request_is_sent_once_on_its_own_connection_and_logged_once(
    serve: Callable[[Respond], Server], images: Path, tmp_path: Path
) -> None:
    server = serve(answer)
    log = run(server.port, tmp_path / "log", images, "--rate", "200", "--seconds", "1")
    assert log.end is not None and log.end["sent"] == len(log.requests) == len(server.requests) == server.connections
    assert len(log.requests) > 100
    assert sorted(r.index for r in log.requests) == list(range(len(log.requests)))
    assert {r.error for r in log.requests} == {None}
    assert {r.version for r in log.requests} == {"1"}
    assert all(r.answer is not None and np.array_equal(r.answer, SCORES) for r in log.requests)
    assert all(r.scheduled <= r.sent <= r.finished for r in log.requests)
    assert sum(r.binary for r in log.requests) == len(log.requests) // 3
    assert log.end["max_lateness_seconds"] >= 0


def test_the_same_seed_sends_the_same_images(serve: Callable[[Respond], Server], images: Path, tmp_path: Path) -> None:
    server = serve(answer)
    logs = [run(server.port, tmp_path / n, images, "--seconds", "0.3", "--seed", s) for n, s in [("a", "5"), ("b", "5"), ("c", "6")]]  # fmt: skip
    first, second, other = ([r.image for r in sorted(log.requests, key=lambda r: r.index)][:40] for log in logs)
    assert first == second != other


def test_every_kind_of_failure_has_its_name(serve: Callable[[Respond], Server], images: Path, tmp_path: Path) -> None:
    async def fail(number: int, head: bytes, writer: asyncio.StreamWriter) -> None:
        match number % 5:
            case 0:
                await answer(number, head, writer)
            case 1:
                body = b'{"error": "Gather: out of range"}'
                lines = (
                    f"HTTP/1.1 500 Internal Server Error\r\nX-Model-Version: 4\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                writer.write(lines.encode() + body)
            case 2:
                writer.close()
            case 3:
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                writer.transport.abort()
            case _:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
                await writer.drain()
                writer.close()

    log = run(serve(fail).port, tmp_path / "log", images, "--rate", "200", "--seconds", "0.5")
    assert {r.error for r in log.requests} == {None, "http 500", "eof", "reset"}
    failed = next(r for r in log.requests if r.status == 500)
    assert failed.version == "4"
    assert failed.message is not None and "Gather" in failed.message
    assert log.end is not None and log.end["sent"] == len(log.requests)


def test_where_nobody_listens_each_request_is_refused_and_none_is_tried_again(images: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        log = run(unused.getsockname()[1], tmp_path / "log", images, "--rate", "100", "--seconds", "0.3")
    assert log.requests
    assert {r.error for r in log.requests} == {"refused"}


def test_at_sigterm_it_waits_for_what_is_under_way_and_closes_its_log(
    serve: Callable[[Respond], Server], images: Path, tmp_path: Path
) -> None:
    async def slowly(number: int, head: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        await answer(number, head, writer)

    server, log = serve(slowly), tmp_path / "log"
    client = subprocess.Popen(command(server.port, log, images, "--rate", "50"))
    until = time.monotonic() + 20
    while time.monotonic() < until and len(server.requests) < 20:
        time.sleep(0.02)
    client.send_signal(signal.SIGTERM)
    assert client.wait(20) == 0
    found = read_log(log)
    assert found.end is not None and found.end["sent"] == len(found.requests) >= 20
    assert {r.error for r in found.requests} == {None}


def test_the_client_goes_on_sending_while_the_server_is_stuck(
    serve: Callable[[Respond], Server], images: Path, tmp_path: Path
) -> None:
    """An open loop: a stall holds up answers, never requests."""
    release = threading.Event()

    async def stuck(number: int, head: bytes, writer: asyncio.StreamWriter) -> None:
        while not release.is_set():
            await asyncio.sleep(0.01)
        await answer(number, head, writer)

    server, log = serve(stuck), tmp_path / "log"
    client = subprocess.Popen(command(server.port, log, images, "--rate", "200", "--seconds", "1.5"))
    until = time.monotonic() + 20
    while time.monotonic() < until and len(server.requests) < 100:
        time.sleep(0.02)
    assert len(server.requests) >= 100  # and not one was answered yet
    release.set()
    assert client.wait(30) == 0
    assert {r.error for r in read_log(log).requests} == {None}


def test_a_wrong_call_ends_with_a_sentence(images: Path, tmp_path: Path) -> None:
    wrong = command(1, tmp_path / "log", tmp_path / "missing.npz")
    ended = subprocess.run(wrong, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "missing.npz" in ended.stderr
    assert "Traceback" not in ended.stderr
