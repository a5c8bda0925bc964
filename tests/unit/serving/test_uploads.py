"""Bodies that come slowly hold no place, within a bound of memory; who waits for a place and goes leaves the queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from serving.access.places import Places
from serving.statuses import ClientGoneError
from tests.unit.serving.helpers import Answer, PythonRuntime, Server, close, load, request, serve, until

PATH = "/v2/models/m/infer"
BODY = orjson.dumps(request(1.0, 2.0))


class Client:
    """Sends a body piece by piece, at a test's word; None: it goes."""

    def __init__(self, server: Server, headers: dict[str, str] | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self._pieces: asyncio.Queue[tuple[bytes, bool] | None] = asyncio.Queue()
        lines = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": lines}
        self.task = asyncio.create_task(server.app(scope, self._receive, self._send))

    def send(self, piece: bytes, *, more: bool = True) -> None:
        self._pieces.put_nowait((piece, more))

    def go(self) -> None:
        self._pieces.put_nowait(None)

    async def answer(self) -> Answer:
        await self.task
        return Answer(self.sent[0]["status"], {}, self.sent[1]["body"])

    async def _receive(self) -> dict[str, Any]:
        piece = await self._pieces.get()
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece[0], "more_body": piece[1]}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


def run(test: Callable[[Server, PythonRuntime], Awaitable[None]], **options: Any) -> None:
    runtime = PythonRuntime()
    version = load(runtime)

    async def whole() -> None:
        try:
            await test(serve(version, **options), runtime)
        finally:
            runtime.gate.set()

    try:
        asyncio.run(whole())
    finally:
        close(version)


def test_slow_uploads_hold_no_place_of_others() -> None:
    async def test(server: Server, runtime: PythonRuntime) -> None:
        slow = [Client(server) for _ in range(5)]
        for client in slow:
            client.send(BODY[:10])
        uploads, places = server.serving.uploads, server.serving.places
        await until(lambda: uploads.bytes == 50)
        assert (uploads.count, places.in_flight) == (5, 0)
        assert (await server.infer(3.0, 4.0)).status == 200, "the only place is free"
        for client in slow:
            client.send(BODY[10:], more=False)
        assert [(await client.answer()).status for client in slow] == [200] * 5
        assert (uploads.count, uploads.bytes, places.in_flight, places.waiting) == (0, 0, 0, 0)

    # Keys and models that hold nothing wait for each other; of one key alone all but one would be refused.
    async def patient(server: Server, runtime: PythonRuntime) -> None:
        server.serving.catching_up = True
        await test(server, runtime)

    run(patient, max_concurrent=1)


def test_a_body_in_one_piece_is_no_upload() -> None:
    async def test(server: Server, runtime: PythonRuntime) -> None:
        runtime.gate.clear()
        client = Client(server)
        client.send(BODY, more=False)
        await until(runtime.entered.is_set)
        assert (server.serving.uploads.count, server.serving.places.in_flight) == (0, 1)
        runtime.gate.set()
        assert (await client.answer()).status == 200

    run(test)


def test_what_an_upload_waited_for_its_place_is_gone_of_its_own_deadline() -> None:
    async def test(server: Server, runtime: PythonRuntime) -> None:
        server.serving.catching_up = True
        runtime.gate.clear()
        computing = asyncio.create_task(server.infer(1.0, 1.0))
        await until(runtime.entered.is_set)
        late, body = Client(server), orjson.dumps({**request(1.0, 2.0), "parameters": {"timeout": 10_000}})
        late.send(body[:10])
        late.send(body[10:], more=False)
        await until(lambda: server.serving.places.waiting == 1)
        await asyncio.sleep(0.02)
        runtime.gate.set()
        answer = await late.answer()
        assert (await computing).status == 200 and answer.status == 504, answer.error
        assert len(runtime.calls) == 1, "it is not computed"

    run(test, max_concurrent=1)


