"""Who has not agreed on TLS counts as a connection and has its time, and what comes with the last of a handshake is not lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from serving.http.handshakes import BEYOND_THE_LIMIT, Handshakes
from tests.certificates import Authority
from tests.unit.serving.helpers import until


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


class Echo(asyncio.Protocol):
    """Sends back what comes."""

    def __init__(self, there: set[Echo]) -> None:
        self._there = there

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._there.add(self)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._there.discard(self)


class Listening:
    def __init__(self, authority: Authority, *, most: int, timeout_seconds: float) -> None:
        self.there: set[Echo] = set()
        self.client = ssl.create_default_context(cafile=str(authority.ca))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority.certificate, authority.key)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.made = Handshakes(
            lambda: Echo(self.there), context, self.listener, self.there, most, timeout_seconds=timeout_seconds
        )

    async def silent(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One that connects and says nothing."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def spoken(self, data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.client, server_hostname="localhost"
        )
        writer.write(data)
        found = await reader.readexactly(len(data))
        writer.close()
        return found


def run(
    authority: Authority,
    test: Callable[[Listening], Awaitable[None]],
    *,
    most: int = 100,
    timeout_seconds: float = 60.0,
) -> None:
    async def whole() -> None:
        made = Listening(authority, most=most, timeout_seconds=timeout_seconds)
        try:
            await asyncio.wait_for(test(made), 60)
        finally:
            made.made.close()
            await made.made.wait_closed()
            for task in made.made.under_way:
                task.cancel()
            made.listener.close()

    uvloop.run(whole())


def test_who_never_finishes_counts_and_others_are_spoken_to(authority: Authority) -> None:
    async def test(found: Listening) -> None:
        quiet = [await found.silent() for _ in range(5)]
        await until(lambda: len(found.made.under_way) == 5)
        assert await found.spoken(b"hello") == b"hello"
        for _, writer in quiet:
            writer.close()
        await until(lambda: not found.made.under_way)
        assert found.made.failed == 5

    run(authority, test)


def test_who_does_not_finish_in_time_is_cut_off(authority: Authority) -> None:
    async def test(found: Listening) -> None:
        reader, writer = await found.silent()
        writer.write(b"\x16\x03\x01")  # the begin of a hello
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        await until(lambda: found.made.failed == 1 and not found.made.under_way)
        writer.close()

    run(authority, test, timeout_seconds=0.2)


def test_beyond_the_limit_nobody_is_let_in_until_others_go(authority: Authority) -> None:
    async def test(found: Listening) -> None:
        quiet = [await found.silent() for _ in range(2 + BEYOND_THE_LIMIT)]
        await until(lambda: len(found.made.under_way) == 2 + BEYOND_THE_LIMIT)
        reader, writer = await found.silent()
        assert await reader.read() == b"", "closed at once"
        writer.close()
        assert found.made.turned_away == 1
        for _, one in quiet:
            one.close()
        await until(lambda: not found.made.under_way)
        assert await found.spoken(b"hello") == b"hello"

    run(authority, test, most=2)


def test_what_comes_with_the_last_of_the_handshake_is_heard(authority: Authority) -> None:
    async def test(found: Listening) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        side = found.client.wrap_bio(incoming, outgoing, server_hostname="localhost")
        reader, writer = await found.silent()
        while True:
            try:
                side.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await reader.read(65536))
        side.write(b"at once")
        writer.write(outgoing.read())  # the end of the handshake and the first words, in one piece
        heard = b""
        while not heard:
            incoming.write(await reader.read(65536))
            try:
                heard = side.read(100)
            except ssl.SSLWantReadError:
                continue
        assert heard == b"at once"
        writer.close()

    run(authority, test)


def test_who_speaks_no_tls_is_no_fault_of_ours(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    async def test(found: Listening) -> None:
        reader, writer = await found.silent()
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        await until(lambda: found.made.failed == 1)
        assert [
            record for record in caplog.records if record.levelno >= logging.WARNING and record.name != "asyncio"
        ] == []
        writer.close()

    run(authority, test)


def test_without_descriptors_it_waits_and_does_not_spin(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(found: Listening) -> None:
        class Full:
            asked = 0

            def accept(self) -> None:
                self.asked += 1
                raise OSError(24, "Too many open files")

            def fileno(self) -> int:
                return found.listener.fileno()

        full, real = Full(), found.made.listener
        found.made.listener = full  # type: ignore[assignment]
        speaking = asyncio.create_task(found.spoken(b"hello"))
        await until(lambda: full.asked)
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert full.asked == 1
        found.made.listener = real
        assert await speaking == b"hello"

    run(authority, test)


def test_a_stop_accepts_no_more_and_lets_who_shakes_hands_finish(authority: Authority, tmp_path: Path) -> None:
    async def test(found: Listening) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        side = found.client.wrap_bio(incoming, outgoing, server_hostname="localhost")
        reader, writer = await found.silent()
        await until(lambda: found.made.under_way)
        found.made.close()
        while True:
            try:
                side.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await reader.read(65536))
        writer.write(outgoing.read())
        await until(lambda: len(found.there) == 1)
        writer.close()

    run(authority, test)
