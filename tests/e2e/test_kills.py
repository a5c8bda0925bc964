"""SIGKILL to the server's child, to the process of the promotion, and to both, at random moments of a canary under traffic."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from registry.promotions import ACTIVE
from tests.e2e.harness import ROOT, Box, box, go, kill, lost_in, parallel, wait_for

TARGETS = ("child", "flow", "both")
RATE = 120.0
BOXES = 2
"""Boxes side by side, each with its own server, traffic and promotions."""
SPREAD_SECONDS = 2.6
"""A kill comes up to so long after the candidate got its first share: in its stages, at 100 %, in the soak, or just after."""


@dataclass(slots=True)
class Kill:
    target: str
    step: str
    outcome: str
    windows: list[tuple[float, float]]


@dataclass(slots=True)
class Tally:
    """What the kills of one box came to."""

    kills: list[Kill] = field(default_factory=list)
    requests: int = 0
    lost: int = 0
    refused: int = 0
    wrong: int = 0
    checked: int = 0
    slowest_seconds: float = 0.0


def one_kill(found: Box, version: str, target: str, delay_seconds: float, runner: subprocess.Popen[bytes]) -> Kill:
    """Promote a version, kill in the middle of it, wait until all is settled, and look."""
    go(runner)
    wait_for("a canary to kill in", lambda: found.weighs(version) or runner.poll() is not None)
    assert runner.poll() is None, found.log(f"promote-{version}").read_text()
    time.sleep(delay_seconds)
    step = (found.promotion(version) or {})["step"]
    windows = []
    if target in ("flow", "both"):
        kill(runner.pid)
        runner.wait(timeout=5)
    if target in ("child", "both"):
        windows.append(kill(found.child_pid()))
    row = wait_for(
        f"the end of the promotion of {version} ({target} killed in {step})",
        lambda: (found_row := found.promotion(version)) and found_row["state"] not in ACTIVE and found_row,
    )
    if target == "child":
        assert runner.wait(timeout=20) in (0, 1), found.log(f"promote-{version}").read_text()
    wait_for("the server to follow", found.follows)
    route = found.route()
    assert route is not None
    expected = version if row["state"] == "promoted" else row["from_version"]
    assert (route.stable, route.candidate, route.promotion) == (expected, None, None), row
    assert found.held_leases() == []
    served = found.info()["models"]["digits"]
    assert (served["stable"], served["candidate"], served["weight"]) == (expected, None, 0.0)
    return Kill(target, step, row["state"], windows)


def series(folder: Path, kills: list[tuple[str, float]], seed: int, tally: Tally) -> None:
    """One box under traffic, killed again and again."""
    with box(folder) as found:
        found.first("1")
        for number in range(len(kills)):
            found.add(str(number + 2))
        found.serve()
        traffic = found.start_traffic(rate=RATE, seed=seed)
        runner = found.promote("2", "--unvalidated")
        for number, (target, delay) in enumerate(kills):
            # The next promotion starts (imports, waits) while this one is under way.
            following = found.promote(str(number + 3), "--unvalidated") if number + 1 < len(kills) else None
            tally.kills.append(one_kill(found, str(number + 2), target, delay, runner))
            if following is not None:
                runner = following
        requests = traffic.stop()
        lost, unexplained = lost_in(requests, [window for one in tally.kills for window in one.windows])
        answers = found.check(requests)
        tally.requests, tally.lost, tally.wrong, tally.checked = (
            len(requests),
            len(lost),
            answers.wrong,
            answers.checked,
        )
        tally.refused = sum(request.error == "refused" for request in requests)
        tally.slowest_seconds = max(request.latency_seconds for request in requests)
        assert not unexplained, [(r.index, r.error, r.message, r.sent, r.finished) for r in unexplained[:5]]
        assert answers.wrong == 0, answers.examples
        assert answers.checked == len(requests) - len(lost)
        assert found.audit_faults() == []


def run_kills(folder: Path, count: int, seed: int) -> list[Tally]:
    chance = random.Random(seed)
    plan = [(TARGETS[number % 3], chance.uniform(0, SPREAD_SECONDS)) for number in range(count)]
    chance.shuffle(plan)
    tallies = [Tally() for _ in range(BOXES)]
    parallel(
        {
            f"box {number}": lambda number=number: series(  # type: ignore[misc]
                folder / f"box-{number}", plan[number::BOXES], seed + number, tallies[number]
            )
            for number in range(BOXES)
        }
    )
    return tallies


def summary(tallies: list[Tally], seed: int, seconds: float) -> dict[str, object]:
    kills = [one for tally in tallies for one in tally.kills]
    return {
        "kills": len(kills),
        "targets": dict(sorted(Counter(one.target for one in kills).items())),
        "steps": dict(sorted(Counter(one.step for one in kills).items())),
        "outcomes": dict(sorted(Counter(f"{one.target}: {one.outcome}" for one in kills).items())),
        "requests": sum(tally.requests for tally in tallies),
        "lost": sum(tally.lost for tally in tallies),
        "refused": sum(tally.refused for tally in tallies),
        "wrong": sum(tally.wrong for tally in tallies),
        "slowest_seconds": round(max(tally.slowest_seconds for tally in tallies), 2),
        "seconds": round(seconds, 1),
        "seed": seed,
    }


def seed_of() -> int:
    return int(os.environ.get("MODELKEEP_TEST_SEED") or random.SystemRandom().randrange(1_000_000))


def test_ten_kills_at_random_moments_of_a_canary_cost_only_the_requests_in_flight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed, began = seed_of(), time.monotonic()
    with capsys.disabled():
        print(f"\nkills: seed {seed}", flush=True)
        tallies = run_kills(tmp_path, int(os.environ.get("MODELKEEP_TEST_KILLS", "10")), seed)
        print("kills:", json.dumps(summary(tallies, seed, time.monotonic() - began)), flush=True)


@pytest.mark.long
def test_two_hundred_kills_at_random_moments_of_a_canary_cost_only_the_requests_in_flight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With MODELKEEP_TEST_RECORD=1 the figures are added to docs/RELIABILITY.md."""
    seed, began = seed_of(), time.monotonic()
    with capsys.disabled():
        print(f"\nkills: seed {seed}", flush=True)
        tallies = run_kills(tmp_path, int(os.environ.get("MODELKEEP_TEST_KILLS", "200")), seed)
        figures = summary(tallies, seed, time.monotonic() - began)
        print("kills:", json.dumps(figures), flush=True)
    if os.environ.get("MODELKEEP_TEST_RECORD") == "1":
        record(figures)


def record(figures: dict[str, object]) -> None:
    """A row in its table of docs/RELIABILITY.md."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    )
    columns = ("kills", "requests", "lost", "refused", "wrong", "slowest_seconds", "seconds", "seed")
    cells = [datetime.now(UTC).strftime("%Y-%m-%d"), commit.stdout.strip(), *(str(figures[name]) for name in columns)]
    path = ROOT / "docs" / "RELIABILITY.md"
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith("| date | commit | kills |"))
    while end < len(lines) and lines[end].startswith("| "):
        end += 1
    lines.insert(end, "| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")
