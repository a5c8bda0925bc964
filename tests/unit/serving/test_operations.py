"""The API of promotions: in whose name it acts, what a body may hold, and a registry that does not answer."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from registry import approvals, commands, keys
from registry.actor import Who
from registry.database import Database
from registry.errors import LockedError, UnavailableError
from registry.schema import PromotionCommand
from serving.access.auth import Guard, Rules
from serving.access.keyring import Keyring
from serving.api import create_app
from serving.statuses import BusyError
from serving.views import operations
from serving.views.operations import RegistryThreads
from tests.unit.registry import kit
from tests.unit.serving.helpers import Answer, Server, close, load, serve


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return kit.prepared(tmp_path)


def server(database: Database, tmp_path: Path, **options: Any) -> tuple[Server, str]:
    """A server with these endpoints that asks for keys, and an operator's key."""
    _, text = keys.create(database, name="olga", role="operate", who=Who("os:admin"))
    ring = Keyring(tmp_path / "keys.json", "http://127.0.0.1:1")
    with database.read() as session:
        ring.install(keys.stored(session), ("e", 1))
    found = serve()
    app = create_app(
        found.serving,
        settings=_limits(),
        nudge=_nothing,
        info=dict,
        routers=[operations.router(database, **options)],
    )
    return Server(found.serving, Guard(app, ring, Rules(local=False))), text  # type: ignore[arg-type]


def _limits() -> Any:
    from registry.settings import Settings

    return Settings(profile="cpu")


async def _nothing() -> dict[str, Any]:
    return {}


def ask(target: tuple[Server, str], method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    found, text = target
    sent = {"X-API-Key": text, "Content-Type": "application/json"} | headers
    answer = asyncio.run(found.ask(method, f"/api/v2/promotions{path}", body, sent))
    assert answer is not None
    return answer


def test_promotions_are_listed_and_shown_with_their_story(database: Database, tmp_path: Path) -> None:
    kit.add_version(database, "1")
    kit.stable_by(database, "1")
    kit.add_version(database, "1", model="letters")
    other = kit.begin(database, "1", model="letters")
    target = server(database, tmp_path)
    everything = ask(target, "GET", "").json()["promotions"]
    assert [row["model"] for row in everything] == ["letters", "digits"]
    found, _ = target
    limited = asyncio.run(_query(found, target[1], b"limit=1"))
    assert [row["model"] for row in limited.json()["promotions"]] == ["letters"]
    named = asyncio.run(_query(found, target[1], b"model=digits"))
    assert [row["model"] for row in named.json()["promotions"]] == ["digits"]
    for wrong in (b"limit=0", b"limit=501", b"limit=x"):
        assert asyncio.run(_query(found, target[1], wrong)).status == 422
    shown = ask(target, "GET", f"/{other.id}").json()
    assert shown["id"] == other.id
    assert shown["approval"] is None, "none is asked for"
    assert isinstance(shown["story"], list)
    missing = ask(target, "GET", "/nowhere")
    assert missing.status == 404
    assert "there is no promotion 'nowhere'" in missing.error


async def _query(found: Server, text: str, query: bytes) -> Answer:
    app = found.app

    async def with_query(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "query_string": query}, receive, send)

    answer = await Server(found.serving, with_query).ask("GET", "/api/v2/promotions", b"", {"X-API-Key": text})  # type: ignore[arg-type]
    assert answer is not None
    return answer


def test_a_command_is_given_in_the_name_of_the_key(database: Database, tmp_path: Path) -> None:
    kit.add_version(database, "1")
    kit.stable_by(database, "1")
    kit.add_version(database, "2")
    operation = kit.begin(database, "2")
    kit.canary(database, operation)
    target = server(database, tmp_path)
    answer = ask(target, "POST", f"/{operation.id}/pause", b'{"reason": "lunch"}')
    assert answer.status == 200, answer.body
    assert answer.json()["command"] == "pause"
    with database.read() as session:
        (row,) = session.scalars(select(PromotionCommand).where(PromotionCommand.promotion == operation.id))
    assert (row.command, row.actor, row.reason) == ("pause", "key:olga", "lunch")
    assert ask(target, "POST", f"/{operation.id}/stop").status == 200, "a reason is no must"


