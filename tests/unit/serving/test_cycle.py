"""The cycle of a request: what leaves in one piece, what is refused, what is waited for. The transport is a list of what was written."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from serving.http.cycle import _MOST_BEHIND, Cycle, LeanHttpToolsProtocol
from serving.http.protocol import bounded_protocol

REQUEST = b"POST /v2/models/m/infer?a=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"


class Transport:
    """Writes into a list."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False
        self.reading = True

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> Any:
        return None

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return 0


def connected(app: Any) -> tuple[Any, Transport, ServerState]:
    """A connection with all limits, on the running loop."""
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    transport, state = Transport(), ServerState()
    protocol = bounded_protocol(30)(config, state, {}, asyncio.get_running_loop())
    protocol.connection_made(transport)  # type: ignore[arg-type]
    return protocol, transport, state


async def over(protocol: Any, state: ServerState) -> None:
    """All requests have ended; no timer is left."""
    while state.tasks:
        await asyncio.wait(set(state.tasks))
        await asyncio.sleep(0)
    for timer in (protocol.timeout_keep_alive_task, type(protocol)._sweep):
        if timer is not None:
            timer.cancel()


async def answered(app: Any, request: bytes = REQUEST, **options: Any) -> Transport:
    """What a connection was sent for these bytes, when all of its requests are over."""
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False, **options)
    config.load()
    transport, state = Transport(), ServerState()
    protocol = LeanHttpToolsProtocol(config, state, {}, asyncio.get_running_loop())
    protocol.connection_made(transport)  # type: ignore[arg-type]
    protocol.data_received(request)
    while state.tasks:
        await asyncio.wait(set(state.tasks))
        await asyncio.sleep(0)
    if protocol.timeout_keep_alive_task is not None:
        protocol.timeout_keep_alive_task.cancel()
    return transport


