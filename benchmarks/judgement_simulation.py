"""Simulates whole canaries against the real judge and prints Markdown tables.

`python -m benchmarks.judgement_simulation` takes about half an hour on one core. Every look draws the requests of one
interval, routes them at random, and asks the judge. Nothing of it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from registry.policy import PromotionPolicy
from tasks.judgement import StreamCounts, Window, judge, judge_soak

STABLE = {"error": 0.01, "slow": 0.05}

CANDIDATES: dict[str, dict[str, float]] = {
    "as good (1 % errors, 5 % slow)": {"error": 0.01, "slow": 0.05},
    "errors 1 -> 2 %": {"error": 0.02, "slow": 0.05},
    "errors 1 -> 5 %": {"error": 0.05, "slow": 0.05},
    # Log-normal latencies with sigma 0.5: of a model 1.5 times as slow, 20 % lie above the stable version's p95.
    "p95 x 1.5 (20 % slow)": {"error": 0.01, "slow": 0.20},
    "half of it fails": {"error": 0.50, "slow": 0.05},
}

GOOD, ERRORS, SLOW = (list(CANDIDATES.values())[k] for k in (0, 2, 3))


@dataclass(frozen=True, slots=True)
class Clusters:
    """How bad requests come: in groups of so many that fail together, for the candidate and for the stable version.

    Several sizes share the requests evenly. `counted` off is the mistake that the judge does not make: every failure an event.
    """

    candidate: Sequence[int] = (1,)
    stable: Sequence[int] = (1,)
    counted: bool = True


ALONE = Clusters()

CORRELATED: dict[str, tuple[dict[str, float], Clusters]] = {
    "as good, clusters of 4": (GOOD, Clusters((4,), (4,))),
    "as good, clusters of 8": (GOOD, Clusters((8,), (8,))),
    "as good, clusters of 16": (GOOD, Clusters((16,), (16,))),
    "as good, half alone, half in 16": (GOOD, Clusters((1, 16), (1, 16))),
    "as good, 8 in the stable version only": (GOOD, Clusters((1,), (8,))),
    "as good, 8 in the candidate only": (GOOD, Clusters((8,), (1,))),
    "errors 1 -> 5 %, clusters of 4": (ERRORS, Clusters((4,), (4,))),
    "errors 1 -> 5 %, 8 in the stable version only": (ERRORS, Clusters((1,), (8,))),
    "p95 x 1.5, clusters of 4": (SLOW, Clusters((4,), (4,))),
}

MISCOUNTED: dict[str, tuple[dict[str, float], Clusters]] = {
    f"as good, clusters of {size}, each failure an event": (GOOD, Clusters((size,), (size,), counted=False))
    for size in (4, 8, 16)
}


@dataclass(slots=True)
class Outcome:
    """How one simulated canary ended: "promoted", "withdrawn" or "held", after how long, in which stage."""

    end: str
    seconds: float
    stage: str
    candidate_bad: int


def run_canary(
    candidate: dict[str, float],
    requests_per_second: float,
    policy: PromotionPolicy,
    random: np.random.Generator,
    *,
    stable: dict[str, float] = STABLE,
    look_seconds: float = 5.0,
    soak: bool = True,
    clusters: Clusters = ALONE,
) -> Outcome:
    """One canary from the first stage to the end of the soak, judged every `look_seconds`."""
    windows: list[Window] = []
    frozen = {stream: StreamCounts() for stream in stable}
    total = 0.0
    candidate_bad = 0

    def add(old: StreamCounts | None, requests: Sequence[int], rate: float, sizes: Sequence[int]) -> StreamCounts:
        total = old or StreamCounts()
        for size, groups in zip(sizes, requests, strict=True):
            failed = int(random.binomial(groups, rate))
            clustered = failed * size * (size - 1) if clusters.counted else 0
            total += StreamCounts(groups * size, failed * size, clustered)
        return total

    def drawn(share: float, sizes: Sequence[int]) -> list[int]:
        """Groups of each size that one version gets in one interval."""
        return [int(random.poisson(requests_per_second * look_seconds * share / len(sizes) / size)) for size in sizes]

    def look(window: Window, weight: float) -> Window:
        nonlocal candidate_bad
        to_candidate, to_stable = drawn(weight, clusters.candidate), drawn(1 - weight, clusters.stable)
        after = replace(
            window,
            candidate={
                s: add(window.candidate.get(s), to_candidate, r, clusters.candidate) for s, r in candidate.items()
            },
            stable={s: add(window.stable.get(s), to_stable, r, clusters.stable) for s, r in stable.items()},
        )
        for s in candidate:
            candidate_bad += after.candidate[s].bad - window.candidate.get(s, StreamCounts()).bad
        return after

    for weight in policy.stages:
        window = Window(f"{weight:.0%}", weight)
        windows.append(window)
        seconds = 0.0
        while True:
            windows[-1] = look(windows[-1], weight)
            seconds += look_seconds
            verdict = judge(windows, frozen, policy, stage_seconds=seconds).verdict
            if verdict == "withdraw":
                return Outcome("withdrawn", total + seconds, f"{weight:.0%}", candidate_bad)
            if verdict == "advance":
                break
            if seconds >= policy.deadline_seconds:
                return Outcome("held", total + seconds, f"{weight:.0%}", candidate_bad)
        total += seconds
        if weight < 1:
            frozen = {s: frozen[s] + windows[-1].stable[s] for s in frozen}
    seconds = 0.0
    while soak and seconds < policy.soak_seconds:
        windows.append(Window("soak", 1.0))
        while seconds < policy.soak_seconds:
            windows[-1] = look(windows[-1], 1.0)
            seconds += look_seconds
            if judge_soak(windows, frozen, policy, stage_seconds=seconds).verdict == "withdraw":
                return Outcome("withdrawn", total + seconds, "soak", candidate_bad)
            if seconds % policy.dwell_seconds < look_seconds:
                break  # the next slice of the soak is a window of its own
    return Outcome("promoted", total + seconds, "", candidate_bad)


def row(name: str, rate: float, runs: int, candidate: dict[str, float], clusters: Clusters, seed: int) -> str:
    """One line of the table."""
    policy, random = PromotionPolicy(), np.random.default_rng([seed, int(rate * 1000)])
    # At a few requests a second nothing happens within five seconds.
    look = 5.0 if rate >= 10 else 10.0
    outcomes = [run_canary(candidate, rate, policy, random, look_seconds=look, clusters=clusters) for _ in range(runs)]
    share = {end: sum(o.end == end for o in outcomes) / runs for end in ("promoted", "withdrawn", "held")}
    seconds = [o.seconds for o in outcomes]
    return (
        f"| {name} | {rate:g} | {runs} "
        f"| {share['promoted']:.1%} | {share['withdrawn']:.1%} | {share['held']:.1%} "
        f"| {np.median(seconds):.0f} ({np.quantile(seconds, 0.9):.0f}) "
        f"| {np.median([o.candidate_bad for o in outcomes]):.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300, help="canaries for each bad candidate and rate")
    parser.add_argument("--good-runs", type=int, default=1000, help="canaries for each good candidate and rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 5, 10, 50, 200], help="requests per second")
    parser.add_argument("--seed", type=int, default=20261101)
    parser.add_argument(
        "--table",
        choices=["alone", "correlated", "miscounted"],
        nargs="+",
        default=["alone", "correlated", "miscounted"],
    )
    arguments = parser.parse_args()
    tables = {
        "alone": {name: (candidate, ALONE) for name, candidate in CANDIDATES.items()},
        "correlated": CORRELATED,
        "miscounted": MISCOUNTED,
    }
    for table in arguments.table:
        print(f"\n{table}\n")
        print(
            "| candidate | requests/s | runs | promoted | withdrawn | held | seconds, median (p90) | its bad requests |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name, (candidate, clusters) in tables[table].items():
            for rate in arguments.rates:
                runs = arguments.good_runs if candidate == STABLE else arguments.runs
                print(row(name, rate, runs, candidate, clusters, arguments.seed), flush=True)


if __name__ == "__main__":
    main()
