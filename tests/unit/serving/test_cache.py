"""Answers that are not computed again: keys, single flight, judgement, versions that change, what the API says of it."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from registry.errors import UsageError
from registry.modeltoml import given as facts_given
from serving.cache import ResponseCache
from serving.cache_page import router
from serving.cache_store import _SLICE
from serving.cache_values import Answer, KeyMaker, kept, pack, unpack
from serving.engine import LoadedVersion, ModelError, QueueFullError
from serving.metrics import Metrics
from serving.pages import create_pages
from serving.routing import Route
from serving.statuses import ClientGoneError, DeadlineError
from serving.waiting import Waits
from tests.unit.serving.helpers import Arrays, PythonRuntime, Server, close, load, no_nudge, request, row, serve, until

KEY = b"k" * 16
WATCHED = Route("m", 1, "1", watch=True)


def cached(*versions: LoadedVersion, route: Route | None = None, max_mb: int = 1) -> Server:
    """A server with a cache."""
    server = serve(*versions, route=route)
    server.serving.cache = ResponseCache(SimpleNamespace(max_mb=max_mb, ttl_seconds=60.0))
    server.serving.cache.follow(versions)
    return server


def cache_of(server: Server) -> ResponseCache:
    assert server.serving.cache is not None
    return server.serving.cache


def ask(version: LoadedVersion, *values: float, route: Route | None = None) -> Any:
    assert version.answers is not None
    return version.answers.submit(row(*values), None, route)


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*values: Any, **named: Any) -> None:
        asyncio.run(test(*values, **named))

    return run


async def landed() -> None:
    """Let what hangs on answered requests run."""
    for _ in range(3):
        await asyncio.sleep(0)


# --- keys


def make(model: str = "m", version: str = "1", digest: str = "d" * 64, platform: str = "onnx") -> KeyMaker:
    return KeyMaker(model, version, digest, platform)


def test_a_key_depends_on_everything_that_the_answer_depends_on() -> None:
    x = np.array([[1, 2]], dtype="<f4")
    inputs: list[tuple[KeyMaker, Arrays, tuple[str, ...] | None]] = [
        (make(), {"x": x}, None),
        (make("n"), {"x": x}, None),
        (make(version="2"), {"x": x}, None),
        (make(digest="e" * 64), {"x": x}, None),
        (make(platform="torch"), {"x": x}, None),
        (make("md"), {"x": x}, None),
        (make(), {"y": x}, None),
        (make(), {"x": x + 1}, None),
        (make(), {"x": -0.0 * x}, None),
        (make(), {"x": 0.0 * x}, None),
        (make(), {"x": x.reshape(2, 1)}, None),
        (make(), {"x": x.reshape(2)}, None),
        (make(), {"x": x.view("<i4")}, None),
        (make(), {"x": x.astype("<f8")}, None),
        (make(), {"x": x, "y": x}, None),
        (make(), {"x": x}, ()),
        (make(), {"x": x}, ("x",)),
        (make(), {"x": x}, ("x", "y")),
        (make(), {"x": x}, ("xy",)),
        (make(), {"x": np.array([b"ab", b"c"], dtype=object)}, None),
        (make(), {"x": np.array([b"a", b"bc"], dtype=object)}, None),
        (make(), {"x": np.array([b"abc"], dtype=object)}, None),
        (make(), {"x": np.zeros((0, 2), "<f4")}, None),
        (make(), {"x": np.zeros((2, 0), "<f4")}, None),
    ]
    keys = [maker(arrays, outputs) for maker, arrays, outputs in inputs]
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {16}


def test_a_key_does_not_depend_on_how_the_request_was_written() -> None:
    x, y = np.arange(6, dtype="<f4").reshape(2, 3), np.ones(2, "<i8")
    assert make()({"x": x, "y": y}, None) == make()({"y": y.copy(), "x": np.asfortranarray(x)}, None)
    wide = np.arange(12, dtype="<f4").reshape(2, 6)
    assert make()({"x": wide[:, :3]}, None) == make()({"x": wide[:, :3].copy()}, None)


ARRAYS = npst.arrays(
    dtype=st.sampled_from(["<f4", "<f8", "<i8", "|u1", "|b1", "<f2"]), shape=npst.array_shapes(min_dims=0, min_side=0)
)
TEXTS = st.lists(st.binary(max_size=9), max_size=4) | st.lists(st.text(max_size=5), max_size=4)


@given(st.dictionaries(st.text(max_size=5), ARRAYS, max_size=3), TEXTS, st.floats(0, 100))
def test_an_answer_comes_back_from_its_bytes_as_it_was(arrays: dict[str, Any], texts: Any, seconds: float) -> None:
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    value = pack(KEY, Answer({**arrays, "texts": array}, seconds))
    assert value is not None
    found = unpack(KEY, value)
    assert (
        found is not None
        and found.model_seconds == seconds
        and list(found.arrays) == [*arrays, "texts"][-len(found.arrays) :]
    )
    assert found.arrays["texts"].tolist() == texts
    for name, array in arrays.items():
        if name != "texts":
            assert found.arrays[name].dtype == array.dtype and found.arrays[name].shape == array.shape
            assert found.arrays[name].tobytes() == array.tobytes()


VALUE = pack(KEY, Answer({"y": np.arange(6, dtype="<f4").reshape(2, 3), "t": np.array([b"ab"], dtype=object)}, 0.5))
assert VALUE is not None


@given(st.integers(0, len(VALUE) - 1), st.integers(1, 255))
def test_a_value_with_a_byte_changed_is_a_miss(at: int, change: int) -> None:
    assert VALUE is not None
    damaged = bytearray(VALUE)
    damaged[at] ^= change
    assert unpack(KEY, bytes(damaged)) is None


@given(st.integers(0, len(VALUE) - 1) | st.just(-1), st.binary(max_size=64))
def test_a_value_that_is_cut_off_longer_or_something_else_is_a_miss(length: int, other: bytes) -> None:
    assert VALUE is not None
    assert unpack(KEY, VALUE[:length]) is None
    assert unpack(KEY, VALUE + b"x" + other) is None
    assert unpack(KEY, other) is None
    assert unpack(b"q" * 16, VALUE) is None, "another key's answer"


def test_what_has_the_right_checksum_and_no_sense_is_a_miss() -> None:
    from serving.cache_values import FORMAT, _checksum

    for header in (
        {},
        [],
        {"arrays": [["y", "<f4", [2, 3], 23]], "seconds": 1},
        {"arrays": [["y", "|O", [1], 24]], "seconds": 1},
        {"arrays": [["y", "<f4", [7], 24]], "seconds": 1},
        {"arrays": [["y", "bytes", [1], 24]], "seconds": 1},
        {"arrays": [["y", "<f4", [2, 3], 24]], "seconds": "long"},
        {"arrays": [["y", "<f4", [2, 3], 24]]},
    ):
        text = orjson.dumps(header)
        body = KEY + len(text).to_bytes(4, "little") + text + b"\xff" * 24
        assert unpack(KEY, bytes((FORMAT,)) + _checksum(body) + body) is None, header


def test_what_cannot_be_written_is_not() -> None:
    assert pack(KEY, Answer({"y": np.array(["a"])}, 0)) is None
    assert pack(KEY, Answer({"y": np.array(["a", b"b"], dtype=object)}, 0)) is None


# --- hits and misses


@on_a_loop
async def test_an_equal_request_is_answered_without_the_model_and_says_so() -> None:
    runtime = PythonRuntime()
    version = load(runtime, deterministic=True)
    server = cached(version)
    first = await server.infer(1, 2)
    await landed()
    second = await server.infer(1, 2)
    other = await server.infer(1, 3)
    assert len(runtime.calls) == 2
    assert "cache" not in first.json()["parameters"] and "cache" not in other.json()["parameters"]
    assert second.json()["parameters"]["cache"] == "l1"
    assert second.json()["outputs"] == first.json()["outputs"]
    assert second.headers["x-model-version"] == "1" and second.headers["x-request-id"] != first.headers["x-request-id"]
    assert version.telemetry.total.requests == 2, "a hit is none of the version's requests"
    assert version.telemetry.codes == {200: 3}
    stats = cache_of(server).stats()
    assert stats["hits"] == {"l1": 1, "l2": 0, "shared": 0} and stats["misses"] == 2 and stats["hit_rate"] == 0.333333
    assert stats["saved_seconds"] >= 0 and stats["l2"] is None
    seconds = stats["saved_seconds"] + stats["computed_seconds"]
    assert stats["computed_seconds"] > 0 and stats["saved_share"] == pytest.approx(
        stats["saved_seconds"] / seconds, abs=0.1
    )
    assert 0 < stats["saved_share"] < 1
    assert stats["versions"][0]["entries"] == stats["l1"]["entries"] == 2
    close(version)


@on_a_loop
async def test_an_answer_in_json_serves_a_binary_request_and_other_outputs_are_other_answers() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version)
    await server.infer(1, 2)
    await landed()
    binary = await server.post(
        "/v2/models/m/infer", {**request(1, 2), "id": "7", "parameters": {"binary_data_output": True}}
    )
    length = int(binary.headers["inference-header-content-length"])
    header = orjson.loads(binary.body[:length])
    assert header["id"] == "7" and header["parameters"]["cache"] == "l1"
    assert np.frombuffer(binary.body[length:], "<f4").tolist() == [2, 4]
    named = await server.post("/v2/models/m/infer", {**request(1, 2), "outputs": [{"name": "y"}]})
    assert "cache" not in named.json()["parameters"] and len(runtime.calls) == 2
    close(version)


@on_a_loop
async def test_a_version_that_does_not_say_that_it_is_deterministic_computes_everything() -> None:
    version = load(runtime := PythonRuntime())
    server = cached(version)
    for _ in range(2):
        assert "cache" not in (await server.infer(1, 2)).json()["parameters"]
        await landed()
    assert version.answers is None and len(runtime.calls) == 2
    assert cache_of(server).stats()["versions"] == []
    close(version)


@on_a_loop
async def test_a_slice_of_a_batch_does_not_keep_the_batch_alive() -> None:
    runtime = PythonRuntime()
    version = load(runtime, deterministic=True)
    server = cached(version)
    runtime.gate.clear()
    works = [ask(version, number, 0) for number in range(5)]
    runtime.gate.set()
    await asyncio.gather(*(work.future for work in works))
    await landed()
    hit = ask(version, 4, 0)
    assert hit.future.done() and hit.answer["y"].base is None and hit.answer["y"].tolist() == [[8, 0]]
    assert len(cache_of(server).local) == 5
    close(version)


# --- single flight


@on_a_loop
async def test_equal_requests_at_the_same_time_are_computed_once() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version)
    runtime.gate.clear()
    asked = [asyncio.create_task(server.infer(1, 2)) for _ in range(20)]
    await until(lambda: server.serving.in_flight == 20 and runtime.entered.is_set())
    runtime.gate.set()
    answers = await asyncio.gather(*asked)
    assert len(runtime.calls) == 1 and {answer.status for answer in answers} == {200}
    assert [answer.json()["outputs"][0]["data"] for answer in answers] == [[2, 4]] * 20
    by = [answer.json()["parameters"].get("cache") for answer in answers]
    assert by.count(None) == 1 and by.count("shared") == 19
    assert version.telemetry.total.requests == 1 and version.references == 0
    close(version)


def fails_at_first(times: int) -> PythonRuntime:
    left = [times]

    def function(inputs: Arrays) -> dict[str, Any]:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("not now")
        return {"y": inputs["x"] * 2}

    return PythonRuntime(function)


@on_a_loop
async def test_when_an_answer_is_too_old_those_who_ask_at_once_have_it_computed_once() -> None:
    now = [0.0]
    runtime = PythonRuntime()
    version = load(runtime, deterministic=True)
    server = cached(version)
    cache_of(server).local._clock = lambda: now[0]
    for _ in range(3):
        await server.infer(1, 2)
        await landed()
    now[0] = 60.0
    runtime.gate.clear()
    asking = [asyncio.create_task(server.infer(1, 2)) for _ in range(30)]
    await until(lambda: cache_of(server).counts.misses == 2 and len(version.answers._flights) == 1)  # type: ignore[union-attr]
    runtime.gate.set()
    levels = [answer.json()["parameters"].get("cache") for answer in await asyncio.gather(*asking)]
    assert sorted(map(str, levels)) == ["None", *["shared"] * 29] and len(runtime.calls) == 2
    close(version)


class OneAnswer:
    """A shared level that has one answer, for ever so long."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def ready(self, model: str, key: bytes) -> bool:
        return True

    def begin(self, model: str, key: bytes) -> asyncio.Task[Answer | None]:
        async def found() -> Answer:
            return self.answer

        return asyncio.create_task(found())