def saying(*messages: dict[str, Any], seen: list[Any] | None = None) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if seen is not None:
            seen.append((scope, await receive()))
        for message in messages:
            await send(message)

    return app


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes = b"", more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def test_an_answer_of_known_length_leaves_in_one_piece() -> None:
    sent = asyncio.run(answered(saying(start((b"content-length", b"2"), (b"X-Two", b"b")), body(b"ok"))))
    assert len(sent.written) == 1
    assert sent.written[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\ncontent-length: 2\r\nx-two: b\r\n\r\nok" in sent.written[0]
    assert not sent.closed


def test_the_application_is_told_path_query_and_body() -> None:
    seen: list[Any] = []
    asyncio.run(
        answered(saying(start((b"content-length", b"0")), body(), seen=seen), REQUEST.replace(b"/m/", b"/m%20n/"))
    )
    scope, message = seen[0]
    assert (scope["method"], scope["path"], scope["raw_path"], scope["query_string"]) == (
        "POST", "/v2/models/m n/infer", b"/v2/models/m%20n/infer", b"a=1",
    )  # fmt: skip
    assert message == {"type": "http.request", "body": b"body", "more_body": False}


def test_an_answer_of_unknown_length_begins_at_once_and_comes_in_chunks() -> None:
    sent = asyncio.run(answered(saying(start(), body(b"one", more=True), body(b"", more=True), body(b"two"))))
    assert sent.written[0].endswith(b"transfer-encoding: chunked\r\n\r\n")
    assert sent.written[1:] == [b"3\r\none\r\n", b"3\r\ntwo\r\n0\r\n\r\n"]


def test_the_answer_to_head_has_headers_only() -> None:
    head = REQUEST.replace(b"POST", b"HEAD")
    sent = asyncio.run(answered(saying(start((b"content-length", b"2")), body(b"ok")), head))
    assert len(sent.written) == 1
    assert sent.written[0].endswith(b"content-length: 2\r\n\r\n")


@pytest.mark.parametrize(
    "header",
    [(b"x-id", b"a\r\nset-cookie: b"), (b"x-id", b"a\x00"), (b"x id", b"a"), (b"x:id", b"a"), (b"x\r\nid", b"a")],
)
def test_a_header_that_would_be_read_as_something_else_is_never_sent(header: tuple[bytes, bytes]) -> None:
    sent = b"".join(asyncio.run(answered(saying(start((b"content-length", b"0"), header), body()))).written)
    assert b"set-cookie" not in sent
    assert header[1] not in sent.partition(b"\r\n\r\n")[0] or header[1] == b"a"
    assert b" 200 " not in sent


@pytest.mark.parametrize("data", [b"longer", b"s"])
def test_a_body_of_another_length_than_it_says_closes_the_connection(data: bytes) -> None:
    assert asyncio.run(answered(saying(start((b"content-length", b"3")), body(data)))).closed


def test_requests_behind_each_other_are_answered_in_their_order() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(5 if scope["path"] == "/a" else 0):
            await asyncio.sleep(0)
        path = scope["path"].encode()
        await send(start((b"content-length", b"%d" % len(path))))
        await send(body(path))

    three = b"".join(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in (b"/a", b"/b", b"/c"))
    sent = asyncio.run(answered(app, three))
    assert [one.rpartition(b"\r\n")[2] for one in sent.written] == [b"/a", b"/b", b"/c"]


def test_the_last_answer_of_a_connection_says_so_and_closes_it() -> None:
    once = REQUEST.replace(b"Host: x", b"Host: x\r\nConnection: close")
    sent = asyncio.run(answered(saying(start((b"content-length", b"0")), body()), once))
    assert b"connection: close\r\n" in sent.written[0]
    assert sent.closed


def test_who_expects_to_be_told_to_continue_is_told_before_his_body_is_waited_for() -> None:
    expecting = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n"
    seen: list[Any] = []
    sent = asyncio.run(answered(saying(start((b"content-length", b"0")), body(), seen=seen), expecting))
    assert sent.written[0] == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert len(sent.written) == 2


def test_who_waits_for_more_learns_that_the_client_went() -> None:
    learned: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            learned.append("request")
        learned.append(message["type"])

    async def story() -> None:
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
        config.load()
        state = ServerState()
        protocol = LeanHttpToolsProtocol(config, state, {}, asyncio.get_running_loop())
        protocol.connection_made(Transport())  # type: ignore[arg-type]
        protocol.data_received(REQUEST[:-2])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        protocol.connection_lost(ConnectionResetError())
        await asyncio.wait(set(state.tasks))

    asyncio.run(story())
    assert learned == ["request", "http.disconnect"]


@pytest.mark.parametrize(("header", "client"), [(b"", "10.0.0.1"), (b"X-Forwarded-For: 192.0.2.7\r\n", "192.0.2.7")])
def test_who_passes_a_request_on_may_say_for_whom(header: bytes, client: str) -> None:
    seen: list[Any] = []
    app = saying(start((b"content-length", b"0")), body(), seen=seen)

    async def story() -> None:
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, forwarded_allow_ips="10.0.0.1")
        config.load()
        state = ServerState()
        protocol = LeanHttpToolsProtocol(config, state, {}, asyncio.get_running_loop())
        protocol.connection_made(Transport())  # type: ignore[arg-type]
        protocol.client = ("10.0.0.1", 5)
        protocol.data_received(REQUEST.replace(b"Host: x\r\n", b"Host: x\r\n" + header))
        await asyncio.wait(set(state.tasks))

    asyncio.run(story())
    assert seen[0][0]["client"][0] == client


def test_a_connection_that_waits_for_a_request_is_closed_when_its_time_is_over_and_not_while_it_has_one() -> None:
    async def story() -> None:
        config = uvicorn.Config(
            saying(start((b"content-length", b"0")), body()), ws="none", lifespan="off", log_config=None
        )
        config.load()
        state, transport = ServerState(), Transport()
        protocol = LeanHttpToolsProtocol(config, state, {}, asyncio.get_running_loop())
        protocol.connection_made(transport)  # type: ignore[arg-type]
        protocol.data_received(REQUEST)
        await asyncio.wait(set(state.tasks))
        timer = protocol.timeout_keep_alive_task
        assert timer is not None
        protocol.data_received(REQUEST)
        await asyncio.wait(set(state.tasks))
        assert protocol.timeout_keep_alive_task is timer, "one for both requests"
        protocol.timeout_keep_alive_handler()
        assert not transport.closed, "the second request ended just now"
        assert protocol.timeout_keep_alive_task not in (None, timer), "it is looked at again"
        timer.cancel()
        assert protocol._idle_since is not None
        idle_since = protocol._idle_since - protocol.timeout_keep_alive
        protocol.data_received(b"\r\n")
        assert protocol._idle_since is None
        protocol.timeout_keep_alive_handler()
        assert not transport.closed, "bytes came"
        protocol._idle_since = idle_since
        protocol.timeout_keep_alive_handler()
        assert transport.closed

    asyncio.run(story())


