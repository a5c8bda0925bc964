"""A private Prefect server for tests: a real process with its own database on a free port; its scheduler looks every second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.harness import free_port

START_SECONDS = 120.0
BUSY_SECONDS = 30.0


def environment(folder: Path, url: str) -> dict[str, str]:
    """What a process needs to talk to that server, and to nothing that the person who runs the tests has."""
    return {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


@contextmanager
def prefect_server(folder: Path) -> Iterator[str]:
    """The address of its API."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    values = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MODELKEEP_"))},
        **environment(folder, url),
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
        "PREFECT_SERVER_SERVICES_SCHEDULER_DEPLOYMENT_BATCH_SIZE": "100",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "prefect.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=values, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            assert process.poll() is None, (folder / "prefect.log").read_text()
            assert time.monotonic() < deadline, f"no answer within {START_SECONDS:g} s"
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)


def ask(method: str, url: str, body: Any = None) -> Any:
    """What Prefect's API answers. On a busy machine its SQLite is locked for a moment: that is a 503, and nothing was done."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        answer = httpx.request(method, url, json=body, timeout=10)
        if answer.status_code != 503 or time.monotonic() > deadline:
            return answer.raise_for_status().json() if answer.content else None
        time.sleep(0.2)


def newest_page(api: str, key: str) -> str:
    """The newest artifact of a key, as the UI would show it."""
    query = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC", "limit": 1}
    (found,) = ask("POST", f"{api}/artifacts/filter", query)
    return str(found["data"])


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
