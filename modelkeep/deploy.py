"""Write work pool, blocks and deployments to a Prefect server, and look whether they are there: Prefect skips what it does not like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import yaml

from modelkeep import prefect_env
from registry import clock, promotions
from registry.database import Database
from registry.errors import ModelkeepError, UnavailableError
from registry.settings import Settings
from tasks import prefect_api

POOL = "modelkeep"
_TIMEOUT_SECONDS = 300.0
_SETTLE_AFTER_SECONDS = 30.0
"""A flow that has just ended its promotion needs a moment to tell Prefect itself."""


def prefect_file() -> Path:
    """prefect.yaml of this checkout. Raises ModelkeepError where modelkeep was installed without it."""
    path = Path(__file__).resolve().parent.parent / "prefect.yaml"
    if not path.is_file():
        raise ModelkeepError(
            f"{path} is missing: run modelkeep from its checkout (pip install -e), or put the file there"
        )
    return path


def declared(path: Path) -> list[dict[str, Any]]:
    """The deployments that prefect.yaml declares."""
    with path.open() as source:
        return list(yaml.safe_load(source)["deployments"])


def deploy_all(settings: Settings) -> list[str]:
    """Make the server match. Returns a line for each thing that was written. Raises ModelkeepError for whatever is not there afterwards."""
    environment = {**os.environ, **prefect_env.environment(settings, api=True)}
    path = prefect_file()
    _prefect(["work-pool", "create", POOL, "--type", "process", "--overwrite"], environment)
    printed = _prefect(["--no-prompt", "deploy", "--all", "--prefect-file", str(path)], environment)
    os.environ.update(prefect_env.environment(settings, api=True))
    from blocks.connections import save_all

    try:
        lines = [f"block {slug}" for slug in save_all(settings)]
        there = [(wanted, _find(settings, wanted)) for wanted in declared(path)]
    except httpx.HTTPError as error:  # Prefect's own client raises these too
        raise UnavailableError(f"Prefect at {settings.prefect.api_url} does not answer: {error}") from error
    missing = []
    for wanted, found in there:
        crons = sorted(s["schedule"].get("cron", "") for s in found["schedules"]) if found else []
        if found is None or crons != sorted(s["cron"] for s in wanted["schedules"]):
            missing.append(
                f"{wanted['name']} (wanted schedules {[s['cron'] for s in wanted['schedules']]}, found {crons})"
            )
        else:
            lines.append(f"deployment {found['name']}" + (f" at {', '.join(crons)}" if crons else ""))
    if missing:
        raise ModelkeepError(f"Prefect did not take these deployments: {'; '.join(missing)}. It printed:\n{printed}")
    return lines


def settle_runs(settings: Settings, database: Database) -> list[str]:
    """Tell Prefect of promotions that ended without their flow (killed): its run would stay Running for ever.

    Returns a line for each run that was settled. Raises UnavailableError where Prefect does not answer.
    """
    lines = []
    api_url = settings.prefect.api_url
    query = {
        "flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}},
        "flows": {"name": {"any_": ["promote-model"]}},
    }
    for run in prefect_api.post(api_url, "/flow_runs/filter", query):
        with database.read() as session:
            row = promotions.of_run(session, run["id"])
            if row is None or row.state in promotions.ACTIVE or row.finished_at is None:
                continue
            if (clock.now() - row.finished_at).total_seconds() < _SETTLE_AFTER_SECONDS:
                continue
            message = f"{row.reason}: the flow was gone, and the promotion was {row.state} without it"
        state = {"type": "CRASHED", "name": "Crashed", "message": message}
        prefect_api.post(api_url, f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
        lines.append(f"run {run['name']}: {message}")
    return lines


def _find(settings: Settings, wanted: dict[str, Any]) -> dict[str, Any] | None:
    query = {"deployments": {"name": {"any_": [wanted["name"]]}}}
    rows = prefect_api.post(settings.prefect.api_url, "/deployments/filter", query)
    found = [row for row in rows if row["entrypoint"] == wanted["entrypoint"]]
    return found[0] if found else None


def _prefect(arguments: list[str], environment: dict[str, str]) -> str:
    """Run Prefect's own command line. Raises ModelkeepError with what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        env=environment,
        cwd=prefect_file().parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise ModelkeepError(f"`prefect {' '.join(arguments)}` ended with {done.returncode}:\n{done.stdout}")
    return done.stdout
