"""How long `modelkeep promote` takes to bring a validated version to all of the traffic, on one server under traffic.

Versions differ in their weights only. Each is validated beside the stable version, golden cases go through both
(`--strategy replay`), then all of the traffic goes to it; no soak, which is a watch and not part of the swap. Measured: the whole command with a
Prefect server that runs already, the validation and the swap by the promotion's own record, and the traffic's log: when the client first
had an answer by the version, and what it lost. Mark: below 30 s with validation (S3-104), nothing lost (S3-105, S3-106).

Prints one JSON document. Run by `make bench`, or `python -m benchmarks.hot_swap [--runs N] [--mb SIZE …] [--budget-mb BUDGET]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.harness import MODEL, POLICY, Box, Traffic, box, build, wait_for, write_golden
from tests.prefect_server import environment, prefect_server

RATE = 100.0
MARK_SECONDS = 30.0


def make(path: Path, number: int, megabytes: int) -> Path:
    """A version that answers as the others do but for a millionth, with so much of weights that add nothing."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(build(path, seed=1, ballast_mb=megabytes)))
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.full(10, number * 1e-6, np.float32), "shift"))
    graph.node[-1].output[0] = "plain"
    graph.node.append(helper.make_node("Add", ["plain", "shift"], ["scores"]))
    onnx.save(model, str(path))
    return path


def swap(one: Box, traffic: Traffic, number: int, megabytes: int, prefect: dict[str, str]) -> dict[str, float]:
    version = str(number)
    path = make(one.folder / f"v{version}.onnx", number, megabytes)
    one.register(version, path, golden=write_golden(one.folder / f"golden-{version}.npz", path))
    path.unlink()
    began = time.monotonic()
    done = one.modelkeep("promote", MODEL, version, "--strategy", "replay", "--json", timeout=300, **prefect)
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"version {version} was not promoted:\n{done.stdout}\n{done.stderr}")
    row = one.promotion(version)
    assert row is not None
    wait_for("an answer by it", lambda: f'"{version}"' in tail(traffic.log))
    return {
        "began": began,
        "command": seconds,
        "validation": float(row["validation_seconds"]),
        "swap": float(row["swap_seconds"]),
    }


def tail(path: Path) -> str:
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 20_000))
        return log.read().decode(errors="replace")


def measure(runs: int, megabytes: int, budget_mb: int) -> dict[str, Any]:
    extra = {"MODELKEEP_GPU__MAX_MEMORY_MB": str(budget_mb)}
    policy = {
        **POLICY, "soak_seconds": 0.0, "replay_requests": 1000, "latency_ratio": 1000.0,
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        box(Path(folder) / "box", policy=policy, extra=extra) as one,
        prefect_server(Path(folder)) as url,
    ):
        prefect = environment(Path(folder), url)
        one.register("1", make(one.folder / "v1.onnx", 1, megabytes))
        one.settle_by_hand("1")
        one.serve()
        traffic = one.start_traffic(rate=RATE)
        swaps = [swap(one, traffic, number, megabytes, prefect) for number in range(2, runs + 2)]
        requests = traffic.stop()
    first = []
    for number, found in enumerate(swaps, 2):
        answered = min(r.finished for r in requests if r.version == str(number) and r.status == 200)
        first.append(answered - found["began"])
    return {
        "model_mb": megabytes,
        "budget_mb": budget_mb,
        "swaps": runs,
        **{
            f"{name}_seconds": {"median": round(statistics.median(values), 2), "all": [round(v, 2) for v in values]}
            for name, values in {
                "command": [s["command"] for s in swaps],
                "validation": [s["validation"] for s in swaps],
                "swap_with_validation": [s["swap"] for s in swaps],
                "command_to_first_answer": first,
            }.items()
        },
        "requests": len(requests),
        "failed": sum(r.status != 200 for r in requests),
        "slowest_answer_seconds": round(max(r.latency_seconds for r in requests), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--mb",
        type=int,
        nargs="*",
        default=[0, 60],
        help="sizes of the model (at most 60: the harness takes no larger ones), 0: a few KB",
    )
    parser.add_argument(
        "--budget-mb", type=int, default=2048, help="memory for models; below twice the size: old goes, then new comes"
    )
    options = parser.parse_args()
    found = [measure(options.runs, megabytes, options.budget_mb) for megabytes in options.mb]
    print(json.dumps({"benchmark": "hot_swap", "mark_seconds": MARK_SECONDS, "rate": RATE, "sizes": found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
