"""Logs go only where no backup that stays could ever use them: whatever happened before, each goes on to where it went before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from registry import clock
from tasks.backup import log_plan, log_retention, states
from tasks.backup.log_retention import Need
from tests.unit.tasks.backup.log_history import History, MariaDB, PostgreSQL, look, run, three_days

STEPS = ("write", "ship", "back_up", "write", "ship", "lose", "reset", "replace")
LIFE = tuple(one for one in STEPS if one != "reset")
"""After RESET MASTER a log of before may be taken for one of the same name until that is shipped; where it is gone it is not."""


@given(
    there=some.lists(some.tuples(some.integers(1, 3), some.integers(1, 9)), unique=True),
    needs=some.lists(some.none() | some.tuples(some.integers(1, 3), some.integers(1, 9))),
)
def test_what_a_kept_backup_needs_and_all_after_it_stays_and_the_last_in_any_case(
    there: list[tuple[int, int]], needs: list[tuple[int, int] | None]
) -> None:
    found = log_retention.decide(there, [Need(f"{number}", first) for number, first in enumerate(needs)])
    goes = {one for one in there if found.goes(one)}
    assert found.rule and (not there or max(there) not in goes)
    known = [one for one in needs if one is not None]
    assert not any(first <= one for one in goes for first in known)
    if not known:
        assert goes == set()
    elif there:
        assert all(one in goes for one in there if one < min(*known, max(there)))


@pytest.mark.parametrize("make", [MariaDB, PostgreSQL])
@settings(max_examples=40, deadline=None)
@given(steps=some.lists(some.sampled_from(STEPS), min_size=4, max_size=24), data=some.data())
def test_every_kept_backup_goes_on_to_where_it_went_before_whatever_happened(
    make: type[MariaDB] | type[PostgreSQL],
    steps: list[str],
    data: some.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    history = make()
    for step in ("ship", *steps):
        getattr(history, step)()
    for backup in list(history.backups):
        if data.draw(some.booleans()):
            history.drop(backup)
    before, there = history.ways(), history.places[0].logs()
    home = tmp_path_factory.getbasetemp() / "home"
    shown = look(history)
    done = run(history, home)
    assert done.waits is None and done.troubles == {}
    assert history.ways() == before
    assert [len(one.goes) for one in shown] == [len(one.removed) for one in done.databases]
    left = history.places[0].logs()
    assert left == there[len(there) - len(left) :] and left[-1] == there[-1], "a gapless end of what was there"
    assert sum(len(one.removed) for one in done.databases) == len(there) - len(left)
    if not history.backups:
        assert left == there
    history.ship()  # goes on as if nothing had happened
    later = history.ways()
    run(history, home)
    assert history.ways() == later


@pytest.mark.parametrize("make", [MariaDB, PostgreSQL])
@settings(max_examples=30, deadline=None)
@given(steps=some.lists(some.sampled_from((*LIFE, "prune", "drop")), min_size=8, max_size=40))
def test_a_life_with_prunes_goes_to_the_same_moments_as_one_without(
    make: type[MariaDB] | type[PostgreSQL], steps: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever comes after a prune: what is shipped then follows what was kept, and a hole is told in the same words."""
    home, (pruned, whole) = tmp_path_factory.getbasetemp() / "home", (make(), make())
    for history in (pruned, whole):
        for step in ("ship", *steps):
            if step == "prune":
                if history is pruned:
                    assert run(history, home).waits is None
            elif step == "drop":
                if history.backups:
                    history.drop(history.backups[0])
            else:
                getattr(history, step)()
    assert pruned.ways() == whole.ways()
    assert pruned.shelf.head() == whole.shelf.head() and pruned.shelf.last() == whole.shelf.last()


