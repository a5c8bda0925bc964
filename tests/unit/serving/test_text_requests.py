"""Requests for texts while others ask too: who leaves, who waits, what runs out, what is taken out, and what is counted."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from registry.errors import UnavailableError
from serving.loaded.swap import Room
from serving.text.caches import COPIES, Caches
from serving.text.exchange import end_texts
from serving.text.groups import Group
from serving.text.sequences import Wanted
from serving.traffic.routing import Route
from tests.unit.serving.helpers import Answer, close, load, until
from tests.unit.serving.text_toy import END, Toy, toy_model
from tests.unit.serving.texting import COMPLETIONS, GENERATE, WORDS, asked, events, expected, held, serve, text_version


def test_a_client_that_leaves_frees_its_place_within_a_step() -> None:
    async def scenario() -> None:
        version, gate = held(max_running=1)
        server = serve(version)
        gone = asyncio.Event()
        body = orjson.dumps(asked(stream=True, max_tokens=200))
        leaving = asyncio.create_task(server.ask("POST", GENERATE, body, gone=gone))
        await until(lambda: version.references == 1)
        staying = asyncio.create_task(server.post(GENERATE, asked("xyz", max_tokens=3)))
        gate.release(3)
        await until(lambda: version.text_counts.completion_tokens >= 3 and len(version.batcher.waiting) == 1)
        gone.set()
        await leaving
        assert version.text_counts.endings == {"cancelled": 1} and version.text_counts.streams_open == 0
        assert version.references == 1
        # The step that is under way, and three for the other text: more the first one does not get.
        gate.release(4)
        assert (await staying).json()["text"] == expected("xyz", 3)
        assert version.telemetry.codes == {499: 1, 200: 1}
        assert version.telemetry.total.requests == 1, "a client that left is no request of the version"
        close(version)

    asyncio.run(scenario())


def test_a_client_that_leaves_before_its_turn_is_never_computed() -> None:
    async def scenario() -> None:
        version, gate = held(max_running=1)
        server = serve(version)
        first = asyncio.create_task(server.post(GENERATE, asked(max_tokens=2)))
        await until(lambda: version.references == 1 and not version.batcher.waiting)
        gone = asyncio.Event()
        waiting = asyncio.create_task(server.ask("POST", GENERATE, orjson.dumps(asked("never")), gone=gone))
        await until(lambda: version.references == 2)
        gone.set()
        assert await waiting is None
        assert len(version.batcher.waiting) == 0
        gate.release(2)
        await first
        runtime = version.runtime
        assert isinstance(runtime, Toy) and len(runtime.rows) == 2
        close(version)

    asyncio.run(scenario())


def test_more_texts_than_may_wait_are_told_to_come_again() -> None:
    async def scenario() -> None:
        version, gate = held(max_running=1, max_waiting=1)
        server = serve(version)
        first = asyncio.create_task(server.post(GENERATE, asked(max_tokens=1)))
        await until(lambda: len(version._open) == 1)
        second = asyncio.create_task(server.post(GENERATE, asked(max_tokens=1)))
        await until(lambda: len(version._open) == 2)
        third = await server.post(GENERATE, asked())
        assert third.status == 429 and third.headers["retry-after"] == "1" and "1 texts waiting" in third.error
        form = await server.post(COMPLETIONS, asked())
        assert form.status == 429 and form.json()["error"]["type"] == "rate_limit_error"
        gate.release(2)
        assert [(await one).status for one in (first, second)] == [200, 200]
        close(version)

    asyncio.run(scenario())


def test_of_the_texts_that_wait_each_key_has_one_in_turn() -> None:
    async def scenario() -> None:
        version, gate = held(max_running=1, max_waiting=10)
        wanted = Wanted((5,), 1)
        texts = [version.generate(wanted, asker="busy")]
        await until(lambda: texts[0].text.started is not None)
        texts += [version.generate(wanted, asker=key) for key in ("busy", "busy", "busy", "other", "other")]
        gate.release(100)
        for text in texts:
            async for _ in text.pieces():
                pass
        begun = sorted(texts[1:], key=lambda text: text.text.started or 0.0)
        assert [text.text.asker for text in begun] == ["busy", "other", "busy", "other", "busy"]
        close(version)

    asyncio.run(scenario())


def test_the_servers_limit_of_requests_counts_texts_too() -> None:
    async def scenario() -> None:
        version, gate = held()
        server = serve(version, max_concurrent=1)
        first = asyncio.create_task(server.post(GENERATE, asked(max_tokens=1)))
        await until(lambda: server.serving.in_flight == 1)
        assert (await server.post(GENERATE, asked())).status == 429
        gate.release(1)
        assert (await first).status == 200 and server.serving.in_flight == 0
        close(version)

    asyncio.run(scenario())


def test_a_text_that_runs_out_of_its_clients_time_at_once_is_no_error_of_the_version() -> None:
    async def scenario() -> None:
        version, gate = held()
        server = serve(version)
        answer = await server.post(GENERATE, asked(timeout=0.5))
        assert answer.status == 504 and "0 tokens" in answer.error
        assert version.telemetry.total.errors == 0, "half a second proves nothing"
        assert version.text_counts.errors == {"deadline": 1}
        gate.release(100)
        close(version)

    asyncio.run(scenario())


def test_no_token_within_an_ample_time_of_the_clients_is_the_versions_error() -> None:
    async def scenario() -> None:
        version, gate = held()
        server = serve(version)
        slow = asyncio.create_task(server.post(GENERATE, asked(timeout=50)))
        await until(lambda: len(version._open) == 1)
        (generation,) = version._open
        generation.expire(50.0, own=True)
        assert (await slow).status == 504 and version.telemetry.total.errors == 1
        gate.release(100)
        close(version)

    asyncio.run(scenario())


def test_the_clients_time_runs_while_its_model_is_not_there() -> None:
    async def scenario() -> None:
        version = text_version()
        server = serve(version)
        server.serving.gate.close("m")
        asking = asyncio.create_task(server.post(GENERATE, asked(timeout=0.05)))
        answer = await asking
        assert answer.status == 503 and "longer than" in answer.error and "30 s" not in answer.error
        assert version.text_counts.prompt_tokens == 0 and server.serving.in_flight == 0
        close(version)

    asyncio.run(scenario())


def test_the_servers_own_limit_of_time_is_the_versions_error_and_the_last_event_of_a_stream() -> None:
    async def scenario() -> None:
        version, gate = held()
        server = serve(version)
        gate.release(2)
        stream = asyncio.create_task(server.post(GENERATE, asked(stream=True)))
        await until(lambda: version.text_counts.completion_tokens == 2)
        (generation,) = version._open
        generation.expire(60.0, own=False)
        answer = await stream
        *pieces, last = events(answer.body)
        assert answer.status == 200 and len(pieces) == 2
        assert last["status"] == 504 and "2 tokens" in last["error"]
        assert version.telemetry.total.errors == 1 and version.telemetry.codes == {504: 1}
        gate.release(100)
        close(version)

    asyncio.run(scenario())


def test_a_graph_that_fails_is_the_versions_error_by_its_kind() -> None:
    async def scenario() -> None:
        toy = Toy(toy_model())
        toy.poison, toy.lost = WORDS.encode("!")[0], WORDS.encode("?")[0]
        version = text_version(toy)
        server = serve(version, route=Route("m", 4, "1", watch=True))
        failed = await server.post(GENERATE, asked("no!"))
        assert failed.status == 500 and "model 'm' version '1' failed" in failed.error
        lost = await server.post(GENERATE, asked("no?", stream=True))
        assert lost.status == 500 and "nan" in lost.error
        toy.most_rows = 0
        full = await server.post(COMPLETIONS, asked())
        assert full.status == 507 and full.json()["error"]["type"] == "server_error"
        assert version.text_counts.errors == {"model": 1, "not_finite": 1, "memory": 1}
        (counts,) = server.serving.watch_counts()
        assert (counts["requests"], counts["errors"], counts["generation"]) == (3, 3, 4)
        close(version)

    asyncio.run(scenario())


def test_refusals_of_a_version_that_hangs_hold_nothing_of_the_requests() -> None:
    """An error that is raised again and again grows by the frames of each."""

    async def scenario() -> None:
        version = text_version()
        server = serve(version)
        error = UnavailableError("it hangs")
        version.declare_hung("it hangs", error)
        for _ in range(5):
            assert (await server.post(GENERATE, asked())).status == 503
        frames, trace = 0, error.__traceback__
        while trace is not None:
            frames, trace = frames + 1, trace.tb_next
        assert frames < 15
        close(version)

    asyncio.run(scenario())


def test_a_stream_that_fails_inside_the_server_gets_a_last_event(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        version = text_version()
        server = serve(version)
        name, calls = version.words.name, itertools.count()

        def broken(token: int) -> str:
            if next(calls) >= 2:
                raise RuntimeError("a secret of the server")
            return name(token)

        monkeypatch.setattr(version.words, "name", broken)
        answer = await server.post(GENERATE, asked(stream=True, logprobs=0))
        *_, last = events(answer.body)
        assert answer.status == 200 and last == {"error": "internal error of the server; see its log", "status": 500}
        assert version.telemetry.codes == {500: 1} and version.references == server.serving.in_flight == 0
        close(version)

    asyncio.run(scenario())


def test_the_route_decides_and_a_clients_key_keeps_its_version() -> None:
    async def scenario() -> None:
        stable, candidate = text_version(version="1"), text_version(version="2")
        server = serve(stable, candidate, route=Route("m", 1, "1", "2", 0.5, watch=True, promotion="p"))
        answers = [await server.post(GENERATE, asked(max_tokens=1), {"X-Route-Key": f"user {n}"}) for n in range(12)]
        again = [await server.post(GENERATE, asked(max_tokens=1), {"X-Route-Key": f"user {n}"}) for n in range(12)]
        versions = [answer.headers["x-model-version"] for answer in answers]
        assert set(versions) == {"1", "2"} and versions == [answer.headers["x-model-version"] for answer in again]
        named = await server.post(GENERATE, asked(max_tokens=1, version="2"))
        assert named.headers["x-model-version"] == "2"
        counted = {row["version"]: row["requests"] for row in server.serving.watch_counts()}
        assert counted == {"1": 2 * versions.count("1"), "2": 2 * versions.count("2")}
        close(stable, candidate)

    asyncio.run(scenario())


def test_a_version_that_is_taken_out_ends_its_streams_with_a_last_event() -> None:
    async def scenario() -> None:
        version, gate = held()
        server = serve(version)
        gate.release(2)
        stream = asyncio.create_task(server.post(GENERATE, asked(stream=True, max_tokens=50)))
        await until(lambda: version.text_counts.completion_tokens >= 2)
        assert not await version.drain(0.01), "a stream holds its version"
        version.close()
        *_, last = events((await stream).body)
        assert last["status"] == 503 and "taken out of service" in last["error"]
        with pytest.raises(UnavailableError, match="closed"):
            version.generate(Wanted((1,), 1))
        gate.release(10)
        assert version.join(10)

    asyncio.run(scenario())


def test_a_server_that_stops_ends_its_streams_with_a_last_event_that_is_no_error_of_the_version() -> None:
    async def scenario() -> None:
        version, gate = held()
        server = serve(version)
        gate.release(2)
        stream = asyncio.create_task(server.post(COMPLETIONS, asked(stream=True, max_tokens=50)))
        await until(lambda: version.text_counts.completion_tokens >= 2)
        end_texts(server.serving)
        *_, last = events((await stream).body)
        assert last["error"]["code"] == 503 and "stopping" in last["error"]["message"]
        assert version.telemetry.total.errors == 0
        late = await server.post(GENERATE, asked())
        assert late.status == 503 and "stopping" in late.error, "it would be cut off without a word"
        gate.release(10)
        close(version)

    asyncio.run(scenario())


def test_what_a_step_has_gained_before_it_fails_reaches_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is at its end by then is not among those that the failure ends."""

    async def scenario() -> None:
        version, gate = held()
        server = serve(version)

        async def generate(prompt: str, most: int) -> asyncio.Task[Answer]:
            held_before = version.references
            task = asyncio.create_task(server.post(GENERATE, asked(prompt, max_tokens=most)))
            await until(lambda: version.references == held_before + 1)
            return task

        await generate("first", 1)
        await until(lambda: not version.batcher.waiting)
        ends, goes_on = await generate("abc", 3), await generate("xyz", 50)
        gate.release(1)
        await until(lambda: not version.batcher.waiting)  # both are in the step that begins
        read = await generate("one token", 1)
        select, fails = Group.select, iter([True])

        def no_memory(group: Group, indices: Sequence[int]) -> Group:
            if next(fails, False):
                raise MemoryError("no room")
            return select(group, indices)

        monkeypatch.setattr(Group, "select", no_memory)
        gate.release(5)
        async with asyncio.timeout(10):
            assert (await read).json()["text"] == expected("one token", 1)
            assert (await ends).json()["text"] == expected("abc", 3)
            assert "no memory for the texts" in (await goes_on).error
        assert version.text_counts.endings == {"length": 3, "error": 1}
        gate.release(10)
        assert (await server.post(GENERATE, asked())).status == 200
        close(version)

    asyncio.run(scenario())


