"""`modelkeep up`: three programs in one terminal; what dies comes back, the deployments work, one Ctrl-C ends it all."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from registry.errors import UnavailableError
from tasks import prefect_api
from tests.e2e.harness import build, free_port
from tests.prefect_server import ask


def until(what: str, test: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, UnavailableError):
            if found := test():
                return found
        time.sleep(0.2)
    raise AssertionError(f"{what} did not happen within {seconds:g} s")


class Up:
    """A running `modelkeep up` with its own home and ports."""

    def __init__(self, home: Path, port: int, prefect_port: int, **more: str) -> None:
        self.home, self.port = home, port
        self.api = f"http://127.0.0.1:{prefect_port}/api"
        self.ui = f"http://127.0.0.1:{prefect_port}"
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("MODELKEEP_", "PREFECT_"))},
            "MODELKEEP_HOME": str(home),
            "MODELKEEP_SERVER__PORT": str(port),
            "MODELKEEP_PREFECT__PORT": str(prefect_port),
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            **more,
        }
        self.log = home / "up.log"
        home.mkdir()
        self.start()

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "modelkeep", "up"],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def end(self) -> None:
        """Ctrl-C; what does not end by it is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                for process in psutil.Process(self.process.pid).children(recursive=True):
                    process.kill()
                self.process.kill()

    def says(self, text: str) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return text in self.log.read_text()

    def modelkeep(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "modelkeep", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return prefect_api.post(self.api, path, body)

    def get(self, path: str) -> Any:
        return ask("GET", f"{self.api}{path}")

    def deployment(self, name: str) -> dict[str, Any]:
        return next(d for d in self.post("/deployments/filter", {}) if d["name"] == name)

    def child(self, *words: str) -> psutil.Process:
        """The process under us whose command line has all these words."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if all(word in " ".join(process.cmdline()) for word in words):
                    return process
        raise AssertionError(f"no process of ours has {words} in its command line")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    running = Up(tmp_path_factory.mktemp("up") / "home", free_port(), free_port())
    try:
        until("the start of everything", lambda: running.says("ready: inference"), 180)
        yield running
    finally:
        running.end()


def test_a_scheduled_deployment_gets_runs_in_state_scheduled(up: Up) -> None:
    identity = up.deployment("validate-models")["id"]
    query = {"flow_runs": {"deployment_id": {"any_": [identity]}, "state": {"type": {"any_": ["SCHEDULED"]}}}}
    runs = until("the scheduling", lambda: up.post("/flow_runs/filter", query), 60)
    assert all(run["expected_start_time"][11:16] == "04:00" for run in runs)


def test_the_form_of_promote_model_says_what_each_field_is(
    up: Up, program: Callable[[str], Path], tmp_path: Path
) -> None:
    chromium = program("chromium")
    page = f"{up.ui}/deployments/deployment/{up.deployment('promote-model')['id']}/run"
    done = subprocess.run(
        [
            str(chromium), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=30000", "--dump-dom", page,
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    for text in ("Which version goes up, and how.", "The version to promote.", "Why; it goes on record."):
        assert text in done.stdout


def test_a_run_that_an_api_call_starts_promotes_and_its_actor_is_the_form(up: Up, tmp_path: Path) -> None:
    up.modelkeep("register", str(build(tmp_path / "first.onnx")), "--name", "sums")
    identity = up.deployment("promote-model")["id"]
    run = up.post(
        f"/deployments/{identity}/create_flow_run", {"parameters": {"request": {"model": "sums", "version": "1"}}}
    )

    def ended() -> str | None:
        state = up.get(f"/flow_runs/{run['id']}")["state"]
        return state["name"] if state["type"] in ("COMPLETED", "FAILED", "CRASHED") else None

    assert until("the end of the run", ended, 90) == "Promoted"
    artifacts = up.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    assert "there is nothing to compare it with" in artifacts[0]["data"]
    assert '"actor": "prefect-ui"' in up.modelkeep("promotions", "list", "--json")
    ready = httpx.get(f"{up.url}/v2/models/sums/versions/1/ready", timeout=10)
    assert ready.status_code == 200


@pytest.mark.parametrize(
    ("words", "back"),
    [
        (("serving.child",), "/v2/health/ready"),
        (("modelkeep", "serve"), "/v2/health/ready"),
        (("prefect", "worker"), None),
    ],
    ids=["inference child", "inference supervisor", "worker"],
)
def test_what_is_killed_comes_back(up: Up, words: tuple[str, ...], back: str | None) -> None:
    before = up.child(*words)
    before.kill()
    until("the end of it", lambda: not before.is_running(), 10)

    def there() -> bool:
        with contextlib.suppress(AssertionError):
            again = up.child(*words).pid != before.pid
            return again and (back is None or httpx.get(f"{up.url}{back}", timeout=2).status_code == 200)
        return False

    until("its next start", there, 60)


def test_a_second_one_is_told_who_has_the_port(up: Up) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modelkeep", "up"], env=up.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{up.port}" in done.stderr
    assert "has it" in done.stderr


def test_one_interrupt_ends_all_of_it(up: Up) -> None:
    family = psutil.Process(up.process.pid).children(recursive=True)
    assert len(family) >= 4
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{up.url}/health", timeout=2)
