"""`modelkeep up` whose worker, Prefect server or whole family is killed in the middle of a promotion: the record and Prefect agree in the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from registry import audit, commands, leases, promotions
from registry.actor import Who
from registry.database import Database
from tests.e2e.harness import build, free_port
from tests.e2e.test_up import Up, until

SECONDS = 90.0
MODEL = "sums"
SETTINGS = {
    "MODELKEEP_LEASE_SECONDS": "4",
    "MODELKEEP_POLL_SECONDS": "0.2",
    "MODELKEEP_PROMOTION__BASELINE_SECONDS": "0.2",
    "MODELKEEP_PROMOTION__SHADOW_SECONDS": "0.2",
    "MODELKEEP_PROMOTION__SHADOW_REQUESTS": "0",
    "MODELKEEP_PROMOTION__SHADOW_GATE": "false",
    "MODELKEEP_PROMOTION__SOAK_SECONDS": "0",
    "MODELKEEP_PROMOTION__DEADLINE_SECONDS": "600",
    "MODELKEEP_PROMOTION__LATENCY_RATIO": "100",
    "MODELKEEP_PROMOTION__MEMORY_RATIO": "100",
}
"""Nobody asks the model, so a promotion stands in its stage until a person says that it may pass."""


class Mortal(Up):
    """One whose processes are killed, with the registry at hand."""

    def __init__(self, home: Path) -> None:
        self.prefect_port = free_port()
        super().__init__(home, free_port(), self.prefect_port, **SETTINGS)
        self.registry = Database(f"sqlite:///{home / 'registry.db'}", anchors=home / "audit.anchors")

    def wait(self) -> None:
        until("the start of everything", lambda: self.says("ready: inference"), 180)

    def add(self, version: str) -> None:
        path = build(self.home / f"v{version}.onnx", seed=int(version))
        self.modelkeep("register", str(path), "--name", MODEL, "--version", version)

    def promote(self, version: str, **request: Any) -> str:
        """The id of a run that the API starts."""
        identity = self.deployment("promote-model")["id"]
        body = {"parameters": {"request": {"model": MODEL, "version": version, **request}}}
        return str(self.post(f"/deployments/{identity}/create_flow_run", body)["id"])

    def in_traffic(self, version: str) -> str:
        """The same, once its version takes traffic."""
        run = self.promote(version, strategy="blue-green")
        until("its stage", lambda: self.record(run).get("step") == "canary", SECONDS)
        return run

    def record(self, run: str) -> dict[str, Any]:
        with self.registry.read() as session:
            row = promotions.of_run(session, run)
            if row is None:
                return {}
            last = promotions.story(session, row.id)[-1:]
            return {"id": row.id, "state": row.state, "step": row.step, "last": [step["detail"] for step in last]}

    def let_pass(self, run: str) -> None:
        commands.give(
            self.registry, self.record(run)["id"], command="advance", who=Who("ada", via="command"), reason="go on"
        )

    def ended(self, run: str) -> tuple[str, str]:
        """(state on record, name of Prefect's state), once both are last ones."""

        def both() -> tuple[str, str] | None:
            state = self.get(f"/flow_runs/{run}")["state"]
            on_record = self.record(run)["state"]
            last = state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            return (on_record, state["name"]) if last and on_record not in promotions.ACTIVE else None

        found: tuple[str, str] = until("an end on record and in Prefect", both, SECONDS)
        return found

    def answers_by(self) -> str | None:
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0.0] * 64}
        answer = httpx.post(f"{self.url}/v2/models/{MODEL}/infer", json={"inputs": [tensor]}, timeout=10)
        return str(answer.json()["model_version"]) if answer.status_code == 200 else None

    def is_whole(self, stable: str) -> None:
        with self.registry.read() as session:
            assert leases.beats_everywhere(session) == {}
            assert promotions.listed(session, states=promotions.ACTIVE) == []
            assert audit.verify(session, self.registry.anchors).faults == []
        until("the stable version", lambda: self.answers_by() == stable, SECONDS)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortal]:
    running = Mortal(tmp_path_factory.mktemp("up") / "home")
    try:
        running.wait()
        running.add("1")
        first = running.promote("1")
        until("the record of the first", lambda: running.record(first), SECONDS)
        assert running.ended(first) == ("promoted", "Promoted")
        yield running
    finally:
        running.end()
        running.registry.dispose()


@pytest.mark.parametrize(
    ("version", "words"),
    [("2", ("prefect", "worker")), ("3", ("prefect", "server", "start"))],
    ids=["worker", "server"],
)
def test_a_promotion_outlives_prefects_worker_and_prefects_server(
    up: Mortal, version: str, words: tuple[str, ...]
) -> None:
    up.add(version)
    run = up.in_traffic(version)
    victim = up.child(*words)
    victim.kill()
    until("its next start", lambda: _next(up, victim, words), SECONDS)
    until("Prefect's answer", lambda: httpx.get(f"{up.api}/health", timeout=2).status_code == 200, SECONDS)
    up.let_pass(run)
    assert up.ended(run) == ("promoted", "Promoted"), (up.record(run), up.log.read_text()[-6000:])
    up.is_whole(version)


def _next(up: Mortal, victim: psutil.Process, words: tuple[str, ...]) -> bool:
    with contextlib.suppress(AssertionError):
        return up.child(*words).pid != victim.pid
    return False


def test_of_a_promotion_whose_whole_family_was_killed_nothing_is_left_and_prefect_says_so_too(up: Mortal) -> None:
    up.add("4")
    run = up.in_traffic("4")
    family = psutil.Process(up.process.pid).children(recursive=True)
    for process in (psutil.Process(up.process.pid), *family):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    up.process.wait(30)
    psutil.wait_procs(family, timeout=30)
    assert up.record(run)["state"] == "running", "nobody was left to end it"
    up.start()
    up.wait()
    assert up.ended(run) == ("withdrawn", "Crashed")
    up.is_whole("3")
