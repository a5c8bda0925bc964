"""A rollback whose answer was lost: asked for again it goes where it went, and no further."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from registry import promotions, rollbacks
from registry.actor import Who
from registry.attempts import Attempt
from registry.database import Database
from registry.errors import ConflictError, FencedError, NotFoundError, RefusedError, UnavailableError, UsageError
from registry.rollbacks import Aim
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL, POLICY, add_version, route, stable_by


@pytest.fixture
def three(database: Database) -> Database:
    """Versions 1 to 5, of which 1, 2, 3 have been stable in that order."""
    for name in ("1", "2", "3", "4", "5"):
        add_version(database, name)
    stable_by(database, "1", "2", "3")
    return database


def aim(database: Database, to: str | None = None, *, emergency: bool = True) -> Aim:
    with database.read() as session:
        return rollbacks.aim(session, ENVIRONMENT, MODEL, to=to, emergency=emergency)


def back(database: Database, aimed: Aim | None = None, *, emergency: bool = True, **asked: Any) -> dict[str, Any]:
    if aimed is not None:
        asked |= {"to": aimed.to, "seen": aimed.seen}
    return rollbacks.roll_back(
        database, environment=ENVIRONMENT, model=MODEL, reason="bad", ttl_seconds=30.0, emergency=emergency,
        **({"to": None} | asked),
    )  # fmt: skip


@pytest.mark.parametrize("emergency", [True, False])
def test_it_is_done_once_however_often_it_is_asked_for(three: Database, emergency: bool) -> None:
    aimed, before = aim(three, emergency=emergency), kit.last_event(three)
    first = back(three, aimed, emergency=emergency)
    assert (first["from"], first["to"]) == ("3", "2")
    assert back(three, aimed, emergency=emergency) == first
    assert back(three, aimed, emergency=not emergency) == first
    assert route(three).stable == "2"
    assert kit.actions(three, before).count("model.rolled-back") == 1
    assert back(three)["to"] == "1", "one that was decided anew goes one further"


def test_what_happens_to_other_models_does_not_matter(three: Database) -> None:
    aimed = aim(three)
    add_version(three, "1", model="letters")
    other = kit.begin(three, "1", model="letters")
    kit.promote(three, other)
    assert back(three, aimed)["to"] == "2"


def test_another_version_that_has_become_stable_since_is_left_alone_and_named(three: Database) -> None:
    aimed = aim(three)
    stable_by(three, "4")
    before = kit.last_event(three)
    with pytest.raises(
        ConflictError, match=r"rollback from 3 to 2 was decided: to 4 by .* \(promote\).*4 is stable now"
    ):
        back(three, aimed)
    assert route(three).stable == "4" and kit.actions(three, before) == []


def test_a_rollback_to_elsewhere_since_is_not_undone_by_one_that_comes_late(three: Database) -> None:
    aimed = aim(three)
    back(three, to="1")
    with pytest.raises(ConflictError, match=r"to 1 by .* \(rollback\)"):
        back(three, aimed)
    assert route(three).stable == "1"


def test_a_promotion_that_began_after_the_rollback_was_done_is_left_alone(three: Database) -> None:
    aimed = aim(three)
    back(three, aimed)
    operation = kit.begin(three, "4")
    kit.canary(three, operation)
    assert back(three, aimed)["to"] == "2"
    assert route(three).candidate == "4"


def test_what_the_promotion_under_way_does_meanwhile_stops_no_emergency(three: Database) -> None:
    operation = kit.begin(three, "4")
    kit.canary(three, operation)
    aimed = aim(three)
    assert aimed.to == "3"
    kit.weigh(three, operation, 0.5)
    kit.promote(three, operation)
    assert back(three, aimed)["withdrawn"] == "4"
    assert (route(three).stable, route(three).candidate) == ("3", None)


def test_a_promotion_that_was_withdrawn_meanwhile_has_done_what_was_asked(three: Database) -> None:
    operation = kit.begin(three, "4")
    kit.canary(three, operation)
    aimed = aim(three)
    kit.end(three, operation, "withdrawn")
    before = kit.last_event(three)
    assert back(three, aimed)["to"] == "3"
    assert route(three).stable == "3" and kit.actions(three, before) == []


def test_a_registry_that_was_restored_meanwhile_is_looked_at_first(three: Database) -> None:
    aimed = aim(three)
    kit.new_epoch(three)
    with pytest.raises(ConflictError, match="restored"):
        back(three, aimed)
    again = aim(three)
    assert back(three, again)["to"] == "2" and back(three, again)["to"] == "2"
    assert route(three).stable == "2"


def test_what_was_seen_is_of_no_use_without_the_version_that_was_decided_on(three: Database) -> None:
    with pytest.raises(UsageError, match="needs the version"):
        back(three, seen=aim(three).seen)


# where it goes


def rest(_database: Database) -> None:
    pass


def copies(database: Database) -> None:
    kit.shadow(database, kit.begin(database, "4"))


def share(database: Database) -> None:
    kit.canary(database, kit.begin(database, "4"))


def soak(database: Database) -> None:
    operation = kit.begin(database, "4")
    kit.canary(database, operation)
    kit.promote(database, operation)


def orphaned(database: Database) -> None:
    operation = kit.begin(database, "4")
    kit.canary(database, operation)
    kit.promote(database, operation)
    promotions.let_go(database, operation, "killed")


def by_steps(database: Database) -> None:
    rollbacks.begin_gradual(
        database, environment=ENVIRONMENT, model=MODEL, to="1", policy=POLICY, ttl_seconds=30.0, reason="slowly"
    )


@pytest.mark.parametrize(
    ("under_way", "expected"), [(rest, "2"), (copies, "2"), (share, "3"), (soak, "3"), (orphaned, "3"), (by_steps, "1")]
)
def test_what_is_decided_is_what_is_done(three: Database, under_way: Callable[[Database], None], expected: str) -> None:
    under_way(three)
    assert aim(three).to == expected
    assert back(three)["to"] == expected
    assert route(three).stable == expected


def test_the_first_version_in_its_soak_has_none_before_it(database: Database) -> None:
    add_version(database, "1")
    operation = kit.begin(database, "1")
    kit.promote(database, operation)
    for ask in (aim, back):
        with pytest.raises(NotFoundError, match="1 is the first version"):
            ask(database)
    assert route(database).stable == "1"


def test_where_there_is_no_version_before_a_promotion_without_traffic_is_withdrawn_and_the_stable_one_stays(
    database: Database,
) -> None:
    for name in ("1", "2"):
        add_version(database, name)
    stable_by(database, "1")
    kit.shadow(database, kit.begin(database, "2"))
    assert aim(database).to == "1"
    done = back(database)
    assert (done["to"], done["withdrawn"], route(database).stable) == ("1", "2", "1")


# an attempt that is late


def attempt(database: Database, one: Attempt) -> dict[str, Any]:
    return one.roll_back(
        database,
        environment=ENVIRONMENT,
        model=MODEL,
        to=None,
        reason="",
        ttl_seconds=30.0,
        emergency=True,
        who=Who("me"),
    )


def test_an_attempt_that_was_given_up_before_it_had_decided_changes_nothing(three: Database) -> None:
    late = Attempt()
    assert late.give_up() is None
    with pytest.raises(UnavailableError, match="too late"):
        attempt(three, late)
    assert route(three).stable == "3"


def test_an_attempt_that_was_given_up_later_has_said_where_it_goes_and_the_next_goes_there_too(three: Database) -> None:
    late = Attempt()
    late.decide(three, environment=ENVIRONMENT, model=MODEL, to=None, emergency=True)
    known = aim(three)
    attempt(three, late)  # its answer came too late
    assert late.give_up() == known
    assert attempt(three, Attempt(known))["to"] == "2"
    assert route(three).stable == "2"


# by steps


def test_a_gradual_rollback_is_found_done_on_its_record(three: Database) -> None:
    operation = rollbacks.begin_gradual(
        three, environment=ENVIRONMENT, model=MODEL, to=None, policy=POLICY, ttl_seconds=30.0, reason="slowly"
    )
    with three.read() as session:
        assert rollbacks.finished(session, operation.id) is None
    done = rollbacks.finish_gradual(three, operation, reason="slowly", detail="")
    with three.read() as session:
        assert rollbacks.finished(session, operation.id) == done
        assert rollbacks.finished(session, "unknown") is None


def test_a_gradual_rollback_that_could_not_be_finished_does_not_believe_that_it_was(
    three: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = rollbacks.begin_gradual(
        three, environment=ENVIRONMENT, model=MODEL, to=None, policy=POLICY, ttl_seconds=30.0, reason="slowly"
    )

    def fail(*_: object, **__: object) -> None:
        raise RefusedError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(rollbacks, "_record", fail)
        with pytest.raises(RefusedError):
            rollbacks.finish_gradual(three, operation, reason="", detail="")
    assert "promoted" not in operation.progress
    promotions.end(three, operation, "failed", title="failed", detail="")
    with pytest.raises(FencedError):
        rollbacks.finish_gradual(three, operation, reason="", detail="")
    assert route(three).stable == "3"
