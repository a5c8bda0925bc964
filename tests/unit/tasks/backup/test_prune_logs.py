"""Logs that nothing needs are deleted so that a kill, a lock, or a place that fails at any moment harms nothing and is told."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import clock
from registry import ledger as ledger_file
from registry.errors import StorageError
from tasks.backup import garbage, ledger, prune, prune_logs, whose
from tasks.backup.log_lock import shipping
from tasks.backup.logs import Shelf
from tasks.backup.retention import Policy
from tests.unit.tasks.backup.log_history import BEGIN, DAY, History, Killed, MariaDB, PostgreSQL, look, run, three_days

LIVING = {"pid": os.getpid(), "host": platform.node(), "boot_id": whose.boot_id()}


def test_logs_of_before_the_oldest_kept_backup_go_with_their_pieces(tmp_path: Path) -> None:
    history = three_days()
    [shown] = look(history)
    assert [one.log for one in shown.goes] == ["binlog.000001", "binlog.000002"] and shown.size_bytes > 0
    assert history.backups[0].backup_id in shown.rule and "2 of 6 go" in shown.text(applied=False)
    place = history.places[0]
    assert len(place.logs()) == 6  # a preview deletes nothing
    [done] = run(history, tmp_path).databases
    assert done.removed == ("000001/binlog.000001", "000001/binlog.000002") and done.removed_bytes > 0
    assert place.logs() == [f"000001/binlog.{number:06d}" for number in (3, 4, 5, 6)]
    assert not [name for name in place.names if "binlog.000001" in name or "binlog.000002" in name]
    assert run(history, tmp_path).databases[0].removed == ()


@pytest.mark.parametrize("make", [MariaDB, PostgreSQL])
@pytest.mark.parametrize("places", [1, 2])
def test_killed_at_any_deletion_the_ways_are_the_same_and_the_next_run_finishes(
    make: Callable[[int], History], places: int, tmp_path: Path
) -> None:
    for limit in range(99):
        history = three_days(make, places)
        if make is PostgreSQL:
            history.drop(history.backups[0])
        before, steps = history.ways(), iter(range(99))

        def die(name: str, limit: int = limit, steps: object = steps) -> None:
            if name.startswith("logs/") and next(steps) == limit:  # type: ignore[call-overload]
                raise Killed

        for place in history.places:
            place.before_delete = die
        killed = False
        try:
            run(history, tmp_path)
        except Killed:
            killed = True
        for place in history.places:
            place.before_delete = lambda _: None
            place.names.pop(garbage.FLAG, None)  # a process that was killed is dead: here it is this one
        assert history.ways() == before
        shelf = Shelf(history.repository, "app")
        for one in (shelf.read(*name) for name in shelf.names()):
            pieces = {one.piece_name(piece) for piece in one.pieces}
            assert any(pieces <= place.names.keys() for place in history.places), "what has a document is whole"
        assert shelf.copy_missing() <= 1 and not shelf.damaged  # the one that was being deleted
        assert run(history, tmp_path).waits is None
        assert history.ways() == before
        assert not any(one.goes for one in look(history))
        whole = three_days(make, places)
        if make is PostgreSQL:
            whole.drop(whole.backups[0])
        run(whole, tmp_path)
        assert [sorted(one.names) for one in history.places] == [sorted(one.names) for one in whole.places]
        if not killed:
            assert limit >= 4
            return
    raise AssertionError("it deletes without an end")


def test_nothing_goes_while_a_backup_or_a_shipment_is_under_way(tmp_path: Path) -> None:
    history = three_days()
    running = "20261120T020000Z-0a1b2c"
    history.repository.begin_intent(running, LIVING)
    assert running in str(run(history, tmp_path).waits)
    history.repository.end_intent(running)
    with shipping(tmp_path):
        assert "being shipped" in str(run(history, tmp_path).waits)
    history.places[0].put(garbage.FLAG, json.dumps({"token": "another", **LIVING}).encode())
    assert "garbage is being collected" in str(run(history, tmp_path).waits)
    assert len(history.places[0].logs()) == 6
    del history.places[0].names[garbage.FLAG]
    assert len(run(history, tmp_path).databases[0].removed) == 2


def test_nothing_goes_while_a_manifest_cannot_be_read(tmp_path: Path) -> None:
    history = three_days()
    history.places[0].names["20261109T020000Z-0a1b2c.manifest.json"] = b'{"format": "modelkeep-backup"'
    assert "20261109T020000Z-0a1b2c cannot be read" in str(run(history, tmp_path).waits)
    assert "cannot be read" in str(prune.preview(history.repository, Policy(), BEGIN, DAY).logs.waits)
    assert len(history.places[0].logs()) == 6


@pytest.mark.parametrize("prefix", ["2", "logs/", "intents/", "states/"])
def test_nothing_goes_while_a_place_does_not_answer(prefix: str, tmp_path: Path) -> None:
    history = three_days(places=2)

    def gone(asked: str) -> None:
        if asked == prefix:
            raise StorageError("the bucket does not answer")

    history.places[1].before_list = gone
    found = run(history, tmp_path)
    assert "the bucket does not answer" in str(found.waits) and "shipped logs" in found.troubles
    assert all(len(place.logs()) == 6 for place in history.places)


def test_a_locked_log_stays_everywhere_and_is_told_and_the_rest_goes(tmp_path: Path) -> None:
    history = three_days(places=2)
    bucket = history.places[1]
    bucket.can_lock = lambda: True  # type: ignore[attr-defined]
    bucket.refuse("binlog.000001")
    [done] = run(history, tmp_path).databases
    assert list(done.refused) == ["000001/binlog.000001"] and done.removed == ("000001/binlog.000002",)
    assert "it is locked" in done.text(applied=True)
    assert all("000001/binlog.000001" in place.logs() for place in history.places), "else it would come back each time"
    bucket.before_delete = lambda _: None
    assert run(history, tmp_path).databases[0].removed == ("000001/binlog.000001",)


def test_after_three_that_are_locked_in_a_row_the_rest_waits(tmp_path: Path) -> None:
    history = MariaDB()
    for _ in range(6):
        history.write()
        history.ship()
    history.back_up()
    history.write()
    history.ship()
    asked: list[str] = []

    def no(name: str) -> None:
        if name.startswith("logs/"):
            asked.append(name)
            raise StorageError("it is locked")

    history.places[0].before_delete = no
    [done] = run(history, tmp_path).databases
    assert len(asked) == len(done.refused) == 3 and "in a row" in str(done.waits)


def test_a_run_that_takes_long_goes_on_in_rounds_with_a_turn_for_others_between_them(tmp_path: Path) -> None:
    history, passed, pauses = three_days(), [0.0], [0]
    place = history.places[0]

    def slow(name: str) -> None:
        passed[0] += prune_logs.SECONDS if ".pieces/" in name else 0

    def others(_: float) -> None:
        pauses[0] += 1
        assert place.stat(garbage.FLAG) is None
        with shipping(tmp_path):
            assert [name[:2] for name in place.logs() if "binlog.000002" in name] == ["00"] * (2 - pauses[0])

    place.before_delete = slow
    said = run(history, tmp_path, monotonic=lambda: passed[0], sleep=others)
    [done] = said.databases
    assert pauses[0] == 1 and done.removed == ("000001/binlog.000001", "000001/binlog.000002")
    assert (done.count, len(done.goes), done.waits) == (6, 2, None) and said.waits is None
    assert "2 of 6 deleted" in done.text(applied=True) and said.removed["app"]["count"] == 2


def test_a_log_that_goes_in_a_later_round_is_no_trouble_any_more(tmp_path: Path) -> None:
    history, passed = three_days(), [0.0]
    place = history.places[0]

    def once(name: str) -> None:
        if "binlog.000001" in name and not passed[0]:
            passed[0] += prune_logs.SECONDS
            raise StorageError("the bucket is busy")

    place.before_delete = once
    found = run(history, tmp_path, monotonic=lambda: passed[0])
    assert found.removed["app"] == {"count": 2, "first": "000001/binlog.000001", "last": "000001/binlog.000002"}
    assert found.troubles == {} and found.databases[0].refused == {}


def test_a_log_that_is_let_go_in_no_round_stays_a_trouble(tmp_path: Path) -> None:
    history, passed = three_days(), [0.0]

    def never(name: str) -> None:
        if "binlog.000001" in name:
            passed[0] += prune_logs.SECONDS if not passed[0] else 0
            raise StorageError("the folder is read-only")

    history.places[0].before_delete = never
    found = run(history, tmp_path, monotonic=lambda: passed[0])
    assert found.removed["app"]["count"] == 1 and "the folder is read-only" in found.troubles["logs of app"]
    assert "; ".join(found.lines(applied=True)).count("the folder is read-only") == 1


def test_its_flag_says_that_logs_are_deleted(tmp_path: Path) -> None:
    history, seen = three_days(), set[object]()
    place = history.places[0]

    def look_at_flag(name: str) -> None:
        if name.startswith("logs/"):
            seen.add(json.loads(place.names[garbage.FLAG])["doing"])

    place.before_delete = look_at_flag
    run(history, tmp_path)
    assert seen == {"logs"}


def test_after_so_many_rounds_the_rest_is_left_to_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_logs, "ROUNDS", 1)
    history, passed = three_days(), [0.0]

    def slow(name: str) -> None:
        passed[0] += prune_logs.SECONDS if ".pieces/" in name else 0

    history.places[0].before_delete = slow
    done = run(history, tmp_path, monotonic=lambda: passed[0])
    assert len(done.databases[0].removed) == 1 and "are over" in str(done.databases[0].waits)
    assert len(run(history, tmp_path, monotonic=lambda: 0.0).databases[0].removed) == 1


def test_no_database_waits_for_the_logs_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_logs, "ROUNDS", 1)
    first, passed = MariaDB(), [0.0]
    for history in (first, second := MariaDB(database="shop", beside=first)):
        for _ in range(9):
            history.write()
            history.ship()
        history.back_up()
        history.ship()

    def slow(name: str) -> None:
        passed[0] += prune_logs.SECONDS / 6 if ".pieces/" in name else 0

    first.places[0].before_delete = slow
    found = run(first, tmp_path, monotonic=lambda: passed[0]).databases
    assert [(one.database, len(one.removed)) for one in found] == [("app", 3), ("shop", 3)]
    assert second.ways()


def test_a_deletion_whose_flag_was_taken_away_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "_BEAT_SECONDS", 0.0)
    history = three_days()

    def steal(name: str) -> None:
        if name.startswith("logs/"):
            history.places[0].names.pop(garbage.FLAG, None)

    history.places[0].before_delete = steal
    [done] = run(history, tmp_path).databases
    assert done.removed == () and "flag was taken away" in str(done.waits)
    assert len(history.places[0].logs()) == 5, "the document of the first was gone by then"
    history.places[0].before_delete = lambda _: None
    assert len(run(history, tmp_path).databases[0].removed) == 2
    assert not any("binlog.000001" in name or "binlog.000002" in name for name in history.places[0].names)


def test_a_base_backup_of_many_pieces_is_no_deletion_that_looks_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = three_days(PostgreSQL)
    history.drop(history.backups[0])
    place, base = history.places[0], f"logs/app/000001/{1:08X}{0:08X}{1:08X}.base"
    for number in range(2000):
        place.names[f"{base}.pieces/{number:064x}"] = b"piece"
    passed, seen, beats = [0.0], [0.0], list[float]()
    put = place.put

    def beaten(name: str, data: bytes, **more: object) -> None:
        if name == garbage.FLAG:
            beats.append(passed[0] - seen[0])
            seen[0] = passed[0]
        put(name, data, **more)  # type: ignore[arg-type]

    def slow(name: str) -> None:
        passed[0] += 1.0 if ".pieces/" in name else 0

    monkeypatch.setattr(place, "put", beaten)
    place.before_delete = slow
    [done] = run(history, tmp_path, monotonic=lambda: passed[0]).databases
    assert len(done.removed) == 3 and not [name for name in place.names if name.startswith(base)]
    assert passed[0] > 2000 and max(beats) < garbage.STALE_SECONDS / 2


def test_what_went_before_a_place_failed_in_the_middle_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "_BEAT_SECONDS", 0.0)
    history = three_days()
    place = history.places[0]
    get = place.get

    def away(name: str) -> bytes:
        if name == garbage.FLAG and not [one for one in place.names if "binlog.000001" in one]:
            raise StorageError("the bucket does not answer")
        return get(name)

    monkeypatch.setattr(place, "get", away)
    found = run(history, tmp_path)
    assert found.removed["app"] == {"count": 1, "first": "000001/binlog.000001", "last": "000001/binlog.000001"}
    assert "no more logs are deleted: the bucket does not answer" in found.lines(applied=True)
    assert "shipped logs" in found.troubles


def test_a_flag_that_cannot_be_taken_down_keeps_no_other_up(tmp_path: Path) -> None:
    for number in range(2):
        history = three_days(places=2)
        history.places[number].refuse(garbage.FLAG, "the bucket does not answer")
        found = run(history, tmp_path)
        assert len(found.databases[0].removed) == 2 and "shipped logs" in found.troubles
        assert [place.stat(garbage.FLAG) is None for place in history.places] == [number == 1, number == 0]


@pytest.mark.parametrize(
    ("locks", "locked_for", "days", "told"),
    [
        (False, None, 0, True),
        (False, 30, 0, True),
        (True, None, 99, False),
        (True, 30, 29, False),
        (True, 30, 31, True),
    ],
)
def test_a_log_that_is_not_let_go_and_that_no_lock_keeps_is_told_as_a_trouble(
    locks: bool, locked_for: int | None, days: int, told: bool, tmp_path: Path
) -> None:
    history = three_days()
    history.places[0].can_lock = lambda: locks  # type: ignore[attr-defined]
    history.places[0].refuse("binlog.000001", "the credentials do not allow it")
    for_days, now = None if locked_for is None else locked_for * DAY, clock.now() + days * DAY
    found = prune_logs.carry_out(history.repository, tmp_path, now=now, grace=DAY, locked_for=for_days)
    assert ("the credentials do not allow it" in found.troubles.get("logs of app", "")) is told


def test_a_log_that_is_damaged_keeps_none_that_come_after_it_from_being_copied(tmp_path: Path) -> None:
    history = three_days(places=2)
    second = history.places[1]
    for name in [one for one in second.names if one.startswith("logs/app/000001/")]:
        del second.names[name]
    [piece] = [one for one in history.places[0].names if "binlog.000002.pieces/" in one]
    history.places[0].names[piece] = b"other bytes"
    shelf = Shelf(history.repository, "app")
    assert shelf.copy_missing() == 5 and "binlog.000002 of app is damaged" in next(iter(shelf.damaged.values()))
    assert list(shelf.damaged) == ["logs/app/000001/binlog.000002.json"]
    assert second.logs() == [f"000001/binlog.{number:06d}" for number in (1, 3, 4, 5, 6)]


def test_a_lock_is_put_on_pieces_documents_and_the_head() -> None:
    history = MariaDB()
    history.shelf.keep_until = BEGIN
    history.write()
    history.ship()
    assert {name for name, until in history.places[0].kept.items() if until == BEGIN} == set(history.places[0].names)


def test_logs_stay_in_the_spool_until_every_place_has_them(tmp_path: Path) -> None:
    from tasks.backup import upkeep
    from tasks.backup.repository import Repository

    history = MariaDB()
    place = history.places[0]
    history.repository = Repository([place], spool=tmp_path / "spool")
    history.shelf = Shelf(history.repository, "app")
    history.repository.is_down(0, StorageError("the bucket does not answer"))
    history.write()
    history.ship()
    fresh = Repository([place], spool=tmp_path / "spool")
    assert place.logs() == []
    upkeep.copy_missing(fresh)
    assert (tmp_path / "spool/logs/app/000001/binlog.000001.json").exists()
    assert Shelf(fresh, "app").copy_missing() == 1
    assert place.logs() == ["000001/binlog.000001"]
    assert not list((tmp_path / "spool/logs/app/000001").rglob("*.json"))
    assert Shelf(fresh, "app").read(1, "binlog.000001").pieces and len(Shelf(fresh, "app").names()) == 1


def test_what_was_lost_before_the_logs_that_stay_is_no_news_any_more(tmp_path: Path) -> None:
    for series, told in ((1, True), (2, False)):
        shipped = {
            "database": "app", "failed": None, "covers_until": "2026-11-01T00:00:00.000000Z", "gap": None,
            "lost": {"why": "another timeline", "from": "a", "until": "b", "series": 2},
        }  # fmt: skip
        ledger.note_shipped(tmp_path, shipped, ["app"])
        ledger.note_logs_begin(tmp_path, "app", series)
        assert bool((ledger_file.read(tmp_path) or {})["logs"]["app"]["lost"]) is told
