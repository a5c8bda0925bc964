"""Approvals, each end to end: asked for by runs of a worker, answered after SIGKILL and restart of every process of `modelkeep up`."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import select

from registry import approvals, audit, promotions, versions
from registry.database import Database
from registry.schema import AuditEvent, Version
from registry.store import DirectoryStore
from tests.e2e.harness import build, free_port
from tests.e2e.test_up import Up, until

SUSPENSION_SECONDS = 240
END_SECONDS = 120
FOUR_EYES = ("twice", "refused")


class Waiting:
    """Models whose first version waits for an approval in a suspended run, with everything restarted since it was asked."""

    def __init__(self, home: Path) -> None:
        self.ports = free_port(), free_port()
        self.home = home
        self.up = Up(home, *self.ports)
        self.runs: dict[str, str] = {}
        self.database = Database(f"sqlite:///{home / 'registry.db'}", anchors=home / "audit.anchors")

    def ask(self, folder: Path, models: tuple[str, ...]) -> None:
        until("the start of everything", lambda: self.up.says("ready: inference"), 180)
        deployment = until("the deployment", lambda: self.up.deployment("promote-model"), 30)["id"]
        for number, model in enumerate(models):
            path = build(folder / f"{model}.onnx", seed=number)
            store = DirectoryStore(self.home / "artifacts")
            versions.register(self.database, store, path, name=model, version="1", max_bytes=1 << 26)
            request: dict[str, Any] = {"model": model, "version": "1"}
            request |= {"policy": {"four_eyes": True}} if model in FOUR_EYES else {"approval": True}
            body = {"parameters": {"request": request}, "idempotency_key": model}
            run = self.post(f"/deployments/{deployment}/create_flow_run", body)
            self.runs[model] = run["id"]
        for model in models:
            until(f"the suspension of {model}", lambda model=model: self.suspended(model), SUSPENSION_SECONDS)

    def restart(self) -> None:
        """SIGKILL for every process there is, and all of it again."""
        family = [self.up.process, *psutil.Process(self.up.process.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.up.process.wait(20)
        psutil.wait_procs(family[1:], timeout=20)
        (self.home / "up.log").rename(self.home / "up-before.log")
        with self.up.log.open("wb") as log:
            self.up.process = subprocess.Popen(
                [sys.executable, "-m", "modelkeep", "up"],
                env=self.up.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until("the start of everything again", lambda: self.up.says("ready: inference"), 180)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """An answer of Prefect's; on a busy machine its SQLite is locked for a moment, which is a 503."""
        return until(f"an answer to {path}", lambda: self.up.post(path, body), 30)

    def run(self, model: str) -> dict[str, Any]:
        return dict(until("an answer", lambda: self.up.get(f"/flow_runs/{self.runs[model]}"), 30))

    def suspended(self, model: str) -> bool:
        state = self.run(model)["state"]
        assert state["type"] not in ("COMPLETED", "FAILED", "CRASHED"), (state, self.up.log.read_text())
        return bool(state["type"] == "PAUSED")

    def ends(self, model: str) -> str:
        """The name of the state that its run ends in."""

        def ended() -> str | None:
            state = self.run(model)["state"]
            return str(state["name"]) if state["type"] in ("COMPLETED", "FAILED", "CRASHED") else None

        return str(until(f"the end of the run of {model}", ended, END_SECONDS))

    def promotion(self, model: str) -> str:
        with self.database.read() as session:
            return str(promotions.listed(session, model=model)[0]["id"])

    def state(self, model: str) -> dict[str, Any]:
        with self.database.read() as session:
            return approvals.state_of(session, self.promotion(model))

    def command(self, verdict: str, model: str, *, key: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "modelkeep", verdict, self.promotion(model), "--note", "looked at it", "--json"],
            env=self.up.environment | ({"MODELKEEP_API_KEY": key} if key else {}),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def api(self, verdict: str, model: str, *, key: str) -> dict[str, Any]:
        answer = httpx.post(
            f"{self.up.url}/api/v2/promotions/{self.promotion(model)}/{verdict}",
            json={"note": "looked at it"},
            headers={"Authorization": f"Bearer {key}"},
            timeout=30,
        )
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def form(self, model: str, decision: str) -> None:
        """What Prefect's page of a suspended run sends."""
        answer = self.post(
            f"/flow_runs/{self.runs[model]}/resume",
            {"run_input": {"decision": decision, "name": "Ann", "note": "looked at it"}},
        )
        assert answer["status"] == "ACCEPT", answer

    def key(self, name: str) -> str:
        made = json.loads(self.up.modelkeep("keys", "create", name, "--role", "operate", "--json"))
        return str(made["key"])

    def actions(self, model: str) -> set[str]:
        subject = f"promotion:{self.promotion(model)}"
        with self.database.read() as session:
            return set(session.scalars(select(AuditEvent.action).where(AuditEvent.subject == subject)))

    def stop(self) -> None:
        self.database.dispose()
        if self.up.process.poll() is None:
            self.up.process.send_signal(signal.SIGINT)
            try:
                self.up.process.wait(60)
            except subprocess.TimeoutExpired:
                for process in psutil.Process(self.up.process.pid).children(recursive=True):
                    process.kill()
                self.up.process.kill()


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    made = Waiting(tmp_path_factory.mktemp("approvals") / "home")
    try:
        made.ask(tmp_path_factory.mktemp("models"), ("formed", "commanded", "called", "stale", *FOUR_EYES))
        made.restart()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def keys(waiting: Waiting) -> list[str]:
    return [waiting.key("ops"), waiting.key("night")]


