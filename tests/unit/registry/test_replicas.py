"""What servers report and read: a row each, cumulative counts, one cheap query to poll with. None of it is audited."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from sqlalchemy import func, select

from registry import clock, leases, replicas, routes
from registry.database import Database
from registry.replicas import Reached, Report
from registry.routes import Desired
from registry.schema import Reach, ReplicaCount
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL, add_version, begin, last_event, stable_by

BORN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def report(database: Database, *counts: dict[str, Any], **changes: Any) -> None:
    fields: dict[str, Any] = {
        "id": "r1", "environment": ENVIRONMENT, "address": "http://127.0.0.1:8000", "boot_id": "b1", "epoch": "e",
        "generation": 1, "serving": {}, "started_at": BORN,
    }  # fmt: skip
    replicas.report(database, Report(**(fields | changes), counts=counts))


def counted(version: str, requests: int, generation: int = 1, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "version": version, "epoch": "e", "generation": generation, "requests": requests, **more}


def listed(database: Database, environment: str | None = None) -> list[dict[str, Any]]:
    with database.read() as session:
        return replicas.listed(session, environment)


def counts(database: Database, generation: int = 1, epoch: str = "e") -> dict[str, list[dict[str, Any]]]:
    with database.read() as session:
        return replicas.counts(session, MODEL, epoch, generation)


def test_a_report_is_one_row_whose_heartbeat_moves(database: Database) -> None:
    events = last_event(database)
    for _ in range(3):
        report(database)
    (row,) = listed(database)
    assert (row["id"], row["heartbeat"], row["address"]) == ("r1", 3, "http://127.0.0.1:8000")
    assert row["started_at"] == "2026-01-01T00:00:00.000000Z"
    assert last_event(database) == events, "a report is no event"


def test_the_time_of_reaching_a_generation_is_kept_until_the_next(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = BORN
    monkeypatch.setattr(clock, "now", lambda: moment)
    report(database)
    moment = BORN + dt.timedelta(seconds=5)
    report(database)
    assert listed(database)[0]["reached_at"] == clock.text(BORN)
    report(database, generation=2)
    assert listed(database)[0]["reached_at"] == clock.text(moment)
    moment = BORN + dt.timedelta(seconds=9)
    report(database, generation=2, boot_id="b2")
    assert listed(database)[0]["reached_at"] == clock.text(moment)


def test_counts_are_cumulative_and_each_boot_keeps_its_own(database: Database) -> None:
    report(database, counted("1", 10, errors=1), counted("2", 1, errors=0))
    report(database, counted("1", 25, errors=2), counted("2", 3, errors=0))
    report(database, counted("1", 4, errors=0), boot_id="b2")
    report(database, counted("1", 7, errors=0), id="r2")
    found = counts(database)
    assert sorted(row["requests"] for row in found["1"]) == [4, 7, 25]
    assert found["2"] == [{"requests": 3, "errors": 0}]


def test_counts_of_another_generation_or_epoch_are_another_window(database: Database) -> None:
    report(database, counted("1", 10), counted("1", 5, generation=2))
    assert counts(database)["1"] == [{"requests": 10}]
    assert counts(database, 2)["1"] == [{"requests": 5}]
    assert counts(database, 1, "other") == {}


def test_counts_can_be_forgotten(database: Database) -> None:
    report(database, counted("1", 10), counted("1", 5, generation=2))
    replicas.forget_counts(database, MODEL, [("e", 1)])
    assert (counts(database), counts(database, 2)) == ({}, {"1": [{"requests": 5}]})
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(ReplicaCount)) == 1


def test_replicas_are_listed_by_environment(database: Database) -> None:
    report(database)
    report(database, id="r2", environment="lab")
    assert [row["id"] for row in listed(database)] == ["r2", "r1"]
    assert [row["id"] for row in listed(database, "lab")] == ["r2"]


def test_an_environment_without_routes_has_no_pulse(database: Database) -> None:
    with database.read() as session:
        assert replicas.pulse(session, ENVIRONMENT) is None


def test_a_pulse_is_one_query_with_the_generation_and_the_beats(database: Database) -> None:
    add_version(database, "1")
    stable_by(database, "1")
    add_version(database, "2")
    operation = begin(database, "2")
    add_version(database, "1", model="letters")
    other = begin(database, "1", model="letters")
    leases.beat(database, other.held)
    with kit.statements(database) as sent, database.read() as session:
        pulse = replicas.pulse(session, ENVIRONMENT)
    assert [statement.split()[0] for statement in sent] == ["BEGIN" if database.sqlite else "SET", "SELECT"]
    assert pulse is not None
    assert pulse.generation == 2
    assert {(beat.subject, beat.token, beat.heartbeat) for beat in pulse.beats} == {
        (operation.held.subject, operation.held.token, 0),
        (other.held.subject, other.held.token, 1),
    }


def test_a_pulse_without_leases_has_no_beats(database: Database) -> None:
    with database.write() as transaction:
        routes.change(transaction, ENVIRONMENT, MODEL, Desired(stable="1"), kind="first", reason="")
    with database.read() as session:
        pulse = replicas.pulse(session, ENVIRONMENT)
    assert pulse is not None
    assert (pulse.generation, pulse.beats) == (1, ())


def test_desired_is_the_routes_and_the_versions_that_they_name(database: Database) -> None:
    for version in ("1", "2", "3"):
        add_version(database, version)
    with database.write() as transaction:
        routes.change(
            transaction, ENVIRONMENT, MODEL, Desired(stable="1", candidate="3", weight=0.5), kind="canary", reason=""
        )
        routes.change(transaction, "lab", MODEL, Desired(stable="2"), kind="first", reason="")
    with database.read() as session:
        found, versions = replicas.desired(session, ENVIRONMENT)
    assert [(route.model, route.stable, route.candidate) for route in found] == [(MODEL, "1", "3")]
    assert {row.version for row in versions} == {"1", "3"}


def test_a_report_that_got_no_answer_and_is_sent_again_counts_once(database: Database) -> None:
    for _ in range(2):
        report(database, counted("1", 25, errors=2))
    assert counts(database)["1"] == [{"requests": 25, "errors": 2}]


def test_a_late_report_of_an_old_boot_changes_its_own_row_only(database: Database) -> None:
    report(database, counted("1", 25))
    report(database, counted("1", 4), boot_id="b2")
    report(database, counted("1", 27), boot_id="b1")
    assert sorted(row["requests"] for row in counts(database)["1"]) == [4, 27]


def test_three_replicas_with_restarts_add_up_to_what_was_answered(database: Database) -> None:
    answered = 0
    for replica in ("r1", "r2", "r3"):
        for boot in ("a", "b"):
            for requests in (10, 30, 70):  # cumulative: what counts is the last
                report(database, counted("1", requests), counted("2", requests // 10), id=replica, boot_id=boot)
            answered += 70
    found = counts(database)
    assert sum(row["requests"] for row in found["1"]) == answered
    assert sum(row["requests"] for row in found["2"]) == answered // 10


# what each boot reached, and when


def reaches(database: Database) -> list[tuple[int, str, dt.datetime, list[str] | None, bool]]:
    with database.read() as session:
        rows = session.scalars(select(Reach).order_by(Reach.at, Reach.generation)).all()
    return [(row.generation, row.boot_id, row.at, row.behind, row.until is not None) for row in rows]


def reached(generation: int, seconds: float, *behind: str) -> Reached:
    return Reached("e", generation, BORN + dt.timedelta(seconds=seconds), behind)


def test_every_switch_is_kept_once_with_the_time_of_the_server_that_made_it(database: Database) -> None:
    report(database, generation=1, reached=(reached(1, 10),))
    report(database, generation=3, reached=(reached(1, 10), reached(2, 20), reached(3, 30)))
    report(database, generation=3)
    first, second, third = (BORN + dt.timedelta(seconds=seconds) for seconds in (10, 20, 30))
    assert reaches(database) == [
        (1, "b1", first, None, False),
        (2, "b1", second, None, False),
        (3, "b1", third, None, False),
    ]
    assert listed(database)[0]["reached_at"] == clock.text(third)


def test_another_boot_ends_the_one_before_with_when_it_was_last_heard_of(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = BORN + dt.timedelta(seconds=12)
    monkeypatch.setattr(clock, "now", lambda: heard)
    report(database, generation=1, reached=(reached(1, 10),))
    monkeypatch.setattr(clock, "now", lambda: heard + dt.timedelta(seconds=99))
    report(database, generation=1, boot_id="b2", reached=(reached(1, 90),))
    with database.read() as session:
        until = {row.boot_id: row.until for row in session.scalars(select(Reach))}
    assert until == {"b1": heard, "b2": None}


def test_what_could_not_be_served_as_wanted_is_reached_when_it_can(database: Database) -> None:
    report(database, generation=1, reached=(reached(1, 10, MODEL),))
    assert reaches(database)[0][3] == [MODEL]
    report(database, generation=1, reached=(reached(1, 40),))
    assert reaches(database) == [(1, "b1", BORN + dt.timedelta(seconds=40), None, False)]
    report(database, generation=1, reached=(reached(1, 60, MODEL),))  # a hold on this server, later
    assert reaches(database) == [(1, "b1", BORN + dt.timedelta(seconds=40), [MODEL], False)]
