"""The client's own side of the protocol: what it sends, and what it makes of the bytes that come back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modelkeep.demo import traffic

IMAGE = np.arange(64, dtype=np.float32).reshape(1, 8, 8) / 64
SCORES = np.linspace(-2, 2, 10, dtype=np.float32)


def respond(
    body: bytes, *, status: str = "200 OK", headers: dict[str, str] | None = None, version: str | None = "2"
) -> bytes:
    named = {"Content-Length": str(len(body))} | ({"X-Model-Version": version} if version else {}) | (headers or {})
    return (f"HTTP/1.1 {status}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in named.items()) + "\r\n").encode() + body


def document(*, version: str | None = "2", shape: tuple[int, ...] = (1, 10), **output: object) -> bytes:
    tensor = {"name": "scores", "datatype": "FP32", "shape": list(shape), **output}
    return json.dumps(
        {"model_name": "digits", "outputs": [tensor]} | ({"model_version": version} if version else {})
    ).encode()


def split(request: bytes) -> tuple[dict[str, str], bytes]:
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v2/models/digits/infer HTTP/1.1"
    return dict(line.split(": ", 1) for line in lines[1:]), body


def test_a_json_request_carries_the_image_exactly() -> None:
    headers, body = split(traffic.json_request("h:1", "digits", IMAGE))
    assert int(headers["Content-Length"]) == len(body)
    (tensor,) = json.loads(body)["inputs"]
    assert tensor["shape"] == [1, 1, 8, 8]
    assert np.array_equal(np.array(tensor["data"], np.float32), IMAGE.ravel())


def test_a_binary_request_carries_the_image_after_its_header_and_asks_for_binary() -> None:
    headers, body = split(traffic.binary_request("h:1", "digits", IMAGE))
    assert int(headers["Content-Length"]) == len(body)
    length = int(headers["Inference-Header-Content-Length"])
    head = json.loads(body[:length])
    assert head["inputs"][0]["parameters"] == {"binary_data_size": 256}
    assert head["outputs"] == [{"name": "scores", "parameters": {"binary_data": True}}]
    assert np.array_equal(np.frombuffer(body[length:], "<f4"), IMAGE.ravel())


def test_a_json_answer_gives_scores_and_version() -> None:
    answer = traffic.parse(respond(document(data=[float(v) for v in SCORES])))
    assert (answer.status, answer.error, answer.version) == (200, None, "2")
    assert answer.scores is not None and np.array_equal(answer.scores, SCORES)


def test_a_binary_answer_gives_scores_and_version() -> None:
    head = document(parameters={"binary_data_size": 40})
    answer = traffic.parse(
        respond(head + SCORES.tobytes(), headers={"Inference-Header-Content-Length": str(len(head))})
    )
    assert answer.version == "2"
    assert answer.scores is not None and np.array_equal(answer.scores, SCORES)


def test_a_server_error_keeps_the_version_that_failed_and_what_it_said() -> None:
    answer = traffic.parse(
        respond(b'{"error": "Gather: out of range"}', status="500 Internal Server Error", version="4")
    )
    assert (answer.status, answer.error, answer.version) == (500, "http 500", "4")
    assert answer.message is not None and "Gather" in answer.message


@pytest.mark.parametrize(
    "received",
    [
        respond(b"not json"),
        respond(document(version=None, data=SCORES.tolist())),
        respond(document(version="1", data=SCORES.tolist())),
        respond(document(data=SCORES[:9].tolist())),
        respond(document(data=SCORES.tolist(), shape=(10, 1))),
        respond(document(parameters={"binary_data_size": 40})),
        respond(b"{}"),
        respond(b"[]"),
        b"nonsense\r\n\r\n",
    ],
    ids=[
        "broken",
        "unnamed",
        "two versions",
        "nine scores",
        "shape",
        "binary without length",
        "empty",
        "list",
        "no http",
    ],
)
def test_an_answer_that_is_none_is_malformed(received: bytes) -> None:
    with pytest.raises(traffic.MalformedAnswerError):
        traffic.parse(received)


def test_the_end_of_an_answer_is_known_from_its_headers_only() -> None:
    whole = respond(b"12345")
    assert traffic.content_end(whole[:20]) is None
    assert traffic.content_end(whole[:-3]) == len(whole)
    with pytest.raises(traffic.MalformedAnswerError, match="without Content-Length"):
        traffic.content_end(b"HTTP/1.1 200 OK\r\n\r\n")