def test_a_version_that_does_not_come_about_leaves_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    caches = Caches(1 << 20)
    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                text_version(caches=caches)
    with caches.changed:
        assert caches.room(caches.share(toy_model(), 1000)) == 1 << 20


def test_raw_inference_goes_between_the_steps_of_texts() -> None:
    async def scenario() -> None:
        version, gate = held()
        server = serve(version)
        stream = asyncio.create_task(server.post(GENERATE, asked(max_tokens=30)))
        await until(lambda: version.references == 1 and not version.batcher.waiting)
        tensors = [
            {"name": name, "shape": [1, 2], "datatype": "INT64", "data": data}
            for name, data in (("input_ids", [5, 6]), ("attention_mask", [1, 1]), ("position_ids", [0, 1]))
        ]
        empty = {"name": "past.0", "shape": [1, 1, 0, 2], "datatype": "FP32", "data": []}
        raw = asyncio.create_task(
            server.post("/v2/models/m/infer", {"inputs": [*tensors, empty], "outputs": [{"name": "logits"}]})
        )
        await until(lambda: len(version._live) == 1)
        gate.release(3)
        answer = await raw
        assert answer.status == 200 and answer.json()["outputs"][0]["shape"] == [1, 2, 96]
        assert not stream.done()
        gate.release(100)
        assert (await stream).json()["text"] == expected("abc", 30)
        close(version)

    asyncio.run(scenario())


