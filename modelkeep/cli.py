"""The command line. It reads, or it starts the flow that does.

Prefect is imported only where a flow starts, and the registry (SQLAlchemy: a third of a second) only where a command needs it,
so that `serve` holds its socket soon.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelkeep import output
from modelkeep.config_command import config_app
from registry import clock, names
from registry.errors import ModelkeepError, UsageError
from registry.settings import Settings, load_settings

if TYPE_CHECKING:
    from registry.database import Database
    from registry.store import ArtifactStore

app = typer.Typer(
    name="modelkeep",
    help="Keeps the models of a GPU box promoted, served, watched, backed up and recoverable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(config_app, name="config", help="Settings: show, set, validate.")
audit_app = typer.Typer(help="The audit trail: list, verify, export.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")
models_app = typer.Typer(help="Models and their versions.", invoke_without_command=True)
app.add_typer(models_app, name="models")
promotions_app = typer.Typer(help="Promotions, and what each decided.", invoke_without_command=True)
app.add_typer(promotions_app, name="promotions")
database_app = typer.Typer(help="The registry's database.", no_args_is_help=True)
app.add_typer(database_app, name="db")

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output; logs go to standard error.")]
Where = Annotated[str | None, typer.Option("--environment", help="Default: the environment of the settings.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why; it goes on record.")]


@dataclass(frozen=True, slots=True)
class Context:
    settings: Settings
    database: Database
    artifacts: ArtifactStore


@contextmanager
def opened() -> Iterator[Context]:
    """Settings, and the registry at this release's schema."""
    from registry.connect import open_database
    from registry.store import open_store

    settings = load_settings()
    database = open_database(settings)
    database.prepare()
    try:
        yield Context(settings, database, open_store(settings.artifacts))
    finally:
        database.dispose()


@app.command()
def register(
    path: Annotated[Path, typer.Argument(help="An ONNX or TorchScript file, or a folder that holds one.")],
    name: Annotated[str, typer.Option("--name", help="Name of the model.")],
    version: Annotated[str | None, typer.Option("--version", help="Default: the next number.")] = None,
    golden: Annotated[
        Path | None, typer.Option("--golden", help="Golden cases (.npz): input.NAME, label, output.NAME.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="KEY=VALUE, as often as you like.")] = None,
    as_json: Json = False,
) -> None:
    """Inspect a model file, store it, and note it as a new version. Nothing in it is executed."""
    from registry import versions

    tags = dict(_pair(item) for item in tag or [])
    with opened() as context:
        result = versions.register(
            context.database,
            context.artifacts,
            path,
            name=name,
            version=version,
            golden=golden,
            tags=tags,
            max_bytes=context.settings.models.max_file_bytes,
        )
    if as_json:
        output.document(result.as_dict())
        return
    what = "registered" if result.created else "is registered already, with the same bytes: nothing to do"
    output.say(
        f"{result.model} {result.version} {what} ({result.format}, {output.size(result.size_bytes)}, {result.digest[:12]}…)"
    )
    if result.created:
        output.say(f"next: modelkeep promote {result.model} {result.version}")


@app.command()
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


@app.command()
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
            _known(session, name)
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


@app.command()
def status(as_json: Json = False) -> None:
    """What is served, by which version, and what is under way."""
    from registry import promotions, replicas
    from tasks import servers

    with opened() as context:
        environment = context.settings.environment
        with context.database.read() as session:
            routes, _ = replicas.desired(session, environment)
            rows = replicas.listed(session, environment)
            running = [
                p for p in promotions.listed(session, environment=environment) if p["state"] == promotions.RUNNING
            ]
        living = servers.alive(context.database, environment)
    yesterday = clock.text(clock.now() - dt.timedelta(days=1))  # who has been silent for longer is history
    document = {
        "environment": environment,
        "models": [
            {
                "model": route.model,
                "stable": route.stable,
                "candidate": route.candidate,
                "weight": route.weight,
                "shadow": route.shadow,
                "generation": route.generation,
            }
            for route in routes
        ],
        "servers": [
            {**{key: row[key] for key in ("id", "address", "generation", "reported_at")}, "answers": row["id"] in living,
             "errors": row["serving"].get("errors", {})}
            for row in rows
            if row["id"] in living or row["reported_at"] > yesterday
        ],
        "promotions_running": running,
    }  # fmt: skip
    if as_json:
        output.document(document)
    else:
        output.status(document)


@models_app.callback()
def models(context: typer.Context, as_json: Json = False) -> None:
    """List every version and where it stands."""
    from registry import versions

    if context.invoked_subcommand is None:
        with opened() as registry, registry.database.read() as session:
            output.versions(versions.listed(session), as_json=as_json)


@models_app.command("show")
def models_show(name: str, as_json: Json = False) -> None:
    """The versions of one model."""
    from registry import versions

    with opened() as registry, registry.database.read() as session:
        _known(session, name)
        output.versions(versions.listed(session, name), as_json=as_json)


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


@database_app.command("upgrade")
def database_upgrade() -> None:
    """Bring the registry to this release's schema; refuses a newer one."""
    from registry.connect import open_database

    settings = load_settings()
    database = open_database(settings)
    before = database.revision()
    database.prepare()
    output.say(f"the registry is at schema revision {database.revision()}" + ("" if before else " (new)"))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option("--host", help="Default: server.host of the settings.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Default: server.port of the settings.")] = None,
) -> None:
    """The inference server alone: a parent that holds the socket and a child that serves."""
    from serving.supervisor import Supervisor

    settings = load_settings()
    _log_to_stderr(settings.log_level)
    supervisor = Supervisor(
        settings, host=host or settings.server.host, port=settings.server.port if port is None else port
    )
    output.say(f"serving {settings.environment} at {supervisor.address}", to_stderr=True)
    raise typer.Exit(supervisor.run())


