"""A text model from the outside: registered as a folder, streamed with curl's eyes, asked by the `openai` client, in a canary, through a stop."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import _text_model
from registry import keys, routes
from registry.actor import Who
from serving.text.words import Words
from tests.e2e.harness import PATIENCE_SECONDS, Box, box, wait_for
from tests.own_environment import own_environment

MODEL = "writer"
PROMPTS = ["The data set contains", "Test prompt", "Number of instances: 150. Each of the attributes", "a"]

CLIENT = """
import json, sys
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI

client = OpenAI(base_url=sys.argv[1] + "/v1", api_key=sys.argv[4], max_retries=0)
asked = dict(model="writer", prompt=sys.argv[2], max_tokens=24, temperature=0)
whole = client.completions.create(**asked, logprobs=2)
pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
said = {
    "models": [model.id for model in client.models.list()],
    "model": client.models.retrieve("writer").id,
    "text": whole.choices[0].text,
    "usage": whole.usage.total_tokens,
    "reason": whole.choices[0].finish_reason,
    "logprobs": len(whole.choices[0].logprobs.tokens),
    "streamed": "".join(piece.choices[0].text for piece in pieces if piece.choices),
    "streamed_usage": pieces[-1].usage.total_tokens,
    "stopped": client.completions.create(**asked, stop=sys.argv[3]).choices[0].text,
}
try:
    client.completions.create(**{**asked, "max_tokens": 100000})
except BadRequestError as error:
    said["refused"] = error.message
try:
    client.completions.create(**{**asked, "model": "nobody"})
except NotFoundError as error:
    said["missing"] = error.message
try:
    OpenAI(base_url=sys.argv[1] + "/v1", api_key="wrong", max_retries=0).completions.create(**asked)
