"""`recover`. It runs where it is started, without Prefect and without the registry: on the worst night there may be neither."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from modelkeep import output
from modelkeep.commands.common import Json, Local, moment
from registry.errors import UsageError
from registry.redaction import redact

if TYPE_CHECKING:
    from tasks.backup.recover import Outcome, Plan


def recover(
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="A manifest (path or URL), a backup's id, or a location: then its newest verified backup."
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            help="The newest verified backup before this time ('2d ago', 2026-03-10T03:12Z), then the shipped logs up to it.",
        ),
    ] = None,
    components: Annotated[
        list[str] | None,
        typer.Option(
            "--components",
            help="registry, database:app, database:app.TABLE, models:NAME@VERSION, vectors:COLLECTION, files:FOLDER; default: all.",
        ),
    ] = None,
    into: Annotated[
        str | None, typer.Option("--into", help="A folder or URL beside what is live, to look at old data.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and change nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is there, after it was backed up and that copy verified.")
    ] = False,
    local: Local = False,
    as_json: Json = False,
) -> None:
    """Bring a backup back: everything, or a table, a model's version, a collection, a folder."""
    if source is None and at is None:
        raise UsageError(
            "which backup? --from MANIFEST_OR_URL, or --at TIME for the newest verified one before (modelkeep backups list)"
        )
    from tasks.backup import recovery

    request = recovery.Request(source, moment(at, local=local), tuple(components or ()), into, force)
    prepared = recovery.prepare(recovery.settings_here(), request)
    if dry_run:
        if as_json:
            output.document({"dry_run": True, **prepared.plan.as_dict()})
        else:
            _show_plan(prepared.plan)
        raise typer.Exit(1 if prepared.plan.problems else 0)
    if not as_json:
        _show_plan(prepared.plan)
    if prepared.plan.problems:
        if as_json:
            output.document({"state": "refused", **prepared.plan.as_dict()})
        else:
            output.problem("nothing was restored")
        raise typer.Exit(1)
    outcome = recovery.carry_out(prepared, request, say=lambda text: output.say(redact(text), to_stderr=True))
    if as_json:
        output.document(outcome.as_dict())
    else:
        _show_outcome(outcome)
    raise typer.Exit(0 if outcome.state == "recovered" else 3 if outcome.restored else 1)


def _show_plan(plan: Plan) -> None:
    output.say(
        f"backup {plan.manifest.backup_id}, {plan.standing.state}; what was written after {plan.lost_since} is not in it"
    )
    output.table(
        ["component", "to", "size", "what is there"],
        [
            [
                step.chosen.text, step.shown, output.size(step.component.size_bytes),
                textwrap.shorten("done by the run that was cut off" if step.done else step.occupied or "nothing", 60, placeholder=" …"),
            ]
            for step in plan.steps
        ],
        empty="nothing of it comes back",
    )  # fmt: skip
    for text in plan.remarks:
        output.say(text)
    for text in plan.problems:
        output.problem(text)


def _show_outcome(outcome: Outcome) -> None:
    from tasks.backup.remains import notes

    for name, why in outcome.failed.items():
        output.problem(f"{name}: {why}")
    if outcome.safety_copy is not None:
        output.say(f"what was there before is backup {outcome.safety_copy}")
    for text in notes(outcome.restored):
        output.say(f"see to it: {text}")
    done = ", ".join(outcome.restored) or "nothing"
    output.say(f"{outcome.state}: {done}, from backup {outcome.plan.manifest.backup_id}")
    if outcome.failed:
        output.say("the same command again goes on with what is left")
