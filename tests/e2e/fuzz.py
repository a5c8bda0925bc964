"""Real requests, mutated at every level that a client reaches, played against a server over sockets; what must never come back.

A case is made from (seed, number) alone, so that one that was found can be played again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

MODELS = {"fuzz": "FP32", "text": "BYTES", "flags": "BOOL", "halves": "FP16"}
"""What the server must have: "fuzz" takes x [rows, 2] and doubles it, the others answer x [n]. None can fail on what its signature allows."""

SILENCE_SECONDS = 0.1
"""A request that is not whole has no answer to wait for: after so long without a byte the client says that it has no more."""
ANSWER_SECONDS = 90.0
"""Far beyond every time-out of the server: what has not come by then never comes."""

PATHS = (
    "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/fuzz", "/v2/models/fuzz/versions/1", "/v2/models/fuzz/ready",
    "/v2/models/fuzz/config", "/v2/models/fuzz/stats", "/v2/models/nobody", "/v2/models/fuzz/versions/9/ready", "/v2/repository/index",
    "/v2/repository/models/nobody/load", "/v2/repository/models/nobody/unload", "/v2/systemsharedmemory/status",
    "/v2/cudasharedmemory/region/x/register", "/v2/trace/setting", "/v2/logging", "/", "/health", "/metrics", "/docs", "/openapi.json",
    "/api/v2/model-info", "/api/v2/model-health", "/api/v2/update-models", "/api/v2/feedback", "/api/v2/rollback", "/api/v2/rollback/fuzz",
    "/api/v2/promotions", "/api/v2/promotions/x", "/api/v2/promotions/x/stop", "/api/cache/stats", "/api/cache/clear", "/api/gpu/profile",
    "/api/gpu/optimization-report", "/v1/generate", "/v1/completions", "/v1/models", "/dashboard", "/ws/metrics", "/favicon.ico", "//", "/v2/",
)  # fmt: skip
NOT_BUILT = re.compile(rb"sharedmemory|trace/setting|logging|repository/models", re.IGNORECASE)
"""What the protocol has and this server has not is answered 501, whoever asks."""

METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "PROPFIND")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, 1e308, -0.0, "", "x", "\u0000", "\ud7ff", "é" * 50, "NaN", [],
    {}, [[]], [None], {"": {}}, "FP32", "BYTES", "BF16", "x" * 3000,
)  # fmt: skip
RAW = (
    b"1e400",
    b"-",
    b"NaN",
    b"Infinity",
    b"\xff\xfe",
    b"\x00",
    b'"\\ud800"',
    b"[" * 300,
    b'{"a":' * 300,
    b"9" * 400,
    b'"a":1,"a":2',
)
NAMES = (
    "inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "id", "binary_data_size", "binary_data", "binary_data_output",
    "classification", "timeout", "priority", "sequence_id", "shared_memory_region", "shared_memory_byte_size", "model_name", "prompt",
    "max_tokens", "request_id", "verdict", "model", "to",
)  # fmt: skip
HEADERS = (
    "Accept-Encoding: gzip", "Accept-Encoding: gzip;q=x, deflate;q=1.0001, *;q=0", "Content-Type: text/plain", "Content-Type: \xff",
    "X-Request-ID: 1", "X-Request-ID: \x7f", "X-Request-ID: " + "i" * 4000, "X-Route-Key: k", "X-Route-Key: ", "Authorization: Bearer nobody",
    "Authorization: Basic \xff", "Cookie: modelkeep=x", "Origin: http://evil.example", "Host: evil.example", "Host:", "Expect: 100-continue",
    "Connection: Upgrade\r\nUpgrade: websocket", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c", "Connection: keep-alive",
    "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: \xe9", "Range: bytes=0-", "If-None-Match: *", "TE: trailers", "Transfer-Encoding: gzip",
    "Transfer-Encoding: chunked, identity", "Content-Length: 0", "Content-Length: 5", "Content-Length: -1", "Content-Length: +5",
    "Content-Length: 99999999999999999999999", "Content-Length: 1e3", "Content-Length: 0x10", "Content-Length: 20000000",
    "Inference-Header-Content-Length: 0", "Inference-Header-Content-Length: 99999999999", "Inference-Header-Content-Length: -1",
    "Inference-Header-Content-Length: x", "Inference-Header-Content-Length: \xb2", "Content-Encoding: gzip", "Content-Encoding: deflate",
    "Content-Encoding: br", "Content-Encoding: gzip, gzip", "Content-Encoding: identity", "Content-Encoding:  GZIP ", "Bad Header: x",
    ": no name", "no colon", " folded: x", "Null: a\x00b", "Long: " + "x" * 20_000,
)  # fmt: skip
FRAMING = re.compile(r"^(content-length|transfer-encoding|connection|expect|bad|:|no|null| |long)", re.IGNORECASE)


@dataclass(slots=True)
class Case:
    """`pieces` are sent one after the other. `whole`: what is sent are `methods` requests whose framing nobody has touched."""

    number: int
    pieces: list[bytes]
    methods: list[str]
    whole: bool

    @property
    def payload(self) -> bytes:
        return b"".join(self.pieces)


def make(seed: int, number: int) -> Case:
    """The case with this number."""
    draw = random.Random(f"{seed}/{number}")
    made, methods, whole = b"", [], True
    for _ in range(draw.choice((1, 1, 1, 1, 2, 3, 5))):
        data, method, good = _request(draw)
        made += data
        methods.append(method)
        whole = whole and good
    kind = draw.random()
    if kind < 0.06:  # cut off
        made, whole = made[: draw.randrange(len(made))], False
    elif kind < 0.16:  # bytes put in, taken out, altered anywhere
        made, whole = _broken(made, draw), False
    pieces = [made]
    if draw.random() < 0.15:
        cuts = sorted(draw.randrange(len(made) + 1) for _ in range(draw.randrange(1, 6)))
        pieces = [made[a:b] for a, b in zip([0, *cuts], [*cuts, len(made)], strict=True)]
    return Case(number, pieces, methods, whole)


def _request(draw: random.Random) -> tuple[bytes, str, bool]:
    """(bytes, method, whether its framing is as it should be)"""
    good = True
    method, path, body, headers = "POST", "", b"", []
    if draw.random() < 0.75:
        model = draw.choice(list(MODELS))
        version = draw.choice(("", "", "/versions/1"))
        path = f"/v2/models/{model}{version}/infer"
        body, headers = _inference(model, draw)
    else:
        path = draw.choice(PATHS)
        method = draw.choice(METHODS[:2])
        if method == "POST":
            body = orjson.dumps(_document(draw, 3))
    if draw.random() < 0.08:
        method = draw.choice(METHODS)
    if draw.random() < 0.12:
        path, good = _path(path, draw, good)
    if draw.random() < 0.15:
        body = _broken(body, draw)
    if draw.random() < 0.15:
        kind = draw.randrange(3)
        packed = (
            gzip.compress(body, 1, mtime=0)
            if kind == 0
            else zlib.compress(body, 1)
            if kind == 1
            else draw.choice(_bombs())
        )
        body = _broken(packed, draw) if draw.random() < 0.4 else packed
        headers.append(draw.choice(("Content-Encoding: gzip", "Content-Encoding: deflate")))
    for _ in range(draw.choice((0, 0, 0, 0, 1, 1, 3))):
        header = draw.choice(HEADERS)
        good = good and not FRAMING.match(header)
        headers.insert(draw.randrange(len(headers) + 1), header)
    if draw.random() < 0.02:
        headers += [f"X-{k}: {k}" for k in range(draw.choice((50, 150, 2000)))]
        good = False  # it may be too much before the end of it has come
    if draw.random() < 0.1:
        size = draw.choice((1, 7, 1000))
        headers.append("Transfer-Encoding: chunked")
        body = (
            b"".join(b"%x\r\n%s\r\n" % (len(body[k : k + size]), body[k : k + size]) for k in range(0, len(body), size))
            + b"0\r\n\r\n"
        )
        if draw.random() < 0.3:
            body, good = _broken(body, draw), False
    else:
        headers.append(f"Content-Length: {len(body)}")
    lines = [f"{method} {path} HTTP/{draw.choice(('1.1', '1.1', '1.1', '1.0'))}", "Host: localhost", *headers]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body, method, good


@functools.cache
def _bombs() -> tuple[bytes, ...]:
    """What is small on the way and large once unpacked: just below the server's limit, and twice that."""
    return tuple(gzip.compress(bytes(size), 9, mtime=0) for size in (10**5, 9 * 10**6, 2 * 10**7))


