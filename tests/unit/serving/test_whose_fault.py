"""Whose fault a failed request is. The signature decides: what it refuses is the client's (400), what it allows and fails is the version's (500)."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import numpy as np
import orjson
import pytest

from registry.errors import UsageError
from registry.signature import Signature, TensorSpec
from serving.compute.engine import LoadedVersion
from serving.traffic.routing import Route
from serving.wire.tensors import InputError
from serving.wire.v2 import Codec
from tests.unit.serving.helpers import Arrays, PythonRuntime, Server, close, load, request, serve

WATCHED = Route("m", 1, "1", watch=True)


def asked(runtime: PythonRuntime, document: Any, route: Route = WATCHED) -> tuple[int, str, LoadedVersion]:
    """The status, what was said, and the version with its counts."""

    async def scenario() -> tuple[int, str, LoadedVersion]:
        version = load(runtime)
        server: Server = serve(version, route=route)
        answer = await server.post("/v2/models/m/infer", document)
        close(version)
        return answer.status, answer.json().get("error", ""), version

    return asyncio.run(scenario())


def errors_of(version: LoadedVersion) -> tuple[int, int]:
    """As the process and as the promotion that watches count them."""
    return version.telemetry.total.errors, version.counts_for(WATCHED).errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": []},
        {"inputs": [{"name": "y", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]},
        {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]},
        {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "INT8", "data": [1, 2]}]},
        {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, "2"]}]},
        {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 1e300]}]},
        {**request(), "outputs": [{"name": "z"}]},
        {**request(), "outputs": [{"name": "y", "parameters": {"classification": -1}}]},
        {**request(), "parameters": {"timeout": "soon"}},
    ],
)
def test_what_the_signature_refuses_is_400_and_no_model_sees_it(wrong: Any) -> None:
    runtime = PythonRuntime()
    status, said, version = asked(runtime, wrong)
    assert status == 400 and said and not runtime.calls and errors_of(version) == (0, 0)


def test_a_model_that_fails_on_what_its_signature_allows_is_500_and_counts() -> None:
    """A candidate whose failures passed for mistakes of clients would pass its canary with them."""

    def fails(inputs: Arrays) -> dict[str, Any]:
        raise ValueError("index 7 is out of bounds")

    status, said, version = asked(PythonRuntime(fails), request())
    assert status == 500 and "failed on this input" in said and errors_of(version) == (1, 1)


def test_a_runtime_that_cannot_carry_an_input_says_so_with_400_and_it_does_not_count() -> None:
    def refuses(inputs: Arrays) -> dict[str, Any]:
        raise UsageError("this model takes text, and an element is not UTF-8")

    status, said, version = asked(PythonRuntime(refuses), request())
    assert (status, said) == (400, "this model takes text, and an element is not UTF-8")
    assert errors_of(version) == (0, 0)


def test_a_model_that_answers_other_tensors_than_its_signature_says_is_its_own_fault() -> None:
    status, _, version = asked(PythonRuntime(lambda given: {"y": given["x"].astype(np.complex64)}), request())
    assert status == 422 and errors_of(version) == (1, 1)


def test_what_is_not_finite_already_when_it_comes_in_does_not_make_a_version_unhealthy() -> None:
    """Else whoever may ask could have the version taken out that serves."""
    values = np.array([[np.nan, 1.0]], "<f4").tobytes()
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": len(values)}}
    header = orjson.dumps({"inputs": [tensor]})

    async def scenario() -> tuple[int, LoadedVersion]:
        version = load()
        server = serve(version, route=WATCHED)
        length = {"Inference-Header-Content-Length": str(len(header))}
        answer = await server.ask("POST", "/v2/models/m/infer", header + values, length)
        assert answer is not None
        close(version)
        return answer.status, version

    status, version = asyncio.run(scenario())
    assert status == 422 and version.telemetry.total.errors == 0
    assert version.counts_for(WATCHED).errors == 1, (
        "a judge hears of it: a candidate may fail where the stable version does not"
    )
    status, _, version = asked(PythonRuntime(lambda given: {"y": given["x"] * np.float32(np.inf)}), request(1.0, 2.0))
    assert status == 422 and errors_of(version) == (1, 1), "finite numbers in, others out"


MANY, LONG = 40_000, 4_000_000


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_one_long_text_among_many_costs_as_much_as_was_sent(nested: bool, binary: bool) -> None:
    """An array of fixed-width text would take elements times the longest: here 640 GB."""
    elements = ["a"] * (MANY - 1) + ["b" * LONG]
    codec = Codec(Signature((TensorSpec("x", "BYTES", (-1, -1)),), (TensorSpec("y", "BYTES", (-1, -1)),)))
    tensor: dict[str, Any] = {"name": "x", "shape": [1, MANY], "datatype": "BYTES"}
    if binary:
        tail = b"".join(len(text).to_bytes(4, "little") + text.encode() for text in elements)
        header = orjson.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(tail)}}]})
        body, length = header + tail, len(header)
    else:
        body, length = orjson.dumps({"inputs": [{**tensor, "data": [elements] if nested else elements}]}), None
    tracemalloc.start()
    try:
        decoded = codec.decode(body, length)
        answer, _ = codec.encode("m", "1", decoded, {"y": decoded.inputs["x"]}, {})
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert decoded.inputs["x"].shape == (1, MANY) and decoded.inputs["x"][0, -1] == b"b" * LONG
    assert len(answer) > MANY + LONG and most < 40 * len(body) < 250_000_000


def test_a_list_of_texts_of_unequal_depth_is_refused_without_being_laid_out() -> None:
    codec = Codec(Signature((TensorSpec("x", "BYTES", (-1,)),), (TensorSpec("y", "BYTES", (-1,)),)))
    data: list[Any] = ["a"] * 1000 + ["b" * 1_000_000] + [["c"]]
    body = orjson.dumps({"inputs": [{"name": "x", "shape": [1002], "datatype": "BYTES", "data": data}]})
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="must be strings, in lists of equal lengths"):
            codec.decode(body, None)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 20_000_000
