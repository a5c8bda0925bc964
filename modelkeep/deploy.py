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
from registry.errors import ModelkeepError
from registry.settings import Settings

POOL = "modelkeep"
_TIMEOUT_SECONDS = 300.0


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

    lines = [f"block {slug}" for slug in save_all(settings)]
    missing = []
    for wanted in declared(path):
        found = _find(settings, wanted)
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


def _find(settings: Settings, wanted: dict[str, Any]) -> dict[str, Any] | None:
    query = {"deployments": {"name": {"any_": [wanted["name"]]}}}
    answer = httpx.post(f"{settings.prefect.api_url}/deployments/filter", json=query, timeout=10.0)
    answer.raise_for_status()
    found = [row for row in answer.json() if row["entrypoint"] == wanted["entrypoint"]]
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
