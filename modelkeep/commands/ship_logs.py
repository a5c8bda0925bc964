"""`backups ship-logs`: what the database servers wrote since the last time, so that a moment between two backups comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from modelkeep import output
from modelkeep.commands.common import Json
from registry.settings import load_settings

if TYPE_CHECKING:
    from tasks.backup.ship import Shipment


def ship_logs(as_json: Json = False) -> None:
    """Ship what the database servers wrote to their logs. The deployment ship-logs does it every five minutes."""
    from tasks.backup import ship

    settings = load_settings()
    found = ship.ship(settings)
    if as_json:
        output.document([one.as_dict() for one in found])
    else:
        _show(found)
    raise typer.Exit(ship.exit_code(found))


def _show(found: list[Shipment]) -> None:
    from tasks.backup import ship

    if not found:
        output.say("no database is named: set logs under [backup]")
    for one in found:
        (output.problem if one.failed or one.gap else output.say)(ship.summary(one))
        for text in one.warnings:
            output.say(f"{one.database}: {text}")
