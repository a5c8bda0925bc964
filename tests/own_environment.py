"""Virtual environments of their own, for packages that must not meet ours: made once, kept between runs under .test-results."""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALL_SECONDS = 400


def own_environment(name: str, packages: tuple[str, ...], *options: str, without: str) -> Path:
    """The folder of an environment with just these packages. `options` are pip's.

    Skips the test, with `without` and pip's last word, where they cannot be installed.
    """
    key = hashlib.sha256(json.dumps([sys.version, *packages]).encode()).hexdigest()[:12]
    folder = ROOT / ".test-results" / "environments" / f"{name}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of the tests at once make one
        if not (folder / "ready").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=120)
            began = time.monotonic()
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--retries", "1"]
            try:
                done = subprocess.run(
                    [*pip, *options, *packages], capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
                )
                why = None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            except subprocess.TimeoutExpired:
                why = f"pip did not end within {INSTALL_SECONDS} s"
            if why is not None:
                pytest.skip(f"NOT TESTED: {without} could not be installed in an environment of their own: {why}")
            (folder / "ready").write_text(f"{time.monotonic() - began:.0f} s\n")
    return folder
