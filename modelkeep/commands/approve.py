"""`approve` and `reject`; and going on, in this process, with a promotion that was approved."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import typer

from modelkeep import output
from modelkeep.commands.common import Context, Json, opened
from registry.errors import UnavailableError

Identity = Annotated[str, typer.Argument(metavar="ID", help="The promotion that waits, as in `modelkeep promotions`.")]
Note = Annotated[str, typer.Option("--note", help="Why; it goes on record.")]


def approve(identity: Identity, note: Note, as_json: Json = False) -> None:
    """Approve a promotion that waits. With four_eyes, two different keys have to."""
    _answer(identity, "approve", note, as_json)


def reject(identity: Identity, note: Note, as_json: Json = False) -> None:
    """Refuse a promotion that waits: it is over, and took no traffic."""
    _answer(identity, "reject", note, as_json)


def _answer(identity: str, verdict: Literal["approve", "reject"], note: str, as_json: bool) -> None:
    from registry import approvals, keys
    from tasks import approval

    with opened() as context:
        who = keys.of_command(context.database, context.settings)
        found = approvals.give(context.database, identity, verdict=verdict, who=who, note=note)
        api_url = os.environ.get("PREFECT_API_URL", context.settings.prefect.api_url)
        try:
            woken = approval.go_on(context.database, api_url, identity)
        except UnavailableError:
            woken = None  # no Prefect server: whoever waits, or `promotions resume`, finds the answer in the registry
    if as_json:
        output.document({**found, "woken": woken})
    else:
        output.say(_in_words(found, woken), to_stderr=not found["counts"])
    raise typer.Exit(0 if found["counts"] else 1)


def _in_words(found: dict[str, Any], woken: str | None) -> str:
    name = f"{found['model']} {found['version']}"
    if not found["counts"]:
        over = f"; promotion {found['promotion']} is {found['state']}" if found["state"] != "awaiting" else ""
        return f"this does not count: {found['why_not']}{over}"
    if found["verdict"] == "reject":
        return f"{name} is rejected; it took no traffic"
    if not found["approved"]:
        return (
            f"this counts; {name} needs {found['needed'] - found['given']} more, by another key, until {found['until']}"
        )
    on = woken or (
        "it goes on where it waits: in its own process, or by `modelkeep up`; else by "
        f"modelkeep promotions resume {found['promotion']}"
    )
    return f"{name} is approved; {on}"


def carry_on(context: Context, identity: str) -> dict[str, Any] | None:
    """What a promote-model run in this process needs to go on with a promotion that waits; None where it waits for no approval."""
    from registry import approvals, promotions

    with context.database.read() as session:
        state = approvals.state_of(session, identity)
    if state["state"] != promotions.AWAITING:
        return None
    return {
        "model": state["model"],
        "version": state["version"],
        "environment": state["environment"],
        "carry_on": identity,
    }