def test_beyond_the_memory_for_uploads_a_request_takes_its_place_while_it_sends() -> None:
    async def test(server: Server, runtime: PythonRuntime) -> None:
        uploads, places = server.serving.uploads, server.serving.places
        uploads.most_bytes = 100
        small, large = Client(server), Client(server)
        small.send(b" " * 60)
        await until(lambda: uploads.bytes == 60)
        large.send(b" " * 60)
        await until(lambda: places.in_flight == 1)
        assert (uploads.bytes, uploads.count) == (60, 2), "the large one is bounded by its place"
        refused = Client(server)
        refused.send(b" " * 60)
        assert (await refused.answer()).status == 429, "there is one place"
        large.send(b" " * 60)
        large.send(BODY, more=False)
        assert (await large.answer()).status == 200
        small.send(BODY, more=False)
        assert (await small.answer()).status == 200
        assert (uploads.count, uploads.bytes, places.in_flight) == (0, 0, 0)

    run(test, max_concurrent=1)


@pytest.mark.parametrize("early", [False, True], ids=["without a place", "with its place"])
def test_an_upload_whose_client_goes_or_that_is_too_long_leaves_nothing(early: bool) -> None:
    async def test(server: Server, runtime: PythonRuntime) -> None:
        uploads, places = server.serving.uploads, server.serving.places
        uploads.most_bytes = 0 if early else 1000
        gone, long = Client(server), Client(server)
        for client in (gone, long):
            client.send(b" " * 60)
        await until(lambda: uploads.count == 2 and places.in_flight == (2 if early else 0))
        gone.go()
        await gone.task
        assert gone.sent == [] and server.serving.unrouted_codes == {499: 1}
        long.send(b" " * 500)
        long.send(b"", more=False)
        assert (await long.answer()).status == 413
        assert (uploads.count, uploads.bytes, places.in_flight) == (0, 0, 0)

    run(test, max_body_bytes=500)


def test_who_waits_for_a_place_and_goes_is_counted_as_gone_and_never_computed() -> None:
    async def test(server: Server, runtime: PythonRuntime) -> None:
        serving = server.serving
        serving.catching_up = True
        runtime.gate.clear()
        first = Client(server)
        first.send(BODY, more=False)
        await until(runtime.entered.is_set)
        waiting = [Client(server), Client(server)]
        waiting[0].send(BODY, more=False)
        waiting[1].send(BODY[:5])
        waiting[1].send(BODY[5:], more=False)
        await until(lambda: serving.places.waiting == 2)
        for client in waiting:
            client.go()
            await client.task
            assert client.sent == []
        assert (serving.places.waiting, serving.places.left) == (0, 2)
        assert serving.unrouted_codes == {499: 2} and serving.uploads.bytes == 0
        runtime.gate.set()
        assert (await first.answer()).status == 200
        assert len(runtime.calls) == 1 and serving.places.in_flight == 0

    run(test, max_concurrent=1)


def test_one_that_waits_for_a_place_while_it_sends_loses_no_piece() -> None:
    async def test(server: Server, runtime: PythonRuntime) -> None:
        serving = server.serving
        serving.catching_up, serving.uploads.most_bytes = True, 0
        runtime.gate.clear()
        first, second = Client(server), Client(server)
        first.send(BODY, more=False)
        await until(runtime.entered.is_set)
        second.send(BODY[:5])
        await until(lambda: serving.places.waiting == 1)
        second.send(BODY[5:9])
        await until(second._pieces.empty)
        runtime.gate.set()
        second.send(BODY[9:], more=False)
        assert (await first.answer()).status == 200
        assert (await second.answer()).json()["outputs"][0]["data"] == [2.0, 4.0]

    run(test, max_concurrent=1)


def test_a_place_that_comes_as_its_client_goes_is_the_next_ones() -> None:
    async def scenario() -> None:
        places, gone = Places(1), asyncio.Event()
        held = places.enter("a", "m")
        assert held is not None

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        turn = asyncio.create_task(places.turn("b", "m", 30, receive=receive, patient=True))
        await until(lambda: places.waiting)
        await asyncio.sleep(0)  # it listens to its client
        gone.set()
        await asyncio.sleep(0)  # the client's going is on its way to it,
        places.leave(held)  # and so is the place
        with pytest.raises(ClientGoneError):
            await turn
        assert (places.in_flight, places.waiting, places.left) == (0, 0, 1)
        assert places.enter("c", "m") is not None

    asyncio.run(scenario())
