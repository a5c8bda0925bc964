"""The state machine of a version: legal moves are made and recorded, illegal ones name the legal ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from registry import states
from registry.database import Database
from registry.errors import IllegalMoveError
from registry.schema import Version
from registry.states import PLACEMENT_MOVES, VERSION_MOVES
from tests.unit.registry.kit import ENVIRONMENT, MODEL, actions, add_version, last_event, places

STATES = tuple(VERSION_MOVES)
STATUSES = ("testing", "passed", "candidate", "stable", "retired", "withdrawn")


def move(database: Database, state: Any) -> None:
    with database.write() as transaction:
        row = transaction.session.get_one(Version, (MODEL, "1"))
        states.move_version(transaction, row, state, reason="why")


def place(database: Database, environment: str, *statuses: Any) -> None:
    for status in statuses:
        with database.write() as transaction:
            states.place(transaction, MODEL, "1", environment, status, reason="why")


def state(database: Database) -> str:
    with database.read() as session:
        return session.get_one(Version, (MODEL, "1")).state


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)))
def test_a_version_moves_as_the_table_says_and_not_otherwise(database: Database, before: str, after: str) -> None:
    add_version(database, "1", state=before)
    events = last_event(database)
    if after in VERSION_MOVES[before]:
        move(database, after)
        assert state(database) == after
        assert actions(database, events) == [f"version.{after}"]
        return
    with pytest.raises(IllegalMoveError) as error:
        move(database, after)
    assert f"{MODEL} 1 is {before} and cannot become {after}" in str(error.value)
    for legal in VERSION_MOVES[before]:
        assert legal in str(error.value)
    assert (state(database), last_event(database)) == (before, events)


def test_archived_is_the_end() -> None:
    assert VERSION_MOVES["archived"] == ()
    assert set(itertools.chain(*VERSION_MOVES.values())) <= set(VERSION_MOVES)


# The shortest way to each status, by environment.
WAYS: dict[str, dict[str, tuple[str, ...]]] = {
    "staging": {
        "": (), "testing": ("testing",), "passed": ("testing", "passed"), "withdrawn": ("testing", "withdrawn"),
    },
    ENVIRONMENT: {
        "": (), "candidate": ("candidate",), "stable": ("stable",), "retired": ("stable", "retired"),
        "withdrawn": ("candidate", "withdrawn"),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "before", "after"),
    [(environment, before, after) for environment, ways in WAYS.items() for before in ways for after in STATUSES],
)
def test_a_placement_moves_as_the_table_says_and_not_otherwise(
    database: Database, environment: str, before: str, after: str
) -> None:
    moves = PLACEMENT_MOVES["staging" if environment == "staging" else "*"]
    add_version(database, "1")
    place(database, environment, *WAYS[environment][before])
    events = last_event(database)
    if after == before:
        place(database, environment, after)
        assert last_event(database) == events, "what it is already is no change"
    elif after in moves[before]:
        place(database, environment, after)
        assert places(database, environment) == {"1": after}
        assert actions(database, events) == ["placement.changed"]
    else:
        with pytest.raises(IllegalMoveError, match=f"cannot become {after} there; legal is ") as error:
            place(database, environment, after)
        for legal in moves[before]:
            assert legal in str(error.value)
        assert places(database, environment) == ({"1": before} if before else {})
        assert last_event(database) == events


def test_environments_are_apart(database: Database) -> None:
    add_version(database, "1")
    place(database, "staging", "testing")
    place(database, ENVIRONMENT, "candidate")
    assert (places(database, "staging"), places(database)) == ({"1": "testing"}, {"1": "candidate"})
