"""The process of a promotion dies right after each thing that it puts on record: the next start repairs it.

To die right before the next one comes to the same on record.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import leases, promotions
from registry.database import Database
from registry.errors import FencedError
from registry.policy import PromotionPolicy
from registry.promotions import Operation
from tasks import promotion, servers
from tasks.promoting import Ended, Promoting
from tasks.soak import soak
from tasks.watchman import Watchman
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, Clock
from tests.unit.tasks import soaking
from tests.unit.tasks.soaking import at_work, report

POLICY = PromotionPolicy(
    stages=[0.5, 1.0], dwell_seconds=2, minimum_requests=20, baseline_seconds=2, shadow_seconds=2, shadow_requests=0,
    soak_seconds=8,
)  # fmt: skip
RUN = "run-1"
WRITES = 14
"""What this promotion puts on record, one transaction each; a test counts them."""


class Killed(BaseException):
    """SIGKILL: nothing of this process runs any more."""


class World:
    """One model under traffic: whenever somebody waits, time goes on and the replica reports."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.database, self.clock = database, clock
        self.requests = 0

    def pass_time(self, seconds: float) -> None:
        self.clock.seconds += max(seconds, 1.0)
        self.requests += 40
        route = kit.route(self.database)
        for version in (route.stable, route.candidate):
            if version is not None:
                report(self.database, version, route.generation, requests=self.requests, errors=0)

    def work(self, operation: Operation) -> Promoting:
        work = at_work(self.database, operation, self.clock)
        work.sleep = self.pass_time
        return work


def steps(work: Promoting) -> Ended:
    """As flows.promote has them, without probe and approval."""
    if work.operation.progress.get("promoted"):
        return soak(work)
    if "validated" not in work.operation.progress:
        promotions.note_validation(
            work.database, work.operation, passed=True, report={}, signature=None, rows_independent=None, title="", detail=""
        )  # fmt: skip
    promotion.baseline(work)
    promotion.shadow(work)
    promotion.canary(work)
    promotion.promote(work)
    return soak(work)


def begin(database: Database) -> Operation:
    return kit.begin(database, "2", policy=POLICY, flow_run_id=RUN)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    soaking.prepared(folder).dispose()
    return folder / "registry.db"


@pytest.fixture
def world(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    opened = soaking.prepared(tmp_path, template)
    monkeypatch.setattr(servers, "follow", lambda *_, **__: servers.Following(reached=("r",)))
    yield World(opened, Clock())
    opened.dispose()


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Die when a transaction of the promotion has been committed. Returns the list of those that were begun."""
    seen: list[str] = []
    leave = promotions.writing.__exit__

    def dying(self: Any, *error: Any) -> bool | None:
        seen.append(self._operation.step)
        suppressed = leave(self, *error)
        if len(seen) == number:
            raise Killed
        return suppressed

    monkeypatch.setattr(promotions.writing, "__exit__", dying)
    return seen


def settled(database: Database, stable: str) -> None:
    route = kit.route(database)
    assert (route.stable, route.candidate, route.watch, route.promotion) == (stable, None, False, None)
    assert [version for version, status in kit.places(database).items() if status == "stable"] == [stable]
    with database.read() as session:
        assert leases.beats_everywhere(session) == {}
        assert promotions.listed(session, states=promotions.ACTIVE) == []
    assert kit.verdict(database).faults == []


def test_undisturbed_it_is_promoted_and_tells_its_times(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, operation = kill_at(monkeypatch, 0), begin(world.database)
    ended = steps(world.work(operation))
    assert ended.outcome == "promoted"
    assert len(seen) == WRITES, seen
    with world.database.read() as session:
        found = promotions.describe(promotions.get(session, operation.id))
    assert found["swap_seconds"] > 0, "from the command to all of the traffic, by the times of the record"
    assert found["watch_seconds"] == POLICY.soak_seconds, "apart from the swap, on the watch's own clock"
    settled(world.database, "2")


@pytest.mark.parametrize("number", range(1, WRITES + 1))
def test_the_run_that_starts_again_brings_it_to_its_end(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as dying, pytest.raises(Killed):
        kill_at(dying, number)
        steps(world.work(begin(world.database)))
    done = promotion.promoted_by(world.database, RUN)
    assert (done is not None) == (number == WRITES), "only after the last one there is nothing left to do"
    if done is None:
        operation = begin(world.database)
        assert operation.resumed
        done = operation.id, steps(world.work(operation))
    assert done[1].outcome == "promoted"
    settled(world.database, "2")


@pytest.mark.parametrize("number", range(1, WRITES + 1))
def test_where_no_run_starts_again_the_watchman_leaves_one_stable_version(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as dying, pytest.raises(Killed):
        kill_at(dying, number)
        steps(world.work(begin(world.database)))
    promoted = kit.route(world.database).stable == "2"
    watchman = Watchman(world.database, ttl_seconds=30.0, poll_seconds=0.5, name="watchman:a", monotonic=world.clock)
    for _ in range(60):
        watchman.look()
        world.pass_time(1.0)
    settled(world.database, "2" if promoted else "1")


def test_of_two_processes_of_one_run_only_the_later_writes(world: World) -> None:
    first = begin(world.database)
    second = begin(world.database)
    with world.database.read() as session:
        (beat,) = leases.beats(session, ENVIRONMENT)
    assert beat.token == second.held.token
    with pytest.raises(FencedError):
        steps(world.work(first))
    assert steps(world.work(second)).outcome == "promoted"
