"""`promote`, and the commands that show promotions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from modelkeep import output
from modelkeep.commands.common import Context, Json, Reason, Where, opened
from registry.errors import ModelkeepError, UsageError

promotions_app = typer.Typer(help="Promotions, and what each decided.", invoke_without_command=True)


def promote(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[str, typer.Argument(help="The version to promote.")],
    environment: Where = None,
    strategy: Annotated[str, typer.Option("--strategy", help="canary or blue-green.")] = "canary",
    force: Annotated[
        bool, typer.Option("--force", help="All of the traffic whatever the validation says. Needs --reason.")
    ] = False,
    reason: Reason = None,
    no_canary: Annotated[bool, typer.Option("--no-canary", help="The same as --strategy blue-green.")] = False,
    as_json: Json = False,
) -> None:
    """Validate a version and bring it up to all of the traffic, in judged stages."""
    from registry import promotions, versions

    if force and not reason:
        raise UsageError("--force needs --reason TEXT: it goes on record")
    strategy = "blue-green" if no_canary else strategy
    if strategy not in ("canary", "blue-green"):
        raise UsageError(f"--strategy {strategy!r}: this release knows canary and blue-green")
    with opened() as context:
        with context.database.read() as session:
            versions.get(session, name, version)  # a wrong name shall not wait for Prefect
        request = {
            "model": name,
            "version": version,
            "environment": environment,
            "strategy": strategy,
            "force": force,
            "reason": reason,
        }
        code, identity, message = _run_promotion(context, request)
        if identity is None:
            output.problem(message)
            raise typer.Exit(code)
        with context.database.read() as session:
            row = promotions.describe(promotions.get(session, identity))
            steps = promotions.story(session, identity)
    if as_json:
        output.document({**row, "story": steps})
    else:
        output.promotion(row, steps)
    raise typer.Exit(code)


def _run_promotion(context: Context, request: dict[str, Any]) -> tuple[int, str | None, str]:
    """(exit code, promotion, message) of a promote-model run in this process."""
    from modelkeep import prefect_env
    from registry import promotions

    prefect_env.use(context.settings)
    from flows.promote import PromoteModel, promote_model

    state = promote_model(PromoteModel(**request), return_state=True)
    run = str(state.state_details.flow_run_id) if state.state_details.flow_run_id else None
    with context.database.read() as session:
        row = promotions.of_run(session, run) if run else None
        found = promotions.describe(row) if row is not None else None
    if state.name in ("Locked", "Fenced"):
        return 4, None, state.message or str(state.name)
    if state.name == "Refused":
        return 1, None, state.message or "refused"
    if state.name == "Promoted":
        return 0, found["id"] if found else None, state.message or ""
    error = state.result(raise_on_failure=False) if state.is_failed() and state.name == "Failed" else None
    if isinstance(error, ModelkeepError) and found is None:
        raise error
    return 1, found["id"] if found else None, state.message or str(error)


@promotions_app.callback()
def promotions_list(context: typer.Context, as_json: Json = False) -> None:
    """List promotions, the newest first."""
    if context.invoked_subcommand is None:
        _list_promotions(as_json)


@promotions_app.command("list")
def promotions_list_command(as_json: Json = False) -> None:
    """List promotions, the newest first."""
    _list_promotions(as_json)


def _list_promotions(as_json: bool) -> None:
    from registry import promotions

    with opened() as registry, registry.database.read() as session:
        output.promotions(promotions.listed(session), as_json=as_json)


@promotions_app.command("show")
def promotions_show(identity: Annotated[str, typer.Argument(metavar="ID")], as_json: Json = False) -> None:
    """What one promotion decided, step by step."""
    from registry import promotions

    with opened() as registry, registry.database.read() as session:
        row, steps = promotions.describe(promotions.get(session, identity)), promotions.story(session, identity)
    if as_json:
        output.document({**row, "story": steps})
    else:
        output.promotion(row, steps)
