"""KServe's own client from PyPI, unchanged, in an environment of its own: it needs other versions than ours of what both use."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.own_environment import own_environment

PACKAGES = ("kserve==0.21.0",)
"""With all that it needs: 450 MB, most of it for Kubernetes, a minute when this was written."""
pytestmark = pytest.mark.timeout(700)  # the first run installs


@pytest.fixture(scope="module")
def said(server: str) -> Any:
    """What the client got, asked once for all."""
    home = own_environment(
        "kserve", PACKAGES, "--no-compile", without=f"KServe's client: {PACKAGES[0]} and what it needs"
    )
    script = Path(__file__).with_name("kserve_client.py")
    done = subprocess.run(
        [str(home / "bin" / "python"), str(script), f"http://{server}"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_it_sees_what_is_live_and_ready(said: Any) -> None:
    assert (said["live"], said["ready"], said["model"]) == (True, True, [True, False])


@pytest.mark.parametrize("sent", ["json", "binary"])
@pytest.mark.parametrize("got", ["json", "binary"])
def test_it_infers_in_json_and_in_binary(said: Any, sent: str, got: str) -> None:
    assert said[f"{sent} to {got}"] == ["r-7", ["y"], [[2, 4], [6, 9]], "1"]


def test_it_sends_and_gets_halves_and_text(said: Any) -> None:
    assert said["FP16"] == [1, 0.5]
    assert said["BYTES False"] == said["BYTES True"] == ["ab", "é"]


def test_it_takes_a_document_and_raises_our_words(said: Any) -> None:
    assert said["dict"] == [[2, 4]]
    kind, words = said["error"]
    assert kind == "HTTPStatusError" and "input 'x' is missing" in words and "400" in words
