"""The audit trail: list, verify, export."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from modelkeep import output
from modelkeep.commands.common import Json, opened

audit_app = typer.Typer(help="The audit trail: list, verify, export.", no_args_is_help=True)


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
    subject: Annotated[str | None, typer.Option("--subject", help="Only what has this in its subject.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1)] = 50,
    as_json: Json = False,
) -> None:
    """The newest events."""
    from sqlalchemy import select

    from registry.schema import AuditEvent

    query = select(AuditEvent).order_by(AuditEvent.seq.desc()).limit(limit)
    if subject is not None:
        query = query.where(AuditEvent.subject.contains(subject, autoescape=True))
    with opened() as registry, registry.database.read() as session:
        events = [{**json.loads(row.text), "hash": row.hash} for row in session.scalars(query)]
    output.events(events, as_json=as_json)


@audit_app.command("export")
def audit_export() -> None:
    """Every event as a JSON line, the oldest first."""
    from sqlalchemy import select

    from registry.schema import AuditEvent

    with opened() as registry, registry.database.read() as session:
        for row in session.scalars(select(AuditEvent).order_by(AuditEvent.seq).execution_options(yield_per=1000)):
            sys.stdout.write(json.dumps({**json.loads(row.text), "hash": row.hash}) + "\n")
