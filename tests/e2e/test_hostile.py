"""Clients that mean harm, or are badly broken, against a real server: others are served meanwhile, and nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest

from serving.api import MOST_OF_OTHERS_BYTES
from tests.e2e.harness import Box, box, wait_for
from tests.unit.serving.helpers import affine_model, identity_model, request

PATIENCE_SECONDS = 2
"""What this server gives a client to send a request, and to take its answer."""
HEAD = b"POST /v2/models/fuzz/infer HTTP/1.1\r\nhost: localhost\r\n"
GOOD = orjson.dumps(request(1, 2))
WHOLE = HEAD + b"content-length: %d\r\n\r\n" % len(GOOD) + GOOD
LARGE_BYTES = 4_000_000
DEADLINE_SECONDS = 60.0
SPARE_DESCRIPTORS = 4
"""The registry's own come and go with each poll. Every test here opens many more than that."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    from onnx import TensorProto

    folder: Path = tmp_path_factory.mktemp("hostile")
    with box(folder / "box") as made:
        for name, path in {
            "fuzz": affine_model(folder / "fuzz.onnx"),
            "flags": identity_model(folder / "flags.onnx", TensorProto.BOOL),
        }.items():
            made.register("1", path, model=name)
            made.settle_by_hand("1", model=name)
        made.serve(
            MODELKEEP_SERVER__REQUEST_TIMEOUT_SECONDS=str(PATIENCE_SECONDS),
            MODELKEEP_SERVER__WRITE_TIMEOUT_SECONDS=str(PATIENCE_SECONDS),
            MODELKEEP_SERVER__KEEP_ALIVE_SECONDS="300",
            MODELKEEP_LOG_LEVEL="ERROR",
        )
        yield made


@pytest.fixture(autouse=True)
def nothing_stays(found: Box) -> Iterator[None]:
    """After each test: the same process, no connection, nothing in flight, as many descriptors as before, and a good request is served."""
    server = psutil.Process(found.child_pid())
    assert serves(found)
    before = server.num_fds()
    yield
    assert serves(found)
    assert found.child_pid() == server.pid, found.log("server").read_text()[-3000:]

    seen: dict[str, int] = {}

    def rests() -> bool:
        seen.update(connections=connections(server), in_flight=found.in_flight(), descriptors=server.num_fds())
        return not seen["connections"] and not seen["in_flight"] and seen["descriptors"] <= before + SPARE_DESCRIPTORS

    try:
        wait_for("the server to come to rest", rests, every=0.1)
    except AssertionError as error:
        raise AssertionError(f"{error}: {seen}, descriptors before {before}") from error
    assert "Traceback" not in found.log("server").read_text()


def serves(found: Box) -> bool:
    answer = httpx.post(f"{found.url}/v2/models/fuzz/infer", content=GOOD, timeout=60)
    return answer.status_code == 200 and bool(answer.json()["outputs"][0]["data"] == [2, 4])


def connections(server: psutil.Process) -> int:
    return sum(c.status != psutil.CONN_LISTEN for c in server.net_connections("tcp"))


async def connect(found: Box) -> Streams:
    return await asyncio.open_connection("127.0.0.1", found.port)


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """What still comes. A reset is a close as well."""
    got = b""
    async with asyncio.timeout(DEADLINE_SECONDS):
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(1 << 16):
                got += chunk
    return got


async def others_are_served(found: Box, while_this: Callable[[], Awaitable[Any]]) -> int:
    """Health and inference all the while on a connection of their own, each answer 200; how many there were."""
    task, served = asyncio.ensure_future(while_this()), 0
    async with httpx.AsyncClient(base_url=found.url, timeout=60) as client:
        while not task.done() or not served:
            health = await client.get("/health")
            answer = await client.post("/v2/models/fuzz/infer", content=GOOD)
            assert (health.status_code, answer.status_code) == (200, 200), (health.text, answer.text)
            served += 1
            await asyncio.sleep(0.02)
    await task
    return served


def test_who_sends_a_byte_now_and_then_is_given_up_while_others_are_served(found: Box) -> None:
    begun = [
        HEAD,
        HEAD + b"content-length: 1000\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\n",
    ]

    async def drip(number: int) -> None:
        reader, writer = await connect(found)
        answer = asyncio.ensure_future(until_closed(reader))
        with contextlib.suppress(ConnectionError):
            writer.write(begun[number % 4])
            while not answer.done():
                writer.write(b"1\r\nx\r\n" if number % 4 == 2 else b"x")
                await writer.drain()
                await asyncio.sleep(0.1)
        writer.transport.abort()
        got = await answer
        assert got == b"" or got.startswith(b"HTTP/1.1 408 "), got

    async def scenario() -> None:
        assert await others_are_served(found, lambda: asyncio.gather(*(drip(number) for number in range(80)))) > 5

    asyncio.run(scenario())