def test_a_connection_that_is_gone_leaves_no_timer() -> None:
    async def story() -> None:
        config = uvicorn.Config(
            saying(start((b"content-length", b"0")), body()), ws="none", lifespan="off", log_config=None
        )
        config.load()
        state = ServerState()
        protocol = LeanHttpToolsProtocol(config, state, {}, asyncio.get_running_loop())
        protocol.connection_made(Transport())  # type: ignore[arg-type]
        protocol.data_received(REQUEST)
        await asyncio.wait(set(state.tasks))
        timer = protocol.timeout_keep_alive_task
        protocol.connection_lost(ConnectionResetError())
        assert timer is not None
        assert timer.cancelled()
        assert protocol.timeout_keep_alive_task is None

    asyncio.run(story())


def test_no_name_of_a_header_is_remembered_without_end() -> None:
    from serving.http import cycle

    async def story() -> None:
        for number in range(2 * cycle._MOST_NAMES):
            await answered(saying(start((b"content-length", b"0"), (b"x-%d" % number, b"a")), body()))

    asyncio.run(story())
    assert len(cycle._names) <= cycle._MOST_NAMES


def test_a_cycle_is_uvicorns_to_everybody_else() -> None:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    assert issubclass(Cycle, RequestResponseCycle)


UPGRADE = b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"


