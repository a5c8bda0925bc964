"""Requests that the cache answers: ours against Triton's local cache, in turns of one run; the cases that `serving_compare` has too, alone,
and the same with images of 28x28 numbers in the place of 8x8.

`python -m benchmarks.cache_hits [--rounds 7] [--seconds 2]` prints a Markdown table of requests a second (p99 in
milliseconds; microseconds of CPU a request) and the ratio of each round. Each server on the first core, wrk on the last.
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
from benchmarks._turns import Driver, Turn, in_turns, rates_table, ratios

CONNECTIONS = (16, 64)


def measure(
    folder: Path, rounds: int, seconds: float, cores: tuple[int | None, int | None]
) -> dict[str, dict[str, list[Turn]]]:
    """By case, by server, the turns. Raises `_servers.Absent` where Triton cannot be had."""
    models = servers.write_models(folder / "models", servers.CACHED)
    driver = Driver(folder, cores[1])
    cases: dict[str, dict[str, list[Turn]]] = {}
    with ExitStack() as stack:
        running = {
            "modelkeep": stack.enter_context(servers.modelkeep(folder / "ours", models, cores[0])),
            "Triton": stack.enter_context(servers.triton(folder / "triton", models, cores[0])),
        }
        alone = servers.Alone(running)
        stack.callback(alone.end)
        for model, kind, connections in product(models, KINDS, CONNECTIONS):

            def one(name: str, model: str = model, kind: str = kind, connections: int = connections) -> Turn:
                with alone.turn(name) as server:
                    return driver.turn(server.target(model, kind), connections, seconds, server.cpu_seconds)

            side = servers.side_of(model)
            case = f"cache hit, {SHOWN[kind]}, {side}x{side}, {connections}"
            cases[case] = in_turns(tuple(running), rounds, one)
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        print("SKIPPED: wrk is not installed (Debian: apt-get install wrk)")
        return 0
    cores = sorted(os.sched_getaffinity(0))
    pair = (cores[0], cores[-1]) if len(cores) > 1 else (None, None)
    with tempfile.TemporaryDirectory(prefix="cache-hits-") as folder:
        cases = measure(Path(folder), options.rounds, options.seconds, pair)
    print(rates_table(cases, ("modelkeep", "Triton")))
    for case, found in cases.items():
        ratio = ratios(found["modelkeep"], found["Triton"], "requests_per_second")
        print(f"\n{case}: {ratio.median:.2f} of Triton's rate ({ratio.low:.2f} to {ratio.high:.2f})")
    failed = sum(turn.failed for found in cases.values() for turns in found.values() for turn in turns)
    print(f"\n{failed} requests failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