def test_what_is_counted_of_texts_is_in_the_metrics() -> None:
    async def scenario() -> None:
        version = text_version()
        server = serve(version)
        await server.post(GENERATE, asked())
        await server.post(GENERATE, asked(stream=True))
        page = (await server.get("/metrics")).body.decode()
        labels = 'model="m",version="1"'
        for line in (
            f'modelkeep_text_tokens_total{{kind="prompt",{labels}}} 6.0',
            f'modelkeep_text_tokens_total{{kind="completion",{labels}}} 16.0',
            f'modelkeep_text_endings_total{{how="length",{labels}}} 2.0',
            f"modelkeep_text_first_token_seconds_count{{{labels}}} 2.0",
            f"modelkeep_text_streams_total{{{labels}}} 1.0",
            f"modelkeep_text_stream_tokens_total{{{labels}}} 8.0",
            f"modelkeep_text_streams_open{{{labels}}} 0.0",
            'modelkeep_text_texts{model="m",state="running",version="1"} 0.0',
            f"modelkeep_text_cache_bytes{{{labels}}} 0.0",
        ):
            assert line in page, line
        assert f"modelkeep_text_tokens_per_second{{{labels}}}" in page
        close(version)

    asyncio.run(scenario())


def test_the_health_of_a_version_is_told_by_a_real_generation() -> None:
    async def scenario() -> None:
        toy = Toy(toy_model())
        version = text_version(toy, trial={"prompt": "Test prompt", "seconds": 0.01})
        other = load(model="other")
        server = serve(version, other)
        first, second = (await server.get("/api/v2/model-health")).json()["models"]
        assert first["generation"] == {"prompt": "Test prompt", "seconds": 0.01} and "generation" not in second
        assert first["last_inference_unix_seconds"] is None and toy.rows == []
        now = (await server.get("/api/v2/model-health?generate=true")).json()["models"][0]
        assert now["generation"]["max_tokens"] == 10 and now["generation"]["seconds"] > 0 and toy.rows
        toy.poison = WORDS.encode("T")[0]
        failed = (await server.get("/api/v2/model-health?generate=true")).json()["models"][0]
        assert "is poison" in failed["generation"]["error"] and failed["in_flight"] == 0
        close(version, other)

    asyncio.run(scenario())


