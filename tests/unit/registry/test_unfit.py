"""A version that cannot serve is taken out of its route where another can, and stays where none can."""

from __future__ import annotations

import pytest

from registry import approvals, promotions, rollbacks, unfit
from registry.database import Database
from tests.unit.registry import kit

WHY = "the server died 2 times"


def take_out(database: Database, version: str) -> str | None:
    return unfit.take_out(database, kit.ENVIRONMENT, kit.MODEL, version, observer="replica:r1", reason=WHY)


@pytest.fixture
def three(database: Database) -> Database:
    """Versions 1 and 2 were promoted one after the other; 3 waits."""
    for version in "123":
        kit.add_version(database, version)
    kit.stable_by(database, "1", "2")
    return database


def state(database: Database, identity: str) -> str:
    with database.read() as session:
        return promotions.get(session, identity).state


@pytest.mark.parametrize("stage", [kit.shadow, kit.canary])
def test_a_candidate_is_withdrawn_whoever_holds_its_lease(three: Database, stage: object) -> None:
    operation = kit.begin(three, "3")
    stage(three, operation)  # type: ignore[operator]
    before = kit.last_event(three)
    assert take_out(three, "3") is not None
    route = kit.route(three)
    assert (route.stable, route.candidate, route.weight, route.promotion) == ("2", None, 0.0, None)
    assert state(three, operation.id) == "withdrawn"
    assert {"version.unfit", "route.withdraw", "lease.pre-empted"} <= set(kit.actions(three, before))
    assert kit.verdict(three).holds
    with pytest.raises(Exception, match="no longer holds the lease"):
        kit.end(three, operation, "promoted")


def test_a_version_in_its_soak_gives_way_to_the_one_before(three: Database) -> None:
    operation = kit.begin(three, "3")
    kit.canary(three, operation)
    kit.promote(three, operation)
    assert take_out(three, "3") is not None
    assert kit.route(three).stable == "2"
    assert state(three, operation.id) == "withdrawn"
    assert kit.places(three)["2"] == "stable"


def test_a_settled_version_gives_way_to_the_one_before_and_that_one_stays(three: Database) -> None:
    assert take_out(three, "2") is not None
    assert kit.route(three).stable == "1"
    assert kit.places(three)["1"] == "stable"
    # Both are unfit now: going to and fro would help nobody.
    assert take_out(three, "1") is None
    assert kit.route(three).stable == "1"
    assert kit.verdict(three).holds


def test_what_was_taken_out_is_not_where_a_rollback_goes(three: Database) -> None:
    kit.stable_by(three, "3")
    take_out(three, "3")
    back = rollbacks.roll_back(
        three, environment=kit.ENVIRONMENT, model=kit.MODEL, to=None, reason="by hand", ttl_seconds=30.0
    )
    assert back["to"] == "1"


def test_the_only_version_stays(database: Database) -> None:
    kit.add_version(database, "1")
    kit.stable_by(database, "1")
    before = kit.last_event(database)
    assert take_out(database, "1") is None
    assert kit.actions(database, before) == []


@pytest.mark.parametrize("version", ["1", "3"])
def test_a_version_without_traffic_is_left_alone(three: Database, version: str) -> None:
    before = kit.last_event(three)
    assert take_out(three, version) is None
    assert kit.actions(three, before) == []


def test_the_stable_version_under_a_promotion_is_not_the_promotions_fault(three: Database) -> None:
    operation = kit.begin(three, "3")
    kit.canary(three, operation)
    assert take_out(three, "2") is None
    assert state(three, operation.id) == "running"


@pytest.mark.parametrize("waits", [False, True], ids=["validating", "waiting for an approval"])
def test_a_promotion_that_began_beside_what_is_taken_out_ends_and_is_not_left_without_its_lease(
    three: Database, waits: bool
) -> None:
    operation = kit.begin(three, "3")
    if waits:
        approvals.ask(three, operation, deadline_seconds=600.0)
    assert take_out(three, "2") is not None
    assert kit.route(three).stable == "1"
    assert state(three, operation.id) == "withdrawn"
    again = kit.begin(three, "3")
    assert (again.stable, again.id == operation.id) == ("1", False)
    assert kit.verdict(three).holds
