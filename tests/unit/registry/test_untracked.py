"""Libraries that report on their user do not, unless the person wants them to."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from registry import untracked

LOOK = """
import os, sys
FIRST = {
    "onnxruntime": "ORT_DISABLE_TELEMETRY", "prefect": "DO_NOT_TRACK", "chromadb": "ANONYMIZED_TELEMETRY",
    "great_expectations": "GX_ANALYTICS_ENABLED", "huggingface_hub": "HF_HUB_DISABLE_TELEMETRY",
}
looked_for = []
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in FIRST:
            looked_for.append(name)
            if FIRST[name] not in os.environ:
                sys.exit(f"{name} is imported before it is told")
sys.meta_path.insert(0, Finder)
"""


def looked_for(code: str, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Which of the libraries were imported, and the environment afterwards."""
    program = f"{LOOK}\n{code}\nimport json; print(json.dumps([looked_for, dict(os.environ)]))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    libraries, after = json.loads(done.stdout)
    return libraries, after


@pytest.fixture
def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in untracked.SETTINGS}


def test_what_the_person_says_stays() -> None:
    environment = {"ORT_DISABLE_TELEMETRY": "0", "HOME": "x"}
    untracked.settle(environment)
    assert environment == {**untracked.SETTINGS, "ORT_DISABLE_TELEMETRY": "0", "HOME": "x"}
    assert untracked.told(environment) == {**untracked.SETTINGS, "ORT_DISABLE_TELEMETRY": "0"}
    assert untracked.told({}) == untracked.SETTINGS


@pytest.mark.parametrize(
    "module",
    [
        "modelkeep.cli",
        "serving.child",
        "serving.probe",
        "tasks.judgement",
        "tasks.backup.vectors",
        "tasks.backup.verify",
    ],
)
def test_every_program_is_told_before_it_imports_what_reports(module: str, clean: dict[str, str]) -> None:
    _, after = looked_for(f"import {module}", clean)
    assert untracked.SETTINGS.items() <= after.items()


@pytest.mark.parametrize("module", ["flows.promote", "flows.backup", "blocks.connections"])
def test_every_flow_is_told_before_prefect_is_imported(module: str, clean: dict[str, str]) -> None:
    libraries, after = looked_for(f"import {module}", clean)
    assert "prefect" in libraries
    assert untracked.SETTINGS.items() <= after.items()


def test_one_that_is_told_too_late_would_be_seen(clean: dict[str, str]) -> None:
    with pytest.raises(AssertionError, match="onnxruntime is imported before it is told"):
        looked_for("import onnxruntime, registry", clean)