def test_an_approval_by_the_form_of_the_run_counts_and_its_name_is_a_claim(waiting: Waiting) -> None:
    waiting.form("formed", "approve")
    assert waiting.ends("formed") == "Promoted"
    (answer,) = waiting.state("formed")["answers"]
    assert (answer["actor"], answer["via"], answer["claimed"]) == ("prefect-ui", "form", "Ann")
    ready = httpx.get(f"{waiting.up.url}/v2/models/formed/versions/1/ready", timeout=10)
    assert ready.status_code == 200


def test_an_approval_by_the_command_line_counts_and_the_run_goes_on(waiting: Waiting) -> None:
    shown = waiting.up.modelkeep("promotions", "show", waiting.promotion("commanded"))
    assert "waits for an approval until" in shown and "modelkeep approve" in shown
    done = waiting.command("approve", "commanded")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["counts"] and document["approved"]
    assert waiting.ends("commanded") == "Promoted"
    assert waiting.state("commanded")["answers"][0]["actor"].startswith("os:")
    assert {"approval.asked", "approval.given", "promotion.carried-on"} <= waiting.actions("commanded")


def test_an_approval_by_the_api_counts_and_the_run_goes_on_by_itself(waiting: Waiting, keys: list[str]) -> None:
    assert waiting.api("approve", "called", key=keys[0])["approved"]
    assert waiting.ends("called") == "Promoted"
    (answer,) = waiting.state("called")["answers"]
    assert (answer["actor"], answer["via"]) == ("key:ops", "api")


def test_an_approval_of_what_has_changed_since_is_refused_as_stale(waiting: Waiting) -> None:
    with waiting.database.write(actor="test") as transaction:
        transaction.session.get_one(Version, ("stale", "1")).digest = "0" * 64
    done = waiting.command("approve", "stale")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert not document["counts"] and "it is stale" in document["why_not"] and "artifact" in document["why_not"]
    assert waiting.ends("stale") == "RolledBack"
    assert "approval.refused" in waiting.actions("stale")
    ready = httpx.get(f"{waiting.up.url}/v2/models/stale/versions/1/ready", timeout=10)
    assert ready.status_code != 200


def test_the_same_key_twice_is_no_four_eyes_and_a_second_key_is(waiting: Waiting, keys: list[str]) -> None:
    first = waiting.command("approve", "twice", key=keys[0])
    assert first.returncode == 0 and not json.loads(first.stdout)["approved"], first.stderr
    again = waiting.api("approve", "twice", key=keys[0])
    assert not again["counts"] and "key:ops has approved it already" in again["why_not"]
    without = waiting.command("approve", "twice")
    assert without.returncode == 1 and "has no key" in json.loads(without.stdout)["why_not"]
    assert waiting.suspended("twice")
    assert waiting.api("approve", "twice", key=keys[1])["approved"]
    assert waiting.ends("twice") == "Promoted"


def test_a_form_does_not_count_where_four_eyes_are_asked_and_the_run_waits_again(waiting: Waiting) -> None:
    waiting.form("refused", "approve")
    until("the answer on record", lambda: waiting.state("refused")["answers"], END_SECONDS)
    (answer,) = waiting.state("refused")["answers"]
    assert not answer["counts"] and "a form has no key" in answer["why_not"]
    until("the run waiting again", lambda: waiting.suspended("refused"), END_SECONDS)
    assert waiting.state("refused")["given"] == 0
    waiting.form("refused", "reject")  # that, anyone may
    assert waiting.ends("refused") == "Rejected"
    with waiting.database.read() as session:
        assert audit.verify(session, waiting.database.anchors).faults == []
