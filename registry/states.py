"""The state machine of a version, in one place: what it is for all (registered, validated …) and where it stands in an environment."""

from __future__ import annotations

from typing import Literal

from sqlalchemy.orm import Session

from registry import clock
from registry.database import Transaction
from registry.errors import IllegalMoveError
from registry.schema import Placement, Version

VersionState = Literal["registered", "validated", "rejected", "archived"]
PlacementStatus = Literal["testing", "passed", "candidate", "stable", "retired", "withdrawn"]

VERSION_MOVES: dict[str, tuple[str, ...]] = {
    "registered": ("validated", "rejected", "archived"),
    "validated": ("validated", "rejected", "archived"),
    "rejected": ("validated", "rejected", "archived"),
    "archived": (),
}
"""A version may be validated again, under another policy or against another stable version. Archived is the end."""

PLACEMENT_MOVES: dict[str, dict[str, tuple[str, ...]]] = {
    "staging": {
        "": ("testing",),
        "testing": ("passed", "withdrawn"),
        "passed": ("testing",),
        "withdrawn": ("testing",),
    },
    "*": {
        "": ("candidate", "stable"),
        "candidate": ("stable", "withdrawn"),
        "stable": ("retired", "withdrawn"),
        "retired": ("candidate", "stable"),
        "withdrawn": ("candidate", "stable"),
    },
}
"""Moves in staging, and in every environment that takes traffic. "" is not being there yet."""


def move_version(
    transaction: Transaction, row: Version, state: VersionState, *, reason: str, facts: dict[str, object] | None = None
) -> None:
    """Change what a version is. Raises IllegalMoveError, which names the legal moves."""
    legal = VERSION_MOVES[row.state]
    if state not in legal:
        raise IllegalMoveError(
            f"{row.model} {row.version} is {row.state} and cannot become {state}; "
            + (f"from there it may become {', '.join(legal)}" if legal else "archived versions stay archived")
        )
    before, row.state = row.state, state
    transaction.record(
        f"version.{state}",
        f"version:{row.model}/{row.version}",
        before={"state": before},
        after={"state": state, **(facts or {})},
        reason=reason,
    )


def placement(session: Session, model: str, version: str, environment: str) -> Placement | None:
    return session.get(Placement, (model, version, environment))


def place(
    transaction: Transaction, model: str, version: str, environment: str, status: PlacementStatus, *, reason: str
) -> None:
    """Change where a version stands in an environment. What it is already is left alone.

    Raises IllegalMoveError for a move that the table above does not have.
    """
    row = placement(transaction.session, model, version, environment)
    current = row.status if row else ""
    if current == status:
        return
    moves = PLACEMENT_MOVES.get(environment, PLACEMENT_MOVES["*"])
    if status not in moves.get(current, ()):
        legal = ", ".join(moves.get(current, ())) or "nothing"
        raise IllegalMoveError(
            f"{model} {version} is {current or 'not'} in {environment} and cannot become {status} there; legal is {legal}"
        )
    if row is None:
        row = Placement(model=model, version=version, environment=environment, status=status, since=clock.now())
        transaction.session.add(row)
    else:
        row.status, row.since = status, clock.now()
    transaction.record(
        "placement.changed",
        f"version:{model}/{version}",
        before={"environment": environment, "status": current or None},
        after={"environment": environment, "status": status},
        reason=reason,
    )