@on_a_loop
async def test_an_answer_of_another_server_ends_here_when_it_ends_there() -> None:
    now = [1_000.0]
    version = load(deterministic=True)
    server = cached(version)
    cache = cache_of(server)
    cache.local._clock = lambda: now[0]
    cache.shared = OneAnswer(Answer({"y": np.array([[2, 4]], "<f4")}, 0.5, left_seconds=10.0))  # type: ignore[assignment]

    async def level() -> str | None:
        answer = await server.infer(1, 2)
        await landed()
        found: str | None = answer.json()["parameters"].get("cache")
        return found

    assert [await level(), await level(), await level()] == ["l2", "l1", "l1"]
    now[0] = 1_009.9
    assert await level() == "l1"
    now[0] = 1_010.0
    assert await level() == "l2"
    close(version)


@on_a_loop
async def test_an_error_is_the_answer_of_one_request_only() -> None:
    version = load(runtime := fails_at_first(1), deterministic=True)
    cached(version)
    runtime.gate.clear()
    works = [ask(version, 1, 2) for _ in range(4)]
    await until(runtime.entered.is_set)
    runtime.gate.set()
    found = await asyncio.gather(*(work.future for work in works), return_exceptions=True)
    assert isinstance(found[0], ModelError) and found[1:] == [None] * 3
    assert version.telemetry.total.requests == 4 and version.telemetry.total.errors == 1
    await landed()
    assert ask(version, 1, 2).future.done()
    close(version)


