"""HTTP/1.1 as clients may use it: many requests on one connection, one behind the other, in chunks, answered without a body."""

from __future__ import annotations

import gzip
import socket
from typing import IO

import numpy as np
import orjson

TENSOR = {"name": "x", "shape": [1, 2], "datatype": "FP32"}
INFER = b"/v2/models/affine/infer"


def asked(method: bytes, path: bytes, body: bytes = b"", *headers: bytes) -> bytes:
    lines = [method + b" " + path + b" HTTP/1.1", b"host: test", *headers]
    if body and not any(line.startswith(b"transfer-encoding") for line in headers):
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def answered(answers: IO[bytes], *, head: bool = False) -> tuple[int, dict[bytes, bytes], bytes]:
    status = int(answers.readline().split()[1])
    headers = dict(line.strip().split(b": ", 1) for line in iter(answers.readline, b"\r\n"))
    return status, headers, b"" if head else answers.read(int(headers[b"content-length"]))


def test_requests_on_one_connection_are_answered_in_their_order(server: str) -> None:
    host, port = server.split(":")
    numbers = [orjson.dumps({"id": str(n), "inputs": [{**TENSOR, "data": [n, n]}]}) for n in range(5)]
    with socket.create_connection((host, int(port)), timeout=30) as connection, connection.makefile("rb") as answers:
        connection.sendall(b"".join(asked(b"POST", INFER, body) for body in numbers))  # nobody waits for an answer
        for n in range(5):
            status, _, body = answered(answers)
            document = orjson.loads(body)
            assert (status, document["id"], document["outputs"][0]["data"]) == (200, str(n), [2 * n, 2 * n])


def test_head_leaves_the_connection_as_it_was(server: str) -> None:
    host, port = server.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection, connection.makefile("rb") as answers:
        for path in (b"/v2", b"/v2/health/ready", b"/v2/models/affine/stats", b"/health", b"/metrics", b"/docs"):
            connection.sendall(asked(b"HEAD", path))
            status, headers, _ = answered(answers, head=True)
            assert status == 200 and int(headers[b"content-length"]) > 0, path
        connection.sendall(asked(b"HEAD", INFER))
        assert answered(answers, head=True)[0] == 405
        connection.sendall(asked(b"GET", b"/v2/health/live"))
        assert answered(answers)[::2] == (200, b'{"live":true}')


def test_a_binary_request_may_come_in_chunks_and_packed(server: str) -> None:
    host, port = server.split(":")
    document = {
        "inputs": [{**TENSOR, "parameters": {"binary_data_size": 8}}],
        "parameters": {"binary_data_output": True},
    }
    head = orjson.dumps(document)
    plain = head + np.array([[1, 2]], np.float32).tobytes()
    length = b"inference-header-content-length: %d" % len(head)
    with socket.create_connection((host, int(port)), timeout=30) as connection, connection.makefile("rb") as answers:
        for body, more in ((plain, ()), (gzip.compress(plain), (b"content-encoding: gzip",))):
            chunks = [body[at : at + 7] for at in range(0, len(body), 7)]
            framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
            connection.sendall(asked(b"POST", INFER, framed, b"transfer-encoding: chunked", length, *more))
            status, headers, answer = answered(answers)
            tensors = answer[int(headers[b"inference-header-content-length"]) :]
            assert status == 200 and np.frombuffer(tensors, np.float32).tolist() == [2, 4, 1, 2]
