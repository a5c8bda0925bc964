"""Routes: every change raises the generation and is on record; a rollback without a name never goes forward."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from sqlalchemy import select, update

from registry import clock, routes
from registry.database import Database
from registry.errors import NotFoundError
from registry.routes import Desired
from registry.schema import Environment, RouteChange
from tests.unit.registry.kit import ENVIRONMENT, actions, route, verdict


def change(database: Database, desired: Desired, kind: str, model: str = "digits", **more: Any) -> int:
    with database.write(actor="ann") as transaction:
        return routes.change(transaction, ENVIRONMENT, model, desired, kind=kind, reason="why", **more).generation


def previous(database: Database) -> str:
    with database.read() as session:
        return routes.previous_stable(session, ENVIRONMENT, "digits")


def history(database: Database, *steps: tuple[str, str | None]) -> None:
    for kind, stable in steps:
        change(database, Desired(stable=stable), kind)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_is_a_share(weight: float) -> None:
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        Desired(stable="1", candidate="2", weight=weight)


@pytest.mark.parametrize("wrong", [{"weight": 0.1}, {"shadow": True}])
def test_without_a_candidate_there_is_nothing_to_weigh_or_shadow(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs a candidate"):
        Desired(stable="1", **wrong)


def test_a_version_is_not_stable_and_candidate_at_once() -> None:
    with pytest.raises(ValueError, match="stable and candidate at once"):
        Desired(stable="1", candidate="1")


def test_a_change_sets_the_route_raises_the_generation_and_is_on_record(database: Database) -> None:
    assert change(database, Desired(stable="1"), "first") == 1
    wanted = Desired(stable="1", candidate="2", weight=0.25, watch=True, slow_threshold_seconds=0.5)
    assert change(database, wanted, "canary", promotion="p1") == 2
    found = route(database)
    assert routes.as_dict(found) == {
        "stable": "1", "candidate": "2", "weight": 0.25, "shadow": False, "watch": True, "slow_threshold_seconds": 0.5,
        "shadow_share": None,
        "generation": 2, "promotion": "p1",
    }  # fmt: skip
    assert actions(database) == ["environment.created", "route.first", "route.canary"]
    with database.read() as session:
        rows = session.scalars(select(RouteChange).order_by(RouteChange.generation)).all()
    assert [(row.kind, row.stable, row.candidate, row.weight, row.actor) for row in rows] == [
        ("first", "1", None, 0.0, "ann"),
        ("canary", "1", "2", 0.25, "ann"),
    ]
    assert verdict(database).holds


def test_models_of_an_environment_share_the_generation(database: Database) -> None:
    assert change(database, Desired(stable="1"), "first") == 1
    assert change(database, Desired(stable="1"), "first", model="letters") == 2
    assert (route(database).generation, route(database, "letters").generation) == (1, 2)


def test_a_change_that_is_not_committed_leaves_nothing(database: Database) -> None:
    change(database, Desired(stable="1"), "first")
    with pytest.raises(ZeroDivisionError), database.write() as transaction:
        routes.change(transaction, ENVIRONMENT, "digits", Desired(stable="2"), kind="promote", reason="")
        raise ZeroDivisionError
    assert (route(database).stable, route(database).generation) == ("1", 1)
    with database.read() as session:
        assert session.get_one(Environment, ENVIRONMENT).generation == 1
    assert actions(database) == ["environment.created", "route.first"]


@pytest.mark.parametrize(
    ("steps", "below"),
    [
        ([("first", "1"), ("promote", "2")], "1"),
        ([("first", "1"), ("promote", "2"), ("canary", "2"), ("withdraw", "2")], "1"),
        ([("first", "1"), ("promote", "2"), ("promote", "3")], "2"),
        ([("first", "1"), ("promote", "2"), ("promote", "3"), ("rollback", "2")], "1"),
        ([("first", "1"), ("promote", "2"), ("promote", "3"), ("withdraw", "2")], "1"),
        ([("first", "1"), ("promote", "2"), ("rollback", "1"), ("rollback", "2")], "1"),
        ([("first", "1"), ("promote", "2"), ("rollback", "1"), ("promote", "3")], "1"),
        ([("first", "1"), ("promote", "2"), ("promote", "1")], "2"),
        ([("first", "1"), ("promote", "2"), ("promote", "1"), ("promote", "3"), ("rollback", "1")], "2"),
    ],
)
def test_previous_is_the_one_below_on_the_stack_of_promotions(
    database: Database, steps: list[tuple[str, str | None]], below: str
) -> None:
    history(database, *steps)
    assert previous(database) == below


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [("first", "1")],
        [("first", "1"), ("promote", "2"), ("rollback", "1")],
        [("first", "1"), ("promote", "2"), ("promote", "3"), ("rollback", "1")],
        [("first", "1"), ("withdraw", None), ("first", "2")],
    ],
)
def test_where_nothing_is_below_a_rollback_wants_a_name(
    database: Database, steps: list[tuple[str, str | None]]
) -> None:
    history(database, *steps)
    with pytest.raises(NotFoundError, match="name one with --to VERSION"):
        previous(database)


def test_a_clock_that_goes_back_does_not_reorder_the_changes(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock.now()
    for hours, (kind, stable) in zip((-2, 0, -1), (("first", "1"), ("promote", "2"), ("promote", "3")), strict=True):
        monkeypatch.setattr(clock, "now", lambda hours=hours: now + dt.timedelta(hours=hours))
        change(database, Desired(stable=stable), kind)
    assert previous(database) == "2"


def test_changes_of_an_earlier_epoch_come_first_whatever_their_generations(database: Database) -> None:
    history(database, ("first", "1"), ("promote", "2"), ("promote", "3"))
    with database.write() as transaction:  # as a restore of the state with version 2 would
        transaction.session.execute(update(Environment).values(epoch=routes.new_epoch(), generation=1))
    history(database, ("rollback", "2"), ("promote", "4"))
    assert previous(database) == "2"


def test_a_version_has_been_stable_only_where_a_route_named_it(database: Database) -> None:
    change(database, Desired(stable="1", candidate="2", weight=0.5), "canary")
    with database.read() as session:
        assert routes.has_been_stable(session, ENVIRONMENT, "digits", "1")
        assert not routes.has_been_stable(session, ENVIRONMENT, "digits", "2")
        assert not routes.has_been_stable(session, "elsewhere", "digits", "1")