@pytest.mark.parametrize("reason", [ClientGoneError("gone"), DeadlineError("late"), None])
@on_a_loop
async def test_a_first_client_that_leaves_does_not_take_the_others_with_it(reason: Any) -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    cached(version)
    runtime.gate.clear()
    works = [ask(version, 1, 2) for _ in range(4)]
    await until(runtime.entered.is_set)
    for work in works[:2]:
        if reason is None:
            work.future.cancel()
        else:
            version.withdraw(work, reason, count_as_error=False)
    await landed()
    runtime.gate.set()
    await asyncio.gather(*(work.future for work in works[2:]))
    assert [work.answer["y"].tolist() for work in works[2:]] == [[[2, 4]]] * 2
    assert len(runtime.calls) == 2, "the one that was left alone, and one for those that stayed"
    for work in works[:2]:
        assert work.future.cancelled() or work.future.exception() is reason
    close(version)


@on_a_loop
async def test_who_waits_behind_another_has_his_own_deadline() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version)
    server.app.v2._waits = Waits(0.1)
    runtime.gate.clear()
    answers = await asyncio.gather(server.infer(1, 2), server.infer(1, 2))
    assert [answer.status for answer in answers] == [504, 504]
    assert version.telemetry.total.errors == 2
    close(version)


@on_a_loop
async def test_a_full_queue_is_told_to_each_that_waited() -> None:
    version = load(runtime := fails_at_first(1), deterministic=True, queue_size=2, rows_independent=False)
    cached(version)
    runtime.gate.clear()
    works = [ask(version, 1, 2) for _ in range(3)]
    await until(runtime.entered.is_set)
    for number in (8, 9):
        version.submit(row(number, 9), None)
    runtime.gate.set()
    found = await asyncio.gather(*(work.future for work in works), return_exceptions=True)
    assert isinstance(found[0], ModelError)
    assert {type(error) for error in found[1:]} <= {QueueFullError, type(None)}
    close(version)


