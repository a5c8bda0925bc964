"""The HTTP face: statuses and words of every refusal, routing and its headers, limits, pages beside inference."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from typing import Any

import numpy as np
import orjson
import pytest
from numpy.typing import NDArray

from registry.errors import ModelkeepError, UnavailableError
from registry.signature import Signature, TensorSpec
from serving.statuses import (
    BusyError,
    ClientGoneError,
    MethodError,
    OutOfMemoryError,
    QueueFullError,
    kind_of,
)
from serving.traffic.routing import Route
from serving.views.metrics import Metrics
from serving.wire.tensors import InputError
from tests.unit.serving.helpers import ROWS, Arrays, PythonRuntime, close, load, request, serve, until

INFER = "/v2/models/m/infer"


def fail(inputs: Arrays) -> dict[str, NDArray[Any]]:
    raise IndexError("index 12 is out of range\n  File '/somewhere/inside.py'")


def test_an_answer_names_the_version_and_the_request() -> None:
    async def scenario() -> None:
        version = load(version="7")
        server = serve(version)
        first, second = await server.infer(1, 2), await server.infer(1, 2)
        assert first.status == 200
        document = first.json()
        assert (document["model_name"], document["model_version"]) == ("m", "7")
        assert document["outputs"][0]["data"] == [2, 4]
        assert set(document["parameters"]) == {"queue_seconds", "model_seconds"}
        assert first.headers["x-model-version"] == "7"
        assert first.headers["x-request-id"] == "box-1.abcdef.1.7.1"
        assert second.headers["x-request-id"] == "box-1.abcdef.1.7.2"
        given = await server.post(INFER, request(), {"X-Request-ID": "mine"})
        assert given.headers["x-request-id"] == "mine"
        unfit = await server.post(INFER, request(), {"X-Request-ID": "x" * 129})
        assert unfit.headers["x-request-id"] == "box-1.abcdef.1.7.4"
        close(version)

    asyncio.run(scenario())


def test_the_route_decides_unless_the_path_names_a_version() -> None:
    async def scenario() -> None:
        stable, candidate = load(version="1"), load(version="2")
        server = serve(stable, candidate, route=Route("m", 1, "1", "2", 0.4, watch=True), random=lambda: 0.39)
        assert (await server.infer()).headers["x-model-version"] == "2"
        server.serving.random = lambda: 0.4
        assert (await server.infer()).headers["x-model-version"] == "1"
        assert (await server.infer(version="2")).headers["x-model-version"] == "2"
        # Who names a version chose for himself: he is no part of the comparison.
        assert {row["version"]: row["requests"] for row in server.serving.watch_counts()} == {"1": 1, "2": 1}
        close(stable, candidate)

    asyncio.run(scenario())


def test_binary_requests_are_answered_in_binary() -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version)
        x = np.array([[1, 2]], np.float32).tobytes()
        tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
        head = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
        headers = {"Inference-Header-Content-Length": str(len(head))}
        answer = await server.ask("POST", INFER, head + x, headers)
        assert answer is not None and answer.status == 200
        length = int(answer.headers["inference-header-content-length"])
        assert answer.headers["content-type"] == "application/octet-stream"
        assert np.frombuffer(answer.body[length:], np.float32).tolist() == [2, 4]
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "words"),
    [
        ("/v2/models/x/infer", b"{}", {}, 404, "model 'x' is not known"),
        ("/v2/models/m/versions/9/infer", b"{}", {}, 404, "loaded are '1'"),
        (INFER, b"{", {}, 400, "not valid JSON"),
        (INFER, b"[]", {}, 400, "must be a JSON object"),
        (INFER, b"{}", {"Inference-Header-Content-Length": "x"}, 400, "must be a number of bytes, it is 'x'"),
        (INFER, b"{}", {"Inference-Header-Content-Length": "-1"}, 400, "must be a number of bytes"),
        (INFER, b"{}", {"Inference-Header-Content-Length": "3"}, 400, "is 3, but the body has 2 bytes"),
        (INFER, b"{}", {"Content-Encoding": "br"}, 415, "Content-Encoding 'br'"),
        (INFER, b"{}", {"Content-Encoding": "gzip"}, 400, "not valid gzip"),
        (INFER, bytes(100_001), {}, 413, "the body has 100001 bytes, the limit is 100000"),
    ],
)
def test_a_wrong_request_is_refused_and_the_next_one_is_served(
    path: str, body: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version, route=Route("m", 1, "1", watch=True))
        answer = await server.ask("POST", path, body, headers)
        assert answer is not None and answer.status == status
        assert words in answer.error
        assert "x-request-id" in answer.headers
        assert (await server.infer()).status == 200
        assert version.counts_for(server.serving.routes["m"]).requests == 1
        assert server.serving.in_flight == version.references == 0
        close(version)

    asyncio.run(scenario())


def test_a_body_without_a_length_is_cut_off_at_the_limit_before_it_is_all_there() -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version)
        chunks = [bytes(60_000), bytes(60_000), *[bytes(60_000)] * 100]
        answer = await server.ask("POST", INFER, chunks)
        assert answer is not None and answer.status == 413
        assert "longer than the limit of 100000 bytes" in answer.error
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/v2/repository/index", "/v2/models/m/versions/1/nothing"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_body_that_is_no_inference_has_a_bound_of_its_own(path: str, pieces: int) -> None:
    """A thousand connections that each send most of `max_body_bytes` would take gigabytes, and no place bounds them."""

    async def scenario() -> None:
        version = load()
        server = serve(version, max_body_bytes=10_000_000)
        sent = [b" " * 30_000] * pieces if pieces > 1 else b" " * 70_000
        answer = await server.ask("POST", path, sent)
        assert answer is not None and answer.status == 413 and str(1 << 16) in answer.error
        close(version)

    asyncio.run(scenario())


def test_who_asks_whether_the_server_is_ready_is_told_when_to_ask_again() -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version)
        assert (await server.get("/health")).status == 200
        server.serving.ready = False
        answer = await server.get("/health")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["ready"] is False and "not ready" in answer.json()["error"]
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize("path", [INFER, "/v2/repository/index"])
@pytest.mark.parametrize(
    ("body", "headers", "lingers"),
    [
        ([gzip.compress(bytes(100_001))], {"Content-Encoding": "gzip"}, False),
        ([bytes(60_000), bytes(60_000)], {}, False),
        ([bytes(100_001)], {}, False),
        ([bytes(60_000), bytes(60_000), b"more"], {}, True),
        (bytes(100_001), {}, True),
    ],
    ids=["unpacked", "last chunk", "only chunk", "more chunks", "declared"],
)
def test_a_refused_body_is_waited_for_only_where_more_of_it_may_come(
    path: str, body: bytes | list[bytes], headers: dict[str, str], lingers: bool
) -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version)
        answer = await server.ask("POST", path, body, headers)
        assert answer is not None and answer.status == 413
        # Where it waits the answer's end comes by itself, after what was still to come.
        assert [message.get("more_body", False) for message in server.sent[1:]] == (
            [True, False] if lingers else [False]
        )
        assert server.serving.in_flight == 0
        close(version)

    asyncio.run(scenario())


def test_too_many_classes_are_the_clients_error_and_not_the_versions() -> None:
    async def scenario() -> None:
        wide = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 100_001)),))
        version = load(PythonRuntime(lambda inputs: {"y": np.zeros((len(inputs["x"]), 100_001), np.float32)}, wide))
        server = serve(version, route=Route("m", 1, "1", watch=True))
        wanted = [{"name": "y", "parameters": {"classification": 100_001}}]
        answer = await server.post(INFER, {**request(), "outputs": wanted})
        assert answer.status == 400 and "the limit is 100000" in answer.error
        counts = version.counts_for(server.serving.routes["m"])
        assert (counts.requests, counts.errors) == (1, 0)
        close(version)

    asyncio.run(scenario())


def test_a_model_that_fails_answers_500_with_its_name_and_counts_as_its_error() -> None:
    async def scenario() -> None:
        version = load(PythonRuntime(fail), "3")
        server = serve(version, route=Route("m", 1, "3", watch=True))
        answer = await server.infer()
        assert answer.status == 500
        assert answer.error == "model 'm' version '3' failed on this input: index 12 is out of range"
        assert answer.headers["x-model-version"] == "3"
        counts = version.counts_for(server.serving.routes["m"])
        assert (counts.requests, counts.errors) == (1, 1)
        close(version)

    asyncio.run(scenario())


def test_errors_are_counted_by_kind() -> None:
    def compute(inputs: Arrays) -> Arrays:
        first = float(inputs["x"][0, 0])
        if first == 1:
            raise ValueError("it cannot")
        if first == 2:
            raise OutOfMemoryError("no room")
        if first == 3:
            return {"y": inputs["x"] / np.float32(np.nan)}
        return {"y": inputs["x"]}

    async def scenario() -> None:
        version = load(runtime := PythonRuntime(compute), "3")
        server = serve(version)
        statuses = [(await server.infer(value, 2)).status for value in (0, 1, 1, 2, 3)]
        assert statuses == [200, 500, 500, 507, 422]
        assert (await server.post(INFER, {"inputs": []})).status == 400
        runtime.gate.clear()
        late = await server.post(INFER, {**request(0, 2), "parameters": {"timeout": 20_000}})
        assert late.status == 504
        runtime.gate.set()
        assert (await server.post("/v2/models/other/infer", request())).status == 404
        assert version.telemetry.errors == {"model": 2, "memory": 1, "output": 1, "input": 1, "deadline": 1}
        assert server.serving.unrouted_errors == {"not_found": 1}
        page = Metrics(server.serving).render().decode()
        assert 'modelkeep_inference_errors_total{kind="model",model="m",version="3"} 2.0' in page
        assert 'modelkeep_inference_errors_total{kind="not_found",model="",version=""} 1.0' in page
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ClientGoneError("x"), "client_gone"),
        (BusyError("x"), "busy"),
        (QueueFullError("x"), "busy"),
        (UnavailableError("x"), "unavailable"),
        (InputError("x", status=413), "input"),
        (MethodError("/x", "GET", "POST"), "input"),
        (ModelkeepError("x"), "internal"),
    ],
)
def test_what_went_wrong_has_a_word(error: ModelkeepError, kind: str) -> None:
    assert kind_of(error) == kind


def test_an_answer_with_nan_is_refused_in_json_and_counts_as_the_versions_error() -> None:
    async def scenario() -> None:
        version = load(PythonRuntime(lambda inputs: {"y": inputs["x"] / np.float32(np.nan)}))
        server = serve(version, route=Route("m", 1, "1", watch=True))
        answer = await server.infer()
        assert answer.status == 422
        assert "output 'y'" in answer.error and "binary" in answer.error
        binary = await server.post(INFER, {**request(), "parameters": {"binary_data_output": True}})
        assert binary.status == 200
        counts = version.counts_for(server.serving.routes["m"])
        assert (counts.requests, counts.errors) == (2, 1)
        close(version)

    asyncio.run(scenario())


def test_a_request_that_runs_out_of_time_answers_504_and_the_next_one_is_not_computed_for_nobody() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime)
        server = serve(version, route=Route("m", 1, "1", watch=True), timeout_seconds=0.3)
        runtime.gate.clear()
        computing = asyncio.create_task(server.infer(1, 1))
        await until(runtime.entered.is_set)
        queued = asyncio.create_task(server.infer(2, 2))
        for answer in (await computing, await queued):
            assert answer.status == 504
            assert answer.error == "model 'm' version '1' did not answer within 0.3 seconds"
        runtime.gate.set()
        close(version)
        assert len(runtime.calls) == 1
        counts = version.counts_for(server.serving.routes["m"])
        assert (counts.requests, counts.errors) == (2, 2)

    asyncio.run(scenario())


def test_a_client_that_goes_is_noticed_and_not_computed_for() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime)
        server = serve(version)
        runtime.gate.clear()
        computing = asyncio.create_task(server.infer(1, 1))
        await until(runtime.entered.is_set)
        gone = asyncio.Event()
        queued = asyncio.create_task(server.ask("POST", INFER, orjson.dumps(request(2, 2)), gone=gone))
        await until(lambda: version.queue_length)
        gone.set()
        assert await queued is None
        runtime.gate.set()
        assert (await computing).status == 200
        assert len(runtime.calls) == 1
        assert version.telemetry.codes == {499: 1, 200: 1}
        assert version.references == 0
        close(version)

    asyncio.run(scenario())


def test_a_client_that_goes_while_it_sends_is_no_error() -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version)
        gone = asyncio.Event()
        gone.set()
        assert await server.ask("POST", INFER, [], gone=gone) is None
        assert (await server.infer()).status == 200
        close(version)

    asyncio.run(scenario())


def test_too_many_requests_are_told_to_come_back() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime, queue_size=1)
        server = serve(version, max_concurrent=3)
        runtime.gate.clear()
        tasks = [asyncio.create_task(server.infer())]
        await until(runtime.entered.is_set)
        tasks.append(asyncio.create_task(server.infer()))
        await until(lambda: version.queue_length)
        full = await server.infer()
        assert full.status == 429 and full.headers["retry-after"] == "1"
        assert "version '1' has 1 requests waiting" in full.error
        server.serving.places.resize(2)
        busy = await server.infer()
        assert busy.status == 429 and busy.headers["retry-after"] == "1"
        assert "the server has 2 requests in flight" in busy.error
        runtime.gate.set()
        assert [(await task).status for task in tasks] == [200, 200]
        assert server.serving.unrouted_codes == {429: 1} and version.telemetry.codes == {429: 1, 200: 2}
        close(version)

    asyncio.run(scenario())


def test_copies_go_to_the_candidate_only_after_the_answer_and_its_failures_stay_there() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime(fail)
        stable, candidate = load(version="1"), load(runtime, "2")
        route = Route("m", 1, "1", "2", 0.0, shadow=True, watch=True)
        server = serve(stable, candidate, route=route)
        runtime.gate.clear()
        answer = await server.infer()
        assert answer.status == 200 and answer.headers["x-model-version"] == "1"
        runtime.gate.set()
        counts = candidate.counts_for(route)
        await until(lambda: counts.shadow_requests)
        assert (counts.shadow_errors, counts.requests, counts.errors) == (1, 0, 0)
        assert stable.counts_for(route).requests == 1
        assert not runtime.closed.is_set()
        close(stable, candidate)

    asyncio.run(scenario())


def test_a_fault_of_the_server_answers_500_without_its_details(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version)
        with monkeypatch.context() as patch:
            patch.setattr(version.codec, "decode", lambda body, length: 1 / 0)
            answer = await server.infer()
        assert answer.status == 500 and "division" not in answer.error
        assert version.telemetry.total.errors == 0
        assert (await server.infer()).status == 200
        close(version)

    asyncio.run(scenario())


def test_the_protocols_descriptions() -> None:
    async def scenario() -> None:
        spec = (
            TensorSpec("x", "FP32", (-1, 2)),
            TensorSpec("t", "BYTES", (-1,)),
            TensorSpec("o", "BF16", (1,), optional=True),
        )
        version, second = load(PythonRuntime(signature=Signature(spec, ROWS.outputs)), "1"), load(version="2")
        server = serve(version, second)
        assert (await server.get("/v2")).json()["name"] == "modelkeep"
        ready = {"name": "m", "ready": True}
        for path, said in (
            ("/v2/health/live", {"live": True}),
            ("/v2/health/ready", {"ready": True}),
            ("/v2/models/m/ready", ready),
            ("/v2/models/m/versions/2/ready", ready),
        ):
            answer = await server.get(path)
            assert (answer.status, answer.json()) == (200, said), path
        metadata = (await server.get("/v2/models/m")).json()
        assert metadata["versions"] == ["1", "2"] and metadata["platform"] == "python"
        assert metadata["inputs"][1] == {"name": "t", "datatype": "BYTES", "shape": [-1]}
        config = (await server.get("/v2/models/m/config")).json()
        assert config["max_batch_size"] == 8
        assert config["input"][1] == {"name": "t", "data_type": "TYPE_STRING", "dims": []}
        assert config["input"][2] == {"name": "o", "data_type": "TYPE_BF16", "dims": [], "optional": True}
        await server.infer(version="2")
        stats = (await server.get("/v2/models/m/versions/2/stats")).json()["model_stats"]
        assert [s["version"] for s in stats] == ["2"] and stats[0]["inference_stats"]["success"]["count"] == 1
        found = stats[0]["inference_stats"]
        assert found["success"]["ns"] == found["request"]["ns"] > 0 and found["fail"] == {"count": 0, "ns": 0}
        assert len((await server.get("/v2/models/m/stats")).json()["model_stats"]) == 2
        assert len((await server.get("/v2/models/stats")).json()["model_stats"]) == 2
        index = (await server.post("/v2/repository/index", None)).json()
        assert index[0] == {"name": "m", "version": "1", "state": "READY", "reason": ""}
        close(version, second)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v2/models/x", 404, "model 'x' is not known"),
        ("GET", "/v2/models/m/versions/9/ready", 404, "no version '9'"),
        ("GET", "/v2/models/m/nothing", 404, "not a path of the V2 protocol"),
        ("GET", "/v2/nothing", 404, "not a path of the V2 protocol"),
        ("GET", INFER, 405, "takes POST, not GET"),
        ("DELETE", "/v2/models/m", 405, "takes GET, not DELETE"),
        ("GET", "/v2/repository/index", 405, "takes POST, not GET"),
        (
            "POST",
            "/v2/repository/models/m/load",
            501,
            "load by the V2 protocol is not supported: what is loaded follows",
        ),
        ("POST", "/v2/repository/models/m/unload", 501, "unload by the V2 protocol is not supported"),
        ("POST", "/v2/repository/own/models/m/load", 501, "load by the V2 protocol is not supported"),
        ("GET", "/v2/repository/models/m/load", 405, "takes POST, not GET"),
        ("GET", "/v2/systemsharedmemory/status", 501, "shared memory is not supported"),
        ("POST", "/v2/systemsharedmemory/region/r/register", 501, "shared memory is not supported"),
        ("POST", "/v2/cudasharedmemory/unregister", 501, "shared memory is not supported"),
        ("GET", "/v2/trace/setting", 501, "trace settings are not supported"),
        ("POST", "/v2/models/m/trace/setting", 501, "trace settings are not supported"),
        ("POST", "/v2/logging", 501, "log settings are not supported"),
        ("HEAD", INFER, 405, "takes POST, not HEAD"),
        ("GET", "/nothing", 404, "/nothing: Not Found"),
        ("GET", "/api/v2/update-models", 405, "Method Not Allowed"),
        ("GET", "/v2x", 404, "/v2x: Not Found"),
    ],
)
def test_every_error_is_one_json_object(method: str, path: str, status: int, words: str) -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version)
        answer = await server.ask(method, path)
        assert answer is not None and answer.status == status
        assert words in answer.error
        if status == 405:
            assert answer.headers["allow"]
        close(version)

    asyncio.run(scenario())


def test_a_server_that_is_not_ready_says_so() -> None:
    async def scenario() -> None:
        server = serve()
        server.serving.ready = False
        for path in ("/v2/health/ready", "/health"):
            assert (await server.get(path)).status == 503
        assert (await server.get("/v2/health/live")).status == 200
        server.serving.live = False
        assert (await server.get("/v2/health/live")).status == 503

    asyncio.run(scenario())


def test_the_index_names_what_is_known_and_not_loaded_with_its_reason() -> None:
    async def scenario() -> None:
        version = load(version="1")
        server = serve(version, route=Route("m", 1, "1", "2"))
        server.serving.load_errors = {("m", "3"): "its file is not there"}
        ready = {"name": "m", "version": "1", "state": "READY", "reason": ""}
        loading = {"name": "m", "version": "2", "state": "LOADING", "reason": ""}
        failed = {"name": "m", "version": "3", "state": "UNAVAILABLE", "reason": "its file is not there"}
        path = "/v2/repository/index"
        for body in (b"", b"{}", b'{"ready": false}'):
            answer = await server.ask("POST", path, body)
            assert answer is not None and answer.json() == [ready, loading, failed], body
        assert (await server.post(path, {"ready": True})).json() == [ready]
        for wrong in (b"{", b"[]", b'{"ready": 1}'):
            answer = await server.ask("POST", path, wrong)
            assert answer is not None and answer.status == 400 and answer.error, wrong
        answer = await server.get("/v2/models/m/versions/3/ready")
        assert (answer.status, answer.error) == (503, "model 'm' version '3' did not load: its file is not there")
        assert answer.headers["retry-after"] == "1"
        long = await server.ask("POST", path, bytes(100_001))
        assert long is not None and long.status == 413
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/metrics",
        "/api/v2/model-info",
        "/docs",
        "/v2",
        "/v2/health/ready",
        "/v2/models/m",
        "/v2/models/stats",
    ],
)
def test_head_is_answered_wherever_get_is(path: str) -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version)
        got, head = await server.get(path), await server.ask("HEAD", path)
        assert head is not None and (head.status, head.headers["content-type"]) == (200, got.headers["content-type"])
        close(version)

    asyncio.run(scenario())


def test_a_request_whose_own_deadline_has_come_is_not_computed_and_proves_nothing_against_the_version() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime)
        server = serve(version, route=Route("m", 1, "1", watch=True))
        runtime.gate.clear()
        computing = asyncio.create_task(server.infer(1, 1))
        await until(runtime.entered.is_set)
        hurried = await server.post(INFER, {**request(2, 2), "parameters": {"timeout": 2000}})
        assert hurried.status == 504
        assert (
            hurried.error == "model 'm' version '1' did not answer within the 0.002 seconds of the parameter 'timeout'"
        )
        runtime.gate.set()
        assert (await computing).status == 200
        patient = await server.post(INFER, {**request(3, 3), "parameters": {"timeout": 20_000_000}})
        assert patient.status == 200 and len(runtime.calls) == 2
        counts = version.counts_for(server.serving.routes["m"])
        assert (counts.requests, counts.errors) == (2, 0)
        close(version)

    asyncio.run(scenario())


def test_who_does_not_take_his_answer_holds_no_place_whatever_it_is() -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version, max_concurrent=1)
        for wanted, document in ((200, request(1.0, 2.0)), (400, {"inputs": []})):
            took, free = asyncio.Event(), asyncio.Event()
            told: list[int] = []

            async def send(message: Any, took: asyncio.Event = took, free: asyncio.Event = free) -> None:
                if message["type"] == "http.response.start":
                    told.append(message["status"])  # noqa: B023
                    took.set()
                await free.wait()

            body = orjson.dumps(document)

            async def receive(body: bytes = body) -> dict[str, Any]:
                return {"type": "http.request", "body": body, "more_body": False}

            lines = [(b"content-length", b"%d" % len(body))]
            scope = {"type": "http", "method": "POST", "path": INFER, "query_string": b"", "headers": lines}
            asking = asyncio.create_task(server.app(scope, receive, send))
            await asyncio.wait_for(took.wait(), 30)
            assert told == [wanted] and server.serving.places.in_flight == 0
            free.set()
            await asking
        close(version)

    asyncio.run(scenario())


def test_what_a_request_waited_for_its_place_is_gone_of_its_own_deadline() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime)
        server = serve(version, route=Route("m", 1, "1", watch=True), max_concurrent=1)
        server.serving.catching_up = True  # everybody waits for his turn
        runtime.gate.clear()
        computing = asyncio.create_task(server.infer(1, 1))
        await until(runtime.entered.is_set)
        late = asyncio.create_task(server.post(INFER, {**request(2, 2), "parameters": {"timeout": 10_000}}))
        long = asyncio.create_task(server.post(INFER, {**request(3, 3), "parameters": {"timeout": 20_000_000}}))
        await until(lambda: server.serving.places.waiting == 2)
        await asyncio.sleep(0.02)
        runtime.gate.set()
        assert (await computing).status == (await long).status == 200
        answer = await late
        assert answer.status == 504 and "was not asked: the request had waited for 0.0" in answer.error
        assert len(runtime.calls) == 2, "it is not computed"
        counts = version.counts_for(server.serving.routes["m"])
        assert (counts.requests, counts.errors) == (2, 0)
        close(version)

    asyncio.run(scenario())


def test_a_deadline_beyond_what_is_usual_counts_against_the_version() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime)
        server = serve(version, route=Route("m", 1, "1", watch=True, slow_threshold_seconds=0.001))
        runtime.gate.clear()
        late = await server.post(INFER, {**request(), "parameters": {"timeout": 5000}})
        assert late.status == 504
        runtime.gate.set()
        counts = version.counts_for(server.serving.routes["m"])
        assert (counts.requests, counts.errors) == (1, 1)
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize(("microseconds", "errors"), [(999_999, 0), (1_000_000, 1)])
def test_without_a_measure_of_slow_an_ample_deadline_counts_against_the_version(microseconds: int, errors: int) -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        version = load(runtime)
        server = serve(version, route=Route("m", 1, "1", watch=True))
        runtime.gate.clear()
        computing = asyncio.create_task(server.infer())
        await until(runtime.entered.is_set)
        late = await server.post(INFER, {**request(), "parameters": {"timeout": microseconds}})
        assert late.status == 504
        runtime.gate.set()
        assert (await computing).status == 200
        counts = version.counts_for(server.serving.routes["m"])
        assert (counts.requests, counts.errors) == (1 + errors, errors)
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize("accepts", ["gzip", "deflate"])
def test_long_answers_are_packed_for_clients_that_ask(accepts: str) -> None:
    async def scenario() -> None:
        version = load()
        server = serve(version)
        tensor = {"name": "x", "shape": [2000, 2], "datatype": "FP32", "data": [1.0] * 4000}
        plain = await server.post(INFER, {"inputs": [tensor]})
        assert "content-encoding" not in plain.headers and len(plain.body) > 8192
        packed = await server.post(INFER, {"inputs": [tensor]}, {"Accept-Encoding": accepts})
        assert (packed.headers["content-encoding"], packed.headers["vary"]) == (accepts, "accept-encoding")
        assert packed.headers["content-length"] == str(len(packed.body))
        unpack = gzip.decompress if accepts == "gzip" else zlib.decompress
        assert orjson.loads(unpack(packed.body))["outputs"] == plain.json()["outputs"]
        short = await server.post(INFER, request(), {"Accept-Encoding": accepts})
        assert "content-encoding" not in short.headers and short.status == 200
        close(version)

    asyncio.run(scenario())


def test_a_model_whose_version_is_not_loaded_is_not_ready() -> None:
    async def scenario() -> None:
        version = load(version="1")
        server = serve(version, route=Route("m", 1, "2"))
        assert (await server.get("/v2/models/m/ready")).status == 503
        close(version)

    asyncio.run(scenario())


def test_the_pages_beside_inference() -> None:
    async def nudge() -> dict[str, Any]:
        return {"generation": 9}

    async def scenario() -> None:
        version = load()
        server = serve(version, nudge=nudge, info=lambda: {"replica": "box-1"})
        assert (await server.get("/")).json()["models"] == ["m"]
        assert (await server.get("/health")).json() == {
            "live": True,
            "ready": True,
            "in_flight": 0,
            "boot_id": "abcdef0123456789",
        }
        assert (await server.get("/api/v2/model-info")).json() == {"replica": "box-1"}
        assert (await server.get("/api/v2/model-health")).json()["models"][0]["version"] == "1"
        assert (await server.post("/api/v2/update-models", None)).json() == {"generation": 9}
        metrics = await server.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert b"modelkeep_requests_total" in metrics.body
        docs = await server.get("/docs")
        assert b"/v2/models/{model}" in docs.body and b"/api/v2/update-models" in docs.body
        assert b"src=" not in docs.body  # opened without network
        close(version)

    asyncio.run(scenario())


def test_errors_of_the_composition_keep_their_status() -> None:
    async def nudge() -> dict[str, Any]:
        raise UnavailableError("the registry does not answer")

    async def scenario() -> None:
        server = serve(nudge=nudge)
        answer = await server.post("/api/v2/update-models", None)
        assert (answer.status, answer.error) == (503, "the registry does not answer")

    asyncio.run(scenario())


def test_only_the_share_of_the_shadow_is_copied() -> None:
    async def scenario() -> None:
        stable, candidate = load(version="1"), load(version="2")
        route = Route("m", 1, "1", "2", 0.0, shadow=True, watch=True, shadow_share=0.25)
        drawn = iter([0.1, 0.25, 0.9, 0.24])
        server = serve(stable, candidate, route=route, random=lambda: next(drawn))
        for _ in range(4):
            assert (await server.infer()).headers["x-model-version"] == "1"
            await until(lambda: not candidate.shadow_queue_length)
        counts = candidate.counts_for(route)
        await until(lambda: counts.shadow_requests + counts.shadow_dropped == 2)
        close(stable, candidate)

    asyncio.run(scenario())


def test_what_is_counted_of_clusters_and_verdicts_is_in_the_metrics() -> None:
    async def scenario() -> None:
        version = load(PythonRuntime(fail), "3")
        server = serve(version, route=Route("m", 1, "3", watch=True))
        await server.infer()
        text = (await server.get("/metrics")).body.decode()
        assert 'modelkeep_bad_events_total{model="m",stream="error",version="3"} 1.0' in text
        assert 'modelkeep_shadow_inexact_total{model="m",version="3"} 0.0' in text
        assert 'modelkeep_feedback_total{result="accepted"} 0.0' in text
        assert "modelkeep_feedback_waiting 0.0" in text
        close(version)

    asyncio.run(scenario())
