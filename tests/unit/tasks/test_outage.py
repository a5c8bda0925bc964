"""The registry goes away in the middle of a promotion, before a commit or between it and its answer: it goes on, once each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import approvals, promotions
from registry.database import Database
from registry.errors import FencedError, UnavailableError
from tasks import outage, promotion, servers
from tasks.promoting import Ended, Promoting
from tests.unit.registry import kit
from tests.unit.registry.kit import Clock
from tests.unit.tasks import soaking
from tests.unit.tasks.test_killed_at_every_step import WRITES, World, begin, settled, steps

GONE = UnavailableError("the registry does not answer")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outage")
    soaking.prepared(folder).dispose()
    return folder / "registry.db"


@pytest.fixture
def world(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    opened = soaking.prepared(tmp_path, template)
    monkeypatch.setattr(servers, "follow", lambda *_, **__: servers.Following(reached=("r",)))
    yield World(opened, Clock())
    opened.dispose()


class Failing:
    """The registry of one process: it goes away at the n-th write, with the commit done or not, and answers at the k-th look."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, *, committed: bool, looks: int = 3) -> None:
        self.number, self.committed, self.writes, self.away, self.looks = number, committed, 0, 0, looks
        leave, read = promotions.writing.__exit__, Database.read

        def leaving(writing: Any, *error: Any) -> bool | None:
            self.writes += 1
            if self.writes != self.number or error[0] is not None:
                return leave(writing, *error)
            self.away = self.looks
            if self.committed:
                leave(writing, *error)
            else:
                leave(writing, UnavailableError, GONE, None)
            writing._operation.step, writing._operation.progress = (
                writing._before
            )  # as after a commit without an answer
            raise GONE

        def reading(database: Database) -> Any:
            if self.away > 0:
                self.away -= 1
                raise GONE
            return read(database)

        patch.setattr(promotions.writing, "__exit__", leaving)
        patch.setattr(Database, "read", reading)


def carried(world: World, failing: Failing, told: list[str] | None = None) -> Ended:
    """As flows.promote has it."""
    operation = begin(world.database)
    work = world.work(operation)

    def sleep(seconds: float) -> None:
        if failing.away > 0:
            world.clock.seconds += seconds
        else:
            world.pass_time(seconds)

    work.sleep = sleep
    if told is not None:
        work.tell = told.append
    try:
        ended = outage.steadfast(work, steps)
        assert ended is not None
        return ended
    except Ended as early:
        return early
    except FencedError:
        found = promotion.ended_meanwhile(world.database, operation.id)
        assert found is not None
        return found


@pytest.mark.parametrize("committed", [True, False], ids=["after the commit", "before the commit"])
@pytest.mark.parametrize("number", range(1, WRITES + 1))
def test_a_registry_that_goes_away_at_a_change_costs_nothing_and_nothing_is_done_twice(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int, committed: bool
) -> None:
    with monkeypatch.context() as patch:
        failing = Failing(patch, number, committed=committed)
        assert carried(world, failing).outcome == "promoted"
        assert failing.writes >= number and failing.away == 0
    settled(world.database, "2")
    with world.database.read() as session:
        (row,) = promotions.listed(session, model=kit.MODEL, states=["promoted"], limit=1)
        titles = [step["title"] for step in promotions.story(session, row["id"])]
    changes = [
        title for title in titles if not title.endswith(" passed")
    ]  # a stage may be judged again, and pass again
    assert len(changes) == len(set(changes)), "each change is on record once"


def test_an_outage_is_told_once_and_its_end_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with monkeypatch.context() as patch:
        assert carried(world, Failing(patch, 5, committed=True, looks=8), told).outcome == "promoted"
    assert [line for line in told if "registry" in line] == [
        f"{GONE}; it is waited for, 15 minutes at most",
        next(line for line in told if line.startswith("the registry answers again, after ")),
    ]


def test_a_registry_that_stays_away_is_an_error_after_the_patience(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = world.clock.seconds
    with monkeypatch.context() as patch:
        failing = Failing(patch, 3, committed=False, looks=1_000_000)
        with pytest.raises(UnavailableError):
            carried(world, failing)
    assert outage.PATIENCE_SECONDS <= world.clock.seconds - began <= 1.2 * outage.PATIENCE_SECONDS


def test_five_minutes_are_waited_for_and_a_later_outage_has_the_whole_patience_again(world: World) -> None:
    work, calls = world.work(begin(world.database)), list[float]()

    def flaky(work: Promoting) -> str:
        """Away for 300 s, twelve times, each after an hour of work: more than the patience in all."""
        calls.append(world.clock.seconds)
        if len(calls) % 2 == 0:
            world.clock.seconds += 3600
        if len(calls) < 24:
            world.clock.seconds += 300 * (len(calls) % 2)
            raise GONE
        return "done"

    assert outage.steadfast(work, flaky) == "done"


def test_one_that_ended_while_the_registry_was_away_is_not_gone_on_with(world: World) -> None:
    operation = begin(world.database)
    asked = 0

    def ended_by_another(work: Promoting) -> None:
        nonlocal asked
        asked += 1
        kit.end(world.database, operation, "withdrawn")
        raise GONE

    with pytest.raises(FencedError, match="has ended"):
        outage.steadfast(world.work(operation), ended_by_another)
    assert asked == 1


def test_a_promotion_that_the_registry_does_not_know_any_more_is_out_of_these_hands(
    world: World, tmp_path: Path, template: Path
) -> None:
    operation = begin(world.database)

    def restored(work: Promoting) -> None:
        kit.reset(world.database, template)
        raise GONE

    with pytest.raises(FencedError, match="went back in time"):
        outage.steadfast(world.work(operation), restored)


def test_a_rejection_whose_process_died_before_it_could_say_so_stays_one(world: World) -> None:
    operation = begin(world.database)
    promotions.note_validation(
        world.database, operation, passed=False, report={}, signature=None, rows_independent=None, title="", detail=""
    )
    with pytest.raises(Ended) as ended:
        promotion.validate(world.work(operation))
    assert ended.value.outcome == "rejected"
    settled(world.database, "1")


def test_a_question_whose_answer_was_lost_waits_though_its_lease_beats_no_more(world: World) -> None:
    operation = begin(world.database)
    work = world.work(operation)

    def asked(work: Promoting) -> None:
        approvals.ask(work.database, work.operation, deadline_seconds=600.0)
        work.keeper.lost = "the lease has expired or was taken"
        raise GONE

    assert outage.steadfast(work, asked) is None