@on_a_loop
async def test_who_waits_behind_another_holds_no_inputs_of_his_own_and_nothing_once_he_gave_up() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    cached(version)
    runtime.gate.clear()
    works = [ask(version, 1, 2) for _ in range(4)]
    await until(runtime.entered.is_set)
    assert {id(work.inputs) for work in works} == {id(works[0].inputs)}
    assert version.answers is not None
    (flight,) = version.answers._flights.values()
    version.withdraw(works[1], DeadlineError("late"), count_as_error=False)
    works[2].future.cancel()
    await landed()
    assert list(flight.behind) == [works[3]] and version.answers._waiting == 1
    runtime.gate.set()
    await works[3].future
    assert works[3].answer["y"].tolist() == [[2, 4]]
    await landed()
    assert version.answers._waiting == 0 and not version.answers._flights
    close(version)


@on_a_loop
async def test_no_more_wait_behind_others_than_may_wait_for_the_version() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True, queue_size=3)
    server = cached(version)
    runtime.gate.clear()
    works = [ask(version, 1, 2) for _ in range(3)]
    await until(runtime.entered.is_set)
    works += [ask(version, 3, 4), ask(version, 3, 4)]
    for value in (1, 3):
        with pytest.raises(QueueFullError, match="3 requests waiting"):
            ask(version, value, value + 1)
    assert (await server.infer(1, 2)).status == 429
    works[1].future.cancel()
    await landed()
    works.append(ask(version, 1, 2))
    # The first client goes: who takes his place waits behind nobody, and makes room for another.
    works[0].future.cancel()
    await landed()
    works.append(ask(version, 1, 2))
    with pytest.raises(QueueFullError):
        ask(version, 1, 2)
    runtime.gate.set()
    await asyncio.gather(*(work.future for work in works[2:]))
    await landed()
    assert version.answers is not None and version.answers._waiting == 0
    close(version)


