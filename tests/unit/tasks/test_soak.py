"""The soak as a stored watch: whoever carries it goes on where the last one stood, and decides what one carrier alone would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry import commands, promotions
from registry.actor import Who
from registry.database import Database
from registry.errors import FencedError, RefusedError
from tasks import promotion, rollback
from tasks.judgement import Judgement, StreamCounts, Window
from tasks.promoting import Ended, Stint
from tasks.slices import MOST_PARTS, MOST_SLICES, Parts
from tasks.soak import LONGEST_GAP_SECONDS, Soak
from tests.unit.registry import kit
from tests.unit.registry.kit import Clock
from tests.unit.tasks import soaking
from tests.unit.tasks.soaking import at_work, orphan, report
from tests.unit.tasks.soaking import soaking as begin_soak

WHO = Who("key:ops", key_id="k1", via="api")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soaks")
    soaking.prepared(folder).dispose()
    return folder / "registry.db"


@pytest.fixture
def database(tmp_path: Path, template: Path) -> Iterator[Database]:
    opened = soaking.prepared(tmp_path, template)
    yield opened
    opened.dispose()


def watched(database: Database, *, carriers: list[int], bad_from: int | None) -> tuple[Ended, int, dict[str, object]]:
    """A soak at 20 requests a second, whose carriers die at the given seconds. Returns the end, its second and the record."""
    operation, monotonic = begin_soak(database), Clock()
    generation = operation.progress["soak"]["generation"]
    watch, requests, errors = Soak(at_work(database, operation, monotonic)), 0, 0
    for second in range(1, 200):
        monotonic.seconds += 1
        requests += 20
        errors += 10 if bad_from is not None and second > bad_from else int(second % 5 == 0)
        report(database, "2", generation, requests=requests, errors=errors)
        if (ended := watch.tick()) is not None:
            return ended, second, soaking.record(database, operation)
        if second in carriers:
            orphan(database)
            monotonic.seconds += 1000  # nobody watches
            operation = promotions.carry_on(database, operation.id, ttl_seconds=30.0, holder="another")
            watch = Soak(at_work(database, operation, monotonic))
    raise AssertionError("the soak never ended")


def test_a_good_version_is_watched_as_long_by_two_carriers_as_by_one(tmp_path: Path, template: Path) -> None:
    alone, _, record = watched(soaking.prepared(tmp_path / "one", template), carriers=[], bad_from=None)
    ended, second, carried = watched(soaking.prepared(tmp_path / "two", template), carriers=[25, 40], bad_from=None)
    assert (alone.outcome, ended.outcome) == ("promoted", "promoted")
    # What was watched since it was last put on record is watched again; what nobody watched does not count.
    assert 60 <= second <= 60 + 2 * 5
    assert record["watch_seconds"] == carried["watch_seconds"] == 60.0


def test_a_version_that_turns_bad_under_the_second_carrier_is_withdrawn_on_the_same_evidence(
    tmp_path: Path, template: Path
) -> None:
    alone, second, _ = watched(soaking.prepared(tmp_path / "one", template), carriers=[], bad_from=30)
    database = soaking.prepared(tmp_path / "two", template)
    ended, later, _ = watched(database, carriers=[29], bad_from=30)
    assert (alone.outcome, ended.outcome) == ("withdrawn", "withdrawn")
    assert abs(later - second) <= 2, "the good time before is not lost and does not cover it"
    assert kit.route(database).stable == "1"
    assert kit.places(database) == {"1": "stable", "2": "withdrawn"}


def test_a_version_that_turned_bad_while_nobody_watched_is_withdrawn_at_the_first_look(database: Database) -> None:
    operation, monotonic = begin_soak(database), Clock()
    generation = operation.progress["soak"]["generation"]
    orphan(database)
    report(database, "2", generation, requests=500, errors=300)
    again = promotions.carry_on(database, operation.id, ttl_seconds=30.0)
    ended = Soak(at_work(database, again, monotonic)).tick()
    assert ended is not None and ended.outcome == "withdrawn"
    assert kit.route(database).stable == "1"


def test_the_carrier_of_before_writes_nothing_more(database: Database) -> None:
    operation, monotonic = begin_soak(database), Clock()
    watch = Soak(at_work(database, operation, monotonic))
    orphan(database)
    promotions.carry_on(database, operation.id, ttl_seconds=30.0)
    monotonic.seconds += 6
    before = kit.last_event(database)
    with pytest.raises(FencedError):
        watch.tick()
    assert kit.last_event(database) == before


def test_what_is_kept_of_a_soak_of_a_day_stays_small_and_loses_no_request(database: Database) -> None:
    parts, total = Parts(60.0), 0
    windows: list[Window] = []
    for second in range(0, 86400, 2):
        total += 10
        counts = {"error": StreamCounts(total, total // 100), "slow": StreamCounts(total, 0)}
        windows = parts.look(Window("soak", 1.0, counts), float(second))
        if second % 7200 == 0:
            parts = Parts.of(60.0, json.loads(json.dumps(parts.as_dict())))
    assert sum((window.candidate["error"] for window in windows), StreamCounts()) == StreamCounts(total, total // 100)
    assert len(windows) <= MOST_PARTS + 1
    assert max(len(window.slices) for window in windows) <= MOST_SLICES
    assert len(json.dumps(parts.as_dict())) < 100_000


def test_a_restored_registry_begins_the_watch_anew_under_its_epoch(database: Database) -> None:
    operation, monotonic = begin_soak(database), Clock()
    watch = Soak(at_work(database, operation, monotonic))
    for _ in range(10):
        monotonic.seconds += 1
        watch.tick()
    epoch = kit.new_epoch(database)
    orphan(database)
    again = promotions.carry_on(database, operation.id, ttl_seconds=30.0)
    assert (again.progress["soak"]["epoch"], again.progress["soak"]["watched_seconds"]) == (epoch, 0.0)
    monotonic.seconds += 6
    with pytest.raises(FencedError):
        watch.tick()


def test_time_in_which_nobody_could_look_was_not_watched() -> None:
    monotonic = Clock()
    stint = Stint(monotonic, most=LONGEST_GAP_SECONDS)
    monotonic.seconds += 300
    stint.tick(paused=False)
    assert (stint.judged, stint.total) == (LONGEST_GAP_SECONDS, LONGEST_GAP_SECONDS)
    monotonic.seconds += 2
    stint.tick(paused=True)
    assert (stint.judged, stint.total) == (LONGEST_GAP_SECONDS, LONGEST_GAP_SECONDS + 2)


def test_a_paused_soak_stands_still_until_it_is_resumed(database: Database) -> None:
    operation, monotonic = begin_soak(database), Clock()
    watch = Soak(at_work(database, operation, monotonic))
    commands.give(database, operation.id, command="pause", who=WHO, reason="an incident")
    for _ in range(100):
        monotonic.seconds += 1
        assert watch.tick() is None
    orphan(database)  # and whoever carries it next stands still as well
    again = promotions.carry_on(database, operation.id, ttl_seconds=30.0)
    watch = Soak(at_work(database, again, monotonic))
    for _ in range(100):
        monotonic.seconds += 1
        assert watch.tick() is None
    commands.give(database, operation.id, command="resume", who=WHO, reason="")
    ended, seconds = None, 0
    while ended is None:
        monotonic.seconds += 1
        seconds += 1
        ended = watch.tick()
    assert ended.outcome == "promoted" and 58 <= seconds <= 61
    assert soaking.steps(database, operation).count("pause") == 1
    assert soaking.steps(database, operation).count("resume") == 1


def test_a_bad_version_is_withdrawn_in_a_pause(database: Database) -> None:
    operation, monotonic = begin_soak(database), Clock()
    watch = Soak(at_work(database, operation, monotonic))
    commands.give(database, operation.id, command="pause", who=WHO, reason="")
    assert watch.tick() is None
    report(database, "2", operation.progress["soak"]["generation"], requests=200, errors=150)
    ended = watch.tick()
    assert ended is not None and ended.outcome == "withdrawn"


def test_a_soak_is_ended_by_a_word_and_the_record_names_whose(database: Database) -> None:
    operation = begin_soak(database)
    watch = Soak(at_work(database, operation, Clock()))
    assert watch.tick() is None
    commands.give(database, operation.id, command="advance", who=WHO, reason="the release is today")
    ended = watch.tick()
    assert ended is not None and ended.outcome == "promoted" and "key:ops: the release is today" in ended.reason
    assert kit.route(database).watch is False
    with database.read() as session:
        (given,) = commands.listed(session, operation.id)
    assert given["taken_at"] is not None


def test_a_pause_after_a_word_to_end_the_soak_wins(database: Database) -> None:
    operation, monotonic = begin_soak(database), Clock()
    watch = Soak(at_work(database, operation, monotonic))
    assert watch.tick() is None
    commands.give(database, operation.id, command="advance", who=WHO, reason="the release is today")
    commands.give(database, operation.id, command="pause", who=WHO, reason="no, wait")
    for _ in range(100):
        monotonic.seconds += 1
        assert watch.tick() is None
    commands.give(database, operation.id, command="resume", who=WHO, reason="")
    monotonic.seconds += 1
    assert watch.tick() is None, "it goes on where it stood: the word of before is spent"
    commands.give(database, operation.id, command="advance", who=WHO, reason="now")
    ended = watch.tick()
    assert ended is not None and "key:ops: now" in ended.reason
    with database.read() as session:
        given = [(row["command"], row["outcome"]) for row in commands.listed(session, operation.id)]
    called_off = ("advance", "not taken: paused by key:ops: no, wait before it was carried out")
    assert given == [called_off, ("pause", "taken"), ("resume", "taken"), ("advance", "taken")]


def test_a_pause_between_the_look_and_the_end_of_the_soak_wins(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = begin_soak(database)
    watch = Soak(at_work(database, operation, Clock()))
    commands.give(database, operation.id, command="advance", who=WHO, reason="")
    judged = watch._judged

    def slowly() -> Judgement:
        monkeypatch.undo()
        commands.give(database, operation.id, command="pause", who=WHO, reason="wait")
        return judged()

    monkeypatch.setattr(watch, "_judged", slowly)
    assert watch.tick() is None
    assert watch.tick() is None
    with database.read() as session:
        assert promotions.get(session, operation.id).state == "soaking"


def test_a_pause_between_the_look_and_the_decision_of_a_stage_wins(database: Database) -> None:
    operation, monotonic = kit.begin(database, "2"), Clock()
    kit.canary(database, operation)
    work, stint = at_work(database, operation, monotonic), Stint(monotonic)
    commands.give(database, operation.id, command="advance", who=WHO, reason="")
    work.hear(stint)
    assert stint.advanced is not None
    commands.give(database, operation.id, command="pause", who=WHO, reason="wait")
    assert promotion._note_passed(work, stint, "canary", "passed", "", {}) is False
    assert rollback._noted(work, stint, "back at 5%") is False
    with database.read() as session:
        assert [step["title"] for step in promotions.story(session, operation.id)][-1] == "Not taken"
    work.hear(stint)
    assert stint.advanced is None and work.paused is not None


def test_a_word_to_go_on_does_not_override_the_evidence(database: Database) -> None:
    operation = begin_soak(database)
    watch = Soak(at_work(database, operation, Clock()))
    report(database, "2", operation.progress["soak"]["generation"], requests=200, errors=150)
    commands.give(database, operation.id, command="advance", who=WHO, reason="")
    ended = watch.tick()
    assert ended is not None and ended.outcome == "withdrawn"


def test_a_stop_in_the_soak_keeps_the_version_and_says_how_to_go_back(database: Database) -> None:
    operation = begin_soak(database)
    watch = Soak(at_work(database, operation, Clock()))
    told = commands.give(database, operation.id, command="stop", who=WHO, reason="")
    assert told["taken"] and told["state"] == "promoted" and "modelkeep rollback digits" in told["message"]
    assert kit.route(database).stable == "2"
    with pytest.raises(FencedError):
        watch.tick()
    ended = promotion.ended_meanwhile(database, operation.id)
    assert ended is not None and ended.outcome == "promoted"
    with pytest.raises(RefusedError, match="has ended"):
        commands.give(database, operation.id, command="stop", who=WHO, reason="")


def test_an_error_of_the_process_in_the_soak_leaves_the_watch_to_others(database: Database) -> None:
    operation = begin_soak(database)
    promotion.failed(at_work(database, operation, Clock()), RuntimeError("out of memory"))
    with database.read() as session:
        assert promotions.orphans(session) == [operation.id]
    assert kit.route(database).stable == "2" and kit.route(database).watch is True


def test_a_promotion_without_a_watch_ends_at_the_next_carriers_first_look(database: Database) -> None:
    operation = kit.begin(database, "2")
    kit.promote(database, operation, watch=False)
    orphan(database)
    again = promotions.carry_on(database, operation.id, ttl_seconds=30.0)
    ended = Soak(at_work(database, again, Clock())).tick()
    assert ended is not None and ended.outcome == "promoted"