def _inference(model: str, draw: random.Random) -> tuple[bytes, list[str]]:
    """The body of an inference that may be right, and the headers that belong to it."""
    datatype, rows = MODELS[model], draw.choice((0, 1, 1, 2, 9))
    count = 2 * rows if model == "fuzz" else rows
    tensor: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": [rows, 2] if model == "fuzz" else [rows]}
    tail = b""
    if draw.random() < 0.4:
        size = {"FP32": 4, "FP16": 2, "BOOL": 1}.get(datatype)
        tail = b"\2\0\0\0ab" * count if size is None else draw.randbytes(size * count)
        tensor["parameters"] = {"binary_data_size": len(tail)}
    else:
        value: Any = {"BYTES": "text", "BOOL": True}.get(datatype, 1.5)
        tensor["data"] = [value] * count
    document: dict[str, Any] = {"inputs": [tensor]}
    if draw.random() < 0.3:
        document["parameters"] = {"binary_data_output": draw.random() < 0.5}
    if draw.random() < 0.3:
        document["outputs"] = [
            {"name": "y", "parameters": {"binary_data": draw.random() < 0.5, "classification": draw.choice((0, 1, 3))}}
        ]
    if draw.random() < 0.35:
        for _ in range(draw.choice((1, 1, 2))):
            document = _altered(document, draw)
    text = orjson.dumps(document)
    headers = ["Content-Type: application/json"] if draw.random() < 0.5 else []
    if tail:
        headers.append(f"Inference-Header-Content-Length: {len(text)}")
    return text + tail, headers


