"""An emergency at the servers' own API: all go to the same version, and a lost answer takes nobody further."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from registry import rollbacks
from registry.database import Database
from registry.rollbacks import Aim, Seen
from tasks import answering, emergency
from tests.unit.registry import kit
from tests.unit.registry.conftest import database, engine, template  # noqa: F401  (fixtures)
from tests.unit.registry.kit import ENVIRONMENT, MODEL, route
from tests.unit.tasks.answered import answered_by

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def three(database: Database) -> Database:  # noqa: F811
    for name in ("1", "2", "3"):
        kit.add_version(database, name)
    kit.stable_by(database, "1", "2", "3")
    return database


class Servers:
    """Several servers that reach the registry where the one that asks them does not."""

    def __init__(self, two: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.database, self.asked = two, list[tuple[str, str, str]]()
        self.gone: set[str] = set()
        self.cut_off: dict[str, dict[str, Any]] = {}
        """Servers that reach no registry, and where they would go back to."""
        self.answers_get_lost: set[str] = set()
        answered_by(monkeypatch, emergency, self)
        monkeypatch.setattr(answering, "first_answer", lambda _a, _m, target, **_: self.follows(target))

    def follows(self, target: str) -> answering.Answer:
        return answering.Answer(0.1) if route(self.database).stable == target else answering.Answer(None, "does not")

    def __call__(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        self.asked.append((host, request.method, request.url.path))
        if host in self.gone:
            raise httpx.ConnectError("refused", request=request)
        if request.method == "GET" and request.url.path == "/api/v2/model-info":
            return httpx.Response(200, json={"holds": [{"model": MODEL}]})
        if request.method == "GET" and host in self.cut_off:
            return httpx.Response(200, json=self.cut_off[host])
        if request.method == "GET":
            with self.database.read() as session:
                found = rollbacks.aim(session, ENVIRONMENT, MODEL, to=None, emergency=True)
            return httpx.Response(200, json={"to": found.to, "seen": found.seen.as_dict(), "by": "registry"})
        body = json.loads(request.content)
        done = rollbacks.roll_back(
            self.database, environment=ENVIRONMENT, model=body["model"], to=body["to"], reason="", ttl_seconds=30.0,
            emergency=True, seen=Seen(**body["seen"]) if "seen" in body else None,
        )  # fmt: skip
        if host in self.answers_get_lost:
            raise httpx.ReadTimeout("timed out", request=request)
        return httpx.Response(200, json={**done, "by": "registry"})

    def told(self, *hosts: str, to: str | None = None, seen: Seen | None = None) -> Any:
        return emergency.at_servers(
            [f"http://{host}" for host in hosts], environment=ENVIRONMENT, model=MODEL, to=to, seen=seen, reason="",
            claimed=None, why="away", began=0.0, timeout_seconds=0.0,
        )  # fmt: skip


@pytest.fixture
def servers(three: Database, monkeypatch: pytest.MonkeyPatch) -> Servers:
    return Servers(three, monkeypatch)


def test_of_several_servers_that_reach_the_registry_all_go_back_to_the_same_version(servers: Servers) -> None:
    servers.gone.add("gone")
    before = kit.last_event(servers.database)
    found = servers.told("gone", "a", "b")
    assert (found.to_version, route(servers.database).stable) == ("2", "2")
    assert found.followed == ("http://a", "http://b")
    assert found.behind == {"http://gone": "does not answer: refused"}
    assert kit.actions(servers.database, before).count("model.rolled-back") == 1


def test_a_server_whose_answer_was_lost_has_gone_back_once_and_its_neighbour_goes_no_further(servers: Servers) -> None:
    servers.answers_get_lost.add("a")
    found = servers.told("a", "b")
    assert (found.to_version, route(servers.database).stable, found.behind) == ("2", "2", {})
    assert set(found.followed) == {"http://a", "http://b"}
    assert "did not answer: ReadTimeout" in found.notes["http://a"] and "has gone back" in found.notes["http://a"]
    assert found.held == ("http://a",)


def test_what_the_caller_had_decided_already_is_asked_of_all_and_nobody_decides_anew(servers: Servers) -> None:
    with servers.database.read() as session:
        aim = rollbacks.aim(session, ENVIRONMENT, MODEL, to=None, emergency=True)
    assert aim == Aim("2", aim.seen)
    rollbacks.roll_back(
        servers.database, environment=ENVIRONMENT, model=MODEL, to=aim.to, seen=aim.seen, reason="late", ttl_seconds=1,
        emergency=True,
    )  # fmt: skip
    found = servers.told("a", "b", to=aim.to, seen=aim.seen)
    assert (found.to_version, route(servers.database).stable) == ("2", "2")
    assert [method for _, method, _ in servers.asked] == ["POST", "POST"]


def test_where_no_server_answers_that_is_said_of_each(servers: Servers) -> None:
    servers.gone |= {"a", "b"}
    found = servers.told("a", "b")
    assert not found.complete and set(found.behind) == {"http://a", "http://b"} and found.followed == ()


def test_a_server_that_reaches_the_registry_decides_for_those_that_are_cut_off(servers: Servers) -> None:
    old = {"epoch": "e", "generation": 2, "stable": "2", "candidate": None}
    servers.cut_off["stale"] = {"to": "1", "seen": old, "by": "hold"}
    assert servers.told("stale", "b").to_version == "2"
    assert route(servers.database).stable == "2"


def test_of_servers_that_are_all_cut_off_the_one_that_has_seen_most_decides(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host, to, generation in (("a", "1", 2), ("b", "2", 9), ("c", "1", 3)):
        seen = {"epoch": "e", "generation": generation, "stable": "x", "candidate": None}
        servers.cut_off[host] = {"to": to, "seen": seen, "by": "hold"}
    told: list[Any] = []
    monkeypatch.setattr(emergency, "_ask", lambda _a, body, _access: told.append(body["to"]) or "refused (409)")
    servers.told("a", "b", "c")
    assert told == ["2", "2", "2"]
