"""Requests whose bytes were answered before: neither read nor answered anew, and never an answer longer than the one they belong to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest

from registry.signature import Signature, TensorSpec
from serving.caching.cache import ResponseCache
from serving.caching.cache_written import Written, WrittenAnswers
from serving.compute.engine import LoadedVersion
from serving.traffic.routing import Route
from serving.wire.classification import INLINE_ELEMENTS
from tests.unit.serving.helpers import Answer, PythonRuntime, Server, close, load, request, serve, until

STABLE = Route("m", 1, "1")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def cached(*versions: LoadedVersion, max_mb: int = 1, max_body_bytes: int = 100_000) -> tuple[Server, ResponseCache]:
    server = serve(*versions, route=STABLE, max_body_bytes=max_body_bytes)
    cache = server.serving.cache = ResponseCache(SimpleNamespace(max_mb=max_mb, ttl_seconds=60.0))
    cache.follow(versions)
    return server, cache


async def send(server: Server, body: bytes | list[bytes], headers: Mapping[str, str] | None = None) -> Answer:
    answer = await server.ask("POST", "/v2/models/m/infer", body, headers)
    assert answer is not None and answer.status == 200, answer
    await asyncio.sleep(0)
    return answer


def reads(version: LoadedVersion, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each request that is read."""
    seen: list[int] = []
    decode = version.codec.decode

    def counted(body: Any, length: Any) -> Any:
        seen.append(len(body))
        return decode(body, length)

    monkeypatch.setattr(version.codec, "decode", counted)
    return seen


def level(answer: Answer) -> str | None:
    found: str | None = answer.json()["parameters"].get("cache")
    return found


def test_from_the_third_time_on_equal_bytes_are_answered_unread_with_an_id_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        version = load(runtime := PythonRuntime(), deterministic=True)
        server, cache = cached(version)
        seen = reads(version, monkeypatch)
        body = orjson.dumps(request(1, 2))
        answers = [await send(server, body) for _ in range(5)]
        assert len(seen) == 2 and len(runtime.calls) == 1
        assert [level(answer) for answer in answers] == [None, "l1", "l1", "l1", "l1"]
        assert answers[1].body == answers[2].body == answers[4].body
        assert len({answer.headers["x-request-id"] for answer in answers}) == 5
        assert {answer.headers["x-model-version"] for answer in answers} == {"1"}
        assert version.telemetry.codes == {200: 5} and version.telemetry.cache.l1 == cache.counts.l1 == 4
        assert cache.counts.saved_seconds == pytest.approx(version.telemetry.cache.saved_seconds)
        assert cache.stats()["l1"]["written"] == 1 and not version.references
        close(version)

    asyncio.run(scenario())


def test_what_differs_in_anything_is_answered_for_itself() -> None:
    async def scenario() -> None:
        version = load(PythonRuntime(), deterministic=True)
        server, _ = cached(version)
        plain = request(1, 2)
        binary = {**plain, "parameters": {"binary_data_output": True}}
        for _ in range(3):
            for document in (plain, request(1, 3), {**plain, "id": "a"}, {**plain, "id": "b"}, binary):
                answer = await send(server, orjson.dumps(document))
                if document is binary:
                    length = int(answer.headers["inference-header-content-length"])
                    assert orjson.loads(answer.body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
                    assert len(answer.body) == length + 8
                    continue
                assert answer.json()["outputs"][0]["data"] == [2 * value for value in document["inputs"][0]["data"]]
                assert answer.json().get("id") == document.get("id")
        close(version)

    asyncio.run(scenario())


def test_equal_bytes_with_another_header_length_are_another_request() -> None:
    async def scenario() -> None:
        version = load(PythonRuntime(), deterministic=True)
        server, _ = cached(version)
        head = orjson.dumps(
            {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}]}
        )
        body = head + bytes(8)
        for _ in range(3):
            await send(server, body, {"inference-header-content-length": str(len(head))})
        whole = await server.ask("POST", "/v2/models/m/infer", body)
        assert whole is not None and whole.status == 400, "without the length it is no JSON"
        close(version)

    asyncio.run(scenario())


def test_it_ends_with_the_answer_that_it_belongs_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        version = load(runtime := PythonRuntime(), deterministic=True)
        server, cache = cached(version)
        clock = Clock()
        cache.local._clock = clock
        body = orjson.dumps(request(1, 2))
        for _ in range(3):
            await send(server, body)
        cache.forget("m")
        assert level(await send(server, body)) is None, "dropped"
        for _ in range(2):
            assert level(await send(server, body)) == "l1"
        clock.now = 60.0
        assert level(await send(server, body)) is None, "too old"
        assert len(runtime.calls) == 3
        for _ in range(2):
            await send(server, body)
        # Something else under the same key: what was written for the one before is not it.
        (key,) = cache.local._entries
        held = cache.local.peek(key)
        cache.local.put(key, ("m", "1", "0" * 64), held._replace(serial=10**9), 500)
        seen = reads(version, monkeypatch)
        await send(server, body)
        assert seen == [len(body)]
        close(version)

    asyncio.run(scenario())