@on_a_loop
async def test_an_answer_that_cannot_be_kept_is_given_to_all_who_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(arrays: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr("serving.cache.kept", fails)
    version = load(PythonRuntime(), deterministic=True)
    cached(version)
    works = [ask(version, 1, 2) for _ in range(3)]
    async with asyncio.timeout(20):
        await asyncio.gather(*(work.future for work in works))
    assert [work.answer["y"].tolist() for work in works] == [[[2, 4]]] * 3
    await landed()
    assert "could not be kept" in caplog.text
    close(version)


# --- judgement


@on_a_loop
async def test_what_a_promotion_judges_is_computed_and_kept_for_afterwards() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version, route=WATCHED)
    for _ in range(3):
        assert "cache" not in (await server.infer(1, 2)).json()["parameters"]
        await landed()
    assert len(runtime.calls) == 3 and version.watch[1].requests == 3
    assert cache_of(server).counts.bypassed == 3
    server.serving.install({"m": Route("m", 2, "1")}, {("m", "1"): version}, "epoch", 2)
    assert (await server.infer(1, 2)).json()["parameters"]["cache"] == "l1"
    assert len(runtime.calls) == 3
    close(version)


@on_a_loop
async def test_a_version_named_in_the_path_is_judged_by_nobody_and_may_be_answered_from_the_cache() -> None:
    version = load(PythonRuntime(), deterministic=True)
    server = cached(version, route=WATCHED)
    await server.infer(1, 2)
    await landed()
    assert (await server.infer(1, 2, version="1")).json()["parameters"]["cache"] == "l1"
    assert version.watch[1].requests == 1
    close(version)


