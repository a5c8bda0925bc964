"""A request as bytes, the answer that a server gives to it, and what of two answers differs."""

from __future__ import annotations

import gzip
import http.client
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.signature import DATATYPES

NUMPY = {**DATATYPES, "BF16": "uint16"}
"""Datatype -> numpy dtype; BF16, which numpy does not have, as its bits."""
Array = NDArray[Any]
LENGTH = "Inference-Header-Content-Length"
ANSWER_SECONDS = 20
TOLERANCES = {"FP16": (1e-3, 0), "FP32": (1e-6, 1e-4), "FP64": (1e-12, 0)}
"""Relative and absolute: the order of a sum is the runtime's business. Everything else must be equal."""


@dataclass(frozen=True)
class Case:
    """One request. `chunk`: the body goes out in chunks of so many bytes, without a Content-Length."""

    kind: str
    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    chunk: int = 0


@dataclass
class Tensor:
    """An input: `said` replaces what the JSON says of it, `data` what it carries."""

    name: str
    datatype: str
    array: Array
    binary: bool = False
    said: dict[str, Any] = field(default_factory=dict)
    data: Any = None


def as_bytes(array: Array) -> bytes:
    if array.dtype != object:
        return array.tobytes()
    return b"".join(len(item).to_bytes(4, "little") + item for item in array.reshape(-1))


def infer(
    kind: str,
    model: str,
    tensors: Sequence[Tensor],
    *,
    version: str | None = None,
    headers: Sequence[tuple[str, str]] = (),
    packed: str | None = None,
    chunk: int = 0,
    extra: bytes = b"",
    **document: Any,
) -> Case:
    """An inference request; `document` are further members of its JSON."""
    inputs, chunks = [], []
    for tensor in tensors:
        item: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.array.shape)}
        if tensor.binary:
            chunks.append(tensor.data if isinstance(tensor.data, bytes) else as_bytes(tensor.array))
            item["parameters"] = {"binary_data_size": len(chunks[-1])}
        else:
            flat = tensor.array.reshape(-1).tolist()
            item["data"] = (
                [v.decode() if isinstance(v, bytes) else v for v in flat] if tensor.data is None else tensor.data
            )
        item |= tensor.said
        inputs.append({name: value for name, value in item.items() if value is not ...})
    head = json.dumps({**document, "inputs": inputs}).encode()
    body = b"".join((head, *chunks, extra))
    lines = list(headers)
    if (chunks or extra) and not any(name == LENGTH for name, _ in lines):
        lines.append((LENGTH, str(len(head))))
    if packed is not None:
        body = gzip.compress(body, mtime=0) if packed == "gzip" else zlib.compress(body)
        lines.append(("Content-Encoding", packed))
    return Case(kind, "POST", path(model, "infer", version=version), tuple(lines), body, chunk)


def path(model: str, *rest: str, version: str | None = None) -> str:
    return "/".join(("/v2/models", model, *(("versions", version) if version is not None else ()), *rest))


@dataclass(frozen=True)
class Answer:
    """`status` 0: the server closed the connection without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def plain(self) -> bytes:
        encoding = self.headers.get("content-encoding")
        if encoding == "gzip":
            return gzip.decompress(self.body)
        return zlib.decompress(self.body) if encoding == "deflate" else self.body

    def outputs(self, document: Any, body: bytes, position: int) -> Iterator[tuple[str, str, list[int], bool, Array]]:
        """Name, datatype, shape, whether it came in binary, and the values."""
        for item in document["outputs"]:
            datatype, shape = item["datatype"], item["shape"]
            size = item.get("parameters", {}).get("binary_data_size")
            if size is None:
                values = item["data"]
                texts = [v.encode() if isinstance(v, str) else v for v in values] if datatype == "BYTES" else values
            else:
                values = body[position : position + size]
                position += size
                texts = list(unpacked(values)) if datatype == "BYTES" else []
            if datatype == "BYTES":
                array = np.empty(len(texts), object)
                array[:] = texts
            elif size is None:
                array = np.array(values, NUMPY[datatype])
            else:
                array = np.frombuffer(values, NUMPY[datatype])
            yield item["name"], datatype, shape, size is not None, array.reshape(shape)
        assert position == len(body), "bytes of the answer belong to no output"


def unpacked(data: bytes) -> Iterator[bytes]:
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        yield data[4:end]
        data = data[end:]


class Client:
    """Sends cases over one connection, opened again where the server has closed it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)

    def send(self, case: Case) -> Answer:
        connection = self._connection
        try:
            connection.putrequest(case.method, case.path, skip_accept_encoding=True)
            for name, value in case.headers:
                connection.putheader(name, value)
            if case.chunk:
                connection.putheader("Transfer-Encoding", "chunked")
            elif case.body or case.method == "POST":
                connection.putheader("Content-Length", str(len(case.body)))
            pieces = [case.body[at : at + case.chunk] for at in range(0, len(case.body), case.chunk or 1)]
            connection.endheaders((pieces if case.chunk else case.body) or None, encode_chunked=bool(case.chunk))
            response = connection.getresponse()
            body = response.read()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, body)
        except (http.client.HTTPException, ConnectionError):
            connection.close()
            return Answer(0, {}, b"")

    def close(self) -> None:
        self._connection.close()