def test_what_follows_a_request_for_another_protocol_is_answered_and_nothing_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    paths: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        paths.append(scope["path"])
        if scope["path"] == "/p":
            assert (await receive())["body"] == b"abc"
        await send(start((b"content-length", b"0")))
        await send(body())

    posted = UPGRADE.replace(b"GET /a", b"POST /p").replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\nabc")
    sent = asyncio.run(answered(app, UPGRADE * 3 + posted + b"GET /b HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert paths == ["/a", "/a", "/a", "/p", "/b"]
    assert len(sent.written) == 5
    asyncio.run(answered(app, b"GARBAGE\r\n\r\n"))
    assert caplog.records == [], "a client could fill the log"


@pytest.mark.parametrize(
    "framed", [b"Content-Length: 47\r\n\r\n%b", b"Transfer-Encoding: chunked\r\n\r\n2f\r\n%b\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("cut", [0, 1, 100])
def test_the_body_of_a_request_for_another_protocol_is_no_request(framed: bytes, cut: int) -> None:
    hidden = b"GET /hidden HTTP/1.1\r\nHost: x\r\nX-Some: thing\r\n\r\n"
    head = UPGRADE.replace(b"GET /a", b"POST /a")[:-2]
    seen: list[Any] = []

    async def story() -> None:
        protocol, transport, state = connected(saying(start((b"content-length", b"0")), body(), seen=seen))
        data = head + framed.replace(b"47", b"%d" % len(hidden)).replace(b"2f", b"%x" % len(hidden)) % hidden
        at = len(data) if cut == 0 else len(head) + 1 if cut == 1 else cut
        for part in (data[:at], data[at:], b"GET /b HTTP/1.1\r\nHost: x\r\n\r\n"):
            if part:
                protocol.data_received(part)
            await asyncio.sleep(0)
        await over(protocol, state)
        assert len(transport.written) == 2

    asyncio.run(story())
    assert [scope["path"] for scope, _ in seen] == ["/a", "/b"]
    first = seen[0][1]["body"]
    assert first == hidden if cut == 0 else hidden.startswith(first), "it may come in two parts"


def test_nobody_is_connected_to_somewhere_else() -> None:
    for target in (b"host:1", b"/a", b"http://host/a"):
        sent = asyncio.run(
            answered(saying(start((b"content-length", b"0")), body()), b"CONNECT %b HTTP/1.1\r\n\r\n" % target)
        )
        assert b"".join(sent.written).startswith(b"HTTP/1.1 400 "), target


def test_who_sends_requests_faster_than_they_are_answered_is_not_read_from() -> None:
    async def story() -> None:
        protocol, transport, state = connected(saying(start((b"content-length", b"0")), body()))
        request = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
        for _ in range(100):
            if transport.reading:
                protocol.data_received(request * 100)
            await asyncio.sleep(0)
            assert len(protocol.pipeline) < _MOST_BEHIND + 100
        await over(protocol, state)
        assert transport.reading, "it goes on when they are answered"
        assert len(transport.written) % 100 == 0
        assert len(transport.written) > 0

    asyncio.run(story())


def test_a_request_that_was_answered_gets_no_second_answer_for_the_rest_of_it() -> None:
    async def story() -> None:
        protocol, transport, state = connected(saying(start((b"content-length", b"0"), status=401), body()))
        protocol.data_received(b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        await over(protocol, state)
        protocol.data_received(b"no chunk\r\n")
        assert len(transport.written) == 1
        assert transport.closed

    asyncio.run(story())


def test_who_was_refused_amid_a_long_upload_has_time_to_see_it() -> None:
    """However long it sent before: a connection that is closed with bytes unread is reset, and the answer is lost."""

    async def story() -> None:
        protocol, transport, state = connected(saying(start((b"content-length", b"0"), status=413), body()))
        protocol.data_received(b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await over(protocol, state)
        assert len(transport.written) == 1 and not transport.closed
        now = asyncio.get_running_loop().time() + 20  # the answer came so late
        for seconds in (0.0, 0.5, 4.9):
            protocol._close_if_slow(now + seconds)
            assert not transport.closed, seconds
        protocol._close_if_slow(now + 5.1)
        assert transport.closed

    asyncio.run(story())


def test_a_request_that_comes_in_while_the_server_stops_is_answered_and_is_the_last() -> None:
    async def story() -> None:
        protocol, transport, state = connected(saying(start((b"content-length", b"0")), body()))
        protocol.data_received(REQUEST[:20])
        protocol.shutdown()
        assert not transport.closed
        protocol.data_received(REQUEST[20:])
        await over(protocol, state)
        assert len(transport.written) == 1
        assert b" 200 " in transport.written[0] and b"connection: close" in transport.written[0]
        assert transport.closed

    asyncio.run(story())


def test_who_still_sends_what_was_answered_is_let_end_when_the_server_stops() -> None:
    async def story() -> None:
        protocol, transport, state = connected(saying(start((b"content-length", b"0"), status=401), body()))
        protocol.data_received(REQUEST[:-2])
        await over(protocol, state)
        protocol.shutdown()
        assert not transport.closed, "a reset would take the answer away"
        protocol.data_received(REQUEST[-2:])
        assert transport.closed
        assert len(transport.written) == 1

    asyncio.run(story())


def test_what_the_end_of_a_stop_interrupts_is_told_to_come_again() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def story() -> None:
        protocol, transport, state = connected(app)
        protocol.data_received(REQUEST)
        await asyncio.sleep(0)
        for task in set(state.tasks):
            task.cancel()
        await over(protocol, state)
        said = b"".join(transport.written)
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in said and said.endswith(b'{"error":"the server is stopping: try again later"}')

    asyncio.run(story())


def test_an_old_client_gets_no_chunks_and_is_not_told_to_continue() -> None:
    old = REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: x", b"Host: x\r\nExpect: 100-continue")
    seen: list[Any] = []
    sent = asyncio.run(answered(saying(start(), body(b"one", more=True), body(b"two"), seen=seen), old))
    assert b"100 Continue" not in b"".join(sent.written)
    assert b"chunked" not in sent.written[0] and b"connection: close" in sent.written[0]
    assert b"".join(sent.written[1:]) == b"onetwo"
    assert sent.closed