def test_a_version_that_is_gone_is_not_kept_in_memory_and_another_has_its_own() -> None:
    async def scenario() -> None:
        one, two = load(PythonRuntime(), "1", deterministic=True), load(PythonRuntime(lambda i: {"y": i["x"] * 3}), "2")
        two.deterministic = True
        server, cache = cached(one, two)
        body = orjson.dumps(request(1, 2))
        for _ in range(3):
            await send(server, body)
        server.serving.routes["m"] = replace(STABLE, stable="2", generation=2)
        for _ in range(3):
            assert (await send(server, body)).json()["outputs"][0]["data"] == [3, 6]
        assert len(cache.written) == 2
        cache.follow([two])
        assert len(cache.written) == 0
        assert (await send(server, body)).json()["outputs"][0]["data"] == [3, 6]
        close(one, two)

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["watched", "copied"])
def test_what_a_promotion_judges_or_copies_is_read(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        version = load(PythonRuntime(), deterministic=True)
        server, _ = cached(version)
        body = orjson.dumps(request(1, 2))
        for _ in range(3):
            await send(server, body)
        server.serving.routes["m"] = (
            replace(STABLE, watch=True) if how == "watched" else replace(STABLE, candidate="2", shadow=True)
        )
        seen = reads(version, monkeypatch)
        await send(server, body)
        await until(lambda: len(seen) == 1)
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_long_request_is_known_too(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        version = load(PythonRuntime(), deterministic=True)
        server, cache = cached(version, max_mb=64, max_body_bytes=2 << 20)
        seen = reads(version, monkeypatch)
        text = orjson.dumps(request(1, 2))
        assert cache.written.largest_bytes == 1 << 20
        for length, read in ((40_000, 2), ((1 << 20) - 2_000, 1), ((1 << 20) + 1, 4)):
            seen.clear()
            body = text.ljust(length)
            cut = -(-length // pieces)
            sent = [body[at : at + cut] for at in range(0, length, cut)]
            for _ in range(4):
                assert (await send(server, sent)).json()["outputs"][0]["data"] == [2, 4]
            assert seen == [length] * read
        close(version)

    asyncio.run(scenario())


def test_long_ones_do_not_push_out_the_short_ones() -> None:
    held = WrittenAnswers(8 << 20)
    for number in range(1_000):
        held.put((1, None, b"%d" % number), Written(b"x" * 500, None, b"k" * 16, number))
    assert len(held) == 1_000
    for number in range(100):
        held.put((1, None, b"%d" % number * 100_000), Written(b"x", None, b"k" * 16, number))
        assert held.bytes <= held.max_bytes
    assert len(held) > 1_010
    assert all(held.get((1, None, b"%d" % number)) is not None for number in range(1_000))
    held.clear()
    assert held.bytes == len(held) == 0


def test_what_is_written_in_a_thread_while_the_cache_is_emptied_is_not_kept() -> None:
    """Ranking the classes of a long output takes a thread; meanwhile the answer is dropped, and another one comes in its place."""

    async def scenario() -> None:
        factor = [1.0]
        signature = Signature(
            (TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, INLINE_ELEMENTS + 1)),)
        )

        def compute(inputs: dict[str, Any]) -> dict[str, Any]:
            answer = np.zeros((1, INLINE_ELEMENTS + 1), np.float32)
            answer[0, 0] = factor[0]
            return {"y": answer}

        version = load(PythonRuntime(compute, signature), deterministic=True)  # type: ignore[arg-type]
        server, cache = cached(version)
        one, two = (
            orjson.dumps({**request(1, 2), "outputs": [{"name": "y", "parameters": {"classification": count}}]})
            for count in (1, 2)
        )
        await send(server, one)
        encode, written, goes_on = version.codec.encode, asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def slowly(*words: Any) -> Any:
            found = encode(*words)
            loop.call_soon_threadsafe(written.set)
            goes_on.wait(20)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(version.codec, "encode", slowly)
            hit = asyncio.create_task(send(server, one))
            await written.wait()
        factor[0] = 2.0
        cache.forget("m")
        assert "2.0" in (await send(server, two)).json()["outputs"][0]["data"][0]
        goes_on.set()
        assert "1.0" in (await hit).json()["outputs"][0]["data"][0]
        for _ in range(3):
            assert "2.0" in (await send(server, one)).json()["outputs"][0]["data"][0]
        close(version)

    asyncio.run(scenario())


def test_nothing_is_kept_of_a_version_that_was_loaded_anew() -> None:
    async def scenario() -> None:
        version, again = load(PythonRuntime(), deterministic=True), load(PythonRuntime(), deterministic=True)
        server, cache = cached(version)
        body = orjson.dumps(request(1, 2))
        for _ in range(3):
            await send(server, body)
        assert len(cache.written) == 1
        cache.follow([version])
        assert len(cache.written) == 1
        cache.follow([again])
        assert len(cache.written) == 0
        close(version, again)

    asyncio.run(scenario())


def test_it_takes_no_more_than_its_bytes_and_the_last_ones_stay() -> None:
    held = WrittenAnswers(10_000)
    assert held.largest_bytes < 10_000 / 4
    for number in range(100):
        held.put((1, None, b"%d" % number), Written(b"x" * 500, None, b"k" * 16, number))
        held.get((1, None, b"0"))
        assert held.bytes <= 10_000
    assert held.get((1, None, b"0")) is not None and held.get((1, None, b"99")) is not None
    assert held.get((1, None, b"50")) is None and held.get((2, None, b"99")) is None
    size = held.bytes
    held.put((1, None, b"99"), Written(b"x" * 500, None, b"k" * 16, 1))
    assert held.bytes == size
    held.put((1, None, b"long"), Written(b"x" * held.largest_bytes, None, b"k" * 16, 1))
    assert held.get((1, None, b"long")) is None and held.bytes == size
    for number in range(100):
        held.drop((1, None, b"%d" % number))
    assert held.bytes == len(held) == 0
