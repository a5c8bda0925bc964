"""Promotions one after the other under traffic, a third of the candidates bad, a third of the promotions hit by a SIGKILL."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import select

from modelkeep.demo import answers
from modelkeep.demo.answers import DirectRuns, Request
from registry import promotions, store, versions
from registry.promotions import ACTIVE
from registry.schema import Promotion
from tests.e2e.beside import Deaths, Direct, SecondClient, come_late, say
from tests.e2e.candidates import WAYS, Gate, Way, build, spoil
from tests.e2e.harness import (
    MODEL,
    POLICY,
    ROOT,
    Box,
    box,
    go,
    kill,
    lost_in,
    parallel,
    wait_for,
    write_golden,
)
from tests.e2e.test_crashes import segfaulting

RATE = 90.0
BOXES = 2
SPREAD_SECONDS = 2.0
"""A kill comes up to so long after the promotion's begin, or after the candidate's first share."""
VALIDATED_EVERY = 10
"""Of the good candidates, one in so many goes through the probe as well."""
ENDED_SECONDS = 120.0

QUICK = {
    **POLICY,
    "stages": [0.5, 1.0],
    "dwell_seconds": 0.3,
    "minimum_requests": 15,
    "shadow_gate": True,
    "soak_seconds": 0.4,
    "deadline_seconds": 60.0,
}

Target = Literal["child", "flow", "both"]


@dataclass(frozen=True, slots=True)
class Plan:
    """One promotion: its candidate, and the kill that hits it."""

    way: Way | None
    target: Target | None = None
    from_share: bool = False
    """The delay of the kill runs from the candidate's first share, not from the promotion's begin."""
    delay_seconds: float = 0.0
    validated: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    plan: Plan
    version: str
    state: str
    gate: Gate | None
    """What stopped it, None where it went through or where the kill of its flow ended it."""
    was_stable: bool
    hit: frozenset[str]
    """What was killed in fact: a flow that had ended by then was not."""
    windows: list[tuple[float, float]]


@dataclass(slots=True)
class Tally:
    """What the promotions of one box came to."""

    outcomes: list[Outcome] = field(default_factory=list)
    requests: int = 0
    lost: int = 0
    refused: int = 0
    wrong: int = 0
    in_canary: int = 0
    crashes: int = 0
    slowest_seconds: float = 0.0


def plans(count: int, seed: int) -> list[Plan]:
    """A third of `count` bad, the ways in turn; a third killed, the targets in turn; in random order and at random moments."""
    chance = random.Random(seed)
    bad = [WAYS[number % len(WAYS)] for number in range(count // 3)]
    made = [Plan(way, validated=way.validated) for way in bad]
    made += [Plan(None, validated=number % VALIDATED_EVERY == 0) for number in range(count - len(bad))]
    targets: tuple[Target, ...] = ("child", "flow", "both")
    for number, index in enumerate(chance.sample(range(count), count // 3)):
        way = made[index].way
        late = chance.random() < 0.5 if way is None else way.gate in ("canary", "crash", "soak")
        delay = chance.uniform(0, SPREAD_SECONDS)
        made[index] = replace(made[index], target=targets[number % 3], from_share=late, delay_seconds=delay)
    chance.shuffle(made)
    return made


def promotion_of(found: Box, version: str) -> Promotion | None:
    with found.database.read() as session:
        return session.scalars(select(Promotion).where(Promotion.version == version)).first()


def last_words(found: Box, row: Promotion) -> str:
    with found.database.read() as session:
        return str(promotions.story(session, row.id)[-1]["detail"])


def gate_of(row: Promotion, detail: str) -> Gate | None:
    """What stopped a promotion, by its record and the last words of its story; None where the death of its flow did."""
    if row.state == "rejected":
        return "validation"
    if row.state != "withdrawn" or row.reason == "Lease expired":
        return None
    if "cannot serve it" in detail:
        return "load"
    if "the server died" in detail:
        return "crash"
    if row.progress.get("promoted"):
        return "soak"
    stage = row.progress["windows"][-1]["stage"]
    return "canary" if stage.startswith("canary") else "shadow"


class Series:
    """One box under traffic, with one promotion after the other."""

    def __init__(self, found: Box, folder: Path, seed: int, tally: Tally) -> None:
        self.found, self.folder, self.tally = found, folder, tally
        self.segfaulting: set[str] = set()
        self.others: list[Request] = []
        self.crashes: list[tuple[float, float]] = []
        self._seed = seed
        self._fault = folder / "fault" / "model.pt"

    def run(self, todo: list[Plan]) -> None:
        found = self.found
        first = build(self.folder / "v1.onnx", 1, None)
        found.register("1", first)
        self.golden = write_golden(self.folder / "golden.npz", first)
        found.settle_by_hand("1")
        found.serve()
        traffic = found.start_traffic(rate=RATE, seed=self._seed)
        runner = self.prepared("2", todo[0])
        for number, plan in enumerate(todo):
            # The next promotion starts (imports, waits) while this one is under way.
            following = self.prepared(str(number + 3), todo[number + 1]) if number + 1 < len(todo) else None
            self.tally.outcomes.append(self.one(str(number + 2), plan, runner))
            if following is not None:
                runner = following
        self.account(traffic.stop())

    def prepared(self, version: str, plan: Plan) -> subprocess.Popen[bytes]:
        """Register the candidate, and start a process that promotes it when it is told to."""
        found, way = self.found, plan.way
        if way is not None and way.gate == "crash":
            if not self._fault.exists():
                segfaulting(self._fault.parent)
            found.register(version, self._fault)
            self.segfaulting.add(version)
        else:
            path = build(self.folder / f"v{version}.onnx", int(version), way)
            found.register(version, path, golden=self.golden if plan.validated else None)
        if way is not None and way.name == "rotten in the store":
            with found.database.read() as session:
                (stored,) = versions.stored_files(versions.get(session, MODEL, version))
            spoil(store.DirectoryStore(found.home / "artifacts").path(stored.digest))
        policy = {f"MODELKEEP_PROMOTION__{k.upper()}": json.dumps(v) for k, v in (way.policy if way else {}).items()}
        options = () if plan.validated else ("--unvalidated",)
        return found.start(f"promote-{version}", "tests.e2e.runner", MODEL, version, *options, **policy)

    def one(self, version: str, plan: Plan, runner: subprocess.Popen[bytes]) -> Outcome:
        """Promote, kill where that is planned, wait until all is settled, and look."""
        found, way = self.found, plan.way
        before = found.stable()
        client = deaths = None
        if way is not None and way.name == "bad by the verdicts of its clients":
            client = SecondClient(found, say(version))
        elif way is not None and way.gate == "soak":
            client = SecondClient(found, come_late(version))
        elif way is not None and way.gate == "crash":
            deaths = Deaths(found)
        go(runner)
        try:
            hit, windows = self.hit(version, plan, runner)
            row: Promotion = wait_for(
                f"the end of the promotion of {version} ({plan})",
                lambda: (one := promotion_of(found, version)) and one.state not in ACTIVE and one,
                seconds=ENDED_SECONDS,
                every=0.05,
            )
        finally:
            if client is not None:
                self.others += client.stop()
            if deaths is not None:
                self.crashes += deaths.stop()
        runner.wait(timeout=20)
        found.forget(runner)
        wait_for("the server to follow", found.follows, seconds=ENDED_SECONDS, every=0.05)
        route = found.route()
        assert route is not None
        detail = last_words(found, row)
        told = f"version {version}, {plan}: {row.state}, {row.reason}: {detail}"
        expected = version if row.state == "promoted" else before
        assert (route.stable, route.candidate, route.promotion) == (expected, None, None), told
        assert found.held_leases() == [], told
        served = found.info()["models"][MODEL]
        assert (served["stable"], served["candidate"], served["weight"]) == (expected, None, 0.0), told
        gate, was_stable = gate_of(row, detail), bool(row.progress.get("promoted"))
        flow_died = "flow" in hit
        if way is None:
            assert row.state == "promoted" or (row.state == "withdrawn" and (flow_died or gate is not None)), told
        else:
            assert row.state in ("rejected", "withdrawn") or (row.state == "failed" and way.gate == "validation"), told
            assert not was_stable or way.gate == "soak", f"past its canary: {told}"
            assert gate is not None or flow_died, told
        return Outcome(plan, version, row.state, gate, was_stable, hit, windows)

    def hit(
        self, version: str, plan: Plan, runner: subprocess.Popen[bytes]
    ) -> tuple[frozenset[str], list[tuple[float, float]]]:
        if plan.target is None:
            return frozenset(), []
        found = self.found
        begun = (lambda: found.weighs(version)) if plan.from_share else (lambda: promotion_of(found, version))
        wait_for(
            "a promotion to kill in", lambda: begun() or runner.poll() is not None, seconds=ENDED_SECONDS, every=0.05
        )
        time.sleep(plan.delay_seconds)  # a random moment is what is tested
        killed, windows = set(), []
        if plan.target in ("flow", "both") and runner.poll() is None:
            kill(runner.pid)
            killed.add("flow")
        if plan.target in ("child", "both"):
            windows.append(kill_child(found))
            killed.add("child")
        return frozenset(killed), windows

    def account(self, requests: list[Request]) -> None:
        """Every request is answered rightly, or lost with a killed server, or failed by a bad candidate within its share."""
        found, tally = self.found, self.tally
        direct = Direct(found, self.segfaulting)
        bad = {one.version: one.plan.way for one in tally.outcomes if one.plan.way is not None}
        everything = requests + self.others
        failed = [r for r in everything if r.error == "http 500" and r.version in bad and fails(direct, r)]
        known = {id(request) for request in failed}
        windows = [window for one in tally.outcomes for window in one.windows]
        lost, unexplained = lost_in([r for r in everything if id(r) not in known], windows + self.crashes)
        checked = answers.check(requests, direct)
        tally.requests, tally.lost, tally.in_canary = len(everything), len(lost), len(failed)
        tally.wrong, tally.crashes = checked.wrong, len(self.crashes)
        tally.refused = sum(request.error == "refused" for request in everything)
        tally.slowest_seconds = max(request.latency_seconds for request in requests)
        shown = [(r.index, r.error, r.version, r.message, r.sent, r.finished) for r in unexplained[:5]]
        assert not unexplained, (len(unexplained), shown, windows, self.crashes)
        assert checked.wrong == 0, checked.examples
        assert checked.checked == sum(request.error is None for request in requests)
        assert found.audit_faults() == []


def fails(direct: DirectRuns, request: Request) -> bool:
    """Whether the version that the answer names fails on this image when it is run directly."""
    assert request.version is not None
    return request.image < 0 or direct.error(request.version, request.image) is not None


def kill_child(found: Box) -> tuple[float, float]:
    """SIGKILL to the child that lives; one that segfaults may be gone already when it is looked up."""
    while True:
        try:
            return kill(found.child_pid())
        except ProcessLookupError:
            time.sleep(0.01)


def series(folder: Path, todo: list[Plan], seed: int, tally: Tally) -> None:
    with box(folder, policy=dict(QUICK)) as found:
        Series(found, folder, seed, tally).run(todo)


def run_many(folder: Path, count: int, seed: int) -> list[Tally]:
    todo = plans(count, seed)
    tallies = [Tally() for _ in range(BOXES)]
    parallel(
        {
            f"box {number}": lambda number=number: series(  # type: ignore[misc]
                folder / f"box-{number}", todo[number::BOXES], seed + number, tallies[number]
            )
            for number in range(BOXES)
        }
    )
    return tallies


def summary(tallies: list[Tally], seed: int, seconds: float) -> dict[str, Any]:
    outcomes = [one for tally in tallies for one in tally.outcomes]
    bad = [one for one in outcomes if one.plan.way is not None]
    return {
        "promotions": len(outcomes),
        "good": len(outcomes) - len(bad),
        "bad": len(bad),
        "kills": sum(bool(one.hit) for one in outcomes),
        "targets": dict(sorted(Counter("both" if len(o.hit) > 1 else next(iter(o.hit)) for o in outcomes if o.hit).items())),
        "good_ended": dict(sorted(Counter(one.state for one in outcomes if one.plan.way is None).items())),
        "bad_stopped_by": {
            way.name: dict(sorted(Counter(one.gate or "kill" for one in bad if one.plan.way == way).items()))
            for way in WAYS
        },
        "stopped_elsewhere": sum(o.gate not in (None, o.plan.way.gate) for o in bad if o.plan.way is not None),
        "good_withdrawn": sum(one.plan.way is None and one.gate is not None for one in outcomes),
        "crashes": sum(tally.crashes for tally in tallies),
        "requests": sum(tally.requests for tally in tallies),
        "failed_in_canary": sum(tally.in_canary for tally in tallies),
        "lost": sum(tally.lost for tally in tallies),
        "refused": sum(tally.refused for tally in tallies),
        "wrong": sum(tally.wrong for tally in tallies),
        "past_their_canary": sum(
            one.state == "promoted" or (one.was_stable and one.plan.way is not None and one.plan.way.gate != "soak")
            for one in bad
        ),
        "slowest_seconds": round(max(tally.slowest_seconds for tally in tallies), 2),
        "seconds": round(seconds, 1),
        "seed": seed,
    }  # fmt: skip


def measured(folder: Path, usual: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    seed = int(os.environ.get("MODELKEEP_TEST_SEED") or random.SystemRandom().randrange(1_000_000))
    count, began = int(os.environ.get("MODELKEEP_TEST_PROMOTIONS", usual)), time.monotonic()
    with capsys.disabled():
        print(f"\npromotions: seed {seed}", flush=True)
        tallies = run_many(folder, count, seed)
        figures = summary(tallies, seed, time.monotonic() - began)
        print("promotions:", json.dumps(figures), flush=True)
    return figures


def hold(figures: dict[str, Any]) -> None:
    """What must be 0 is 0. A machine that stalls may cost a good candidate its promotion, or stop a bad one sooner: once in a hundred."""
    assert (figures["past_their_canary"], figures["wrong"], figures["refused"]) == (0, 0, 0), figures
    assert figures["good_withdrawn"] <= max(1, figures["good"] // 100), figures
    assert figures["stopped_elsewhere"] <= max(1, figures["bad"] // 50), figures


def test_fifty_promotions_under_load_with_kills_let_no_bad_version_past_its_canary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(measured(tmp_path, 50, capsys))


@pytest.mark.long
def test_a_thousand_promotions_under_load_with_kills_let_no_bad_version_past_its_canary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With MODELKEEP_TEST_RECORD=1 the figures are added to docs/RELIABILITY.md."""
    figures = measured(tmp_path, 1000, capsys)
    if os.environ.get("MODELKEEP_TEST_RECORD") == "1":
        record(figures)
    hold(figures)


COLUMNS = (
    "promotions",
    "good",
    "bad",
    "kills",
    "requests",
    "failed_in_canary",
    "lost",
    "refused",
    "wrong",
    "past_their_canary",
    "slowest_seconds",
    "seconds",
    "seed",
)
TABLE = "| date | commit | promotions |"


def record(figures: dict[str, Any]) -> None:
    """A row in its table of docs/RELIABILITY.md."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    )
    cells = [datetime.now(UTC).strftime("%Y-%m-%d"), commit.stdout.strip(), *(str(figures[name]) for name in COLUMNS)]
    path = ROOT / "docs" / "RELIABILITY.md"
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith(TABLE))
    while end < len(lines) and lines[end].startswith("| "):
        end += 1
    lines.insert(end, "| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")