@on_a_loop
async def test_shadow_copies_of_answers_from_the_cache_are_computed() -> None:
    stable, candidate = (
        load(PythonRuntime(), deterministic=True),
        load(shadowed := PythonRuntime(), "2", deterministic=True),
    )
    server = cached(stable, candidate, route=Route("m", 1, "1", "2", shadow=True))
    for count in (1, 2, 3):
        await server.infer(1, 2)
        await until(lambda count=count: len(shadowed.calls) == count)
    await until(lambda: candidate.telemetry.total.shadow_requests == 3)
    assert cache_of(server).counts.l1 == 2 and candidate.telemetry.total.shadow_inexact == 0
    close(stable, candidate)


@on_a_loop
async def test_an_answer_that_json_cannot_carry_counts_as_the_versions_error_when_it_was_computed() -> None:
    version = load(PythonRuntime(lambda inputs: {"y": inputs["x"] * np.float32("nan")}), deterministic=True)
    server = cached(version)
    for _ in range(3):
        assert (await server.infer(1, 2)).status == 422
        await landed()
    assert (version.telemetry.total.requests, version.telemetry.total.errors) == (1, 1)
    assert version.telemetry.codes == {422: 3}
    close(version)


# --- versions that come and go


@on_a_loop
async def test_versions_never_answer_for_each_other_and_take_their_answers_with_them() -> None:
    one = load(PythonRuntime(), deterministic=True)
    two = load(PythonRuntime(lambda inputs: {"y": inputs["x"] * 3}), "2", deterministic=True)
    two.digest = "1" * 64
    server = cached(one, two)
    await server.infer(1, 2)
    await landed()
    assert (await server.infer(1, 2, version="2")).json()["outputs"][0]["data"] == [3, 6]
    await landed()
    assert len(cache_of(server).local) == 2
    assert server.serving.install({"m": Route("m", 2, "2")}, {("m", "2"): two}, "epoch", 2) == [one]
    assert cache_of(server).local.owners() == [("m", "2", two.digest)]
    assert (await server.infer(1, 2)).json()["parameters"]["cache"] == "l1"
    close(one, two)


@on_a_loop
async def test_what_ends_after_its_version_has_gone_is_not_kept() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version)
    runtime.gate.clear()
    work = ask(version, 1, 2)
    server.serving.install({}, {}, "epoch", 2)
    runtime.gate.set()
    await work.future
    await landed()
    assert len(cache_of(server).local) == 0
    close(version)


@on_a_loop
async def test_what_was_being_computed_when_the_answers_were_dropped_is_not_kept() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    cache = cache_of(cached(version))
    runtime.gate.clear()
    work = ask(version, 1, 2)
    assert await cache.invalidate(["m"]) == (0, False)
    runtime.gate.set()
    await work.future
    await landed()
    assert len(cache.local) == 0
    close(version)


@on_a_loop
async def test_who_comes_after_the_answers_were_dropped_does_not_join_a_request_from_before() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True, max_batch=1)
    cache = cache_of(cached(version))
    runtime.gate.clear()
    before = [ask(version, 1, 2), ask(version, 1, 2)]
    await until(runtime.entered.is_set)
    await cache.invalidate(["m"])
    after = [ask(version, 1, 2), ask(version, 1, 2)]
    before[0].future.cancel()  # who waited behind takes its place, and does not come between the later ones
    await landed()
    assert version.answers is not None
    (flight,) = version.answers._flights.values()
    assert flight.leader is after[0] and list(flight.behind) == [after[1]]
    runtime.gate.set()
    await asyncio.gather(*(work.future for work in [*before[1:], *after]))
    await landed()
    assert len(runtime.calls) == 3 and after[1].cached == "shared"
    assert not version.answers._flights and version.answers._waiting == 0
    close(version)


