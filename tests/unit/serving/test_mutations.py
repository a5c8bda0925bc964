"""Real requests, broken at random: whatever comes is answered or refused by the client's fault, never by the server's."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from registry.signature import DATATYPES, Signature, TensorSpec
from serving.compute.engine import LoadedVersion
from serving.wire.tensors import DTYPES
from tests.unit.serving.helpers import Arrays, PythonRuntime, Server, close, load, serve

PIECES = (
    *(
        b'"classification":',
        b'"timeout":',
        b'"binary_data":true',
        b'"shared_memory_region":"x"',
        b'"BF16"',
        b'"\\ud800"',
    ),
    *(b"-1", b"1e400", b"18446744073709551616", b"0.5", b"null", b"true", b"[]", b"{}", b"[" * 30, b"\x00", b"\xff"),
)


def same(inputs: Arrays) -> dict[str, NDArray[Any]]:
    return {"y": inputs["x"]}


def request_of(datatype: str, draw: random.Random) -> tuple[bytes, bytes]:
    """The JSON of a good request, and its binary tensor."""
    tensor: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": [1, 2]}
    binary = datatype == "BF16" or draw.random() < 0.5
    tail = b""
    if binary:
        tail = b"\1\0\0\0a\0\0\0\0" if datatype == "BYTES" else draw.randbytes(2 * DTYPES[datatype].itemsize)
        tensor["parameters"] = {"binary_data_size": len(tail)}
    else:
        tensor["data"] = {"BYTES": ["a", "b"], "BOOL": [True, False]}.get(datatype, [1, 2])
    document = {"id": "7", "inputs": [tensor], "parameters": {"timeout": 5_000_000, "binary_data_output": binary}}
    if draw.random() < 0.6:
        wanted = {"classification": draw.choice([0, 1, 5]), "binary_data": binary}
        document["outputs"] = [{"name": "y", "parameters": wanted}]
    return orjson.dumps(document), tail


def broken(body: bytes, draw: random.Random) -> bytes:
    found = bytearray(body)
    for _ in range(draw.choice([0, 1, 1, 2, 4])):
        at = draw.randrange(len(found) + 1)
        change = draw.randrange(3)
        if change == 0:
            found[at : at + 1] = draw.randbytes(1)
        elif change == 1:
            del found[at : at + draw.randrange(1, 6)]
        else:
            found[at : at + draw.randrange(0, 9)] = draw.choice(PIECES)
    return bytes(found)


async def answers(count: int, seed: int) -> dict[int, int]:
    """Statuses of `count` broken requests, each with how often it came."""
    draw = random.Random(seed)
    statuses: dict[int, int] = {}
    for datatype in DATATYPES:
        spec = TensorSpec("x", datatype, (-1, 2))
        signature = Signature(
            (spec, TensorSpec("o", "FP32", (1,), optional=True)), (TensorSpec("y", datatype, (-1, 2)),)
        )
        version = load(PythonRuntime(same, signature))
        server = serve(version)
        for _ in range(count // len(DATATYPES)):
            head, tail = request_of(datatype, draw)
            body = broken(head + tail, draw)
            headers = {"Accept-Encoding": draw.choice(["gzip", "deflate;q=x", "*;q=0"])}
            if tail or draw.random() < 0.1:
                headers["Inference-Header-Content-Length"] = draw.choice(
                    [*[str(len(head))] * 6, "0", str(len(head) + 1), "-1", "x"]
                )
            if draw.random() < 0.1:
                headers["Content-Encoding"] = "gzip"
                body = broken(gzip.compress(body, 1), draw) if draw.random() < 0.5 else gzip.compress(body, 1)
            answer = await server.ask("POST", "/v2/models/m/infer", body, headers)
            assert answer is not None
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
            # 422: bits that are NaN, which JSON cannot carry
            assert answer.status in (200, 400, 413, 422), (answer.status, answer.body, body, headers)
            if answer.status != 200:
                assert answer.error
        assert server.serving.in_flight == version.references == 0
        assert not [code for code in version.telemetry.codes if code >= 500]
        close(version)
    return statuses


def test_a_broken_request_is_never_the_servers_fault() -> None:
    statuses = asyncio.run(answers(3000, 20261121))
    assert statuses[200] > 100 and statuses[400] > 1000


@pytest.mark.long
def test_a_hundred_thousand_broken_requests_are_never_the_servers_fault() -> None:
    asyncio.run(answers(100_000, 7))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TENSORS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "x", "o", "z"]) | JSON,
        "datatype": st.sampled_from(["FP32", "FP32", *DATATYPES]) | JSON,
        "shape": st.lists(st.integers(-1, 3) | st.just(2**40), max_size=3)
        | st.sampled_from([[1, 2], [2, 2], [0, 2]])
        | JSON,
    },
    optional={
        "data": st.lists(st.floats(-1e39, 1e39), max_size=6)
        | st.sampled_from([[1, 2], [[1, 2]], [[1, 2], [3, 4]]])
        | JSON,
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "shared_memory_region", "a"]), JSON, max_size=2
        )
        | JSON,
    },
)
REQUESTS = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS, max_size=3) | JSON},
    optional={
        "id": JSON,
        "outputs": st.lists(
            st.fixed_dictionaries({"name": st.just("y") | JSON}, optional={"parameters": JSON}), max_size=2
        )
        | JSON,
        "parameters": st.dictionaries(
            st.sampled_from(["timeout", "binary_data_output", "priority", "a"]), JSON, max_size=3
        )
        | JSON,
    },
)


def answers_each(examples: int, **options: Any) -> None:
    """One server is asked all of them."""

    async def started() -> tuple[LoadedVersion, Server]:
        signature = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),))
        version = load(PythonRuntime(same, signature))
        return version, serve(version)

    with asyncio.Runner() as runner:
        version, server = runner.run(started())

        @settings(max_examples=examples, deadline=None, **options)
        @given(REQUESTS | JSON)
        def answered(document: Any) -> None:
            answer = runner.run(server.ask("POST", "/v2/models/m/infer", json.dumps(document).encode()))
            assert answer is not None and answer.status in (200, 400, 413, 422, 504), answer
            # 504: the document may give the version a microsecond
            assert answer.status == 200 or answer.error

        try:
            answered()
            assert server.serving.in_flight == version.references == 0
        finally:
            close(version)


def test_any_document_is_answered_or_refused_by_the_clients_fault() -> None:
    answers_each(300, derandomize=True)


@pytest.mark.long
def test_any_of_twenty_thousand_documents_is_answered_or_refused_by_the_clients_fault() -> None:
    answers_each(20_000)
