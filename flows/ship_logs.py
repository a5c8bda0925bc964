"""ship-logs: what the database servers wrote since the last time goes to where the backups are, every five minutes."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.common import logger, settings_alone
from registry.errors import LockedError
from tasks.backup import ship


class ShipLogs(BaseModel):
    """Whose logs are shipped."""

    model_config = ConfigDict(extra="forbid", title="Logs")

    databases: list[str] = Field(default=[], description="Of those that `[backup] logs` names; empty: all of them.")


@flow(
    name="ship-logs",
    description="Ship the logs of the databases that [backup] logs names: with them a moment between two backups comes back.",
    persist_result=False,
)
def ship_logs(request: ShipLogs | None = None) -> State[Any]:
    """Ends Shipped; Refused for a name that `[backup] logs` does not have; or Failed with the name Failed, Gap (shipped, and no
    backup can use them yet) or Locked (another is at it)."""
    request = request or ShipLogs()
    settings = settings_alone()
    if not settings.backup.logs:
        ship.ship(settings)  # what was known of those that were shipped goes
        return Completed(name="Shipped", message="[backup] logs names no database")
    if unknown := sorted(set(request.databases) - set(settings.backup.logs)):
        return Failed(
            name="Refused", message=f"{', '.join(unknown)}: [backup] logs has {', '.join(settings.backup.logs)}"
        )
    try:
        found = ship.ship(settings, request.databases, tell=logger().info)
    except LockedError as error:
        return Failed(name="Locked", message=str(error))
    message = "; ".join(map(ship.summary, found))
    match ship.exit_code(found):
        case 0:
            return Completed(name="Shipped", message=message)
        case 3:
            return Failed(name="Gap", message=message)
        case _:
            return Failed(name="Failed", message=message)