@on_a_loop
async def test_a_request_from_before_the_answers_were_dropped_does_not_end_what_a_later_one_began() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True, max_batch=1)
    cache = cache_of(cached(version))
    runtime.gate.clear()
    before = ask(version, 1, 2)
    await until(runtime.entered.is_set)
    await cache.invalidate(["m"])
    after = ask(version, 1, 2)
    before.future.cancel()
    await landed()
    behind = ask(version, 1, 2)
    runtime.gate.set()
    await asyncio.gather(after.future, behind.future)
    assert len(runtime.calls) == 2 and behind.cached == "shared"
    close(version)


@on_a_loop
async def test_many_answers_that_are_dropped_are_removed_little_by_little_and_none_is_given() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version, max_mb=8)
    cache = cache_of(server)
    many = 4 * _SLICE
    for number in range(many):
        cache.local.put(number.to_bytes(16, "little"), ("m", "1", version.digest), Answer({}, 0.0), 100)
    await server.infer(1, 2)
    await landed()
    assert cache.forget("m") == many + 1
    assert len(cache.local) == many + 1 - _SLICE and cache.stats()["versions"][0]["entries"] == 0
    assert "cache" not in (await server.infer(1, 2)).json()["parameters"] and len(runtime.calls) == 2
    await until(lambda: len(cache.local) == 1)
    assert (await server.infer(1, 2)).json()["parameters"]["cache"] == "l1"
    close(version)


@pytest.mark.parametrize("text", ["a" * 1_000, "\u00e9" * 1_000, "\u6c34" * 1_000, "\U0001f40d" * 1_000, b"a" * 1_000])
def test_a_text_counts_with_the_bytes_that_it_takes(text: Any) -> None:
    array = np.empty(1, dtype=object)
    array[0] = text
    empty = np.empty(1, dtype=object)
    empty[0] = b""
    more = kept({"y": array})[1] - kept({"y": empty})[1]
    wide = 1 if isinstance(text, bytes) or text[0] < "\u0100" else 2 if text[0] < "\U00010000" else 4
    assert wide * 1_000 <= more <= wide * 1_000 + 100


# --- the API, the metrics, the flag


@on_a_loop
async def test_the_pages_show_and_empty_the_cache() -> None:
    one, other = load(PythonRuntime(), deterministic=True), load(PythonRuntime(), model="digits", deterministic=True)
    server = cached(one, other)
    cache = cache_of(server)
    for version in (one, other):
        for number in range(3):
            await ask(version, number, 0).future
    await landed()
    pages = TestClient(create_pages(server.serving, nudge=no_nudge, info=dict, routers=[router(cache)]))
    stats = pages.get("/api/cache/stats").json()
    assert stats["enabled"] and [v["entries"] for v in stats["versions"]] == [3, 3]
    assert pages.delete("/api/cache", params={"model": "m", "pattern": "*"}).status_code == 400
    assert pages.delete("/api/cache", params={"model": "nobody"}).status_code == 404
    assert pages.delete("/api/cache", params={"pattern": "x*"}).json()["models"] == []
    dropped = pages.delete("/api/cache", params={"model": "m"}).json()
    assert dropped == {"models": ["m"], "dropped": 3, "servers": "this", "within_seconds": 0.0}
    assert pages.delete("/api/cache", params={"pattern": "dig*"}).json()["dropped"] == 3
    assert pages.get("/api/cache/stats").json()["l1"]["entries"] == 0
    assert (
        'modelkeep_cache_requests_total{model="m",result="miss",version="1"} 3.0'
        in Metrics(server.serving).render().decode()
    )
    close(one, other)


