"""Gradual rollbacks step by step, and how a server's answers are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from registry import commands, promotions, rollbacks, versions
from registry.actor import Who
from registry.database import Database
from registry.errors import FencedError
from registry.store import DirectoryStore
from tasks import answering, rollback
from tasks.promoting import Ended
from tests.unit.registry import kit
from tests.unit.registry.conftest import database, engine, template  # noqa: F401  (fixtures)
from tests.unit.registry.kit import ENVIRONMENT, MODEL, POLICY, Clock, route
from tests.unit.tasks import soaking


@pytest.fixture
def two(database: Database) -> Database:  # noqa: F811
    """Version 2 is stable, version 1 was."""
    for name in ("1", "2"):
        kit.add_version(database, name)
    kit.stable_by(database, "1", "2")
    return database


def begun(two: Database) -> promotions.Operation:
    return rollbacks.begin_gradual(
        two, environment=ENVIRONMENT, model=MODEL, to=None, policy=POLICY, ttl_seconds=30.0, reason="slowly"
    )


def driven(two: Database, operation: promotions.Operation, looks: dict[float, Any]) -> Any:
    """A gradual rollback whose time goes by 2 s a look; `looks` is what happens at a share once it is set."""
    clock = Clock()
    work = soaking.at_work(two, operation, clock)

    def sleep(_seconds: float) -> None:
        clock.seconds += 2
        found = route(two)
        if (what := looks.pop(found.weight, None)) is not None:
            what(found.generation)

    work.sleep = sleep
    return rollback.gradual(work, reason="slowly")


def test_the_traffic_moves_back_share_by_share_and_each_step_has_its_time(two: Database) -> None:
    operation, seen = begun(two), []
    watched = {share: (lambda _g, s=share: seen.append(s)) for share in (0.05, 0.25, 0.5)}
    result = driven(two, operation, watched)
    assert seen == [0.05, 0.25, 0.5]
    assert (result["from"], result["to"], route(two).stable) == ("2", "1", "1")


def test_a_share_that_is_passed_at_the_word_of_a_person_is_on_record_as_that(two: Database) -> None:
    operation = begun(two)

    def advance(_generation: int) -> None:
        commands.give(two, operation.id, command="advance", who=Who("os:me"), reason="it is fine")

    driven(two, operation, {0.05: advance, 0.5: advance})
    with two.read() as session:
        told = [(step["step"], step["detail"]) for step in promotions.story(session, operation.id)]
        assert all(given["taken_at"] for given in commands.listed(session, operation.id))
    assert told.count(("rollback", "Passed at the word of os:me: it is fine.")) == 2
    assert "advance" not in dict(told)


def test_a_target_that_fails_stops_the_rollback_and_the_stable_version_has_all_traffic(two: Database) -> None:
    def fail(generation: int) -> None:
        soaking.report(two, "1", generation, requests=20, errors=15)
        soaking.report(two, "2", generation, requests=300, errors=3)

    with pytest.raises(Ended, match=r"15 of 20 requests failed on 1, 3 of 300 on 2"):
        driven(two, begun(two), {0.25: fail})
    found = route(two)
    assert (found.stable, found.candidate) == ("2", None)


def test_where_both_fail_alike_it_is_not_the_target_and_the_rollback_goes_on(two: Database) -> None:
    def fail(generation: int) -> None:
        soaking.report(two, "1", generation, requests=20, errors=15)
        soaking.report(two, "2", generation, requests=300, errors=200)

    assert driven(two, begun(two), {0.25: fail})["to"] == "1"


def test_a_gradual_rollback_that_an_emergency_overtook_writes_nothing_more(two: Database) -> None:
    operation = begun(two)

    def overtake(_generation: int) -> None:
        rollbacks.roll_back(
            two, environment=ENVIRONMENT, model=MODEL, to=None, reason="now", ttl_seconds=1, emergency=True
        )

    with pytest.raises(FencedError):
        driven(two, operation, {0.05: overtake})
    assert route(two).stable == "1"


# answers


def test_of_several_servers_that_reach_the_registry_one_goes_back_and_the_others_to_the_same(
    two: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.add_version(two, "3")
    kit.stable_by(two, "3")

    def ask(address: str, body: dict[str, Any], _access: object) -> dict[str, Any] | str:
        if address == "gone":
            return "does not answer"
        done = rollbacks.roll_back(
            two,
            environment=ENVIRONMENT,
            model=body["model"],
            to=body["to"],
            reason="",
            ttl_seconds=30.0,
            emergency=True,
        )
        return {**done, "by": "registry"}

    monkeypatch.setattr(rollback, "_ask", ask)
    monkeypatch.setattr(answering, "first_answer", lambda *_, **__: answering.Answer(0.1))
    found = rollback.at_servers(
        ["gone", "a", "b"],
        environment=ENVIRONMENT,
        model=MODEL,
        to=None,
        reason="",
        claimed=None,
        why="away",
        began=0.0,
    )
    assert (found.to_version, route(two).stable) == ("2", "2")
    assert (found.followed, found.behind) == (("a", "b"), {"gone": "does not answer"})


def test_zeros_fit_any_signature() -> None:
    metadata = {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "t", "datatype": "BYTES", "shape": [2]},
            {"name": "b", "datatype": "BOOL", "shape": []},
        ]
    }
    assert answering.zeros(metadata) == [
        {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [0, 0, 0]},
        {"name": "t", "datatype": "BYTES", "shape": [2], "data": ["", ""]},
        {"name": "b", "datatype": "BOOL", "shape": [], "data": [False]},
    ]


def test_the_first_golden_case_is_what_is_asked(
    database: Database,  # noqa: F811
    tmp_path: Path,
) -> None:
    store = DirectoryStore(tmp_path / "artifacts")
    golden = kit.golden_file(tmp_path / "golden.npz", **{"input.x": np.full((3, 4), 2, dtype=np.float32)})
    versions.register(
        database,
        store,
        kit.onnx_file(tmp_path / "m.onnx"),
        name="linear",
        version="1",
        golden=golden,
        max_bytes=1 << 20,
    )
    row = answering.golden_row(database, store, "linear", "1")
    assert row == [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [2.0, 2.0, 2.0, 2.0]}]


class Fake:
    """A server whose route and answers are given."""

    def __init__(self, stable: str, answers: str, *, candidate: str | None = None, status: int = 200) -> None:
        self.stable, self.answers, self.candidate, self.status = stable, answers, candidate, status

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/v2/model-info":
            models = {"m": {"stable": self.stable, "candidate": self.candidate}}
            return httpx.Response(200, json={"models": models, "errors": {}})
        if request.method == "GET":
            return httpx.Response(200, json={"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}]})
        assert json.loads(request.content)["inputs"][0]["data"] == [0]
        body = {"model_version": self.answers} if self.status == 200 else {"error": "no"}
        return httpx.Response(self.status, json=body, headers={"x-model-version": self.answers})


@pytest.mark.parametrize(
    ("server", "follows", "why"),
    [
        (Fake("1", "1"), True, ""),
        (Fake("2", "2"), False, "still serves 2"),
        (Fake("1", "1", candidate="2"), False, "still serves 1 and 2"),
        (Fake("1", "2"), False, "still answers by version 2"),
        (Fake("1", "1", status=500), True, "answered with an error (500): no"),
        (Fake("1", "2", status=500), False, "still answers by version 2"),
    ],
)
def test_a_server_follows_when_its_route_answers_by_the_target(
    server: Fake, follows: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = httpx.Client
    monkeypatch.setattr(
        answering.httpx, "Client", lambda **options: real(**options, transport=httpx.MockTransport(server))
    )
    answer = answering.first_answer("http://s", "m", "1", tensors=None, since=0.0, deadline=0.0, monotonic=lambda: 1.5)
    assert (answer.follows, answer.why) == (follows, why)
    assert answer.seconds == (1.5 if follows else None)
