"""Verdicts on their way: ids that any server reads, ids that one remembers, the bounded inbox, the answers of the page."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.feedback import Verdict
from serving.api import create_app
from serving.http import request_ids
from serving.http.request_ids import RequestId
from serving.traffic.feedback import Inbox, InboxFullError, Remembered
from serving.traffic.routing import Route
from serving.views.feedback_page import MOST_VERDICTS, router
from tests.unit.serving.helpers import Answer, Server, close, load, no_nudge, request, serve

PAGE = "/api/v2/feedback"
ROUTE = Route("m", 7, "1", watch=True)


@given(
    replica=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60),
    version=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=128),
    generation=st.integers(0, 10**12),
    number=st.integers(1, 10**12),
)
def test_an_id_tells_what_it_was_made_of(replica: str, version: str, generation: int, number: int) -> None:
    made = request_ids.prefix(replica, "abcdef0123") + b"%d.%s.%d" % (generation, request_ids.quoted(version), number)
    assert request_ids.parse(made.decode()) == RequestId(replica, "abcdef", generation, version, number)


@pytest.mark.parametrize(
    "text", ["", "mine", "a.b.c.d.e", "r.abcdef.1.2", "r.abcdef.x.2.3", "r.abcdef.1.2.3.4", "....."]
)
def test_other_ids_are_none_of_ours(text: str) -> None:
    assert request_ids.parse(text) is None


@pytest.mark.parametrize("text", ["r.abcdef.05.1.7", "r.abcdef.5.1.07", "r.abcdef.5.%31.7"])
def test_one_answer_has_one_id_so_that_no_spelling_of_it_counts_twice(text: str) -> None:
    assert request_ids.parse("r.abcdef.5.1.7") is not None
    assert request_ids.parse(text) is None


def test_only_the_last_ids_are_remembered_and_a_repeated_one_is_the_newest() -> None:
    known = Remembered(3)
    for k in (1, 2, 3):
        known.add(b"%d" % k, "m", str(k), "e", k)
    known.add(b"1", "m", "9", "e", 9)
    known.add(b"4", "m", "4", "e", 4)
    assert known.get("2") is None
    assert [found.version if (found := known.get(str(k))) else None for k in (1, 3, 4)] == ["9", "3", "4"]


def verdicts(n: int) -> list[Verdict]:
    return [Verdict(f"r.abcdef.7.1.{k}", "1", 7, bad=False) for k in range(n)]


def test_a_full_inbox_takes_none_of_what_does_not_fit_and_forgets_nothing_before_it_is_written() -> None:
    inbox = Inbox(5)
    inbox.put(verdicts(3))
    with pytest.raises(InboxFullError, match="3 verdicts wait"):
        inbox.put(verdicts(3))
    assert (len(inbox), inbox.counts) == (3, {"accepted": 3, "refused": 3})
    assert len(inbox.peek(2)) == 2 and len(inbox) == 3
    inbox.done(2, [("kept", 1), ("known", 1)])
    assert (len(inbox), inbox.counts["kept"], inbox.counts["known"]) == (1, 1, 1)
    assert inbox.peek(10)[0].request_id == "r.abcdef.7.1.2"


def paged(server: Server) -> Server:
    limits: Any = server.app.v2
    settings = SimpleNamespace(
        server=SimpleNamespace(
            request_timeout_seconds=limits._timeout_seconds, max_body_bytes=limits._max_body_bytes, max_receiving_mb=64
        ),
        performance=SimpleNamespace(max_concurrent_requests=server.serving.places.capacity),
    )
    app = create_app(server.serving, settings=settings, nudge=no_nudge, info=dict, routers=[router(server.serving)])
    return Server(server.serving, app)


async def tell(server: Server, body: Any) -> Answer:
    return await server.post(PAGE, body, {"Content-Type": "application/json"})


def test_a_verdict_on_an_answer_of_this_server_or_of_another_is_accepted() -> None:
    async def scenario() -> None:
        version = load()
        server = paged(serve(version, route=ROUTE))
        answer = await server.infer()
        mine = {"request_id": answer.headers["x-request-id"], "verdict": "bad", "reason": "wrong digit"}
        other = {"request_id": "box-2.fedcba.7.1.12", "verdict": "good"}
        one = await tell(server, mine)
        assert (one.status, one.json()) == (202, {"accepted": 1})
        both = await tell(server, [mine, other])
        assert (both.status, both.json()) == (202, {"accepted": 2})
        first = server.serving.feedback.peek(1)[0]
        assert (first.version, first.generation, first.bad, first.reason) == ("1", 7, True, "wrong digit")
        close(version)

    asyncio.run(scenario())


def test_the_clients_own_id_is_echoed_and_its_verdict_finds_the_version_while_the_route_is_watched() -> None:
    async def scenario() -> None:
        version = load()
        server = paged(serve(version, route=ROUTE))
        answer = await server.post("/v2/models/m/infer", request(), {"X-Request-ID": "order 17"})
        assert answer.headers["x-request-id"] == "order 17"
        told = await tell(server, {"request_id": "order 17", "verdict": "good"})
        assert told.status == 202
        (verdict,) = server.serving.feedback.peek(9)
        assert (verdict.model, verdict.version, verdict.epoch, verdict.generation) == ("m", "1", "epoch", 7)
        server.serving.install({"m": Route("m", 8, "1")}, server.serving.loaded, "epoch", 8)
        await server.post("/v2/models/m/infer", request(), {"X-Request-ID": "order 18"})
        assert (await tell(server, {"request_id": "order 18", "verdict": "good"})).status == 404
        close(version)

    asyncio.run(scenario())


def test_an_id_that_nobody_knows_is_refused_with_the_reason() -> None:
    async def scenario() -> None:
        version = load()
        server = paged(serve(version, route=ROUTE))
        unknown = await tell(server, {"request_id": "nobody", "verdict": "good"})
        assert unknown.status == 404
        assert "no server made this id" in unknown.json()["error"]
        named = await server.infer(version="1")
        unrouted = await tell(server, {"request_id": named.headers["x-request-id"], "verdict": "good"})
        assert unrouted.status == 404 and "not given to a version by a route" in unrouted.json()["error"]
        mixed = await tell(
            server, [{"request_id": "nobody", "verdict": "good"}, {"request_id": "b.abcdef.7.1.3", "verdict": "bad"}]
        )
        assert mixed.status == 202
        assert (mixed.json()["accepted"], mixed.json()["unknown"][0]["request_id"]) == (1, "nobody")
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "body",
    [
        {"request_id": "r.abcdef.7.1.3", "verdict": "fine"},
        {"request_id": "", "verdict": "good"},
        {"request_id": "r.abcdef.7.1.3", "verdict": "good", "score": 3},
        {"request_id": "r.abcdef.7.1.3", "verdict": "good", "reason": "nul \x00"},
        [],
        [{"request_id": f"r.abcdef.7.1.{k}", "verdict": "good"} for k in range(MOST_VERDICTS + 1)],
    ],
)
def test_what_is_no_verdict_is_refused(body: Any) -> None:
    async def scenario() -> None:
        version = load()
        server = paged(serve(version, route=ROUTE))
        assert (await tell(server, body)).status == 422
        assert len(server.serving.feedback) == 0
        close(version)

    asyncio.run(scenario())


def test_a_full_inbox_is_answered_429() -> None:
    async def scenario() -> None:
        version = load()
        server = paged(serve(version, route=ROUTE))
        server.serving.feedback.size = 1
        body = [{"request_id": f"r.abcdef.7.1.{k}", "verdict": "good"} for k in range(2)]
        answer = await tell(server, body)
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        close(version)

    asyncio.run(scenario())


@pytest.mark.parametrize(("body", "words"), [
    (b"[" * 100_001, "the body has 100001 bytes, the limit is 100000"),
    ([bytes(60_000)] * 3, "the body is longer than the limit of 100000 bytes"),
])  # fmt: skip
def test_a_body_beyond_the_limit_is_answered_413_with_the_limit(body: Any, words: str) -> None:
    async def scenario() -> None:
        version = load()
        server = paged(serve(version))
        answer = await server.ask("POST", "/api/v2/feedback", body, {"content-type": "application/json"})
        assert answer is not None and (answer.status, answer.error) == (413, words)
        close(version)

    asyncio.run(scenario())
