"""What runs, and what looks after it: status, serve, up, deploy, demo, doctor."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Annotated

import typer

from modelkeep import output
from modelkeep.commands.common import Json, log_to_stderr, opened
from registry import clock
from registry.errors import ModelkeepError
from registry.settings import load_settings


def status(as_json: Json = False) -> None:
    """What is served, by which version, and what is under way."""
    from registry import promotions, replicas
    from tasks import servers
    from tasks.backup import ledger

    with opened() as context:
        environment = context.settings.environment
        with context.database.read() as session:
            routes, _ = replicas.desired(session, environment)
            pulse = replicas.pulse(session, environment)
            rows = replicas.listed(session, environment)
            running = [
                p for p in promotions.listed(session, environment=environment) if p["state"] in promotions.ACTIVE
            ]
        living = servers.alive(context.database, environment)
    yesterday = clock.text(clock.now() - dt.timedelta(days=1))  # who has been silent for longer is history
    document = {
        "environment": environment,
        "generation": pulse.generation if pulse else 0,
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
        "backups": ledger.summary(context.settings.home, context.settings.backup.logs),
    }  # fmt: skip
    if as_json:
        output.document(document)
    else:
        output.status(document)


def serve(
    host: Annotated[str | None, typer.Option("--host", help="Default: server.host of the settings.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Default: server.port of the settings.")] = None,
) -> None:
    """The inference server alone: a parent that holds the socket and a child that serves."""
    from modelkeep.side import Side, watchman
    from serving.supervisor import Supervisor

    settings = load_settings()
    log_to_stderr(settings.log_level)
    supervisor = Supervisor(
        settings, host=host or settings.server.host, port=settings.server.port if port is None else port
    )
    output.say(f"serving {settings.environment} at {supervisor.address}", to_stderr=True)
    side = Side(watchman())
    try:
        code = supervisor.run()
    finally:
        side.stop()
    raise typer.Exit(code)


def up() -> None:
    """Prefect's server, a worker and the inference server, in this terminal. Ctrl-C ends all of them."""
    from modelkeep.up import run

    settings = load_settings()
    raise typer.Exit(run(settings))


def deploy() -> None:
    """Write the blocks and the deployments of prefect.yaml to a running Prefect server."""
    from modelkeep import prefect_env
    from modelkeep.deploy import deploy_all

    settings = load_settings()
    if not prefect_env.prefect_answers(settings):
        raise ModelkeepError(f"no Prefect server answers at {settings.prefect.api_url}: start one with `modelkeep up`")
    for line in deploy_all(settings):
        output.say(line)


def demo(
    keep: Annotated[Path | None, typer.Option("--home", help="Where to run it. Default: MODELKEEP_HOME.")] = None,
) -> None:
    """The main job on real data: train, promote, withdraw, roll back, kill; with a report."""
    from modelkeep.demo.story import run

    raise typer.Exit(run(keep or load_settings().home))


def doctor(as_json: Json = False) -> None:
    """Check what modelkeep needs on this machine."""
    from modelkeep.doctor import examine

    findings = examine(load_settings())
    if as_json:
        output.document([finding.as_dict() for finding in findings])
    else:
        output.findings(findings)
    raise typer.Exit(1 if any(finding.level == "error" for finding in findings) else 0)
