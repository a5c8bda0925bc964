"""`modelkeep serve` with certificates: our own commands reach it, and files that do not fit are an error before it begins."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from registry import replicas
from registry.connect import open_database
from registry.settings import load_settings
from tests.certificates import Authority
from tests.e2e.harness import ROOT, wait_for

COMMAND = [sys.executable, "-P", "-m", "modelkeep"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    authority = Authority(tmp_path / "ca")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MODELKEEP_")}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "MODELKEEP_HOME": str(tmp_path / "home"),
        "MODELKEEP_PROFILE": "cpu",
        "MODELKEEP_SERVER__PORT": "0",
        "MODELKEEP_SERVER__TLS_CERTIFICATE": str(authority.certificate),
        "MODELKEEP_SERVER__TLS_KEY": str(authority.key),
        "MODELKEEP_SECURITY__REQUIRE_KEYS": "true",
        "MODELKEEP_CLIENT__CA": str(authority.ca),
    }


def test_commands_reach_a_server_by_https_where_they_trust_its_ca(environ: dict[str, str], tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    with said.open("wb") as output:
        server = subprocess.Popen([*COMMAND, "serve"], env=environ, stdout=output, stderr=output)
    try:
        found = wait_for("its address", lambda: re.search(r"at (https://127\.0\.0\.1:\d+)", said.read_text()))
        address = found[1]
        trusted = ssl.create_default_context(cafile=environ["MODELKEEP_CLIENT__CA"])

        def answers() -> bool:
            try:
                return httpx.get(f"{address}/health", verify=trusted, timeout=10).status_code in (200, 503)
            except httpx.HTTPError:
                return False

        wait_for("its answer", answers)
        database = open_database(load_settings(environ=environ, cwd=tmp_path))

        def reported() -> bool:
            with database.read() as session:
                return bool(replicas.listed(session))

        wait_for("its report", reported)
        database.dispose()
        done = subprocess.run(
            [*COMMAND, "keys", "create", "alice", "--role", "infer", "--rate", "2/hour", "--json"],
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        assert made["rate"] == "2/hour"
        assert len(made["follow"]) == 1 and made["silent"] == [], "it was told, and said so"
        answer = httpx.post(
            f"{address}/v2/models/none/infer", headers={"X-API-Key": made["key"]}, verify=trusted, timeout=10
        )
        assert answer.status_code == 404 and answer.headers["ratelimit-limit"] == "2"

        mistrustful = {**environ, "MODELKEEP_CLIENT__CA": str(Authority(tmp_path / "other").ca)}
        done = subprocess.run(
            [*COMMAND, "keys", "create", "bob", "--role", "view", "--json"],
            env=mistrustful,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and "cannot be trusted" in done.stderr and "client.ca" in done.stderr
        assert len(json.loads(done.stdout)["silent"]) == 1
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def test_files_that_do_not_fit_are_said_before_it_begins(environ: dict[str, str], tmp_path: Path) -> None:
    other = Authority(tmp_path / "other").key
    done = subprocess.run(
        [*COMMAND, "serve"],
        env={**environ, "MODELKEEP_SERVER__TLS_KEY": str(other)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert f"server.tls_key = {other} is not the key of" in done.stderr and "Traceback" not in done.stderr