def test_of_a_postgresql_the_base_that_the_oldest_backup_needs_stays_with_all_after_it(tmp_path: Path) -> None:
    history = three_days(PostgreSQL)
    before = history.ways()
    [done] = run(history, tmp_path).databases
    # The second base is younger than the second backup: moments between the two need the first.
    assert done.removed == ()
    history.drop(history.backups[0])
    [done] = run(history, tmp_path).databases
    assert [one.rpartition("/")[2] for one in done.removed] == [
        f"{1:08X}{0:08X}{1:08X}.base",
        f"{1:08X}{0:08X}{1:08X}",
        f"{1:08X}{0:08X}{2:08X}",
    ]
    assert history.ways() == {key: way for key, way in before.items() if key[0] == history.backups[0].backup_id}


def test_a_backup_that_was_pruned_just_now_keeps_its_logs_for_the_grace(tmp_path: Path) -> None:
    """Somebody may be restoring it."""
    history = three_days()
    oldest = history.backups[0]
    history.repository.note_state(oldest.backup_id, states.PRUNED, {"logs": log_plan.stands(oldest)})
    before = history.ways()
    history.drop(oldest)
    assert run(history, tmp_path).databases[0].removed == ("000001/binlog.000001", "000001/binlog.000002")
    assert run(history, tmp_path).databases[0].removed == ()
    for place in history.places:
        place.put(f"{oldest.backup_id}.manifest.json", history.repository.signed(oldest).text())
    history.backups.insert(0, oldest)
    assert history.ways() == before
    history.drop(oldest)
    assert run(history, tmp_path, days=1.1).databases[0].removed == ("000001/binlog.000003", "000001/binlog.000004")


def test_while_the_note_of_a_backup_that_was_pruned_just_now_is_damaged_nothing_goes(tmp_path: Path) -> None:
    history = three_days()
    oldest = history.backups[0]
    history.repository.note_state(oldest.backup_id, states.PRUNED, {"logs": log_plan.stands(oldest)})
    history.drop(oldest)
    [name] = [one for one in history.places[0].names if one.startswith("states/")]
    history.places[0].names[name] = history.places[0].names[name][:-9]
    assert "cannot be read" in str(run(history, tmp_path).waits)
    assert len(history.places[0].logs()) == 6


def test_without_a_backup_that_is_kept_or_one_that_stands_in_them_all_logs_stay(tmp_path: Path) -> None:
    history = three_days()
    for backup in list(history.backups):
        history.drop(backup)
    [done] = run(history, tmp_path).databases
    assert "no backup of it is kept" in done.rule and len(history.places[0].logs()) == 6
    elsewhere = MariaDB()
    elsewhere.snapshot = lambda at: {"began_at": at}  # type: ignore[method-assign]
    elsewhere.back_up()
    for _ in range(3):
        elsewhere.write()
        elsewhere.ship()
    [done] = run(elsewhere, tmp_path).databases
    assert "stands in its logs" in done.rule and len(elsewhere.places[0].logs()) == 3


def test_a_backup_whose_own_log_is_not_there_keeps_what_follows_it(tmp_path: Path) -> None:
    """Its document was deleted by mistake, say, and can be put back from a bucket with versions."""
    history = three_days()
    del history.places[0].names["logs/app/000001/binlog.000003.json"]
    [done] = run(history, tmp_path).databases
    assert "000001/binlog.000003" in done.removed, "its pieces: the document was gone already"
    assert history.places[0].logs() == [f"000001/binlog.{number:06d}" for number in (4, 5, 6)]


@pytest.mark.parametrize(
    ("make", "name"),
    [(MariaDB, "logs/app/000001/binlog.000003.json"), (PostgreSQL, f"logs/app/000001/{1:08X}{0:08X}{3:08X}.base.json")],
)
def test_nothing_goes_while_the_log_in_which_a_backup_stands_is_damaged(
    make: Callable[[int], History], name: str, tmp_path: Path
) -> None:
    history = three_days(make)
    there = len(history.places[0].logs())
    history.places[0].names[name] = history.places[0].names[name][:-20]
    found = run(history, tmp_path)
    assert list(found.troubles) == ["logs of app"] and "all stay" in found.lines(applied=True)[0]
    assert len(history.places[0].logs()) == there


