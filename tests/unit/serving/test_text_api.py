"""The paths of text generation over a toy decoder whose steps the test can hold back: answers, streams, refusals, counts."""

from __future__ import annotations

import asyncio
import itertools
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest

from registry.errors import UnavailableError, UsageError
from serving.api import create_app
from serving.routing import Route
from serving.state import Serving
from serving.text import api as text_api
from serving.text import asked as asked_module
from serving.text.exchange import FIRST_NUMBER, end_texts
from serving.text.sequences import Wanted
from serving.text.version import TextVersion
from tests.unit.serving.helpers import Server, close, load, no_nudge, until
from tests.unit.serving.text_toy import END, Letters, Toy, toy_model

WORDS = Letters()
GENERATE, COMPLETIONS = "/v1/generate", "/v1/completions"


def text_version(toy: Toy | None = None, version: str = "1", *, model: str = "m", **options: Any) -> TextVersion:
    toy = toy or Toy(toy_model())
    how = {"max_running": 4, "max_waiting": 2, "max_cache_bytes": 1 << 30, "max_batch": 8, **options}
    return TextVersion(
        model, version, "0" * 64, toy, text=toy.model, words=WORDS, rows_independent=True, queue_size=10, **how
    )


def held(version: str = "1", **options: Any) -> tuple[TextVersion, threading.Semaphore]:
    """A version each of whose runs waits for a token of the semaphore."""
    toy = Toy(toy_model())
    toy.gate = threading.Semaphore(0)
    return text_version(toy, version, **options), toy.gate


def serve(*versions: Any, route: Route | None = None, max_concurrent: int = 100, **limits: Any) -> Server:
    serving = Serving(environment="production", replica_id="box-1", boot_id="abcdef0123456789", random=lambda: 0.5)
    routes = {"m": route or Route("m", 1, versions[0].version)}
    routes |= {v.model: Route(v.model, 1, v.version) for v in versions if v.model != "m"}
    serving.install(routes, {(v.model, v.version): v for v in versions}, "epoch", 1)
    serving.ready = True
    settings: Any = SimpleNamespace(
        server=SimpleNamespace(request_timeout_seconds=30.0, max_body_bytes=100_000),
        performance=SimpleNamespace(max_concurrent_requests=max_concurrent),
        text=SimpleNamespace(**{"max_tokens": 300, "timeout_seconds": 60.0, **limits}),
    )
    routers = [text_api.router(serving, settings)]
    return Server(serving, create_app(serving, settings=settings, nudge=no_nudge, info=dict, routers=routers))


def expected(prompt: str, most: int) -> str:
    """The greedy answer, by the plainest loop over the toy."""
    toy, ids = Toy(toy_model(cached=False)), WORDS.encode(prompt)
    begin = len(ids)
    for _ in range(most):
        array = np.array([ids])
        answer = toy.run(
            {"input_ids": array, "attention_mask": np.ones_like(array), "position_ids": np.arange(len(ids))[None]}, None
        )
        ids.append(int(answer["logits"][0, -1].argmax()))
    return WORDS.decode(ids[begin:])


def asked(prompt: str = "abc", **more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}


def events(body: bytes) -> list[Any]:
    parts = body.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part if part == "data: [DONE]" else orjson.loads(part[6:]) for part in parts]


