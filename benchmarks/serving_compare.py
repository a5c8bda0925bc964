"""Our server beside Triton (as PyPI has it) and others, in turns, in one run: rates, latencies, the marks of the design, what each feature costs.

`python -m benchmarks.serving_compare [--quick] [--json FILE] [--markdown FILE] [--into PAGE]`, or `make bench-serving`: one JSON document on standard
output (or in FILE),
the tables in Markdown on standard error (or in FILE). Each server has the first core, wrk the last; a round is one short turn of every server, in which the
others are stopped; medians and ratios are taken over rounds.
Everything a request meets is on in ours: metrics, routing, keys, the limit on a key's rate, validation.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks import _peers as peers
from benchmarks import _servers as servers
from benchmarks import _tell as tell
from benchmarks._features import cost_of_features, cost_of_models
from benchmarks._report import (
    ALONE,
    BATCHER,
    HEAVY,
    KEPT_28,
    KINDS,
    LARGER,
    OURS,
    SHOWN,
    SMALL,
    SMALL_28,
    TRITON,
    Found,
    case,
    document,
    judge,
    markdown,
)
from benchmarks._servers import Absent, Alone, Server
from benchmarks._turns import Driver, Turn, in_turns, two_cores

CONNECTIONS = (1, 16, 64)
PROBES = 300
CHECKED = ("/v2/health/ready", "/health", "/metrics")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. A turn is whole seconds: wrk knows no others."""

    turn_seconds: float
    rounds: int
    peer_rounds: int
    other_rounds: int
    """Of the heavy model and the cache."""
    feature_rounds: int
    starts: int
    swaps: int
    growth: tuple[int, ...]
    registered: int
    peers: tuple[str, ...]
    checked: tuple[str, ...]
    kinds: tuple[str, ...]
    """Of requests, for the cost of features."""
    heavy: tuple[tuple[str, int], ...]
    """(kind, connections) of the heavy model; the marks need 16 of both kinds."""


FULL = Plan(
    1,
    6,
    2,
    4,
    4,
    3,
    20,
    (1, 10, 100),
    1000,
    ("MLServer", "LitServe", "BentoML"),
    CHECKED,
    KINDS,
    (("json", 1), ("json", 16), ("json", 64), ("binary", 16)),
)
QUICK = Plan(
    1, 2, 1, 1, 1, 1, 6, (1, 10), 100, ("MLServer", "LitServe"), CHECKED[:1], KINDS[:1], (("json", 16), ("binary", 16))
)


def measure(plan: Plan, folder: Path, cores: tuple[int | None, int | None]) -> Found:
    """Start everything, take turns, end everything. `cores`: that of the servers, that of wrk."""
    found = Found()
    serving_core, driving_core = cores
    files = servers.write_models(folder / "models")
    driver = Driver(folder, driving_core)
    with contextlib.ExitStack() as stack:
        running = start_all(stack, folder, files, serving_core, found, plan.peers)
        time.sleep(1)
        found.others["memory_at_rest_bytes"] = {server.name: server.memory_bytes() for server in running.values()}
        alone = servers.Alone(running)
        stack.callback(alone.end)
        rates(plan, running, alone, driver, found)
        heavy(plan, running, alone, driver, found, files[HEAVY], serving_core)
        kept(plan, running, alone, driver, found)
        health(plan, running, alone, driver, found)
    with tell.say("cost of features"):
        found.others["features"] = cost_of_features(
            folder / "features", files, driver, serving_core, plan.feature_rounds, plan.kinds
        )
    with tell.say("cost of models"):
        found.others["growth"] = cost_of_models(
            folder / "growth", files[SMALL], driver, serving_core, plan.growth, plan.registered, plan.feature_rounds
        )
    starts(plan, folder, files, serving_core, found)
    swaps(plan, folder, found)
    return found


