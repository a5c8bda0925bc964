"""`modelkeep demo`, as README's first command runs it: the story comes out as told, and its files say so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)


def tell(home: Path) -> tuple[int, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MODELKEEP_", "PREFECT_"))}
    done = subprocess.run(
        [sys.executable, "-m", "modelkeep", "demo"],
        env={**environment, "MODELKEEP_HOME": str(home)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    return done.returncode, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the demo has come out as told.

    Its canaries judge real latencies, so a machine that is busy with other things may withdraw a good version by its own figures. It then
    says so and is told once more; what no machine excuses, a wrong answer, counts the first time.
    """
    home = tmp_path_factory.mktemp("demo") / "home"
    code, printed = tell(home)
    if code == 1:
        assert json.loads((home / "demo" / "summary.json").read_text())["answers_wrong"] == 0, printed
        warned = [line for line in printed.splitlines() if line.startswith("NOT AS TOLD")]
        print("the demo is told a second time:", *warned, sep="\n")
        home = tmp_path_factory.mktemp("demo-again") / "home"
        code, printed = tell(home)
    assert code == 0, printed
    return home


@pytest.fixture(scope="module")
def summary(home: Path) -> dict[str, Any]:
    return dict(json.loads((home / "demo" / "summary.json").read_text()))


def test_no_request_is_lost_to_a_change_and_no_answer_is_wrong(summary: dict[str, Any]) -> None:
    assert summary["requests_total"] >= 2000
    assert summary["requests_failed"] == 0
    assert summary["answers_wrong"] == 0
    assert summary["answers"]["checked"] >= summary["requests_total"] - 100


def test_each_version_ends_as_it_deserves(summary: dict[str, Any]) -> None:
    outcomes = {facts["name"]: facts["outcome"] for facts in summary["versions"].values()}
    good = dict.fromkeys(("v1", "v2", "v7"), "promoted")
    bad = dict.fromkeys(("v4", "v5", "v8"), "withdrawn")
    assert outcomes == {**good, **bad, "v3": "refused", "v6": "refused"}


def test_the_canary_costs_less_than_a_cut_over(summary: dict[str, Any]) -> None:
    assert 0 < summary["requests_failed_in_canary"] <= 50
    assert summary["requests_failed_in_canary"] < summary["cutover_failed"]


def test_v5_is_withdrawn_for_being_slow_and_v4_for_its_errors(summary: dict[str, Any]) -> None:
    assert "slow answers" in summary["versions"]["5"]["reason"]
    assert "errors" in summary["versions"]["4"]["reason"]


def test_the_report_opens_without_a_network(home: Path, program: Callable[[str], Path], tmp_path: Path) -> None:
    page = home / "demo" / "report.html"
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page.read_text())
    done = subprocess.run(
        [
            str(program("chromium")), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "What was decided, when and why" in done.stdout
    assert done.stdout.count("<svg") >= 1


def test_the_audit_chain_holds_afterwards(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modelkeep", "audit", "verify", "--json"],
        env={**os.environ, "MODELKEEP_HOME": str(home)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["holds"] and found["events"] > 100 and found["anchors"] > 50
