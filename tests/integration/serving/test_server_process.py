"""A server process over real sockets: bad bodies, slow and vanished clients, many at once; TorchScript."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Talk = Callable[[str, bytes], bytes]
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}).encode()


def http_request(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: test", f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def split(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def serves(talk: Talk, server: str) -> bool:
    status, document = split(talk(server, http_request("/v2/models/affine/infer", BODY)))
    return status == 200 and document["outputs"][0]["data"] == [2, 4]


@pytest.mark.parametrize(
    ("request_bytes", "status", "words"),
    [
        (http_request("/v2/models/affine/infer", b"{"), 400, "not valid JSON"),
        (http_request("/v2/models/nobody/infer", BODY), 404, "model 'nobody' is not known"),
        (http_request("/v2/models/affine/infer", BODY, "inference-header-content-length: 99999"), 400, "99999"),
        (http_request("/v2/models/affine/infer", bytes(1_000_001)), 413, "1000001 bytes, the limit is 1000000"),
        (http_request("/v2", b"", method="GET").replace(b"HTTP/1.1", b"HTTP/x"), 400, "Invalid HTTP request"),
        (b"nonsense\r\n\r\n", 400, "Invalid HTTP request"),
    ],
)
def test_a_bad_request_is_answered_in_json_and_the_next_one_served(
    talk: Talk, server: str, request_bytes: bytes, status: int, words: str
) -> None:
    got, document = split(talk(server, request_bytes))
    assert got == status and words in document["error"]
    assert serves(talk, server)


def test_a_chunked_body_is_cut_off_at_the_limit(talk: Talk, server: str) -> None:
    head = b"POST /v2/models/affine/infer HTTP/1.1\r\nhost: test\r\nconnection: close\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%s\r\n" % (100_000, bytes(100_000))
    status, document = split(talk(server, head + chunk * 11 + b"0\r\n\r\n"))
    assert status == 413 and "limit of 1000000 bytes" in document["error"]
    assert serves(talk, server)


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"POST /v2/models/affine/infer HTTP/1.1\r\nhost: te",
        b"POST /v2/models/affine/infer HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\n{",
        b"\r\n\r\n",
    ],
)
def test_a_request_that_never_ends_is_given_up(talk: Talk, impatient_server: str, begun: bytes) -> None:
    status, document = split(talk(impatient_server, begun))
    assert status == 408 and "within 0.5 seconds" in document["error"]
    assert serves(talk, impatient_server)


def test_a_connection_that_owes_nothing_is_left_alone(talk: Talk, impatient_server: str) -> None:
    # Idle between two requests for longer than a request may take to come in.
    host, port = impatient_server.split(":")
    request = http_request("/v2/models/affine/infer", BODY).replace(b"connection: close", b"connection: keep-alive")
    with socket.create_connection((host, int(port)), timeout=30) as connection, connection.makefile("rb") as answers:
        for _ in range(2):
            connection.sendall(request)
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            headers = dict(line.strip().split(b": ", 1) for line in iter(answers.readline, b"\r\n"))
            answers.read(int(headers[b"content-length"]))
            time.sleep(1.5)


def test_clients_that_vanish_leave_nothing_behind(talk: Talk, server: str) -> None:
    host, port = server.split(":")
    whole = http_request("/v2/models/affine/infer", BODY)
    for cut in (1, 50, len(whole) - 5, len(whole)):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(whole[:cut])
    assert serves(talk, server)
    # The last of them may still be on its way out.
    for _ in range(500):
        page = talk(server, http_request("/metrics", b"", method="GET")).decode()
        if "modelkeep_requests_in_flight 0.0" in page:
            break
    assert "modelkeep_requests_in_flight 0.0" in page
    assert 'modelkeep_version_requests_in_flight{model="affine",version="1"} 0.0' in page


def test_many_connections_each_get_their_own_answers(server: str) -> None:
    import aiohttp

    async def client(session: aiohttp.ClientSession, first: int) -> None:
        for k in range(first, first + 25):
            tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [k % 90, k % 7]}
            body = {"id": str(k), "inputs": [tensor], "outputs": [{"name": "y"}]}
            async with session.post(f"http://{server}/v2/models/affine/infer", json=body) as answer:
                document = await answer.json(content_type=None)
                assert answer.status == 200, document
                assert document["id"] == str(k)
                assert document["outputs"][0]["data"] == [2 * (k % 90), 2 * (k % 7)]

    async def scenario() -> None:
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(client(session, 1000 * n) for n in range(32)))

    asyncio.run(scenario())


def test_one_bad_input_among_many_fails_alone(server: str) -> None:
    import aiohttp

    async def ask(session: aiohttp.ClientSession, k: int) -> int:
        value = 1000 if k % 10 == 0 else 1
        body = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [value, value]}]}
        async with session.post(f"http://{server}/v2/models/affine/infer", json=body) as answer:
            document = await answer.json(content_type=None)
            assert answer.status != 200 or document["outputs"][0]["data"] == [2, 2], (
                "its batch-mates get their own answers"
            )
            return answer.status

    async def scenario() -> list[int]:
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(ask(session, k) for k in range(200)))

    assert asyncio.run(scenario()) == [500 if k % 10 == 0 else 200 for k in range(200)]


def test_a_server_of_onnx_models_imports_no_torch_and_no_prefect(talk: Talk, server: str) -> None:
    assert serves(talk, server)
    status, document = split(talk(server, http_request("/api/v2/model-info", b"", method="GET")))
    assert status == 200 and document == {"modules": []}


TORCHSCRIPT = """
import sys
from pathlib import Path
import numpy as np
import torch
from registry.errors import RefusedError
from registry.signature import Signature, TensorSpec
from serving.compute.runtimes import load_runtime

class Both(torch.nn.Module):
    def forward(self, x, n):
        x.add_(1)  # in place: the caller's array must not change
        return x * 2, n + 1

path = Path(sys.argv[1]) / "model.pt"
torch.jit.script(Both()).save(str(path))
signature = Signature(
    (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("n", "INT64", (-1,))),
    (TensorSpec("doubled", "FP32", (-1, 2)), TensorSpec("next", "INT64", (-1,))),
)
runtime = load_runtime(path, "torchscript", signature=signature)
x = np.frombuffer(np.array([[1, 2]], np.float32).tobytes(), np.float32).reshape(1, 2)
answer = runtime.run({"n": np.array([5]), "x": x}, None)
assert answer["doubled"].tolist() == [[4, 6]] and answer["next"].tolist() == [6], answer
assert x.tolist() == [[1, 2]]
assert list(runtime.run({"n": np.array([5]), "x": x}, ["next"])) == ["next"]
assert runtime.memory_bytes >= path.stat().st_size
short = Signature(signature.inputs, signature.outputs[:1])
try:
    load_runtime(path, "torchscript", signature=short).run({"n": np.array([5]), "x": x}, None)
except ValueError as error:
    assert "answered 2 tensors, its signature has 1" in str(error)
else:
    raise AssertionError("a short signature passed")
path.write_bytes(path.read_bytes()[:100])
try:
    load_runtime(path, "torchscript", signature=signature)
except RefusedError as error:
    assert "TorchScript cannot load it" in str(error)
else:
    raise AssertionError("a truncated file passed")
print("done")
"""


def test_torchscript_computes_by_position_and_answers_by_name(repository: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # TorchScript compiles from a file's source
    script.write_text(TORCHSCRIPT)
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "done", done.stderr