def start_all(
    stack: contextlib.ExitStack,
    folder: Path,
    files: dict[str, Path],
    core: int | None,
    found: Found,
    wanted: Sequence[str],
) -> dict[str, Server]:
    running: dict[str, Server] = {}
    plain = {name: path for name, path in files.items() if name not in servers.CACHED}
    starters: dict[str, Callable[[], contextlib.AbstractContextManager[Server]]] = {
        OURS: lambda: servers.modelkeep(folder / "ours", files, core),
        BATCHER: lambda: servers.triton(folder / "triton", files, core),
        TRITON: lambda: servers.triton(folder / "triton-plain", plain, core, batcher=False),
        "MLServer": lambda: peers.mlserver(folder / "mlserver", files, core),
        "LitServe": lambda: peers.litserve(folder / "litserve", files, core),
        "BentoML": lambda: peers.bentoml(folder / "bentoml", files, core),
    }
    packages = {
        TRITON: servers.parity.TRITON,
        BATCHER: servers.parity.TRITON,
        "MLServer": peers.MLSERVER[0],
        "LitServe": peers.LITSERVE[0],
        "BentoML": peers.BENTOML[0],
    }
    for name, start in starters.items():
        if name not in (OURS, TRITON, BATCHER, *wanted):
            continue
        with tell.say(f"start of {name}"):
            try:
                running[name] = stack.enter_context(start())
                found.versions[name] = packages.get(name, tell.commit())
            except Absent as why:
                if name == OURS:
                    raise
                found.absent[name] = str(why)
                print(f"ABSENT {name}: {why}", file=sys.stderr, flush=True)
    return running


def take(
    found: Found, name: str, plan: Plan, one: Callable[[str], Turn], among: Sequence[str], rounds: int | None = None
) -> None:
    """The turns of a case."""
    few = {peer: plan.peer_rounds for peer in among if peer not in (OURS, TRITON, BATCHER)}
    with tell.say(name):
        found.cases[name] = in_turns(among, rounds or plan.rounds, one, fewer=few)


def rates(plan: Plan, running: dict[str, Server], alone: Alone, driver: Driver, found: Found) -> None:
    """The small model, by connections and encoding; with larger images among the Tritons only."""
    for model, kind, connections in product((SMALL, SMALL_28), KINDS, CONNECTIONS):
        if model == SMALL_28 and connections == 1:
            continue
        among = [name for name, server in running.items() if kind in server.kinds and model in server.models]

        def one(name: str, model: str = model, kind: str = kind, connections: int = connections) -> Turn:
            with alone.turn(name) as server:
                return driver.turn(server.target(model, kind), connections, plan.turn_seconds, server.cpu_seconds)

        take(found, case(model, kind, connections), plan, one, among)


def heavy(
    plan: Plan, running: dict[str, Server], alone: Alone, driver: Driver, found: Found, model: Path, core: int | None
) -> None:
    """The heavy model; at 16 connections beside what ONNX Runtime does alone on that core, in the same rounds."""
    for kind, connections in plan.heavy:
        among = [name for name, server in running.items() if kind in server.kinds]

        def one(name: str, kind: str = kind, connections: int = connections) -> Turn:
            if name == ALONE:
                rate = servers.onnxruntime_rate(model, 16, core, plan.turn_seconds)
                return Turn(rate, 16 / rate, 16 / rate, 16 / rate)
            with alone.turn(name) as server:
                return driver.turn(server.target(HEAVY, kind), connections, plan.turn_seconds, server.cpu_seconds)

        take(
            found,
            case(HEAVY, kind, connections),
            plan,
            one,
            [*among, *([ALONE] if connections == 16 else [])],
            plan.other_rounds,
        )