def test_each_path_says_what_it_is_named_after(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, str, Who, str]] = []

    def approve(_db: Any, identity: str, *, verdict: str, who: Who, note: str, seen: str | None) -> dict[str, Any]:
        said.append((identity, verdict, who, note))
        return {}

    def command(_db: Any, identity: str, *, command: str, who: Who, reason: str) -> dict[str, Any]:
        said.append((identity, command, who, reason))
        return {}

    monkeypatch.setattr(approvals, "give", approve)
    monkeypatch.setattr(commands, "give", command)
    target = server(database, tmp_path)
    for verb in ("approve", "reject"):
        assert ask(target, "POST", f"/p/{verb}", b'{"note": "n"}').status == 200
    for verb in ("pause", "resume", "advance", "stop"):
        assert ask(target, "POST", f"/p/{verb}", b'{"reason": "n"}').status == 200
    assert [(entry[0], entry[1], entry[3]) for entry in said] == [
        ("p", verb, "n") for verb in ("approve", "reject", "pause", "resume", "advance", "stop")
    ]
    assert {entry[2].actor for entry in said} == {"key:olga"}
    assert {entry[2].via for entry in said} == {"api"}
    assert {entry[2].key_id for entry in said} == {target[1][3:15]}


@pytest.mark.parametrize(
    "body",
    [b'{"reasn": "x"}', b'{"reason": 1}', b'{"reason": null}', b'{"reason": "a\\u0000b"}', b'{"reason": "%s"}' % (b"x" * 2001),
     b"[]", b'"x"', b"{", b'{"reason": "x", "actor": "root"}'],
)  # fmt: skip
def test_a_body_is_taken_by_its_letter(
    body: bytes, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "give", lambda *_a, **_k: pytest.fail("it was taken"))
    answer = ask(server(database, tmp_path), "POST", "/p/pause", body)
    assert answer.status == 422
    assert list(answer.json()) == ["error"]


def test_errors_of_the_registry_have_their_status_and_words(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = server(database, tmp_path)
    assert ask(target, "POST", "/nowhere/stop").status == 404

    def locked(*_a: Any, **_k: Any) -> Any:
        raise LockedError("digits is locked by somebody")

    monkeypatch.setattr(approvals, "give", locked)
    answer = ask(target, "POST", "/p/approve")
    assert (answer.status, answer.error) == (409, "digits is locked by somebody")


def test_a_registry_that_does_not_answer_is_a_503_in_time_and_blocks_nobody(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(commands, "give", lambda *_a, **_k: release.wait(30))
    found, text = server(database, tmp_path, threads=RegistryThreads(answer_seconds=0.2))
    version = load()

    async def scenario() -> None:
        headers = {"X-API-Key": text}
        hung = asyncio.create_task(found.ask("POST", "/api/v2/promotions/p/pause", b"", headers))
        health = await found.ask("GET", "/health")
        assert health is not None and health.status == 200
        assert not hung.done(), "the event loop went on meanwhile"
        answer = await hung
        assert answer is not None and answer.status == 503
        assert "did not answer within 0.2 s" in answer.error
        release.set()

    try:
        asyncio.run(scenario())
    finally:
        release.set()
        close(version)


def test_too_many_who_wait_are_sent_away() -> None:
    release = threading.Event()
    threads = RegistryThreads(answer_seconds=0.05)

    async def scenario() -> None:
        async def one() -> str:
            try:
                await threads.run(lambda: release.wait(30))
            except (UnavailableError, BusyError) as error:
                return type(error).__name__
            return "answered"

        ends = await asyncio.gather(*(one() for _ in range(20)))
        assert sorted(set(ends)) == ["BusyError", "UnavailableError"]
        assert ends.count("BusyError") == 4
        release.set()

    try:
        asyncio.run(scenario())
    finally:
        release.set()
