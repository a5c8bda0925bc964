"""Libraries that report on their user do not, unless the person wants them to."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from registry import untracked


def test_what_the_person_says_stays() -> None:
    environment = {"ORT_DISABLE_TELEMETRY": "0", "HOME": "x"}
    untracked.settle(environment)
    assert environment == {**untracked.SETTINGS, "ORT_DISABLE_TELEMETRY": "0", "HOME": "x"}


@pytest.mark.parametrize(
    "module", ["modelkeep.cli", "serving.child", "serving.probe", "tasks.judgement", "tasks.backup.vectors"]
)
def test_every_program_is_told_where_it_begins(module: str) -> None:
    told = "import json, os, sys, {module}; print(json.dumps(dict(os.environ)))"
    clean = {name: value for name, value in os.environ.items() if name not in untracked.SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", told.format(module=module)], env=clean, capture_output=True, text=True, check=True
    )
    assert untracked.SETTINGS.items() <= json.loads(done.stdout).items()
