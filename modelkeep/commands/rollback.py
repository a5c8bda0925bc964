"""`rollback`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelkeep import output
from modelkeep.commands.common import Context, Json, Reason, Where, known, moment, opened
from registry.errors import ModelkeepError, UsageError
from registry.settings import load_settings

if TYPE_CHECKING:
    from tasks.rollback import RollbackResult

STRATEGIES = ("instant", "gradual", "emergency")


def rollback(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    to: Annotated[str | None, typer.Option("--to", help="Default: the stable version before this one.")] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="To the version that was stable then: a time, '2d ago'.")
    ] = None,
    environment: Where = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="instant; gradual: share by share; emergency: pre-empts whatever runs, without Prefect, and where it must without the registry.",
        ),
    ] = "instant",
    reason: Reason = None,
    points: Annotated[bool, typer.Option("--points", help="List what it can go back to, and change nothing.")] = False,
    release: Annotated[
        bool, typer.Option("--release", help="Take the servers' own holds of this model away, and change nothing else.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make an earlier version stable again, and check that the servers answer by it."""
    if strategy not in STRATEGIES:
        raise UsageError(f"--strategy {strategy!r}: there are {', '.join(STRATEGIES)}")
    if to is not None and at is not None:
        raise UsageError("--to and --at are both given: leave one of them out")
    when = moment(at)
    if points:
        _list(name, environment, as_json)
    elif release:
        _release(name, environment, reason or "released by hand", as_json)
    elif strategy == "emergency":
        from modelkeep import emergency

        _said(emergency.roll_back(load_settings(), environment, name, to, when, reason or "emergency"), as_json)
    else:
        _by_flow(name, to, when, environment, strategy, reason or "", as_json)


def _by_flow(
    name: str, to: str | None, when: Any, environment: str | None, strategy: str, reason: str, as_json: bool
) -> None:
    with opened() as context:
        to = _checked(context, name, to, when, environment)
        from modelkeep import prefect_env

        prefect_env.use(context.settings)
        from flows.rollback import RollbackModel, rollback_model

        request = RollbackModel(model=name, to=to, environment=environment, strategy=strategy, reason=reason)
        state = rollback_model(request, return_state=True)
    if state.name == "Failed":
        error = state.result(raise_on_failure=False)
        raise error if isinstance(error, BaseException) else ModelkeepError(state.message or "the rollback failed")
    if state.name in ("Refused", "Locked"):
        output.problem(state.message or str(state.name))
        raise typer.Exit(4 if state.name == "Locked" else 1)
    if as_json:
        found = getattr(state.data, "result", state.data)
        result: dict[str, Any] = found if isinstance(found, dict) else {}
        output.document({"model": name, "state": state.name, "message": state.message, **result})
    else:
        output.say(state.message or str(state.name))
    raise typer.Exit({"RolledBack": 0, "Behind": 3}.get(str(state.name), 1))


def _checked(context: Context, name: str, to: str | None, when: Any, environment: str | None) -> str | None:
    """The version to go back to, where one is asked for; what is wrong is said before Prefect starts."""
    from registry import history, versions

    with context.database.read() as session:
        known(session, name)
        if when is not None:
            return history.stable_at(session, environment or context.settings.environment, name, when)
        if to is not None:
            versions.get(session, name, to)
    return to


def _said(result: RollbackResult, as_json: bool) -> None:
    if as_json:
        output.document(result.as_dict())
    else:
        output.say(result.summary())
        for replica in result.followed:
            how = "holds it by itself" if replica in result.held else "follows the registry"
            output.say(f"  {replica}: answers by {result.to_version} after {result.seconds[replica]:.2f} s, {how}")
        for replica, why in result.behind.items():
            output.say(f"  {replica}: {why}")
    nobody = result.registry is not None and not result.followed
    raise typer.Exit(0 if result.complete and not nobody else 1 if nobody else 3)


def _list(name: str, environment: str | None, as_json: bool) -> None:
    from registry import points

    with opened() as context, context.database.read() as session:
        known(session, name)
        rows = points.listed(session, environment or context.settings.environment, name)
    if as_json:
        output.document(rows)
        return
    output.table(
        ["point", "version", "since", "by", "kind", "artifact", "why"],
        [
            [
                row["id"], row["version"], row["created_at"][:19], row["route"].get("actor"), row["route"].get("kind"),
                str(row["digests"].get("artifact", ""))[:12], row["route"].get("reason"),
            ]
            for row in rows
        ],
        empty=f"{name} has no rollback point yet: there is one from each promotion on",
    )  # fmt: skip


def _release(name: str, environment: str | None, reason: str, as_json: bool) -> None:
    from modelkeep import emergency

    began = time.monotonic()
    found = emergency.release(load_settings(), environment, name, reason)
    if as_json:
        output.document({"model": name, "servers": found, "seconds": round(time.monotonic() - began, 3)})
    else:
        for address, what in found.items():
            output.say(f"{address}: {what}")
    done = sum(what == "released" for what in found.values())
    raise typer.Exit(0 if done == len(found) and found else 3 if done else 1)