def test_a_text_is_answered_with_its_usage_and_who_answered() -> None:
    async def scenario() -> None:
        version = text_version(version="3")
        server = serve(version)
        answer = await server.post(GENERATE, asked())
        assert answer.status == 200
        document = answer.json()
        assert document["text"] == expected("abc", 8) and document["finish_reason"] == "length"
        assert document["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
        assert (document["model"], document["version"]) == ("m", "3")
        assert 0 < document["first_token_seconds"] <= document["seconds"]
        assert answer.headers["x-model-version"] == "3"
        assert answer.headers["x-request-id"] == document["id"] == f"box-1.abcdef.1.3.{FIRST_NUMBER + 1}"
        given = await server.post(GENERATE, asked(), {"X-Request-Id": "mine"})
        assert given.headers["x-request-id"] == given.json()["id"] == "mine"
        assert "logprobs" not in document
        total = version.telemetry.total
        assert (total.requests, total.errors, version.references, server.serving.in_flight) == (2, 0, 0, 0)
        assert version.telemetry.codes == {200: 2}
        close(version)

    asyncio.run(scenario())


def test_a_stream_gives_the_same_text_token_by_token_and_ends_with_the_usage() -> None:
    async def scenario() -> None:
        version = text_version()
        server = serve(version)
        answer = await server.post(GENERATE, asked(stream=True, logprobs=1))
        assert answer.headers["content-type"].startswith("text/event-stream")
        *pieces, last = events(answer.body)
        assert len(pieces) == 7 and all(len(piece["text"]) == 1 for piece in pieces)
        assert "".join(piece["text"] for piece in [*pieces, last]) == expected("abc", 8)
        assert last["finish_reason"] == "length" and last["usage"]["completion_tokens"] == 8
        told = [one for piece in [*pieces, last] for one in piece["logprobs"]]
        assert "".join(one["token"] for one in told) == expected("abc", 8)
        assert all(one["logprob"] < 0 and len(one["top"]) == 1 for one in told)
        assert (version.text_counts.streams_open, version.text_counts.streams, version.text_counts.stream_tokens) == (
            0,
            1,
            8,
        )
        close(version)

    asyncio.run(scenario())


def test_completions_are_in_the_form_of_their_client() -> None:
    async def scenario() -> None:
        version = text_version()
        server = serve(version)
        document = (await server.post(COMPLETIONS, asked(logprobs=2, user="me", n=1))).json()
        choice = document["choices"][0]
        assert (document["object"], choice["text"], choice["finish_reason"]) == (
            "text_completion",
            expected("abc", 8),
            "length",
        )
        assert choice["logprobs"]["tokens"] == list(expected("abc", 8))
        assert choice["logprobs"]["text_offset"] == list(range(8))
        assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [2] * 8
        by_tokens = await server.post(COMPLETIONS, asked() | {"prompt": WORDS.encode("abc")})
        assert by_tokens.json()["choices"][0]["text"] == expected("abc", 8)
        assert (await server.post(COMPLETIONS, asked() | {"prompt": ["abc"]})).json()["choices"][0]["text"] == expected(
            "abc", 8
        )
        short = await server.post(
            COMPLETIONS, {"model": "m", "prompt": "a", "max_tokens": None, "stop": None, "seed": None}
        )
        assert short.json()["usage"]["completion_tokens"] <= 16
        streamed = await server.post(COMPLETIONS, asked(stream=True, stream_options={"include_usage": True}))
        *pieces, usage, done = events(streamed.body)
        assert done == "data: [DONE]" and usage["choices"] == [] and usage["usage"]["total_tokens"] == 11
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected("abc", 8)
        assert [piece["choices"][0]["finish_reason"] for piece in pieces][-2:] == [None, "length"]
        assert all(piece["usage"] is None for piece in pieces)
        close(version)

    asyncio.run(scenario())


def test_models_that_generate_text_are_listed_and_no_others() -> None:
    async def scenario() -> None:
        version, other = text_version(), load(model="other")
        server = serve(version, other)
        listed = (await server.get("/v1/models")).json()
        assert [(one["id"], one["object"], one["version"]) for one in listed["data"]] == [("m", "model", "1")]
        assert (await server.get("/v1/models/m")).json() == listed["data"][0]
        missing = await server.get("/v1/models/other")
        assert missing.status == 404 and "'other'" in missing.json()["error"]["message"]
        close(version, other)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 301}, "300 are allowed"),
        ({"prompt": "x" * 395}, "together they may be 400"),
        ({"prompt": "x" * 60_000}, "60000 characters"),
        ({"prompt": 7}, "prompt: "),
        ({"prompt": ""}, "empty"),
        ({"temperature": -1}, "temperature: "),
        ({"temperature": "0"}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"top_k": -1}, "top_k: "),
        ({"seed": 2**63}, "seed: "),
        ({"stop": ""}, "stop: "),
        ({"stop": ["a"] * 17}, "stop: "),
        ({"logprobs": 21}, "logprobs: "),
        ({"repetition_penalty": 0}, "repetition_penalty: "),
        ({"max_token": 5}, "max_token: is not known here"),
        ({"timeout": 0}, "timeout: "),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    async def scenario() -> None:
        version = text_version()
        server = serve(version)
        answer = await server.post(GENERATE, asked() | change)
        assert answer.status == 400 and words in answer.error
        assert (await server.post(GENERATE, asked())).status == 200
        assert version.telemetry.total.errors == 0 and version.references == 0 and server.serving.in_flight == 0
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 2}, "n: "),
        ({"best_of": 3}, "best_of: "),
        ({"echo": True}, "echo: "),
        ({"suffix": "x"}, "suffix: "),
        ({"presence_penalty": 0.5}, "presence_penalty: "),
        ({"logit_bias": {"5": 1}}, "logit_bias: "),
        ({"prompt": ["a", "b"]}, "2 prompts"),
        ({"prompt": []}, "0 prompts"),
        ({"prompt": [5, 9999]}, "tokens are numbers from 0 to 95"),
        ({"messages": []}, "messages: is not known here"),
    ],
)
def test_what_a_completion_cannot_have_is_refused_in_its_clients_form(change: dict[str, Any], words: str) -> None:
    async def scenario() -> None:
        version = text_version()
        answer = await serve(version).post(COMPLETIONS, asked() | change)
        error = answer.json()["error"]
        assert answer.status == error["code"] == 400 and words in error["message"]
        assert error["type"] == "invalid_request_error"
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "more",
    [
        b'"prompt":[' + b",".join([b"{}"] * 200_000) + b"]",
        b'"prompt":[' + b",".join([b'"a"'] * 100_000 + [b"1"] * 100_000) + b"]",
        b'"prompt":[[' + b",".join([b"null"] * 200_000) + b"]]",
        b'"prompt":"a",' + b",".join(b'"%d":1' % n for n in range(100_000)),
        b'"prompt":"a","logit_bias":{' + b",".join(b'"%d":"x"' % n for n in range(100_000)) + b"}",
        b'"prompt":"a","stop":[' + b",".join([b"1"] * 200_000) + b"]",
        b'"prompt":"a","version":"' + b"x" * 500_000 + b'"',
    ],
    ids=["objects", "mixed", "nested", "keys", "bias", "stops", "version"],
)
def test_a_long_wrong_body_is_refused_in_few_words_and_little_memory(more: bytes) -> None:
    """An error for each of its items would take gigabytes, and the event loop for as long."""
    import tracemalloc

    body = b'{"model":"m",' + more + b"}"
    tracemalloc.start()
    try:
        with pytest.raises(UsageError) as refused:
            asked_module.completion(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 2000
    assert peak < 60 << 20, peak


def test_a_default_of_tokens_is_no_more_than_there_is_room_for() -> None:
    async def scenario() -> None:
        version = text_version()
        server = serve(version, max_tokens=100)
        left = await server.post(GENERATE, {"model": "m", "prompt": "x" * 390, "temperature": 0})
        assert left.status == 200 and left.json()["usage"]["completion_tokens"] == 10
        short = await server.post(GENERATE, {"model": "m", "prompt": "abc", "temperature": 0, "ignore_eos": True})
        assert short.status == 200 and short.json()["usage"]["completion_tokens"] == 100
        form = await server.post(COMPLETIONS, {"model": "m", "prompt": "x" * 397, "temperature": 0})
        assert form.status == 200 and form.json()["usage"]["completion_tokens"] == 3
        full = await server.post(GENERATE, {"model": "m", "prompt": "x" * 400})
        assert full.status == 400 and "together they may be 400" in full.error
        close(version)

    asyncio.run(scenario())


def test_who_asks_for_what_is_not_there_is_told_so() -> None:
    async def scenario() -> None:
        version, other = text_version(), load(model="other")
        server = serve(version, other)
        assert (await server.post(GENERATE, asked(model="nobody"))).status == 404
        assert (await server.post(GENERATE, asked(version="9"))).status == 404
        wrong = await server.post(GENERATE, asked(model="other"))
        assert wrong.status == 400 and "/v2/models/other/infer" in wrong.error
        for body in (b"{", b"[]", b"null"):
            answer = await server.ask("POST", GENERATE, body)
            assert answer is not None and answer.status == 400
        assert other.references == version.references == 0
        close(version, other)

    asyncio.run(scenario())


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
