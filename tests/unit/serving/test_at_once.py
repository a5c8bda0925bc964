"""Requests that are answered from memory have no task; whatever has to wait gets one, and is answered as if it had had one from the start."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from serving.http.heads import AT_ONCE, in_a_task
from tests.unit.serving.caching import cache_of, cached, landed, on_a_loop
from tests.unit.serving.helpers import PythonRuntime, close, load, request
from tests.unit.serving.test_cycle import REQUEST, Transport, connected, over


def asking(first: float = 1.0) -> bytes:
    body = orjson.dumps(request(first, 2.0))
    head = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    return head + body


async def arrive(protocol: Any, data: bytes) -> None:
    """As a transport does it: by a callback of the loop, where no task runs."""
    asyncio.get_running_loop().call_soon(protocol.data_received, data)
    await asyncio.sleep(0)


async def next_answer(protocol: Any, transport: Transport, state: Any, data: bytes = b"") -> bytes:
    """What is written for these bytes, in the end."""
    before = len(transport.written)
    await arrive(protocol, data or asking())
    if state.tasks:
        await asyncio.wait(set(state.tasks))
    await landed()
    return b"".join(transport.written[before:])


def without_times(answer: bytes) -> list[bytes]:
    lines = answer.split(b"\r\n")
    return [line for line in lines[:-1] if not line.startswith((b"x-request-id", b"date", b"content-length"))]


@on_a_loop
async def test_an_answer_from_memory_is_written_before_anything_else_happens() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version)
    protocol, transport, state = connected(server.app)
    answers = [await next_answer(protocol, transport, state) for _ in range(6)]
    before = len(transport.written)
    await arrive(protocol, asking())
    assert not state.tasks
    assert len(transport.written) == before + 1
    assert without_times(transport.written[-1]) == without_times(answers[2])
    assert orjson.loads(transport.written[-1].split(b"\r\n\r\n")[1])["parameters"]["cache"] == "l1"
    assert len(runtime.calls) == 1
    assert version.telemetry.codes == {200: 7}
    await over(protocol, state)
    close(version)


@on_a_loop
async def test_a_request_that_memory_does_not_answer_waits_in_a_task_and_the_next_one_begins_in_one() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version)
    protocol, transport, state = connected(server.app)
    for _ in range(5):
        await next_answer(protocol, transport, state)
    runtime.gate.clear()
    await arrive(protocol, asking(7.0))  # the same head: it begins without a task
    assert len(state.tasks) == 1
    runtime.gate.set()
    (task,) = state.tasks
    await task
    assert b"HTTP/1.1 200" in transport.written[-1]
    assert protocol._head.scope["memo"][AT_ONCE] is False
    await arrive(protocol, asking())
    assert state.tasks  # in memory, but nobody could know
    await over(protocol, state)
    await arrive(protocol, asking())
    assert not state.tasks
    await over(protocol, state)
    close(version)


@on_a_loop
async def test_a_request_that_waits_for_its_model_waits_as_long_as_any_other() -> None:
    version = load(PythonRuntime(), deterministic=True)
    server = cached(version)
    protocol, transport, state = connected(server.app)
    for _ in range(5):
        await next_answer(protocol, transport, state)
    server.serving.gate.close(["m"])
    await arrive(protocol, asking())
    (task,) = state.tasks
    await asyncio.sleep(0.02)
    assert not task.done()
    assert server.serving.gate.waiting == 1
    server.serving.gate.open(["m"])
    await task
    assert b"HTTP/1.1 200" in transport.written[-1]
    await over(protocol, state)
    close(version)


@on_a_loop
async def test_who_goes_while_it_waits_is_counted_as_gone() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version)
    protocol, transport, state = connected(server.app)
    for _ in range(5):
        await next_answer(protocol, transport, state)
    server.serving.gate.close(["m"])
    await arrive(protocol, asking())
    await asyncio.sleep(0.01)
    protocol.connection_lost(None)
    await asyncio.wait(set(state.tasks), timeout=5)
    assert not state.tasks
    assert server.serving.gate.left == 1
    assert len(runtime.calls) == 1
    await over(protocol, state)
    close(version)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_one_that_is_cancelled_tidies_up_and_answers_wherever_it_is(steps: int) -> None:
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if "memo" in scope:
            scope["memo"][AT_ONCE] = True
        await receive()
        if len(ended) == 5:
            try:
                await asyncio.sleep(0)
                await asyncio.Event().wait()
            finally:
                ended.append("cancelled")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
        ended.append("answered")

    async def told() -> bytes:
        protocol, transport, state = connected(app)
        for _ in range(5):
            await next_answer(protocol, transport, state, REQUEST)
        await arrive(protocol, REQUEST)
        (task,) = state.tasks
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await landed()
        await over(protocol, state)
        return transport.written[-1]

    assert b"503" in asyncio.run(told()).split(b"\r\n")[0]
    assert ended == ["answered"] * 5 + ["cancelled"]


async def begun(app: Any, connections: int = 1) -> list[tuple[Any, Transport, Any]]:
    """Connections whose next request begins without a task."""
    made = [connected(app) for _ in range(connections)]
    for one in made:
        for _ in range(5):
            await next_answer(*one, REQUEST)
    return made


async def say_ok(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@on_a_loop
async def test_several_may_wait_for_the_same() -> None:
    shared: list[asyncio.Future[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if "memo" in scope:
            scope["memo"][AT_ONCE] = True
        if shared:
            await shared[0]
        await say_ok(send)

    made = await begun(app, 3)
    shared.append(asyncio.get_running_loop().create_future())
    loop = asyncio.get_running_loop()
    for protocol, _, _ in made:
        loop.call_soon(protocol.data_received, REQUEST)  # all of them before the first task begins
    await asyncio.sleep(0)
    before = [len(transport.written) for _, transport, _ in made]
    shared[0].set_result(None)
    for protocol, _, state in made:
        await over(protocol, state)
    written = [b"".join(transport.written[at:]) for (_, transport, _), at in zip(made, before, strict=True)]
    assert [one.startswith(b"HTTP/1.1 200") for one in written] == [True] * 3


@on_a_loop
async def test_one_that_waits_again_when_it_is_cancelled_waits_for_the_new() -> None:
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if "memo" in scope:
            scope["memo"][AT_ONCE] = True
        if len(ended) == 5:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await asyncio.sleep(0.01)
        ended.append("answered")
        await say_ok(send)

    ((protocol, transport, state),) = await begun(app)
    before = len(transport.written)
    await arrive(protocol, REQUEST)
    (task,) = state.tasks
    task.cancel()
    await over(protocol, state)
    assert len(ended) == 6
    assert transport.written[before].startswith(b"HTTP/1.1 200")


@on_a_loop
async def test_after_an_answer_that_failed_the_next_one_begins_in_a_task() -> None:
    version = load(PythonRuntime(), deterministic=True)
    server = cached(version)
    protocol, transport, state = connected(server.app)
    for _ in range(5):
        await next_answer(protocol, transport, state)
    assert protocol._head.scope["memo"][AT_ONCE] is True
    body = asking().partition(b"\r\n\r\n")[2]
    await next_answer(protocol, transport, state, asking().replace(body, b"x" * len(body)))
    assert b"HTTP/1.1 400" in transport.written[-1]
    assert AT_ONCE not in protocol._head.scope["memo"]
    await over(protocol, state)
    close(version)


@on_a_loop
async def test_what_needs_a_task_has_one() -> None:
    seen: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if "memo" in scope:
            scope["memo"][AT_ONCE] = True
        seen.append(asyncio.current_task() is not None)
        await in_a_task()
        async with asyncio.timeout(5):
            await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    protocol, transport, state = connected(app)
    for _ in range(5):
        assert b"HTTP/1.1 200" in await next_answer(protocol, transport, state, REQUEST)
    assert seen == [True, True, True, True, False]
    await over(protocol, state)


@on_a_loop
async def test_an_empty_cache_makes_no_difference_but_the_model_computes() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version)
    protocol, transport, state = connected(server.app)
    for _ in range(5):
        await next_answer(protocol, transport, state)
    cache_of(server).forget("m")
    answer = await next_answer(protocol, transport, state)
    assert b"HTTP/1.1 200" in answer
    assert len(runtime.calls) == 2
    await over(protocol, state)
    close(version)
