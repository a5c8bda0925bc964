"""`rollback`."""

from __future__ import annotations

from typing import Annotated

import typer

from modelkeep import output
from modelkeep.commands.common import Json, Reason, Where, known, opened
from registry.errors import ModelkeepError, UsageError


def rollback(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    to: Annotated[str | None, typer.Option("--to", help="Default: the stable version before this one.")] = None,
    environment: Where = None,
    strategy: Annotated[
        str, typer.Option("--strategy", help="instant, or emergency: pre-empts whatever runs, without Prefect.")
    ] = "instant",
    reason: Reason = None,
    as_json: Json = False,
) -> None:
    """Make an earlier version stable again, and check that the servers answer by it."""
    if strategy not in ("instant", "emergency"):
        raise UsageError(f"--strategy {strategy!r}: this release knows instant and emergency")
    with opened() as context:
        where = environment or context.settings.environment
        if strategy == "emergency":
            from tasks import rollback as steps

            result = steps.change(
                context.database, environment=where, model=name, to=to, reason=reason or "emergency",
                ttl_seconds=context.settings.lease_seconds, emergency=True,
            )  # fmt: skip
            outcome = steps.follow(context.database, result)
            if as_json:
                output.document(outcome.as_dict())
            else:
                output.say(outcome.summary())
            raise typer.Exit(0 if outcome.complete else 3)
        with context.database.read() as session:
            known(session, name)
        from modelkeep import prefect_env

        prefect_env.use(context.settings)
        from flows.rollback import RollbackModel, rollback_model

        request = RollbackModel(model=name, to=to, environment=environment, reason=reason or "")
        state = rollback_model(request, return_state=True)
    if state.name == "Failed":
        error = state.result(raise_on_failure=False)
        raise error if isinstance(error, BaseException) else ModelkeepError(state.message or "the rollback failed")
    if state.name in ("Refused", "Locked"):
        output.problem(state.message or str(state.name))
        raise typer.Exit(4 if state.name == "Locked" else 1)
    if as_json:
        output.document({"model": name, "state": state.name, "message": state.message})
    else:
        output.say(state.message or str(state.name))
    raise typer.Exit({"RolledBack": 0, "Behind": 3}.get(str(state.name), 1))