def _altered(document: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The document with one value somewhere in it replaced, left out, put in or put twice."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    document = orjson.loads(orjson.dumps(document))
    walk(document)
    if not places:
        return document
    node, key = draw.choice(places)
    change = draw.randrange(4)
    if change == 0:
        del node[key]
    elif change == 1 and isinstance(node, dict):
        node[draw.choice(NAMES)] = draw.choice(VALUES)
    elif change == 2 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = draw.choice(VALUES) if draw.random() < 0.8 else _document(draw, 3)
    return document


def _document(draw: random.Random, depth: int) -> Any:
    if depth == 0 or draw.random() < 0.2:
        return draw.choice(VALUES)
    if draw.random() < 0.3:
        return [_document(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {draw.choice(NAMES): _document(draw, depth - 1) for _ in range(draw.randrange(5))}


def _path(path: str, draw: random.Random, good: bool) -> tuple[str, bool]:
    odd = draw.choice(
        (
            "%00",
            "%2e%2e/",
            "%ff",
            "%",
            "\xe9",
            "?a=b&c=%zz",
            "#f",
            "/../..",
            "a" * 500,
            "a" * 70_000,
            " x",
            "\x01",
            "//",
            ";p=1",
            "%2f",
            "{m}",
        )
    )
    at = draw.randrange(len(path) + 1)
    plain = not any(sign in odd for sign in (" ", "\x01", "\xe9")) and len(odd) < 1000 and at > 0
    found = path[:at] + odd + path[at:]
    if draw.random() < 0.1:
        return draw.choice(("http://localhost" + path, "*", "fuzz:80", "http://[", "")), False
    return found, good and plain


def _broken(data: bytes, draw: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(found) + 1)
        change = draw.randrange(5)
        if change == 0:
            found[at : at + 1] = draw.randbytes(1)
        elif change == 1:
            del found[at : at + draw.randrange(1, 30)]
        elif change == 2:
            found[at : at + draw.randrange(9)] = draw.choice(RAW)
        elif change == 3:
            found[at:at] = found[at : at + draw.randrange(1, 60)]
        else:
            found[at:at] = draw.choice((b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"0\r\n\r\n"))
    return bytes(found)


@dataclass(slots=True)
class Found:
    """What came back. `faults` holds what must never come, each with the number of its case."""

    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    closed: int = 0
    """Connections that were closed without an answer to a request that was not whole."""
    faults: list[str] = field(default_factory=list)


async def play(address: tuple[str, int], seed: int, numbers: Iterable[int], *, connections: int = 32) -> Found:
    """Play the cases with these numbers, so many at a time."""
    found, left = Found(), iter(numbers)

    async def one_after_the_other() -> None:
        for number in left:
            await _play(address, make(seed, number), found)

    await asyncio.gather(*(one_after_the_other() for _ in range(connections)))
    return found


async def _play(address: tuple[str, int], case: Case, found: Found) -> None:
    found.cases += 1
    reader, writer = await asyncio.open_connection(*address)
    answer = b""
    try:
        with contextlib.suppress(ConnectionError):  # the server may have seen enough, and closed
            for piece in case.pieces:
                writer.write(piece)
                await writer.drain()
        answer = await _answer(reader, writer, case)
    except TimeoutError:
        found.faults.append(
            f"{case.number}: neither an answer nor a close; got {answer[:200]!r}; sent {case.payload[:700]!r}"
        )
    finally:
        writer.transport.abort()
    try:
        answers = parsed(answer, case.methods if case.whole else [])
    except ValueError as error:
        found.faults.append(f"{case.number}: {error}: {answer[:600]!r}; sent {case.payload[:700]!r}")
        return
    found.closed += not answers
    for status, body in answers:
        found.statuses[status] += 1
        bad = status >= 500 and not (status == 501 and NOT_BUILT.search(case.payload))
        if bad or (status >= 400 and body is not None and not _is_error(body)):
            found.faults.append(f"{case.number}: {status} {(body or b'')[:300]!r}; sent {case.payload[:700]!r}")


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case) -> bytes:
    """Everything that comes back: as many answers as there are requests, or until the server closes."""
    got = b""
    deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS
    said_all = False
    while True:
        if case.whole and _complete(got, case.methods):
            return got
        patience = ANSWER_SECONDS if case.whole or said_all else SILENCE_SECONDS
        try:
            async with asyncio.timeout(patience):
                chunk = await reader.read(1 << 16)
        except TimeoutError:
            if case.whole or said_all or asyncio.get_running_loop().time() > deadline:
                raise
            said_all = True
            with contextlib.suppress(ConnectionError, OSError):
                writer.write_eof()
            continue
        except ConnectionError:
            return got
        if not chunk:
            return got
        got += chunk


def _complete(got: bytes, methods: list[str]) -> bool:
    try:
        return len(parsed(got, methods)) >= len(methods)
    except ValueError:
        return False


def parsed(data: bytes, methods: list[str]) -> list[tuple[int, bytes | None]]:
    """(status, body) of every answer; None for a body that there is none of. Raises ValueError where these are no whole answers.

    Without `methods` an answer to HEAD is known by what follows it.
    """
    answers: list[tuple[int, bytes | None]] = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        line, _, lines = head.partition(b"\r\n")
        known = re.match(rb"HTTP/1\.1 (\d{3}) ", line + b" ")
        if known is None or not end:
            raise ValueError("no answer of HTTP")
        status = int(known.group(1))
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (one.partition(b":") for one in lines.split(b"\r\n"))
        }
        if status < 200:
            data = rest
            continue
        method = methods[len(answers)] if len(answers) < len(methods) else ""
        unasked = rest.startswith(b"{")  # refused before the server knew that it was HEAD
        if (
            (method == "HEAD" and not unasked)
            or status in (204, 304)
            or (not methods and (not rest or rest.startswith(b"HTTP/1.1 ")))
        ):
            answers.append((status, None))
            data = rest
        elif headers.get(b"transfer-encoding") == b"chunked":
            body, data = _chunks(rest)
            answers.append((status, body))
        else:
            size = int(headers.get(b"content-length", b"-1"))
            if size < 0 or len(rest) < size:
                raise ValueError(f"an answer of {size} bytes has {len(rest)}")
            body = rest[:size]
            if headers.get(b"content-encoding") == b"gzip":
                body = gzip.decompress(body)
            answers.append((status, body))
            data = rest[size:]
    return answers


def _chunks(rest: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        line, end, rest = rest.partition(b"\r\n")
        if not end:
            raise ValueError("an answer in chunks without an end")
        size = int(line, 16)
        if len(rest) < size + 2:
            raise ValueError("a chunk is cut off")
        body, rest = body + rest[:size], rest[size + 2 :]
        if size == 0:
            return body, rest


def _is_error(body: bytes) -> bool:
    try:
        document = orjson.loads(body)
    except ValueError:
        return False
    if not isinstance(document, dict) or list(document) != ["error"]:
        return False
    said = document["error"]  # the clients of /v1/completions want an object that holds the message
    return isinstance(said["message"] if isinstance(said, dict) else said, str)
