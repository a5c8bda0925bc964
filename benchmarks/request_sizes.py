"""What a request costs as it grows: images of 8x8 to 224x224 numbers for a model that hardly computes, ours against Triton with its batcher.

`python -m benchmarks.request_sizes [--rounds 5] [--seconds 1]` prints a Markdown table. Each server has the first core, wrk the last, with 16
connections; ratios are those of two turns of one round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from itertools import product
from pathlib import Path

from benchmarks import _servers as servers
from benchmarks._report import KINDS, SHOWN
from benchmarks._turns import Driver, Turn, in_turns, ratios, spread, table

SIDES = (8, 28, 64, 128, 224)
CONNECTIONS = 16
OURS, TRITON = "modelkeep", "Triton"


def measure(
    folder: Path, rounds: int, seconds: float, cores: tuple[int | None, int | None]
) -> dict[tuple[str, int], dict[str, list[Turn]]]:
    """By kind and side, by server, the turns. Raises `_servers.Absent` where Triton cannot be had."""
    files = folder / "models"
    files.mkdir()
    models = {f"flat-{side}": servers.conv_model(files / f"flat-{side}.onnx", (), side) for side in SIDES}
    driver = Driver(folder, cores[1])
    found: dict[tuple[str, int], dict[str, list[Turn]]] = {}
    with ExitStack() as stack:
        running = {
            OURS: stack.enter_context(servers.modelkeep(folder / "ours", models, cores[0])),
            TRITON: stack.enter_context(servers.triton(folder / "triton", models, cores[0])),
        }
        alone = servers.Alone(running)
        stack.callback(alone.end)
        for kind, model in product(KINDS, models):

            def one(name: str, kind: str = kind, model: str = model) -> Turn:
                with alone.turn(name) as server:
                    return driver.turn(server.target(model, kind), CONNECTIONS, seconds, server.cpu_seconds)

            found[kind, servers.side_of(model)] = in_turns(tuple(running), rounds, one)
    return found


def shown(found: dict[tuple[str, int], dict[str, list[Turn]]]) -> str:
    rows = []
    for (kind, side), turns in found.items():
        body = servers.v2_target("", "", kind, side=side).body
        rates = ratios(turns[OURS], turns[TRITON], "requests_per_second")
        row = [f"{SHOWN[kind]}, {side}x{side} ({len(body) / 1000:,.1f} kB)"]
        for name in (OURS, TRITON):
            rate = spread([turn.requests_per_second for turn in turns[name]]).median
            p99 = spread([1e3 * turn.p99_seconds for turn in turns[name]]).median
            row.append(f"{rate:,.0f} ({p99:.1f})")
        rows.append((*row, f"{rates.median:.2f} ({rates.low:.2f} to {rates.high:.2f})"))
    return table(("16 connections", "modelkeep", "Triton, batcher", "rate, ours of Triton's"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        print("SKIPPED: wrk is not installed (Debian: apt-get install wrk)")
        return 0
    cores = sorted(os.sched_getaffinity(0))
    pair = (cores[0], cores[-1]) if len(cores) > 1 else (None, None)
    with tempfile.TemporaryDirectory(prefix="request-sizes-") as folder:
        found = measure(Path(folder), options.rounds, options.seconds, pair)
    print(shown(found))
    failed = sum(turn.failed for turns in found.values() for some in turns.values() for turn in some)
    print(f"\n{failed} requests failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
