"""Runs the test layers with pytest and prints one table of totals, with the reasons for skipping.

Where there are two cores, the registry's tests on MariaDB and PostgreSQL run beside those of the first layers; end to end is alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from devices import device_names

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".test-results"
NO_TESTS_COLLECTED = 5


@dataclass(frozen=True)
class Layer:
    """One run of pytest: what it selects, and after how many seconds a test counts as hung (0: never)."""

    paths: tuple[str, ...]
    markers: str
    timeout_seconds: int
    options: tuple[str, ...] = ()


REGISTRY = ("tests/unit/registry", "tests/integration/registry")
LAYERS = {
    "unit": Layer(("tests/unit",), "not long and not gpu", 60),
    "integration": Layer(("tests/integration",), "not long and not gpu", 240),
    # The registry's tests once more, on a real server that the run starts for itself.
    "mariadb": Layer(REGISTRY, "not long and not gpu", 240, ("--registry-database=mariadb",)),
    "postgresql": Layer(REGISTRY, "not long and not gpu", 240, ("--registry-database=postgresql",)),
    "e2e": Layer(("tests/e2e",), "not long and not gpu", 600),
    "long": Layer(("tests",), "long and not gpu", 0),
    "gpu": Layer(("tests",), "gpu", 600),
}
BESIDE = ("mariadb", "postgresql")
"""They wait for their servers much of the time, and measure nothing."""
NOT_BESIDE = ("e2e", "long", "gpu")
"""They have the machine to themselves."""


@dataclass
class Outcome:
    """What a layer's run came to."""

    name: str
    exit_code: int
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        return self.exit_code == 0


def run_layer(name: str, extra: list[str], *, aside: bool = False) -> Outcome:
    """Runs one layer and reads its counts from pytest's own XML report. `aside`: what it prints is shown when it is done."""
    layer = LAYERS[name]
    report = RESULTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    if not aside:
        print(f"\n== {name} tests", flush=True)
    started = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "pytest",
        *layer.paths,
        *layer.options,
        "-m",
        layer.markers,
        "-q",
        f"--timeout={layer.timeout_seconds}",
    ]
    command += [f"--junitxml={report}", "-o", "junit_family=xunit2", *extra]
    done = subprocess.run(
        command,
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE if aside else None,
        stderr=subprocess.STDOUT if aside else None,
    )
    if aside:
        print(f"\n== {name} tests, which ran beside\n{done.stdout.decode(errors='replace')}", flush=True)
    outcome = Outcome(name, done.returncode, time.monotonic() - started)
    if not report.exists():
        return outcome
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed += 1
        elif skipped is not None:
            outcome.skipped[skipped.get("message") or "no reason given"] += 1
        else:
            outcome.passed += 1
    return outcome


def run_layers(names: list[str], extra: list[str]) -> list[Outcome]:
    """All of them, in this order; those of BESIDE at the side of the first, where there are cores for both."""
    beside = [name for name in names if name in BESIDE]
    first = [name for name in names if name not in BESIDE + NOT_BESIDE]
    if (os.cpu_count() or 1) < 2 or not beside or not first:
        return [run_layer(name, extra) for name in names]
    with ThreadPoolExecutor(1) as side:
        running = side.submit(lambda: [run_layer(name, extra, aside=True) for name in beside])
        outcomes = [run_layer(name, extra) for name in first]
        outcomes += running.result()
    return outcomes + [run_layer(name, extra) for name in names if name in NOT_BESIDE]


def print_totals(outcomes: list[Outcome]) -> None:
    """The last thing on the screen: one line a layer, one line a reason for skipping."""
    print(f"\n{'layer':<14}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for outcome in outcomes:
        skipped = sum(outcome.skipped.values())
        note = ""
        if outcome.exit_code == NO_TESTS_COLLECTED:
            note = "  no tests found"
        elif not outcome.ok and not outcome.failed:
            note = f"  pytest ended with {outcome.exit_code}"
        print(f"{outcome.name:<14}{outcome.passed:>8}{outcome.failed:>8}{skipped:>9}{outcome.seconds:>9.1f}{note}")
    reasons: Counter[str] = sum((outcome.skipped for outcome in outcomes), Counter())
    for reason, count in reasons.most_common():
        print(f"SKIPPED {count} test{'s' if count != 1 else ''}: {reason}")
    print("PASSED" if all(outcome.ok for outcome in outcomes) else "FAILED", flush=True)


def main() -> int:
    """Exit 0 when every layer passed, 1 otherwise; `gpu` without a device is a loud skip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layers", nargs="+", choices=LAYERS, help="which layers, in this order")
    arguments, extra = parser.parse_known_args()
    if "gpu" in arguments.layers and not device_names():
        print("SKIPPED all GPU tests: this machine has no NVIDIA device that its driver answers for")
        return 0
    RESULTS.mkdir(exist_ok=True)
    outcomes = run_layers(arguments.layers, extra)
    print_totals(outcomes)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
