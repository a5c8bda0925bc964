"""Mutated requests against a real server: no fault of the server's, no hang, no growth, and a good request is served right afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e import fuzz
from tests.e2e.harness import Box, box, wait_for
from tests.e2e.records import record
from tests.unit.serving.helpers import affine_model, identity_model, request

GROWTH_MB = 40
"""Of resident memory after the first part of the requests. What a request leaves behind would show: of 3,000, 14 kB each."""


SPARE = {"descriptors": 4, "threads": 4}
"""Descriptors of the registry come and go with each poll, and pools of threads grow with what is done at the same time."""


@pytest.fixture
def found(tmp_path: Path) -> Iterator[Box]:
    from onnx import TensorProto

    models = {
        "fuzz": affine_model(tmp_path / "fuzz.onnx"),
        "text": identity_model(tmp_path / "text.onnx", TensorProto.STRING),
        "flags": identity_model(tmp_path / "flags.onnx", TensorProto.BOOL),
        "halves": identity_model(tmp_path / "halves.onnx", TensorProto.FLOAT16),
    }
    with box(tmp_path / "box") as made:
        for name, path in models.items():
            made.register("1", path, model=name)
            made.settle_by_hand("1", model=name)
        made.serve()
        yield made


def serves(found: Box) -> bool:
    answer = httpx.post(f"{found.url}/v2/models/fuzz/infer", json=request(1, 2), timeout=60)
    return answer.status_code == 200 and answer.json()["outputs"][0]["data"] == [2, 4]


def attack(found: Box, seed: int, count: int) -> dict[str, Any]:
    """Play `count` cases; what came back, and by how much the server grew after the first third."""
    address, began = ("127.0.0.1", found.port), time.monotonic()
    server = psutil.Process(found.child_pid())
    thirds = [range(part * count // 3, (part + 1) * count // 3) for part in range(3)]
    rests: list[dict[str, int]] = []
    statuses: Counter[int] = Counter()
    closed = faults = 0
    for numbers in thirds:
        came = asyncio.run(fuzz.play(address, seed, numbers))
        assert came.faults == [], "\n".join(came.faults[:5])
        assert serves(found)
        rests.append(settled(found, server, rests[0] if rests else None))
        statuses += came.statuses
        closed += came.closed
        faults += len(came.faults)
    before, after = rests[0], rests[-1]
    assert found.child_pid() == server.pid, "the server crashed"
    log = found.log("server").read_text(errors="replace")
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:4000]
    return {
        "requests": count,
        "answers": sum(statuses.values()),
        "statuses": {str(code): statuses[code] for code in sorted(statuses)},
        "closed": closed,
        "faults": faults,
        "resident_mb": [round(rest["rss"] / 2**20, 1) for rest in rests],
        "grown_mb": round((after["rss"] - before["rss"]) / 2**20, 1),
        "descriptors": after["descriptors"] - before["descriptors"],
        "threads": after["threads"] - before["threads"],
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
    }


def settled(found: Box, server: psutil.Process, before: dict[str, int] | None = None) -> dict[str, int]:
    """Memory, descriptors and threads once nothing is under way any more; with `before`, once descriptors and threads are back at that."""
    wait_for("the end of what is in flight", lambda: found.in_flight() == 0)

    seen: dict[str, int] = {}

    def rests() -> bool:
        sockets = [c for c in server.net_connections("tcp") if c.status != psutil.CONN_LISTEN]
        seen.update(rss=server.memory_info().rss, descriptors=server.num_fds(), threads=server.num_threads())
        seen["connections"] = len(sockets)
        if before is None:
            return not sockets
        return not sockets and all(seen[name] <= before[name] + SPARE[name] for name in SPARE)

    try:
        wait_for("the server to come to rest", rests, every=0.1)
    except AssertionError as error:
        raise AssertionError(f"{error}: {before} became {seen}") from error
    return seen


def hold(figures: dict[str, Any]) -> None:
    assert (
        figures["statuses"]["200"] > figures["requests"] // 20
        and figures["statuses"]["400"] > figures["requests"] // 20
    ), figures
    assert figures["grown_mb"] < GROWTH_MB, figures


def measured(found: Box, count: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    seed = int(
        os.environ.get("MODELKEEP_TEST_SEED")
        or (20261121 if count < 10_000 else random.SystemRandom().randrange(1_000_000))
    )
    with capsys.disabled():
        print(f"\nfuzz: seed {seed}", flush=True)
        figures = attack(found, seed, int(os.environ.get("MODELKEEP_TEST_FUZZ", count)))
        print("fuzz:", json.dumps(figures), flush=True)
    return figures


def test_three_thousand_mutated_requests_are_never_the_servers_fault(
    found: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(measured(found, 3000, capsys))


COLUMNS = ("requests", "answers", "closed", "faults", "grown_mb", "descriptors", "threads", "seconds", "seed")


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_mutated_requests_are_never_the_servers_fault(
    found: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    """With MODELKEEP_TEST_RECORD=1 the figures are added to docs/RELIABILITY.md."""
    figures = measured(found, 100_000, capsys)
    record("| date | commit | requests | answers |", [figures[name] for name in COLUMNS])
    hold(figures)