def test_without_a_cache_the_pages_say_so() -> None:
    server = serve()
    pages = TestClient(create_pages(server.serving, nudge=no_nudge, info=dict, routers=[router(None)]))
    assert pages.get("/api/cache/stats").json() == {"enabled": False}
    assert pages.delete("/api/cache").json()["dropped"] == 0
    assert b"modelkeep_cache" not in Metrics(server.serving).render()


def test_the_option_says_that_a_model_is_deterministic() -> None:
    assert facts_given({}, {"deterministic": "true"}) == {"deterministic": True}
    assert facts_given({}, {"deterministic": "false"}) == {"deterministic": False}
    with pytest.raises(UsageError, match="it is true or false"):
        facts_given({}, {"deterministic": "yes"})


def test_the_settings_decide_whether_there_is_a_cache_and_whether_it_is_shared() -> None:
    from registry.settings import Settings
    from serving.child import open_cache

    assert open_cache(Settings(performance={"enable_caching": False})) is None  # type: ignore[arg-type]
    alone = open_cache(Settings(cache={"max_mb": 3}))  # type: ignore[arg-type]
    assert alone is not None and alone.shared is None
    assert alone.local.max_bytes + alone.written.max_bytes == 3 << 20
    shared = open_cache(Settings(redis_url="redis://127.0.0.1:1/0"))
    assert shared is not None and shared.shared is not None and not shared.shared.usable


@pytest.mark.parametrize("seed", [1, 2, 3])
@on_a_loop
async def test_in_any_order_of_requests_departures_swaps_and_errors_every_answer_is_its_versions_own(seed: int) -> None:
    draw = random.Random(seed)

    def unsteady(factor: int) -> PythonRuntime:
        def function(inputs: Arrays) -> dict[str, Any]:
            if draw.random() < 0.05:
                raise RuntimeError("now and then")
            return {"y": inputs["x"] * np.float32(factor)}

        return PythonRuntime(function)

    versions = {name: load(unsteady(int(name)), name, deterministic=True, max_batch=4) for name in ("2", "3")}
    for name, version in versions.items():
        version.digest = name * 64
    loaded = {("m", name): version for name, version in versions.items()}
    server = cached(*versions.values())
    cache = cache_of(server)
    seen: dict[str | None, int] = {}

    async def client() -> None:
        for _ in range(60):
            value, gone = draw.randrange(6), asyncio.Event()
            body = orjson.dumps(request(value, 1))
            if draw.random() < 0.1:
                gone.set()
            answer = await server.ask("POST", "/v2/models/m/infer", body, gone=gone)
            if answer is None or answer.status in (500, 503):
                continue
            assert answer.status == 200, answer.body
            factor = int(answer.headers["x-model-version"])
            assert answer.json()["outputs"][0]["data"] == [value * factor, factor]
            level = answer.json()["parameters"].get("cache")
            seen[level] = seen.get(level, 0) + 1

    clients = [asyncio.create_task(client()) for _ in range(12)]
    generation = 1
    while not all(task.done() for task in clients):
        await asyncio.sleep(draw.random() * 0.01)
        generation += 1
        route = Route("m", generation, draw.choice(["2", "3"]), watch=draw.random() < 0.3)
        only = ("m", route.stable)
        kept = loaded if draw.random() < 0.7 else {key: version for key, version in loaded.items() if key == only}
        server.serving.install({"m": route}, kept, "epoch", generation)
        if draw.random() < 0.2:
            await cache.invalidate(["m"])
    await asyncio.gather(*clients)
    await landed()
    assert set(seen) == {None, "l1", "shared"}, seen
    assert server.serving.in_flight == 0 and [version.references for version in versions.values()] == [0, 0]
    for version in versions.values():
        assert version.answers is None or not (version.answers._flights or version.answers._waiting)
    close(*versions.values())
