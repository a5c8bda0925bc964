"""Requests that are equal to one that is being computed wait for its answer, whatever becomes of it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from serving.caching.cache_values import Answer
from serving.compute.engine import ModelError, QueueFullError
from serving.compute.waiting import Waits
from serving.statuses import ClientGoneError, DeadlineError
from tests.unit.serving.caching import ask, cache_of, cached, landed, on_a_loop
from tests.unit.serving.helpers import Arrays, PythonRuntime, close, load, row, until


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

    monkeypatch.setattr("serving.caching.cache.kept", fails)
    version = load(PythonRuntime(), deterministic=True)
    cached(version)
    works = [ask(version, 1, 2) for _ in range(3)]
    async with asyncio.timeout(20):
        await asyncio.gather(*(work.future for work in works))
    assert [work.answer["y"].tolist() for work in works] == [[[2, 4]]] * 3
    await landed()
    assert "could not be kept" in caplog.text
    close(version)
