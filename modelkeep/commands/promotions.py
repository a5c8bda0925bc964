"""`promote`, and the commands that show promotions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from modelkeep import output
from modelkeep.commands.common import Context, Json, Reason, Where, known, opened
from registry.errors import ModelkeepError, UsageError

Identity = Annotated[str, typer.Argument(metavar="ID", help="As in `modelkeep promotions`.")]
OfModel = Annotated[str | None, typer.Option("--model", help="Of this model only.")]
InState = Annotated[
    str | None,
    typer.Option(
        "--state",
        help="active, or one of running, awaiting, soaking, promoted, shadowed, rejected, withdrawn, held, failed.",
    ),
]

STRATEGIES = ("canary", "blue-green", "shadow", "replay")

promotions_app = typer.Typer(help="Promotions, and what each decided.", invoke_without_command=True)


def promote(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[str, typer.Argument(help="The version to promote.")],
    environment: Where = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="canary, blue-green, shadow (copies only) or replay (captured requests or golden inputs).",
        ),
    ] = "canary",
    force: Annotated[
        bool, typer.Option("--force", help="All of the traffic whatever the validation says. Needs --reason.")
    ] = False,
    reason: Reason = None,
    approval: Annotated[
        bool,
        typer.Option("--approval", help="Ask a person before it takes any traffic, also where the policy does not."),
    ] = False,
    no_canary: Annotated[bool, typer.Option("--no-canary", help="The same as --strategy blue-green.")] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the policy for this promotion; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Validate a version and bring it up to all of the traffic, in judged stages."""
    from registry import policy, promotions, versions

    if force and not reason:
        raise UsageError("--force needs --reason TEXT: it goes on record")
    if no_canary and strategy not in ("canary", "blue-green"):
        raise UsageError(f"--no-canary is --strategy blue-green, and {strategy} is asked for: leave one of them out")
    strategy = "blue-green" if no_canary else strategy
    if strategy not in STRATEGIES:
        raise UsageError(f"--strategy {strategy!r}: this release knows {', '.join(STRATEGIES)}")
    if force and strategy == "shadow":
        raise UsageError("--force gives it all of the traffic, --strategy shadow none: leave one of them out")
    with opened() as context:
        changed = policy.parsed(changes or [])
        policy.resolve(context.settings, name, changed)  # a wrong value shall not wait for Prefect
        with context.database.read() as session:
            versions.get(session, name, version)  # a wrong name shall not wait for Prefect
        request = {
            "model": name,
            "version": version,
            "environment": environment,
            "strategy": strategy,
            "force": force,
            "reason": reason,
            "approval": approval,
            "changes": changed,
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
    if state.name in ("Promoted", "Shadowed"):
        return 0, found["id"] if found else None, state.message or ""
    error = state.result(raise_on_failure=False) if state.is_failed() and state.name == "Failed" else None
    if isinstance(error, ModelkeepError) and found is None:
        raise error
    return 1, found["id"] if found else None, state.message or str(error)


@promotions_app.callback()
def promotions_list(
    context: typer.Context, model: OfModel = None, state: InState = None, as_json: Json = False
) -> None:
    """List promotions, the newest first."""
    if context.invoked_subcommand is None:
        _list_promotions(model, state, as_json)


@promotions_app.command("list")
def promotions_list_command(model: OfModel = None, state: InState = None, as_json: Json = False) -> None:
    """List promotions, the newest first."""
    _list_promotions(model, state, as_json)


def _list_promotions(model: str | None, state: str | None, as_json: bool) -> None:
    from registry import stories

    known_states = {"active": stories.ACTIVE, **{name: (name,) for name in (*stories.ACTIVE, *stories.ENDED)}}
    if state is not None and state not in known_states:
        raise UsageError(f"--state {state!r}: one of {', '.join(known_states)} is")
    with opened() as registry, registry.database.read() as session:
        if model is not None:
            known(session, model)
        rows = stories.listed(session, model=model, states=known_states[state] if state else ())
        output.promotions(rows, as_json=as_json)


@promotions_app.command("show")
def promotions_show(identity: Identity, as_json: Json = False) -> None:
    """What one promotion decided, step by step, on which evidence, and what it waits for."""
    from registry import accounts
    from tasks import approval

    with opened() as registry, registry.database.read() as session:
        found = accounts.of(session, identity)
    if as_json:
        output.document(found)
        return
    output.promotion(found, found["story"])
    if found["approval"] is not None and found["state"] == "awaiting":
        output.account({**found, "waits_for": None})
        output.say(approval.in_words(found["approval"]))
    else:
        output.account(found)


@promotions_app.command("pause")
def promotions_pause(identity: Identity, reason: Reason = None, as_json: Json = False) -> None:
    """Stay at this stage: shares and time stand still, and a bad version is still taken back."""
    with opened() as context:
        _tell(context, identity, "pause", reason, as_json)


@promotions_app.command("resume")
def promotions_resume(identity: Identity, reason: Reason = None, as_json: Json = False) -> None:
    """Go on after a pause; or, here in this process, with a promotion that is approved and that nobody went on with."""
    from modelkeep.commands.approve import carry_on

    with opened() as context:
        request = carry_on(context, identity)
        if request is None:
            _tell(context, identity, "resume", reason, as_json)
            return
        code, found, message = _run_promotion(context, request)
        _show_ended(context, code, found, message, as_json)
    raise typer.Exit(code)


@promotions_app.command("advance")
def promotions_advance(identity: Identity, reason: Reason = None, as_json: Json = False) -> None:
    """Pass the present stage now, unless the evidence says that the version is bad."""
    with opened() as context:
        _tell(context, identity, "advance", reason, as_json)


@promotions_app.command("stop")
def promotions_stop(identity: Identity, reason: Reason = None, as_json: Json = False) -> None:
    """End it at once: the candidate is taken out; in the soak the promoted version stays and is no longer watched."""
    with opened() as context:
        _tell(context, identity, "stop", reason, as_json)


def _tell(context: Context, identity: str, command: str, reason: str | None, as_json: bool) -> None:
    from registry import commands, keys
    from tasks import servers

    who = keys.of_command(context.database, context.settings)
    told = commands.give(context.database, identity, command=command, who=who, reason=reason or "")
    if told["taken"]:
        living = servers.alive(context.database, told["environment"], timeout_seconds=1.0)
        servers.nudge(list(living.values()))
    if as_json:
        output.document(told)
    else:
        output.say(f"promotion {told['promotion']}, {told['command']}: {told['message']}")


def _show_ended(context: Context, code: int, identity: str | None, message: str, as_json: bool) -> None:
    from registry import accounts

    if identity is None:
        output.problem(message)
        raise typer.Exit(code)
    with context.database.read() as session:
        found = accounts.of(session, identity)
    if as_json:
        output.document(found)
    else:
        output.promotion(found, found["story"])