def test_a_thousand_connections_that_ask_nothing_keep_nobody_from_being_served(found: Box) -> None:
    async def scenario() -> None:
        idle: list[Streams] = []
        for _ in range(10):
            idle += await asyncio.gather(*(connect(found) for _ in range(100)))

        async def ask_once() -> None:
            # Each has been answered once, so that it is a connection kept alive, not one that sends too slowly.
            for _, writer in idle:
                writer.write(b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
            for reader, _ in idle:
                async with asyncio.timeout(DEADLINE_SECONDS):
                    assert (await reader.readuntil(b"}")).endswith(b'{"live":true}')

        await others_are_served(found, ask_once)
        assert connections(psutil.Process(found.child_pid())) >= 1000
        assert await others_are_served(found, lambda: asyncio.sleep(0.5)) >= 1
        assert not any(reader.at_eof() for reader, _ in idle), "they may stay"
        for _, writer in idle:
            writer.transport.abort()

    asyncio.run(scenario())


def test_clients_that_do_not_read_their_answers_are_cut_off(found: Box) -> None:
    document = {
        "inputs": [
            {"name": "x", "shape": [LARGE_BYTES], "datatype": "BOOL", "parameters": {"binary_data_size": LARGE_BYTES}}
        ],
        "parameters": {"binary_data_output": False},
    }
    text = orjson.dumps(document)
    head = b"POST /v2/models/flags/infer HTTP/1.1\r\nhost: localhost\r\ninference-header-content-length: %d\r\n" % len(
        text
    )
    asked = head + b"content-length: %d\r\n\r\n" % (len(text) + LARGE_BYTES) + text + b"\1" * LARGE_BYTES

    def ask() -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(DEADLINE_SECONDS)
        client.connect(("127.0.0.1", found.port))
        client.sendall(asked)
        return client

    server = psutil.Process(found.child_pid())

    async def scenario() -> None:
        clients = await asyncio.gather(*(asyncio.to_thread(ask) for _ in range(8)))
        ports = {client.getsockname()[1] for client in clients}

        async def all_cut_off() -> None:
            # The clients cannot see it: what the system has taken over is offered to them still.
            deadline = time.monotonic() + DEADLINE_SECONDS
            while any(c.raddr and c.raddr.port in ports for c in server.net_connections("tcp")):
                assert time.monotonic() < deadline, "a client that takes nothing is still connected"
                await asyncio.sleep(0.1)

        try:
            await others_are_served(found, all_cut_off)
        finally:
            for client in clients:
                client.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("cut", [0, 20, len(HEAD) + 30, len(WHOLE) - 3, len(WHOLE)])
def test_a_client_that_says_it_has_no_more_gets_an_answer_or_a_close(found: Box, cut: int) -> None:
    async def scenario() -> None:
        for _ in range(20):
            reader, writer = await connect(found)
            writer.write(WHOLE[:cut])
            writer.write_eof()
            got = await until_closed(reader)
            assert got == b"" or got[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 400", b"HTTP/1.1 408"), got
            writer.close()

    asyncio.run(scenario())


def test_connections_that_are_reset_in_the_middle_leave_nothing_behind(found: Box) -> None:
    async def scenario() -> None:
        async def reset(number: int) -> None:
            _, writer = await connect(found)
            writer.write(WHOLE[: number * len(WHOLE) // 250] if number < 250 else WHOLE * 5)
            await writer.drain()
            if number % 2:
                await asyncio.sleep(0)
            linger = struct.pack("ii", 1, 0)  # the system sends a reset in place of an end
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

        async def all_of_them() -> None:
            for first in range(0, 300, 50):
                await asyncio.gather(*(reset(number) for number in range(first, first + 50)))

        await others_are_served(found, all_of_them)

    asyncio.run(scenario())


def open_and_close(found: Box, count: int) -> None:
    async def scenario() -> None:
        async def connect_and_go() -> None:
            for first in range(0, count, 200):
                streams = await asyncio.gather(*(connect(found) for _ in range(first, min(first + 200, count))))
                for _, writer in streams:
                    writer.transport.abort()
                await asyncio.sleep(0)

        await others_are_served(found, connect_and_go)

    asyncio.run(scenario())


def test_two_thousand_connections_without_a_byte_are_nothing(found: Box) -> None:
    open_and_close(found, 2000)


@pytest.mark.long
def test_ten_thousand_connections_without_a_byte_are_nothing(found: Box) -> None:
    open_and_close(found, 10_000)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_slow_clients_that_come_again_and_again_for_long_keep_nobody_from_being_served(found: Box) -> None:
    """For MODELKEEP_TEST_SECONDS (300): 500 clients at a time that send a byte now and then, each replaced when it is given up."""
    seconds = float(os.environ.get("MODELKEEP_TEST_SECONDS", "300"))

    async def drip(until: float) -> None:
        while time.monotonic() < until:
            reader, writer = await connect(found)
            answer = asyncio.ensure_future(until_closed(reader))
            with contextlib.suppress(ConnectionError):
                writer.write(HEAD)
                while not answer.done() and time.monotonic() < until:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.5)
            writer.transport.abort()
            await answer

    async def scenario() -> None:
        until = time.monotonic() + seconds
        await others_are_served(found, lambda: asyncio.gather(*(drip(until) for _ in range(500))))

    asyncio.run(scenario())


# What one request may try

INNER = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
SMUGGLING = {
    "a length beside chunks": HEAD + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks beside a length": HEAD + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"content-length: 0\r\ncontent-length: 41\r\n\r\n",
    "the same length twice": HEAD + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}",
    "a list of lengths": HEAD + b"content-length: 2, 2\r\n\r\n{}",
    "a length with a sign": HEAD + b"content-length: +2\r\n\r\n{}",
    "a length below zero": HEAD + b"content-length: -1\r\n\r\n{}",
    "a length in hexadecimal": HEAD + b"content-length: 0x2\r\n\r\n{}",
    "a length with a zero byte": HEAD + b"content-length: 2\x00\r\n\r\n{}",
    "a folded length": HEAD + b"content-length:\r\n 2\r\n\r\n{}",
    "chunks that are not last": HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunks by another name": HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two ways of transfer": HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n",
    "a blank before the colon": HEAD + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    "a tab that is none": HEAD + b"transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n",
    "lines that end too soon": HEAD + b"content-length: 2\n\n{}",
    "a lone carriage return": HEAD + b"x: a\rcontent-length: 2\r\n\r\n",
    "an extension with a line in it": CHUNKED + b"0;a\nb\r\n\r\n",
    "a size that ends too soon": CHUNKED + b"2\n{}\r\n0\r\n\r\n",
    "a size with 0x": CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n",
    "a size beyond all numbers": CHUNKED + b"fffffffffffffffff\r\n{}",
    "a chunk that does not end": CHUNKED + b"2\r\n{}0\r\n\r\n",
}


def test_no_shape_of_a_request_hides_another_one_in_it(found: Box) -> None:
    """Each is refused, and its connection closed: what follows it is nobody's request."""

    async def scenario() -> dict[str, tuple[int, bytes, bool]]:
        seen = {}
        for name, data in SMUGGLING.items():
            reader, writer = await connect(found)
            writer.write(data + INNER)
            got = await until_closed(reader)
            writer.transport.abort()
            seen[name] = (got.count(b"HTTP/1.1 "), got[9:12], b"boot_id" in got)
        return seen

    assert asyncio.run(scenario()) == dict.fromkeys(SMUGGLING, (1, b"400", False))


def test_a_get_with_a_body_does_not_have_it_taken_for_a_request(found: Box) -> None:
    async def scenario() -> bytes:
        reader, writer = await connect(found)
        writer.write(
            b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(INNER)
            + INNER
        )
        got = await until_closed(reader)
        writer.transport.abort()
        return got

    got = asyncio.run(scenario())
    assert got.count(b"HTTP/1.1 ") == 1 and b"boot_id" not in got


def post(found: Box, body: bytes, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{found.url}/v2/models/fuzz/infer", content=body, headers=named, timeout=60)


def test_a_length_that_no_body_has_is_refused_before_any_of_it_comes(found: Box) -> None:
    async def scenario() -> list[bytes]:
        statuses = []
        for length in (10_000_001, 2**31, 2**63 - 1):
            reader, writer = await connect(found)
            writer.write(HEAD + b"content-length: %d\r\n\r\n" % length)
            async with asyncio.timeout(DEADLINE_SECONDS):
                statuses.append((await reader.readline())[9:12])
            writer.transport.abort()
        return statuses

    assert asyncio.run(scenario()) == [b"413"] * 3


def test_what_is_small_on_the_way_and_huge_once_unpacked_is_refused_and_never_held(found: Box) -> None:
    server = psutil.Process(found.child_pid())
    bomb = gzip.compress(bytes(500_000_000), 9)
    assert len(bomb) < 500_000
    before = server.memory_info().rss
    answers = [post(found, bomb, content_encoding="gzip") for _ in range(3)]
    assert {answer.status_code for answer in answers} == {413}
    assert server.memory_info().rss - before < 150_000_000


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 50_000 + b"]" * 50_000,
        b'{"inputs":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=["open lists", "open objects", "closed lists", "in a request"],
)
def test_json_as_deep_as_a_well_is_refused(found: Box, body: bytes) -> None:
    for path in ("/v2/models/fuzz/infer", "/v2/repository/index", "/api/v2/feedback", "/v1/generate"):
        answer = httpx.post(f"{found.url}{path}", content=body, timeout=60)
        too_long = path == "/v2/repository/index" and len(body) > MOST_OF_OTHERS_BYTES
        assert answer.status_code in ((413,) if too_long else (400, 422)), (path, answer.status_code)
        assert list(answer.json()) == ["error"]
