"""Three models on a server with memory for two, under clients that never pause: no request fails, every answer is its model's."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import pytest

from tests.e2e.closed_loop import Log
from tests.e2e.harness import Box, box, build, kill, wait_for, write_traffic
from tests.e2e.test_swaps import wrong

MODELS = {"m-one": "1", "m-two": "2", "m-three": "3"}
"""With the version of each that is stable. No two versions have one name, so that an answer tells its model."""
SIZE_MB, BUDGET_MB = 30, 80
WAKES = 6
"""So many times a model is loaded again before the clients stop."""


def loads(one: Box) -> int:
    found = httpx.get(f"{one.url}/api/v2/model-info", timeout=30).json()["residency"]["models"]
    return sum(int(entry["loads"]) for entry in found.values())


def order(one: Box, action: str, model: str) -> httpx.Response:
    return httpx.post(f"{one.url}/v2/repository/models/{model}/{action}", timeout=60)


def test_three_models_in_memory_for_two_fail_no_request_and_an_unload_outlives_a_kill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with box(tmp_path, extra={"MODELKEEP_GPU__MAX_MEMORY_MB": str(BUDGET_MB)}) as one:
        for model, version in MODELS.items():
            path = build(one.folder / f"v{version}.onnx", seed=int(version), ballast_mb=SIZE_MB)
            one.register(version, path, model=model)
            one.settle_by_hand(version, model=model)
        one.serve()
        began = loads(one)
        assert began == 2, "two fit"
        data, clients, logs = write_traffic(tmp_path / "traffic.npz"), [], []
        for model in MODELS:
            logs.append(tmp_path / f"{model}.npz")
            clients.append(
                one.start(
                    f"closed-{model}", "tests.e2e.closed_loop", "--port", str(one.port), "--model", model,
                    "--log", str(logs[-1]), "--data", str(data), "--connections", "4",
                )
            )  # fmt: skip
        wait_for(f"{WAKES} models that woke", lambda: loads(one) >= began + WAKES, seconds=120)
        info = httpx.get(f"{one.url}/api/v2/model-info", timeout=30).json()
        for client in clients:
            client.send_signal(signal.SIGTERM)
            assert client.wait(60) == 0
        found = {}
        for model, path in zip(MODELS, logs, strict=True):
            log = Log.read(path)
            failed, bad = int((log.status != 200).sum()), wrong(log, dict(one.models))
            found[model] = {"requests": len(log.status), "failed": failed, "wrong": bad}
            assert set(log.version[log.status == 200].tolist()) == {MODELS[model]}
            found[model]["slowest_seconds"] = round(float(log.seconds.max()), 3)
        with capsys.disabled():
            print(f"\nthree models in memory for two: {json.dumps([found, info['exchanges'], info['residency']])}")
        assert all((entry["failed"], entry["wrong"]) == (0, 0) for entry in found.values())
        assert info["exchanges"]["waited"] >= WAKES and info["exchanges"]["turned_away"] == 0
        assert info["residency"]["versions"] <= 2

        assert order(one, "unload", "m-two").json()["state"] == "UNAVAILABLE"
        kill(one.child_pid())
        wait_for("the server to be ready again", one.is_ready)
        answers = {model: one.infer(model=model, timeout=60) for model in MODELS}
        assert {model: answer.status_code for model, answer in answers.items()} == {
            "m-one": 200, "m-two": 503, "m-three": 200,
        }  # fmt: skip
        assert "unloaded on this server" in answers["m-two"].text
        wait_for("the order on record", lambda: one.info()["unloaded"][0]["recorded"])
        assert order(one, "load", "m-two").json()["state"] == "READY"
        assert one.infer(model="m-two", timeout=60).headers["x-model-version"] == "2"
        assert one.audit_faults() == []