def test_the_end_of_a_text_is_told_as_stop() -> None:
    async def scenario() -> None:
        toy = Toy(toy_model())
        toy.choose = lambda seen: END if len(seen) > 5 else 40
        version = text_version(toy)
        document = (await serve(version).post(GENERATE, asked())).json()
        assert (document["text"], document["finish_reason"]) == (WORDS.decode([40] * 3), "stop")
        assert document["usage"]["completion_tokens"] == 4
        going_on = (await serve(version).post(GENERATE, asked(ignore_eos=True))).json()
        assert going_on["finish_reason"] == "length"
        close(version)

    asyncio.run(scenario())


def test_the_speed_is_that_of_the_last_whole_seconds() -> None:
    from serving.text.counts import TextCounts

    now = 100.2
    counts = TextCounts(clock=lambda: now)
    counts.generated(50)
    assert counts.tokens_per_second() == 0.0, "a second that has not passed says nothing"
    now = 101.5
    counts.generated(7)
    assert counts.tokens_per_second() == 5.0
    now = 104.0
    assert counts.tokens_per_second() == 5.7
    now = 111.0
    assert counts.tokens_per_second() == 0.7
    now = 150.0
    assert counts.tokens_per_second() == 0.0


def test_many_streams_in_a_budget_for_few_all_end_right_and_the_pages_tell_of_it() -> None:
    async def scenario() -> None:
        toy = Toy(toy_model())
        per_token = toy.model.cache_bytes_per_token
        budget = Toy.memory_bytes + COPIES * 3 * 60 * per_token
        caches = Caches(budget)
        version = text_version(toy, max_running=8, max_waiting=8, max_cache_bytes=3 * 60 * per_token, caches=caches)
        caches.note(version)
        assert version.claim_bytes == Toy.memory_bytes + COPIES * 3 * 60 * per_token
        server = serve(version)
        prompts = [chr(97 + number) * (1 + number % 5) for number in range(14)]
        toy.gate = threading.Semaphore(0)
        posts = [
            asyncio.create_task(server.post(GENERATE, asked(prompt, max_tokens=50, stream=number % 2 == 0)))
            for number, prompt in enumerate(prompts)
        ]
        await until(lambda: len(version._open) == len(prompts))
        toy.gate.release(100_000)
        answers = await asyncio.gather(*posts)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.status == 200
            found = "".join(
                one["text"] for one in (events(answer.body) if b"data: " in answer.body else [answer.json()])
            )
            assert found == expected(prompt, 50)
        figures = version.cache_figures()
        assert figures["computed_again"] > 0 and figures["cut"] == 0 and figures["bytes"] == 0
        alone = await server.post(GENERATE, asked("abc", max_tokens=300))
        assert alone.json()["finish_reason"] == "length" and alone.json()["usage"]["completion_tokens"] == 178
        large = await server.post(GENERATE, asked("x" * 200, max_tokens=5))
        assert large.status == 507 and "shorter prompt" in large.json()["error"]
        page = (await server.get("/metrics")).body.decode()
        labels = '{model="m",version="1"}'
        assert f"modelkeep_text_cut_total{labels} 1.0" in page
        assert f"modelkeep_text_computed_again_total{labels} {float(figures['computed_again'])}" in page
        assert f"modelkeep_text_cache_claim_bytes{labels} {float(figures['claim_bytes'])}" in page
        close(version)

    asyncio.run(scenario())


def test_a_room_reckons_with_the_caches_of_a_version_that_generates_text() -> None:
    version = text_version(max_cache_bytes=5000)
    room = Room(20_000)
    room.note(version)
    wanted: Any = SimpleNamespace(digest=version.digest, files=[], memory_bytes=None)
    assert (
        room.need(wanted)
        == version.claim_bytes
        == Toy.memory_bytes + COPIES * min(5000, 400 * version.text.cache_bytes_per_token)
    )
    assert room.over([wanted], [version]) == 2 * version.claim_bytes - 20_000
    close(version)
