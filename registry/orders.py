"""What a decision does with the commands that people gave (registry.commands): takes the one that it follows, calls off what came too late."""

from __future__ import annotations

from sqlalchemy import select

from registry import clock
from registry.database import Transaction
from registry.errors import ConflictError
from registry.schema import Promotion, PromotionCommand
from registry.stories import add_step


class OvertakenError(ConflictError):
    """A command was called off between the look that found it and the decision that follows it. Nothing was written: look again."""


def take(transaction: Transaction, promotion: str, number: int | None) -> None:
    """Note that the decision of this transaction follows a command; None: it follows none. Raises OvertakenError."""
    if number is None:
        return
    row = transaction.session.get_one(PromotionCommand, (promotion, number), populate_existing=True)
    if row.taken_at is not None:
        raise OvertakenError(f"promotion {promotion}: its {row.command} by {row.actor} was called off just now")
    row.taken_at = clock.now()


def void_advances(transaction: Transaction, promotion: str, next_stage: str) -> None:
    """A word to pass a stage is meant for the stage that it was given in, not for the next one."""
    session = transaction.session
    late = select(PromotionCommand).where(
        PromotionCommand.promotion == promotion,
        PromotionCommand.command == "advance",
        PromotionCommand.taken_at.is_(None),
    )
    for command in session.scalars(late):
        command.taken_at = clock.now()
        row = session.get_one(Promotion, promotion)
        detail = f"{command.actor} asked for it before {next_stage}, which was reached without it"
        figures = {"command": command.number, "not_taken": f"{next_stage} was reached without it"}
        add_step(transaction, row, "advance", "Sped up by itself already", detail, figures)