except AuthenticationError as error:
    said["unknown"] = error.message
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A server whose model MODEL has the stable version 1 and, registered only, version 2."""
    with box(tmp_path_factory.mktemp("text")) as made:
        for version, seed in (("1", 0), ("2", 1)):
            made.register(version, _text_model.kept(seed) / "model", model=MODEL)
        made.settle_by_hand("1", model=MODEL)
        made.serve()
        yield made


def golden(prompt: str, most: int, seed: int = 0) -> str:
    """The greedy continuation, by the plainest loop in torch."""
    folder = _text_model.kept(seed)
    words = Words.read(folder / "model" / "tokenizer.json")
    return words.decode(_text_model.in_torch(folder).greedy(words.encode(prompt), most, 0))


def generate(server: Box, prompt: str, **more: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0, **more}
    headers = more.pop("headers", {})
    body.pop("headers", None)
    return httpx.post(f"{server.url}/v1/generate", json=body, headers=headers, timeout=PATIENCE_SECONDS)


def test_the_golden_continuations_are_those_of_a_plain_loop_alone_and_in_company(writer: Box) -> None:
    expected = {prompt: golden(prompt, 24) for prompt in PROMPTS}
    assert len(set(expected.values())) > 1, "the model says the same whatever it is asked"
    for prompt in PROMPTS:
        assert generate(writer, prompt).json()["text"] == expected[prompt]
    with ThreadPoolExecutor(8) as pool:
        asked = PROMPTS * 6
        for prompt, answer in zip(asked, pool.map(lambda one: generate(writer, one), asked), strict=True):
            assert answer.status_code == 200 and answer.json()["text"] == expected[prompt]


def test_curl_sees_a_stream_of_events(writer: Box, program: Callable[[str], Path]) -> None:
    body = json.dumps({"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "stream": True})
    done = subprocess.run(
        [str(program("curl")), "--silent", "--no-buffer", "--include", "--data", body, f"{writer.url}/v1/generate"],
        capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True,
    )  # fmt: skip
    head, _, stream = done.stdout.replace("\r\n", "\n").partition("\n\n")
    assert head.startswith("HTTP/1.1 200") and "content-type: text/event-stream" in head
    assert "x-model-version: 1" in head.lower()
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line]
    assert "".join(event["text"] for event in events) == golden(PROMPTS[0], 24)
    assert events[-1]["finish_reason"] in ("stop", "length") and events[-1]["usage"]["prompt_tokens"] > 0
    assert len(events) > 5


def test_the_openai_client_completes_and_streams(writer: Box) -> None:
    python = own_environment("openai", ("openai==3.54.0",), without="the openai client") / "bin" / "python"
    text = golden(PROMPTS[0], 24)
    stop = text[6:9]
    _, key = keys.create(writer.database, name="application", role="infer", who=Who("test"))
    wait_for("the key", lambda: httpx.get(f"{writer.url}/v1/models", headers={"X-API-Key": key}).status_code == 200)
    done = subprocess.run(
        [str(python), "-c", CLIENT, writer.url, PROMPTS[0], stop, key],
        capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["text"] == said["streamed"] == text
    assert said["usage"] == said["streamed_usage"] > 24
    assert said["stopped"] == text[: text.index(stop)]
    assert said["reason"] in ("stop", "length") and said["logprobs"] > 0
    assert said["models"] == [MODEL] and said["model"] == MODEL
    assert "max_tokens" in said["refused"] and "nobody" in said["missing"] and "not known" in said["unknown"]


def test_a_client_that_is_killed_in_a_stream_frees_its_place(writer: Box, program: Callable[[str], Path]) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 250, "temperature": 1, "ignore_eos": True, "stream": True}
    for _ in range(20):
        process = subprocess.Popen(
            [str(program("curl")), "--silent", "--no-buffer", "--data", json.dumps(body), f"{writer.url}/v1/generate"],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"data: ")
        process.kill()
        process.wait()
        process.stdout.close()
    wait_for("the end of all texts", lambda: _metric(writer, "modelkeep_text_streams_open") == 0)
    wait_for("free places", lambda: _metric(writer, 'modelkeep_text_texts{model="writer",state="running"') == 0)
    wait_for("the end of all requests", lambda: writer.in_flight() == 0)
    assert generate(writer, PROMPTS[1]).json()["text"] == golden(PROMPTS[1], 24)


def _metric(server: Box, name: str) -> float:
    page = httpx.get(f"{server.url}/metrics", timeout=10).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name))


def test_two_versions_share_the_traffic_of_a_route(writer: Box) -> None:
    with writer.database.write(actor="test") as transaction:
        desired = routes.Desired(stable="1", candidate="2", weight=0.5)
        routes.change(transaction, "production", MODEL, desired, kind="stage", reason="the test's canary")
    wait_for("the candidate", lambda: writer.follows() and len(writer.info()["loaded"]) == 2)
    expected = {"1": golden(PROMPTS[0], 24), "2": golden(PROMPTS[0], 24, seed=1)}
    answers = [generate(writer, PROMPTS[0], headers={"X-Route-Key": f"user {n}"}) for n in range(24)]
    assert {answer.headers["x-model-version"] for answer in answers} == {"1", "2"}
    for answer in answers:
        assert answer.json()["text"] == expected[answer.headers["x-model-version"]]


def test_a_stop_ends_a_stream_with_a_last_event_within_its_time(tmp_path: Path) -> None:
    with box(tmp_path, extra={"MODELKEEP_SERVER__DRAIN_SECONDS": "1"}) as server:
        server.register("1", _text_model.kept() / "model", model=MODEL)
        server.settle_by_hand("1", model=MODEL)
        process = server.serve()
        body = {"model": MODEL, "prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/generate", json=body, timeout=PATIENCE_SECONDS) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            process.terminate()
            events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        last = events[-1]
        assert last.get("finish_reason") == "length" or (last["status"] == 503 and "stopping" in last["error"])
        assert process.wait(PATIENCE_SECONDS) == 0


def test_streams_run_to_their_end_while_their_version_is_exchanged(tmp_path: Path) -> None:
    """One after the other, so that the last are at work long after a stop's time to drain is over."""
    drain_seconds = 0.2
    extra = {"MODELKEEP_SERVER__DRAIN_SECONDS": str(drain_seconds), "MODELKEEP_TEXT__MAX_RUNNING": "1"}
    with box(tmp_path, extra=extra) as server:
        for version, seed in (("1", 0), ("2", 1)):
            server.register(version, _text_model.kept(seed) / "model", model=MODEL)
        server.settle_by_hand("1", model=MODEL)
        server.serve()
        asked = {"max_tokens": 250, "ignore_eos": True}
        alone = generate(server, "a", **asked).json()
        body = json.dumps({"model": MODEL, "prompt": "a", "temperature": 0, "stream": True, **asked})
        # All are asked before anything is read: the clients take no time from the server meanwhile.
        streams = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=120) for _ in range(60)]
        for stream in streams:
            stream.request("POST", "/v1/generate", body, {"Content-Type": "application/json"})
        prompts = 'modelkeep_text_tokens_total{kind="prompt",model="writer",version="1"}'
        tokens = (len(streams) + 1) * alone["usage"]["prompt_tokens"]
        wait_for("all streams", lambda: _metric(server, prompts) == tokens)
        server.settle_by_hand("2", model=MODEL)
        wait_for("version 2", lambda: server.info()["models"][MODEL]["stable"] == "2")
        during = generate(server, PROMPTS[0])
        time.sleep(2 * drain_seconds)
        sent = [stream.sock.recv(1 << 20, socket.MSG_PEEK) for stream in streams]
        assert not all(data.endswith(b"0\r\n\r\n") for data in sent), "the streams were too short to show anything"
        for stream in streams:
            answer = stream.getresponse()
            events = [json.loads(line.removeprefix(b"data: ")) for line in answer.read().splitlines() if line]
            assert events[-1].get("finish_reason") == "length", events[-1]
            assert "".join(event["text"] for event in events) == alone["text"]
            stream.close()
        assert during.headers["x-model-version"] == "2" and during.json()["text"] == golden(PROMPTS[0], 24, seed=1)
        wait_for("the end of version 1", lambda: _states(server)["1"] == "ARCHIVED")
        assert _metric(server, "modelkeep_text_errors_total") == 0