def differences(case: Case, triton: Answer, ours: Answer) -> set[tuple[str, str, str]]:
    """(aspect, Triton's, ours) of everything in which the two answers differ."""
    if triton.status != ours.status:
        return {("status", str(triton.status), str(ours.status))}
    found = set()

    def compare(aspect: str, one: Any, other: Any) -> None:
        if one != other:
            found.add((aspect, shown(one), shown(other)))

    if triton.status != 200:
        compare("error's body", error_of(case, triton), error_of(case, ours))
        compare("error's Content-Type", triton.headers.get("content-type"), ours.headers.get("content-type"))
        return found
    compare("Content-Encoding", triton.headers.get("content-encoding"), ours.headers.get("content-encoding"))
    if not case.path.partition("?")[0].rstrip("/").endswith("/infer"):
        compare("Content-Type", triton.headers.get("content-type"), ours.headers.get("content-type"))
        if triton.body and ours.body:
            found |= of_documents(json.loads(triton.plain()), json.loads(ours.plain()))
        else:
            compare("body", bool(triton.body), bool(ours.body))
        return found
    compare("Content-Type", triton.headers.get("content-type"), ours.headers.get("content-type"))
    parts = []
    for answer in (triton, ours):
        body = answer.plain()
        length = int(answer.headers.get(LENGTH.lower(), len(body)))
        document = json.loads(body[:length])
        # In which order is the backend's business in Triton, so it is not compared.
        parts.append((document, sorted(answer.outputs(document, body, length), key=lambda output: output[0])))
    (one, ones), (other, others) = parts
    for key in sorted({*one, *other} - {"outputs"}):
        compare(f"'{key}'", one.get(key), other.get(key)) if key != "parameters" else compare(
            key, key in one, key in other
        )
    compare("outputs", [output[:4] for output in ones], [output[:4] for output in others])
    if [output[:3] for output in ones] == [output[:3] for output in others]:
        for (name, datatype, *_, left), (*_, right) in zip(ones, others, strict=True):
            if not alike(datatype, left, right):
                found.add((f"values of '{name}'", shown(left.reshape(-1).tolist()), shown(right.reshape(-1).tolist())))
    return found


def of_documents(one: Any, other: Any, where: str = "") -> set[tuple[str, str, str]]:
    """As `differences`, of two JSON documents; members that count or tell the time are compared by being there."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(left, right, where) for left, right in zip(one, other, strict=True)]
    elif isinstance(one, dict) and isinstance(other, dict):
        found = set()
        for left, right, what in ((one, other, "lacks in ours"), (other, one, "lacks in Triton's")):
            if gone := sorted(left.keys() - right.keys()):
                found.add((f"{where or 'the document'}: {what}", ", ".join(gone), ""))
        pairs = [(one[key], other[key], f"{where}.{key}".lstrip(".")) for key in one.keys() & other.keys()]
        return found.union(*(of_documents(*pair) for pair in pairs))
    elif one == other or (is_count(one, where) and is_count(other, where)):
        return set()
    else:
        return {(where, shown(one), shown(other))}
    return set().union(*(of_documents(*pair) for pair in pairs))


def is_count(value: Any, where: str) -> bool:
    return where.startswith("model_stats") and isinstance(value, int)


def error_of(case: Case, answer: Answer) -> str:
    """What an error's body is: the protocol asks for a JSON object with "error"."""
    if not answer.body:
        return "empty"
    try:
        document = json.loads(answer.plain())
    except ValueError:
        return "no JSON"
    good = isinstance(document, dict) and list(document) == ["error"] and isinstance(document["error"], str)
    return "error" if good and document["error"] else "other JSON"


def alike(datatype: str, one: Array, other: Array) -> bool:
    tolerance = TOLERANCES.get(datatype)
    if tolerance is None:
        return bool(np.array_equal(one, other))
    return bool(np.allclose(one.astype(float), other.astype(float), *tolerance, equal_nan=True))


def shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 160 else text[:159] + "…"
