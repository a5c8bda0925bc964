"""Swaps of the version in traffic under sixteen connections that never pause: no request fails, every answer is its version's."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import numpy as np
import pytest

from modelkeep.demo.answers import DirectRuns
from tests.e2e.closed_loop import Log
from tests.e2e.harness import MODEL, Box, box, build, images, wait_for, write_traffic

BEFORE_SECONDS = 2.0
"""What is usual is seen for so long before the first swap."""


def swap(one: Box, version: str, ballast_mb: int) -> None:
    """Make a version stable by force, and wait until the server has followed."""
    one.register(version, build(one.folder / f"v{version}.onnx", seed=int(version), ballast_mb=ballast_mb))
    one.settle_by_hand(version)
    wait_for(f"an answer by {version}", lambda: one.infer().headers.get("x-model-version") == version)


@dataclass(slots=True)
class Swapped:
    """The log of the client through some swaps, from when to when each took (monotonic), the versions' files, and what model-info says."""

    log: Log
    times: list[tuple[float, float]]
    models: dict[str, Path]
    info: dict[str, Any]


def swapped(
    folder: Path,
    count: int,
    *,
    ballast_mb: int = 0,
    budget_mb: int = 2048,
    connections: int = 16,
    extra: Mapping[str, str] = MappingProxyType({}),
) -> Swapped:
    with box(folder, extra={"MODELKEEP_GPU__MAX_MEMORY_MB": str(budget_mb), **extra}) as one:
        one.register("1", build(one.folder / "v1.onnx", seed=1, ballast_mb=ballast_mb))
        one.settle_by_hand("1")
        one.serve()
        log = folder / "closed.npz"
        client = one.start(
            "closed", "tests.e2e.closed_loop", "--port", str(one.port), "--model", MODEL, "--log", str(log),
            "--data", str(write_traffic(folder / "traffic.npz")), "--connections", str(connections),
        )  # fmt: skip
        wait_for("a request of the client", lambda: requests_of(one) > 100)
        time.sleep(BEFORE_SECONDS)
        times = []
        for number in range(2, count + 2):
            began = time.monotonic()
            swap(one, str(number), ballast_mb)
            times.append((began, time.monotonic()))
        info = httpx.get(f"{one.url}/api/v2/model-info", timeout=10).json()
        client.send_signal(signal.SIGTERM)
        assert client.wait(60) == 0, one.log("closed").read_text()
        return Swapped(Log.read(log), times, dict(one.models), info)


def requests_of(one: Box) -> int:
    found = httpx.get(f"{one.url}/api/v2/model-health", timeout=10).json()["models"]
    return sum(int(entry["requests"]) for entry in found)


def wrong(log: Log, models: dict[str, Path]) -> int:
    """Answers that are not what the version that they name gives when it is run directly."""
    direct = DirectRuns(models, images())
    expected: dict[tuple[str, int], Any] = {}
    count = 0
    for status, version, image, scores in zip(log.status, log.version, log.image, log.scores, strict=True):
        if status != 200:
            continue
        key = (str(version), int(image))
        if key not in expected:
            expected[key] = direct.scores(*key) if direct.knows(key[0]) else None
        want = expected[key]
        count += want is None or not np.allclose(scores, want, rtol=1e-3, atol=1e-4)
    return count


def figures(found: Swapped) -> dict[str, Any]:
    log, times = found.log, found.times
    usual = log.seconds[(log.finished < times[0][0])]
    during = log.seconds[log.finished >= times[0][0]]
    return {
        "swaps": len(times),
        "requests": len(log.status),
        "failed": int((log.status != 200).sum()),
        "wrong": wrong(log, found.models),
        "versions": len(set(log.version[log.status == 200].tolist())),
        "usual_p50_seconds": round(float(np.median(usual)), 4),
        "usual_slowest_seconds": round(float(usual.max()), 4),
        "slowest_seconds": round(float(during.max()), 4),
        "p99_seconds": round(float(np.quantile(during, 0.99)), 4),
        "swap_seconds": round(float(np.median([end - begin for begin, end in times])), 3),
        "held_back": found.info["exchanges"]["waited"],
        "held_back_longest_seconds": found.info["exchanges"]["longest_seconds"],
    }


def test_ten_swaps_under_sixteen_connections_fail_no_request_and_give_no_wrong_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures(swapped(tmp_path, 10))
    with capsys.disabled():
        print(f"\nswaps: {json.dumps(found)}")
    assert (found["failed"], found["wrong"]) == (0, 0)
    assert found["versions"] == 11, "each version answered"
    assert found["held_back"] == 0, "there was room for both"


def test_five_swaps_with_memory_for_one_version_hold_requests_back_and_fail_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures(swapped(tmp_path, 5, ballast_mb=30, budget_mb=50))
    with capsys.disabled():
        print(f"\nswaps with memory for one version: {json.dumps(found)}")
    assert (found["failed"], found["wrong"]) == (0, 0)
    assert found["versions"] == 6, "each version answered"
    assert found["held_back"] >= 5, "at each swap some requests waited"


def test_swaps_on_the_five_places_of_the_4_gb_profile_fail_none_where_every_place_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four connections and this test's own: each holds a place of the five, also while all wait for the next version."""
    profile = {"MODELKEEP_PROFILE": "rtx3050-4gb", "MODELKEEP_GPU__COMPUTE": "cpu"}
    found = figures(swapped(tmp_path, 3, ballast_mb=30, budget_mb=50, connections=4, extra=profile))
    with capsys.disabled():
        print(f"\nswaps with five places: {json.dumps(found)}")
    assert (found["failed"], found["wrong"]) == (0, 0)
    assert found["versions"] == 4 and found["held_back"] >= 3
