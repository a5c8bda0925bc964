"""A real server on the device with memory for one version: it is drained and let go, the next one comes, and no request fails."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from registry import versions
from tests.e2e.harness import Box, box, wait_for
from tests.gpu.conftest import write_wide

MODEL = "wide"
BALLAST_MB = 200
TOML = """
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 256]

[[outputs]]
name = "y"
datatype = "FP32"
shape = [-1, 256]
"""


def test_versions_that_do_not_fit_the_device_together_are_exchanged_and_no_request_fails(
    torch_cuda: Any, tmp_path: Path
) -> None:
    exchange(tmp_path, {"MODELKEEP_PROFILE": "8gb"}, computes_on="cuda:0")


def exchange(folder: Path, environment: dict[str, str], *, computes_on: str) -> None:
    with box(folder / "box") as made:
        made.extra |= environment | {"MODELKEEP_GPU__MAX_MEMORY_MB": str(BALLAST_MB * 3 // 2 + 100)}
        (made.folder / "model.toml").write_text(TOML)
        for version in ("1", "2"):
            path = write_wide(made.folder / f"v{version}.pt", ballast_mb=BALLAST_MB + int(version))
            versions.register(made.database, made.store, path, name=MODEL, version=version, max_bytes=1 << 30)
        made.settle_by_hand("1", model=MODEL)
        made.serve()
        wait_for("the first answer", lambda: answered(made) == "1")
        (model,) = httpx.get(f"{made.url}/api/gpu/profile", timeout=30).json()["models"]
        assert model["computes_on"] == computes_on
        end, found = threading.Event(), []

        def ask() -> None:
            while not end.is_set():
                found.append(answered(made))

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            made.settle_by_hand("2", model=MODEL)
            wait_for("the second version", lambda: found and found[-1] == "2")
        finally:
            end.set()
            for client in clients:
                client.join()
        assert set(found) == {"1", "2"}, "every request is answered by one version or the other"
        waited = [
            line
            for line in httpx.get(f"{made.url}/metrics", timeout=30).text.splitlines()
            if "exchange_waits_total" in line
        ]
        assert float(waited[-1].split()[-1]) >= 1


def answered(made: Box) -> str:
    """The version that answered, or what was wrong."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 256], "data": np.ones(256).tolist()}
    answer = httpx.post(f"{made.url}/v2/models/{MODEL}/infer", json={"inputs": [tensor]}, timeout=60)
    if answer.status_code != 200:
        return answer.text
    y = np.array(answer.json()["outputs"][0]["data"])
    return answer.headers["x-model-version"] if np.allclose(y, np.tanh(1.0), atol=1e-2) else "wrong"