def kept(plan: Plan, running: dict[str, Server], alone: Alone, driver: Driver, found: Found) -> None:
    """The models whose answers are kept: hits, and requests of which each is new."""
    for model, fresh, kind in product(servers.CACHED, (False, True), KINDS):
        among = [name for name, server in running.items() if model in server.models]
        size = f"{LARGER}, " if model == KEPT_28 else ""
        for connections in (16,) if fresh else (16, 64):

            def one(
                name: str, model: str = model, kind: str = kind, connections: int = connections, fresh: bool = fresh
            ) -> Turn:
                with alone.turn(name) as server:
                    target = server.target(model, kind, fresh=fresh)
                    return driver.turn(target, connections, plan.turn_seconds, server.cpu_seconds)

            word = "miss" if fresh else "hit"
            take(found, f"cache {word}, {size}{SHOWN[kind]}, {connections}", plan, one, among, plan.other_rounds)


def health(plan: Plan, running: dict[str, Server], alone: Alone, driver: Driver, found: Found) -> None:
    """Checks, each on its own connection, while 64 connections infer as fast as they can."""
    results = found.others["health_under_load"] = {}
    for model in (SMALL, HEAVY):
        for path in plan.checked:
            for name in (OURS, TRITON) if path == CHECKED[0] else (OURS,):
                if name not in running:
                    continue
                with (
                    tell.say(f"health: {name} {path} while {model}"),
                    alone.turn(name) as server,
                    ThreadPoolExecutor(1) as pool,
                ):
                    load = pool.submit(driver.turn, server.target(model, "json"), 64, 2 * plan.turn_seconds)
                    time.sleep(0.2)
                    latencies = servers.health_latencies(server, path, PROBES, load.done)
                    load.result()
                cuts = statistics.quantiles(latencies, n=100)
                results[f"{name} {path}, {model}"] = {
                    "p50_seconds": round(cuts[49], 6), "p99_seconds": round(cuts[98], 6), "probes": len(latencies)
                }  # fmt: skip


def starts(plan: Plan, folder: Path, files: dict[str, Path], core: int | None, found: Found) -> None:
    """From the start of the process to the first answer of a model; and Triton with one model, and from the start to ready."""
    from benchmarks.server_start import measure as measure_start

    with tell.say("start of the server"):
        ours = measure_start(plan.starts)
    found.others["start"] = {
        key: ours[key] for key in ("first_answer_seconds_median", "first_answer_seconds", "listening_seconds_median")
    }
    if TRITON in found.versions:
        times = []
        with tell.say("start of Triton"):
            for number in range(min(3, plan.starts)):
                began = time.perf_counter()
                with servers.triton(folder / f"start-{number}", {SMALL: files[SMALL]}, None) as server:
                    while servers.ask(server.target(SMALL, "binary"))[0] != 200:
                        time.sleep(0.005)
                    times.append(round(time.perf_counter() - began, 3))
        found.others["start"]["triton_first_answer_seconds"] = times


def swaps(plan: Plan, folder: Path, found: Found) -> None:
    """Swaps of the version in traffic; then with memory for one version only."""
    from tests.e2e.test_swaps import figures, swapped

    with tell.say("swaps"):
        found.others["swaps"] = figures(swapped(folder / "swaps", plan.swaps))
    with tell.say("swaps with memory for one version"):
        found.others["swaps_one_version"] = figures(
            swapped(folder / "swaps-one", max(3, plan.swaps // 6), ballast_mb=30, budget_mb=50)
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: below three minutes, and noisy")
    tell.add_outputs(parser)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        print("SKIPPED: wrk is not installed (Debian: apt-get install wrk), so nothing was measured")
        return 0
    pair = two_cores()
    plan = QUICK if options.quick else FULL
    began = time.monotonic()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder:
        found = measure(plan, Path(folder), pair)
    about = {
        "date": dt.date.today().isoformat(),
        "commit": tell.commit(),
        "machine": tell.machine(),
        "load_before": round(load, 2),
        "seconds": round(time.monotonic() - began),
        "rounds": plan.rounds,
        "peer_rounds": plan.peer_rounds,
    }
    marks = judge(found)
    tell.put_out(options, document(found, marks, about), markdown(found, marks, about), name="bench-serving")
    return 0


if __name__ == "__main__":
    sys.exit(main())