def test_a_name_that_cannot_be_ordered_lets_nothing_go(tmp_path: Path) -> None:
    history = three_days()
    history.places[0].names["logs/app/000001/odd.json"] = b"{}"
    assert "odd" in run(history, tmp_path).troubles["logs of app"]
    assert len(history.places[0].logs()) == 7


@pytest.mark.parametrize("facts", [{"logs": None}, {"logs": [{"kind": "mariadb"}]}])
def test_a_note_that_this_release_does_not_understand_stops_the_deletion_and_nothing_else(
    facts: dict[str, object], tmp_path: Path
) -> None:
    history = three_days()
    history.repository.note_state(history.backups[0].backup_id, states.PRUNED, facts)
    assert "cannot be read" in str(run(history, tmp_path).waits)
    history = three_days()
    name = f"states/odd/{clock.now():%Y%m%dT%H%M%S.%fZ}-{states.PRUNED}.json"
    history.places[0].names[name] = b"{}"
    assert "backup odd" in str(run(history, tmp_path).waits) and len(history.places[0].logs()) == 6


def test_where_two_logs_may_be_that_of_a_backup_the_older_stays(tmp_path: Path) -> None:
    """After RESET MASTER numbers and GTIDs begin anew, and reach those of before."""
    history = MariaDB()
    history.ship()
    for _ in range(2):
        history.write()
        history.ship()
    history.write()
    history.back_up()
    for _ in range(2):
        history.write()
        history.ship()
    history.reset()
    for _ in range(5):
        history.write()
        history.ship()
    history.write()
    history.ship()
    history.back_up()
    history.ship()
    [done] = run(history, tmp_path).databases
    assert done.removed == ("000001/binlog.000001", "000001/binlog.000002", "000001/binlog.000003")


@pytest.mark.parametrize("make", [MariaDB, PostgreSQL])
def test_for_two_months_of_nights_no_more_stays_than_the_kept_backups_need(
    make: Callable[[], History], tmp_path: Path
) -> None:
    history = make()
    for night in range(60):
        if isinstance(history, PostgreSQL) and night % 7 == 0:
            history.base()
        history.back_up()
        if len(history.backups) > 7:
            history.drop(history.backups[0])
        for _ in range(6):
            history.write()
            history.ship()
        before = history.places[0].logs()
        done = run(history, tmp_path)
        assert done.waits is None and not done.troubles
        left = history.places[0].logs()
        assert left == before[len(before) - len(left) :] and len(left) <= 6 * (14 if make is PostgreSQL else 7) + 3
    history.moments = history.moments[-40:]
    assert history.ways() and not [way for way in history.ways().values() if isinstance(way, str)]


def test_a_backup_that_only_another_place_holds_keeps_its_logs(tmp_path: Path) -> None:
    history = three_days(places=2)
    name = f"{history.backups[0].backup_id}.manifest.json"
    del history.places[1].names[name]
    before = history.ways()
    assert run(history, tmp_path).databases[0].removed == ("000001/binlog.000001", "000001/binlog.000002")
    assert history.ways() == before


def test_two_homes_that_ship_two_servers_under_one_name_into_one_place_keep_what_both_need(tmp_path: Path) -> None:
    """It makes a new series each time, and no sense. What each has is not the other's to delete."""
    ours = MariaDB()
    theirs = MariaDB(beside=ours)
    theirs.uid, theirs.count = 2, 50
    for _ in range(5):
        for one in (ours, theirs):
            last = one.shelf.last()
            one.fresh = last is None or last.server != one.server
            one.series = 1 if last is None else last.series + one.fresh
            one.back_up()
            for _ in range(2):
                one.write()
                one.ship()
    ours.drop(ours.backups[0])
    before, of_theirs = ours.ways(), theirs.ways()
    assert run(ours, tmp_path).databases[0].removed == ("000001/binlog.000001", "000001/binlog.000002")
    assert ours.ways() == before and theirs.ways() == of_theirs
    for backup in theirs.backups[:4]:
        theirs.drop(backup)
    of_theirs = theirs.ways()
    run(theirs, tmp_path / "another home")
    assert ours.ways() == before and theirs.ways() == of_theirs