def _states(server: Box) -> dict[str, str]:
    return {entry["version"]: entry["state"] for entry in server.info()["states"]}


def test_many_streams_in_little_memory_end_right_a_candidate_repeats_them_and_they_are_kept(tmp_path: Path) -> None:
    """A megabyte holds the caches of four of these texts."""
    with box(tmp_path) as server:
        server.extra |= {
            "MODELKEEP_TEXT__MAX_CACHE_MB": "1",
            "MODELKEEP_GPU__MAX_MEMORY_MB": "96",
            "MODELKEEP_GPU__LIMIT_ON_CPU": "true",
            "MODELKEEP_CAPTURE__SHARE": "1",
        }
        for version, seed in (("1", 0), ("2", 1)):
            server.register(version, _text_model.kept(seed) / "model", model=MODEL)
        server.settle_by_hand("1", model=MODEL)
        server.serve()
        asked = {"max_tokens": 200, "ignore_eos": True}
        expected = {prompt: generate(server, prompt, **asked).json()["text"] for prompt in PROMPTS}
        with ThreadPoolExecutor(16) as pool:
            streams = list(pool.map(lambda prompt: _streamed(server, prompt, **asked), PROMPTS * 4))
        assert streams == [expected[prompt] for prompt in PROMPTS * 4]
        (model,) = httpx.get(f"{server.url}/api/gpu/profile", timeout=10).json()["models"]
        caches = model["caches"]
        assert caches["most_bytes"] == 1 << 20 and caches["bytes_per_token"] == 1024 and caches["cut"] == 0
        assert caches["claim_bytes"] == 2 * 256 * 1024, "one text of the whole context, old and new"
        assert _metric(server, "modelkeep_text_errors_total") == 0
        kept = wait_for("what is kept", lambda: _kept(server) if _kept(server).get("requests") == 20 else None)
        assert kept["bytes"] > 20 * 100
        with server.database.write(actor="test") as transaction:
            desired = routes.Desired(stable="1", candidate="2", shadow=True, watch=True)
            routes.change(transaction, "production", MODEL, desired, kind="stage", reason="the test's shadow")
        wait_for("the candidate", lambda: server.follows() and len(server.info()["loaded"]) == 2)
        for prompt in PROMPTS:
            assert generate(server, prompt, seed=7, temperature=1).headers["x-model-version"] == "1"
        copies = 'modelkeep_shadow_requests_total{model="writer",version="2"}'
        dropped = 'modelkeep_shadow_dropped_total{model="writer",version="2"}'
        wait_for("the copies", lambda: _metric(server, copies) + _metric(server, dropped) == len(PROMPTS))
        assert 0 < _metric(server, "modelkeep_shadow_inexact_total") <= _metric(server, copies)
        assert _metric(server, "modelkeep_shadow_errors_total") == 0


def _streamed(server: Box, prompt: str, **more: Any) -> str:
    answer = generate(server, prompt, stream=True, **more)
    assert answer.status_code == 200
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    assert events[-1].get("finish_reason") == "length", events[-1]
    return "".join(event["text"] for event in events)


def _kept(server: Box) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/api/v2/captured", timeout=10).json()["models"].get(MODEL, {})
    return found
