"""Gradual rollbacks step by step, and how a server's answers are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from registry import commands, leases, promotions, rollbacks, versions
from registry.actor import Who
from registry.database import Database
from registry.errors import ConflictError, FencedError, StorageError, UnavailableError
from registry.store import DirectoryStore
from tasks import answering, rollback, servers
from tasks.promoting import Ended, Promoting
from tests.unit.registry import kit
from tests.unit.registry.conftest import database, engine, template  # noqa: F401  (fixtures)
from tests.unit.registry.kit import ENVIRONMENT, MODEL, POLICY, Clock, route
from tests.unit.tasks import soaking
from tests.unit.tasks.test_outage import Failing


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


# to a defined end


def working(two: Database, operation: promotions.Operation, told: list[str] | None = None) -> Promoting:
    """At work with a clock that goes on by what is slept."""
    clock = Clock()
    work = soaking.at_work(two, operation, clock, told=told)

    def sleep(seconds: float) -> None:
        clock.seconds += max(seconds, 2.0)

    work.sleep = sleep
    return work


def by_steps(work: Promoting) -> dict[str, Any]:
    return rollback.gradual(work, reason="slowly")


def ended(two: Database, operation: promotions.Operation) -> tuple[str, str | None, str | None, bool]:
    """(state of the record, stable version, candidate, whether the lease is free)."""
    found = route(two)
    with two.read() as session:
        state = promotions.get(session, operation.id).state
        free = leases.is_free(session, leases.subject_of(ENVIRONMENT, MODEL))
    return state, found.stable, found.candidate, free


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("number", range(1, 5))  # three shares, and the end
def test_a_registry_that_goes_away_at_any_write_is_waited_for_and_the_rollback_is_done_once(
    two: Database, monkeypatch: pytest.MonkeyPatch, number: int, committed: bool
) -> None:
    monkeypatch.setattr(servers, "follow", lambda *_, **__: servers.Following(reached=("r",)))
    operation, before = begun(two), kit.last_event(two)
    failing = Failing(monkeypatch, number, committed=committed)
    result = rollback.carry(working(two, operation), by_steps)
    assert (result["from"], result["to"], result["generation"]) == ("2", "1", route(two).generation)
    assert ended(two, operation) == ("promoted", "1", None, True)
    assert failing.writes >= number
    assert kit.actions(two, before).count("model.rolled-back") == 1


@pytest.mark.parametrize("error", [StorageError("the disk is full"), ZeroDivisionError("oops"), KeyboardInterrupt()])
def test_any_error_in_the_middle_undoes_a_gradual_rollback_at_once_and_says_why_on_its_record(
    two: Database, error: BaseException
) -> None:
    operation = begun(two)

    def break_down(work: Promoting) -> dict[str, Any]:
        kit.canary(two, work.operation, 0.25)
        raise error

    with pytest.raises(type(error)):
        rollback.carry(working(two, operation), break_down)
    assert ended(two, operation) == ("failed", "2", None, True)
    with two.read() as session:
        last = promotions.story(session, operation.id)[-1]
    assert last["title"] == "The rollback to 1 failed" and type(error).__name__ in last["detail"]


def test_where_even_the_end_cannot_be_written_that_is_told_and_the_error_is_the_one_that_ended_it(
    two: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation, told = begun(two), list[str]()

    def break_down(_work: Promoting) -> dict[str, Any]:
        raise ZeroDivisionError("oops")

    def gone(*_: object, **__: object) -> None:
        raise UnavailableError("it is gone")

    monkeypatch.setattr(promotions, "end", gone)
    with pytest.raises(ZeroDivisionError):
        rollback.carry(working(two, operation, told), break_down)
    assert "ZeroDivisionError: oops" in told[-1] and "its lease runs out" in told[-1]


def test_a_gradual_rollback_that_a_person_stopped_ends_as_that_and_not_as_locked(two: Database) -> None:
    operation = begun(two)

    def stopped(work: Promoting) -> dict[str, Any]:
        commands.give(two, work.operation.id, command="stop", who=Who("os:me"), reason="wrong model")
        work.hear(rollback.Stint(work.monotonic))
        raise AssertionError("it has ended")

    with pytest.raises(Ended) as found:
        rollback.carry(working(two, operation), stopped)
    assert found.value.outcome == "withdrawn"
    assert ended(two, operation) == ("withdrawn", "2", None, True)


def test_one_that_another_process_carries_on_is_left_to_it(two: Database) -> None:
    operation = begun(two)

    def lost(_work: Promoting) -> dict[str, Any]:
        raise FencedError("the token is dead")

    with pytest.raises(FencedError):
        rollback.carry(working(two, operation), lost)
    assert ended(two, operation) == ("running", "2", None, False)


def aimed(two: Database) -> rollbacks.Aim:
    with two.read() as session:
        return rollbacks.aim(session, ENVIRONMENT, MODEL, to=None, emergency=False)


def opened(two: Database, aim: rollbacks.Aim, **options: Any) -> promotions.Operation:
    return rollback.begin_gradual(
        two, aim, environment=ENVIRONMENT, model=MODEL, policy=POLICY, ttl_seconds=30.0, reason="slowly",
        flow_run_id="run-1", sleep=lambda _: None, **options,
    )  # fmt: skip


def test_a_lost_answer_to_the_beginning_is_asked_for_again_and_one_record_is_opened(
    two: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lost = rollbacks.begin_gradual, [UnavailableError("gone")]

    def begin(*arguments: Any, **options: Any) -> promotions.Operation:
        operation = real(*arguments, **options)
        if lost:
            raise lost.pop()
        return operation

    monkeypatch.setattr(rollbacks, "begin_gradual", begin)
    operation = opened(two, aimed(two))
    assert operation.resumed
    with two.read() as session:
        assert [row["id"] for row in promotions.listed(session, model=MODEL) if row["strategy"] == "rollback"] == [
            operation.id
        ]


def test_a_gradual_rollback_that_was_decided_over_another_stable_version_is_not_begun(two: Database) -> None:
    kit.add_version(two, "3")
    aim = aimed(two)
    kit.stable_by(two, "3")
    with pytest.raises(ConflictError, match="3 has become the stable version since this rollback from 2"):
        opened(two, aim)
    found = route(two)
    assert (found.stable, found.candidate) == ("3", None)
    with two.read() as session:
        assert leases.is_free(session, leases.subject_of(ENVIRONMENT, MODEL))


# answers


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


def test_a_model_that_slept_is_asked_for_a_text_once_it_is_known_to_generate_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, asked = Fake("1", "1"), []

    def server(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models/m":
            return httpx.Response(200, json={"object": "model"}) if asked else httpx.Response(404, json={"error": {}})
        if request.method == "POST":
            asked.append(request.url.path)
            status = 200 if request.url.path == "/v1/generate" else 400
            return httpx.Response(status, json={"error": "no input 'prompt'"}, headers={"x-model-version": "1"})
        return plain(request)

    real = httpx.Client
    monkeypatch.setattr(
        answering.httpx, "Client", lambda **options: real(**options, transport=httpx.MockTransport(server))
    )
    answer = answering.first_answer("http://s", "m", "1", tensors=[], since=0.0, deadline=0.0, monotonic=lambda: 1.5)
    assert (answer.follows, answer.why) == (True, "")
    assert asked == ["/v2/models/m/infer", "/v1/generate"]


def test_a_model_that_generates_text_is_asked_for_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = Fake("1", "1"), []

    def server(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models/m":
            return httpx.Response(200, json={"object": "model", "id": "m"})
        if request.method == "POST":
            asked.append((request.url.path, json.loads(request.content)["max_tokens"]))
            return httpx.Response(200, json={"text": "s", "version": "1"}, headers={"x-model-version": "1"})
        return plain(request)

    real = httpx.Client
    monkeypatch.setattr(
        answering.httpx, "Client", lambda **options: real(**options, transport=httpx.MockTransport(server))
    )
    answer = answering.first_answer("http://s", "m", "1", tensors=None, since=0.0, deadline=0.0, monotonic=lambda: 1.5)
    assert (answer.follows, answer.why, asked) == (True, "", [("/v1/generate", 1)])
