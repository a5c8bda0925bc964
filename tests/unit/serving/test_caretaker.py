"""Crash marks, crashes of record, the life and the health of versions, and what the caretaker asks for."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serving.compute.engine import LoadedVersion
from serving.loaded.caretaker import PAUSE_SECONDS, Caretaker
from serving.loaded.health import HealthStatus, ModelHealth
from serving.loaded.laststate import Wanted
from serving.loaded.lifecycle import MOVES, Lifecycle, ModelState
from serving.process.crashmark import SLOTS, Crash, Crashes, CrashMarks
from serving.traffic.routing import Route
from tests.unit.registry.kit import Clock
from tests.unit.serving.helpers import load

KEY = ("m", "2")


@dataclass
class Limits:
    max_memory_mb: int = 1
    response_seconds: float = 1.0
    error_rate: float = 0.05
    window_seconds: float = 60.0
    minimum_requests: int = 20


def wanted(version: str = "2", digest: str = "d") -> Wanted:
    return Wanted("m", version, digest, "onnx", (), None, True)


def canary(**changes: Any) -> Route:
    asked: dict[str, Any] = {"stable": "1", "candidate": "2", "weight": 0.5, "watch": True}
    return Route("m", 7, **(asked | changes))


def die(folder: Path, times: int = 1) -> None:
    """A process that dies by SIGKILL while version 2 computes (and version 1 does not), as often as said."""
    for _ in range(times):
        child = os.fork()
        if child == 0:
            care = Caretaker(folder, Limits())
            idle, computing = (care.begin(wanted(version)) for version in "12")
            for slot in (idle, computing):
                slot.mark(True)
            idle.mark(False)
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL


# --- the mark


def test_who_was_computing_when_the_process_was_killed_is_known_to_the_next(tmp_path: Path) -> None:
    die(tmp_path)
    marks = CrashMarks(tmp_path / "computing.mark")
    assert [(crash.model, crash.version, crash.digest) for crash in marks.computing_at_death] == [("m", "2", "d")]
    assert CrashMarks(tmp_path / "computing.mark").computing_at_death == []  # told once


def test_a_version_that_was_idle_or_gone_is_not_blamed(tmp_path: Path) -> None:
    marks = CrashMarks(tmp_path / "mark")
    idle, gone = marks.take("m", "1", "d"), marks.take("m", "2", "d")
    idle.mark(True)
    idle.mark(False)
    gone.mark(True)
    gone.free()
    gone.mark(True)  # a worker that comes to its end after the slot was given up
    assert CrashMarks(tmp_path / "mark").computing_at_death == []


def test_a_stop_in_good_order_blames_nobody_who_is_computing_just_then(tmp_path: Path) -> None:
    care = Caretaker(tmp_path, Limits())
    slot = care.begin(wanted("2", "d"))
    care.loading(wanted("2", "d"), slot)
    care.end()
    slot.mark(True)  # a worker that is still at it
    assert CrashMarks(tmp_path / "computing.mark").computing_at_death == []


def test_a_mark_file_of_another_size_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "mark").write_bytes(b"\x02" * 100)
    assert CrashMarks(tmp_path / "mark").computing_at_death == []


def test_a_slot_that_holds_nonsense_is_nobody(tmp_path: Path) -> None:
    CrashMarks(tmp_path / "mark").take("m", "1", "d").mark(True)
    data = bytearray((tmp_path / "mark").read_bytes())
    data[1:20] = b"\xff" * 19
    (tmp_path / "mark").write_bytes(data)
    assert CrashMarks(tmp_path / "mark").computing_at_death == []


def test_more_versions_than_slots_are_loaded_without_a_mark(tmp_path: Path) -> None:
    marks = CrashMarks(tmp_path / "mark")
    for number in range(SLOTS + 3):
        marks.take("m", str(number), "d").mark(True)
    assert len(CrashMarks(tmp_path / "mark").computing_at_death) == SLOTS


# --- crashes of record


def test_crashes_are_kept_by_model_version_and_digest_for_an_hour(tmp_path: Path) -> None:
    import time

    crashes = Crashes(tmp_path / "crashes.json")
    now = time.time()
    crashes.note([Crash("m", "2", "d", now), Crash("m", "2", "d", now - 7200), Crash("m", "2", "other", now)])
    again = Crashes(tmp_path / "crashes.json")
    assert again.count("m", "2", "d") == 1
    again.forget_all_but({("m", "1")})
    assert Crashes(tmp_path / "crashes.json").known == []


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9, "crashes": []}', '{"format": 1, "crashes": [{"x": 1}]}'])
def test_a_file_of_crashes_that_cannot_be_read_is_no_reason_not_to_serve(tmp_path: Path, text: str) -> None:
    (tmp_path / "crashes.json").write_text(text)
    assert Crashes(tmp_path / "crashes.json").known == []


# --- what the caretaker asks for


def test_a_candidate_waits_after_one_crash_and_stays_away_after_two(tmp_path: Path) -> None:
    clock, versions = Clock(), {("m", "1"): wanted("1"), KEY: wanted()}
    die(tmp_path)
    care = Caretaker(tmp_path, Limits(), monotonic=clock)
    assert set(care.hold_back([canary()], versions)) == {KEY}
    assert care.crashed([canary()], versions) == []
    assert not care.take_back_due()
    clock.seconds = PAUSE_SECONDS
    assert care.take_back_due()
    assert not care.take_back_due()
    assert care.hold_back([canary()], versions) == {}
    die(tmp_path)
    care = Caretaker(tmp_path, Limits(), monotonic=clock)
    clock.seconds += 10 * PAUSE_SECONDS
    assert "died 2 times" in care.hold_back([canary()], versions)[KEY]
    found = care.crashed([canary()], versions)
    assert [(unfit.model, unfit.version) for unfit in found] == [KEY]
    care.told(found[0])
    assert care.crashed([canary()], versions) == []


def test_at_the_start_a_candidate_waits_until_the_stable_version_answers(tmp_path: Path) -> None:
    clock, versions = Clock(), {("m", "1"): wanted("1"), KEY: wanted()}
    care = Caretaker(tmp_path, Limits(), monotonic=clock)
    care.starting()
    assert "once the stable version answers" in care.hold_back([canary()], versions)[KEY]
    clock.seconds = 10 * PAUSE_SECONDS
    assert not care.take_back_due()
    care.started()
    assert care.take_back_due()
    assert care.hold_back([canary()], versions) == {}
    assert not care.take_back_due()


def test_the_end_of_the_start_does_not_cut_the_pause_after_a_crash_short(tmp_path: Path) -> None:
    clock, versions = Clock(), {("m", "1"): wanted("1"), KEY: wanted()}
    die(tmp_path)
    care = Caretaker(tmp_path, Limits(), monotonic=clock)
    care.starting()
    assert set(care.hold_back([canary()], versions)) == {KEY}
    care.started()
    assert not care.take_back_due()
    clock.seconds = PAUSE_SECONDS
    assert care.take_back_due()
    assert care.hold_back([canary()], versions) == {}


def test_what_has_no_stable_version_beside_it_is_never_held_back(tmp_path: Path) -> None:
    die(tmp_path, 2)
    care = Caretaker(tmp_path, Limits())
    assert care.hold_back([canary(stable=None)], {KEY: wanted()}) == {}


@pytest.mark.parametrize(("watch", "crashes", "unfit"), [(True, 1, 0), (True, 2, 1), (False, 2, 0), (False, 3, 1)])
def test_a_stable_version_in_its_soak_has_two_crashes_and_a_proven_one_three(
    tmp_path: Path, watch: bool, crashes: int, unfit: int
) -> None:
    die(tmp_path, crashes)
    care = Caretaker(tmp_path, Limits())
    route = Route("m", 7, stable="2", watch=watch)
    assert len(care.crashed([route], {KEY: wanted()})) == unfit


def test_the_same_version_with_other_bytes_has_a_clean_slate(tmp_path: Path) -> None:
    die(tmp_path, 2)
    assert Caretaker(tmp_path, Limits()).crashed([canary()], {KEY: wanted(digest="other")}) == []


def test_a_version_that_leaves_the_routes_takes_its_crashes_along(tmp_path: Path) -> None:
    die(tmp_path, 2)
    care = Caretaker(tmp_path, Limits())
    care.settled([Route("m", 8, stable="1")], {"m": Route("m", 8, stable="1")}, [])
    assert Caretaker(tmp_path, Limits()).crashed([canary()], {KEY: wanted()}) == []


def test_a_folder_that_cannot_be_written_costs_the_mark_and_not_the_server(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    care = Caretaker(tmp_path / "file", Limits())
    slot = care.begin(wanted())
    care.loading(wanted(), slot)
    slot.mark(False)


# --- health


def ask(version: LoadedVersion, requests: int, *, errors: int = 0, seconds: float = 0.01) -> None:
    for number in range(requests):
        version.telemetry.total.record(seconds, error=number < errors, slow=False)


@pytest.mark.parametrize(
    ("requests", "errors", "seconds", "status"),
    [
        (100, 0, 0.01, HealthStatus.HEALTHY),
        (100, 5, 0.01, HealthStatus.HEALTHY),
        (100, 6, 0.01, HealthStatus.UNHEALTHY),
        (100, 0, 1.01, HealthStatus.DEGRADED),
        (100, 6, 1.01, HealthStatus.UNHEALTHY),
        (19, 19, 2.0, HealthStatus.UNKNOWN),
        (0, 0, 0.0, HealthStatus.UNKNOWN),
    ],
)
def test_health_goes_by_the_limits(requests: int, errors: int, seconds: float, status: HealthStatus) -> None:
    version, clock = load(version="2"), Clock()
    health = ModelHealth(Limits(), clock)
    health.look({KEY: version})
    ask(version, requests, errors=errors, seconds=seconds)
    clock.seconds = 30
    result = health.look({KEY: version})[KEY]
    version.close()
    assert result.status is status
    assert result.requests == requests
    assert (result.error_rate is None) == (requests == 0)


def test_health_forgets_what_is_older_than_its_window() -> None:
    version, clock = load(version="2"), Clock()
    health = ModelHealth(Limits(), clock)
    health.look({KEY: version})
    ask(version, 100, errors=100)
    clock.seconds = 10
    assert health.look({KEY: version})[KEY].status is HealthStatus.UNHEALTHY
    for _ in range(10):
        clock.seconds += 10
        ask(version, 30)
        last = health.look({KEY: version})[KEY]
    version.close()
    assert last.status is HealthStatus.HEALTHY
    assert last.requests <= 30 * 7


def test_a_version_that_takes_more_memory_than_it_may_is_unhealthy() -> None:
    version = load(version="2")
    version.runtime.memory_bytes = 2**20 + 1
    health = ModelHealth(Limits(), Clock())
    assert "1 MB" in health.look({KEY: version})[KEY].reasons[0]
    version.close()


def test_an_unhealthy_version_is_loaded_again_once_and_then_taken_out(tmp_path: Path) -> None:
    version, clock = load(version="2"), Clock()
    care = Caretaker(tmp_path, Limits(), monotonic=clock)
    routes = {"m": Route("m", 7, stable="2")}
    steps = []
    for _ in range(4):
        care.look({KEY: version}, routes)
        ask(version, 40, errors=40)
        clock.seconds += 10
        for what, unfit in care.look({KEY: version}, routes):
            steps.append(what)
            (care.reloaded if what == "reload" else care.told)(unfit)
    version.close()
    assert steps == ["reload", "take out"]


def test_a_version_at_the_limit_of_its_errors_is_not_loaded_again_and_again(tmp_path: Path) -> None:
    version, clock = load(version="2"), Clock()
    care = Caretaker(tmp_path, Limits(), monotonic=clock)
    routes = {"m": Route("m", 7, stable="2")}
    steps = []
    for number in range(100):  # the first requests after a reload are well, those that follow are not
        care.look({KEY: version}, routes)
        ask(version, 40, errors=0 if number % 2 == 0 else 40)
        clock.seconds += 1
        for what, unfit in care.look({KEY: version}, routes):
            steps.append(what)
            (care.reloaded if what == "reload" else care.told)(unfit)
    version.close()
    assert steps == ["reload", "take out"]


def test_a_version_that_is_being_loaded_once_more_does_not_stop_the_routes_from_being_changed() -> None:
    lifecycle = Lifecycle()
    for state in (ModelState.DOWNLOADING, ModelState.LOADING, ModelState.DOWNLOADING):
        lifecycle.move(KEY, state)
    lifecycle.settle([KEY], {KEY})
    lifecycle.move(KEY, ModelState.LOADING)
    lifecycle.settle([KEY], {KEY})
    assert lifecycle.state(KEY) is ModelState.IN_USE


def test_while_a_promotion_is_judged_its_judge_decides_and_nobody_else(tmp_path: Path) -> None:
    version, clock = load(version="2"), Clock()
    care = Caretaker(tmp_path, Limits(), monotonic=clock)
    care.look({KEY: version}, {"m": canary()})
    ask(version, 40, errors=40)
    clock.seconds = 10
    assert care.look({KEY: version}, {"m": canary()}) == []
    assert care.results[KEY].status is HealthStatus.UNHEALTHY
    version.close()


# --- the life of a version


def test_a_life_from_the_store_to_the_archive_and_back() -> None:
    life = Lifecycle()
    for state in (
        ModelState.DOWNLOADING, ModelState.LOADING, ModelState.READY, ModelState.IN_USE, ModelState.READY,
        ModelState.UNLOADING, ModelState.ARCHIVED, ModelState.DOWNLOADING, ModelState.ERROR, ModelState.DOWNLOADING,
    ):  # fmt: skip
        life.move(KEY, state)
        assert life.state(KEY) is state


def test_every_move_that_the_table_does_not_have_is_refused() -> None:
    paths = {
        None: (),
        ModelState.DOWNLOADING: (ModelState.DOWNLOADING,),
        ModelState.LOADING: (ModelState.DOWNLOADING, ModelState.LOADING),
        ModelState.READY: (ModelState.DOWNLOADING, ModelState.LOADING, ModelState.READY),
        ModelState.IN_USE: (ModelState.DOWNLOADING, ModelState.LOADING, ModelState.IN_USE),
        ModelState.UNLOADING: (
            ModelState.DOWNLOADING, ModelState.LOADING, ModelState.READY, ModelState.UNLOADING,
        ),
        ModelState.ARCHIVED: (
            ModelState.DOWNLOADING, ModelState.LOADING, ModelState.READY, ModelState.UNLOADING, ModelState.ARCHIVED,
        ),
        ModelState.ERROR: (ModelState.DOWNLOADING, ModelState.ERROR),
    }  # fmt: skip
    assert set(paths) == set(MOVES)
    for before, path in paths.items():
        for state in ModelState:
            life = Lifecycle()
            for step in path:
                life.move(KEY, step)
            if state in MOVES[before] or state is before:
                life.move(KEY, state)
            else:
                with pytest.raises(ValueError, match="cannot become"):
                    life.move(KEY, state)


def test_only_the_last_versions_that_are_gone_are_told() -> None:
    life = Lifecycle()
    for number in range(200):
        for state in (
            ModelState.DOWNLOADING,
            ModelState.LOADING,
            ModelState.READY,
            ModelState.UNLOADING,
            ModelState.ARCHIVED,
        ):
            life.move(("m", str(number)), state)
    listed = life.as_list()
    assert len(listed) == 64
    assert {entry["version"] for entry in listed} == {str(number) for number in range(136, 200)}
