"""The audit trail: list, verify, export."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from modelkeep import output
from modelkeep.commands.common import Json, Local, moment, opened

audit_app = typer.Typer(help="The audit trail: list, verify, export.", no_args_is_help=True)

Subject = Annotated[
    str | None,
    typer.Option("--subject", help="A model (all that is about it), a whole subject, or a part of one."),
]
Since = Annotated[str | None, typer.Option("--since", help='From then on: "2d", "yesterday 03:12", ISO 8601.')]
Until = Annotated[str | None, typer.Option("--until", help="Up to then.")]
Actor = Annotated[str | None, typer.Option("--actor", help="Who did it: os:NAME, key:NAME, prefect-ui, replica:ID.")]
Action = Annotated[str | None, typer.Option("--action", help="promotion.begun, or promotion for all of those.")]


@audit_app.command("verify")
def audit_verify(as_json: Json = False) -> None:
    """Prove that no event was changed, removed or added, and that the tail was not cut."""
    from registry import audit

    with opened() as registry, registry.database.read() as session:
        verdict = audit.verify(session, registry.database.anchors)
    if as_json:
        output.document(
            {"holds": verdict.holds, "events": verdict.events, "head": {"seq": verdict.head.seq, "hash": verdict.head.hash},
             "anchors": verdict.anchors, "faults": verdict.faults}
        )  # fmt: skip
    elif verdict.holds:
        output.say(
            f"the audit chain holds: {verdict.events} events, {verdict.anchors} anchors, head {verdict.head.hash[:16]}…"
        )
    else:
        for fault in verdict.faults:
            output.problem(fault)
    raise typer.Exit(0 if verdict.holds else 1)


@audit_app.command("list")
def audit_list(
    subject: Subject = None,
    since: Since = None,
    until: Until = None,
    actor: Actor = None,
    action: Action = None,
    limit: Annotated[int, typer.Option("--limit", min=1)] = 50,
    local: Local = False,
    as_json: Json = False,
) -> None:
    """The newest events."""
    from registry import trail

    wanted = trail.Wanted(subject, moment(since, local=local), moment(until, local=local), actor, action)
    with opened() as registry, registry.database.read() as session:
        events = trail.listed(session, wanted, limit=limit)
    output.events(events, as_json=as_json)


@audit_app.command("export")
def audit_export(
    subject: Subject = None,
    since: Since = None,
    until: Until = None,
    actor: Actor = None,
    action: Action = None,
    after: Annotated[int, typer.Option("--after", min=0, help="The number of the last event that you have.")] = 0,
    local: Local = False,
) -> None:
    """Every event as a JSON line, the oldest first. To go on later: --after with the last `seq`."""
    from registry import trail

    wanted = trail.Wanted(subject, moment(since, local=local), moment(until, local=local), actor, action, after)
    with opened() as registry:
        for event in trail.stream(registry.database, wanted):
            sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()
