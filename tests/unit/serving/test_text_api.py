"""The paths of text generation over a toy decoder whose steps the test can hold back: answers, streams, refusals, counts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from registry.errors import UsageError
from serving.text import asked as asked_module
from serving.text.exchange import FIRST_NUMBER
from tests.unit.serving.helpers import close, load
from tests.unit.serving.texting import COMPLETIONS, GENERATE, WORDS, asked, events, expected, serve, text_version


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
        assert 0 < document["queue_seconds"] < document["first_token_seconds"] <= document["seconds"]
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
