"""Runs the test layers one after another with pytest and prints one table of totals, with the reasons for skipping."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
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


def run_layer(name: str, extra: list[str]) -> Outcome:
    """Runs one layer and reads its counts from pytest's own XML report."""
    layer = LAYERS[name]
    report = RESULTS / f"{name}.xml"
    report.unlink(missing_ok=True)
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
    exit_code = subprocess.run(command, cwd=ROOT, check=False).returncode
    outcome = Outcome(name, exit_code, time.monotonic() - started)
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
    outcomes = [run_layer(name, extra) for name in arguments.layers]
    print_totals(outcomes)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