@app.command()
def up() -> None:
    """Prefect's server, a worker and the inference server, in this terminal. Ctrl-C ends all of them."""
    from modelkeep.up import run

    settings = load_settings()
    raise typer.Exit(run(settings))


@app.command()
def deploy() -> None:
    """Write the blocks and the deployments of prefect.yaml to a running Prefect server."""
    from modelkeep import prefect_env
    from modelkeep.deploy import deploy_all

    settings = load_settings()
    if not prefect_env.prefect_answers(settings):
        raise ModelkeepError(f"no Prefect server answers at {settings.prefect.api_url}: start one with `modelkeep up`")
    for line in deploy_all(settings):
        output.say(line)


@app.command()
def demo(
    keep: Annotated[Path | None, typer.Option("--home", help="Where to run it. Default: MODELKEEP_HOME.")] = None,
) -> None:
    """The main job on real data: train, promote, withdraw, roll back, kill; with a report."""
    from modelkeep.demo.story import run

    raise typer.Exit(run(keep or load_settings().home))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check what modelkeep needs on this machine."""
    from modelkeep.doctor import examine

    findings = examine(load_settings())
    if as_json:
        output.document([finding.as_dict() for finding in findings])
    else:
        output.findings(findings)
    raise typer.Exit(1 if any(finding.level == "error" for finding in findings) else 0)


def _known(session: Any, name: str) -> None:
    """Raise NotFoundError for a model that does not exist."""
    from registry import versions

    names.check_model_name(name)
    if not versions.listed(session, name, limit=1):
        versions.get(session, name, "")


def _pair(text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark or not key:
        raise UsageError(f"--tag {text!r}: KEY=VALUE is needed")
    return key, value


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0 done, 1 failed or refused, 2 bad usage, 3 partly done, 4 locked."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="modelkeep", standalone_mode=False)
    except ModelkeepError as error:
        output.problem(str(error))
        return error.exit_code
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        output.problem("interrupted")
        return 130
    except Exception as error:
        usage = output.usage_error(error)
        if usage is None:
            raise
        return usage
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
