"""Heads that a connection brings again: what the application is told is the same as if each had been parsed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from registry import keys
from serving.access.auth import Guard, Rules
from serving.access.keyring import Keyring
from serving.http.front import Front
from serving.http.heads import AT_ONCE, WHOLE, by_name, raw_of
from serving.http.protocol import bounded_protocol
from tests.unit.serving.test_cycle import REQUEST, Transport, over

POOL = (
    REQUEST,
    REQUEST.replace(b"body", b"BODY"),
    REQUEST.replace(b"Host: x", b"Host: y"),
    b"POST /a%20b HTTP/1.1\r\nHost: x\r\nX-Two: 1\r\nX-Two: 2\r\nContent-Length: 0\r\n\r\n",
    b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    b"POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n0\r\n\r\n",
    b"POST /e HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\nbody",
    b"POST /u HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 4\r\n\r\nbody",
    b"POST /m HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\nwith\r\n\r\nin it\r\n\r\n...",
)
LAST = (
    b"GET /old HTTP/1.0\r\nHost: x\r\n\r\n",
    b"POST /z HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\n!",
    b"\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
)


async def told(pieces: list[bytes], *, learning: bool) -> tuple[list[Any], bytes, int, bool]:
    """What the application was told of each request, what was written, how many heads were known, whether the connection was closed."""
    seen: list[Any] = []
    known = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal known
        message = await receive()
        found = bytearray(message["body"])
        while message.get("more_body"):
            message = await receive()
            found += message.get("body", b"")
        known += "memo" in scope
        assert by_name(scope) == dict(scope["headers"])
        told = {name: value for name, value in scope.items() if name not in ("memo", "asgi")}
        seen.append((told, bytes(found)))
        answer = b"%d" % len(seen)
        headers = [(b"content-length", b"%d" % len(answer))]
        if "memo" in scope:
            scope["memo"][AT_ONCE] = len(seen) % 3 != 0
            await send({"type": "http.response.start", "status": 200, "headers": headers, WHOLE: answer})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer})

    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    transport, state = Transport(), ServerState()
    made = bounded_protocol(30)
    if not learning:
        made._learn = lambda self, data: None  # type: ignore[method-assign]
    protocol = made(config, state, {}, asyncio.get_running_loop())
    protocol.connection_made(transport)  # type: ignore[arg-type]
    for piece in pieces:
        if transport.closed:
            break
        if piece:
            protocol.data_received(piece)
        else:  # until all that came is answered
            await over(protocol, state)
    await over(protocol, state)
    return seen, b"".join(transport.written), known, transport.closed


def cut(requests: list[tuple[bytes, int, bool]], last: bytes) -> list[bytes]:
    pieces: list[bytes] = []
    for data, at, waits in requests:
        pieces += [piece for piece in (data[:at], data[at:]) if piece]
        pieces += [b""] if waits else []
    return [*pieces, last]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(POOL), st.sampled_from((0, 0, 0, 9, 70)), st.booleans()), max_size=12),
    st.sampled_from(LAST),
)
def test_whatever_comes_in_whatever_pieces_the_application_is_told_what_the_parser_would_have_told(
    requests: list[tuple[bytes, int, bool]], last: bytes
) -> None:
    pieces = cut(requests, last)
    seen, written, _, closed = asyncio.run(told(pieces, learning=True))
    parsed, expected, none, closed_too = asyncio.run(told(pieces, learning=False))
    assert (seen, written, closed) == (parsed, expected, closed_too)
    assert none == 0


@pytest.mark.parametrize("request_", POOL[:6])
def test_a_head_that_came_twice_is_known_from_then_on(request_: bytes) -> None:
    seen, _, known, _ = asyncio.run(told([piece for _ in range(5) for piece in (request_, b"")], learning=True))
    assert len(seen) == 5
    assert known == 2  # the first belongs to the begin of the connection, two are learnt from
    assert all(found == seen[0] for found in seen)


def test_another_body_under_the_same_head_is_the_one_that_is_told() -> None:
    pieces = [piece for text in (b"aaaa", b"bbbb", b"cccc", b"dddd", b"eeee") for piece in (REQUEST[:-4] + text, b"")]
    seen, _, known, _ = asyncio.run(told(pieces, learning=True))
    assert [found for _, found in seen] == [b"aaaa", b"bbbb", b"cccc", b"dddd", b"eeee"]
    assert known == 2


@pytest.mark.parametrize("request_", POOL[6:10])
def test_what_does_not_follow_from_a_head_alone_is_parsed_each_time(request_: bytes) -> None:
    seen, _, known, _ = asyncio.run(told([piece for _ in range(5) for piece in (request_, b"")], learning=True))
    assert len(seen) == 5
    assert known == 0


def test_more_than_the_request_is_not_taken_for_its_body() -> None:
    pieces = [piece for _ in range(4) for piece in (REQUEST, b"")] + [REQUEST + REQUEST, b"", REQUEST[:-1], b"!", b""]
    seen, written, _, _ = asyncio.run(told(pieces, learning=True))
    assert [found for _, found in seen] == [b"body"] * 6 + [b"bod!"]
    assert written.count(b"HTTP/1.1 200") == 7


def test_a_head_without_end_or_too_long_to_be_kept_is_none() -> None:
    assert raw_of(b"GET / HTTP/1.1\r\n") is None
    assert raw_of(b"GET / HTTP/1.1\r\nX: " + b"x" * 5000 + b"\r\n\r\n") is None
    assert raw_of(b"GET / HTTP/1.1\r\n\r\nbody") == b"GET / HTTP/1.1\r\n\r\n"


def test_under_a_known_head_a_key_is_still_checked_each_time(tmp_path: Path) -> None:
    secret = "x" * 43
    held = Keyring(tmp_path / "keys.json", "")

    def stored(*, revoked: bool) -> keys.StoredKey:
        return keys.StoredKey("0" * 12, "mine", "infer", keys.digest(secret), None, revoked)

    asked: list[Any] = []
    statuses: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["state"]["who"].key_id)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    guard = Guard(app, held, Rules(local=False))
    text = f"Bearer mk_{'0' * 12}_{secret}".encode()
    memo: dict[str, Any] = {}

    async def ask() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v2/models/m/infer", "headers": [(b"authorization", text)]}
        await guard({**scope, "memo": memo, "state": {}}, None, send)  # type: ignore[arg-type]

    for number, revoked in enumerate((False, False, True, False)):
        held.install([stored(revoked=revoked)], ("epoch", number))
        asyncio.run(ask())
    assert asked == ["0" * 12] * 3
    assert statuses == [401]


def test_the_access_log_has_the_size_of_an_answer_in_one_message() -> None:
    lines: list[Any] = []

    class Log:
        def wants(self, status: int) -> bool:
            return True

        def add(self, line: Any) -> None:
            lines.append(line)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")], WHOLE: b"whole"}
        )

    async def send(message: Any) -> None:
        assert message[WHOLE] == b"whole"
        assert (b"x-request-id", b"1") in message["headers"]

    front = Front(app, name=lambda: b"1", template=str, log=Log())  # type: ignore[arg-type]
    scope = {"type": "http", "method": "POST", "path": "/v2/models/m/infer", "headers": [], "memo": {}}
    asyncio.run(front(scope, None, send))  # type: ignore[arg-type]
    assert [line.size_bytes for line in lines] == [5]
