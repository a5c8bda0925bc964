"""Backups, prunes, checks and drills beside each other, on machines that look alike and by clocks that jump."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest

from registry import clock
from registry.errors import ConflictError, StorageError
from tasks.backup import drill, garbage, newest, prune, states, sweeping, whose
from tasks.backup.manifest import FAILED, Component
from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import Repository
from tests.unit.tasks.backup.test_prune import DAY, NOW, POLICY, backup_id, take

ELSEWHERE = {"pid": 4_000_000, "host": platform.node(), "boot_id": "that of another machine with this name"}
OTHER_CONTAINER = {"pid": 4_000_000, "host": platform.node(), "boot_id": whose.boot_id(), "pid_space": "pid:[1]"}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository([DirectoryPlace(tmp_path / "backups")])


@pytest.mark.parametrize("facts", [ELSEWHERE, OTHER_CONTAINER], ids=["another machine", "another container"])
def test_a_backup_of_a_machine_or_container_with_our_name_is_not_taken_for_dead(
    repository: Repository, facts: dict[str, object]
) -> None:
    take(repository, 1, b"one" * 100, days_ago=9)
    take(repository, 2, b"new" * 100)
    prune.apply(repository, POLICY, now=NOW, grace=DAY)
    repository.begin_intent(backup_id(3), facts)
    found = garbage.collect(repository, now=NOW + 2 * DAY, grace=DAY)[0]
    assert found.deleted == 0 and "is under way" in str(found.waits)


def test_the_next_backup_does_not_sweep_one_of_another_machine_with_our_name_and_home(
    repository: Repository, tmp_path: Path
) -> None:
    facts = {**sweeping.identity(tmp_path), **ELSEWHERE}
    repository.begin_intent(backup_id(3), facts)
    repository.note_state(backup_id(3), states.RUNNING, {"sequence": 3})
    assert sweeping.sweep(repository, tmp_path, None).said == []
    assert [one.backup_id for one in repository.intents()] == [backup_id(3)]


def test_of_two_collections_that_saw_no_flag_only_one_raises_it(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = repository.places[0]
    mine = garbage._Flag(place, lambda: 0.0)
    stat = place.stat

    def late(name: str) -> object:
        found = stat(name)
        if name == garbage.FLAG and found is None:  # the other one is quicker, in just this moment
            place.put(
                garbage.FLAG, json.dumps({"token": "another", "pid": os.getpid(), "host": platform.node()}).encode()
            )
        return found

    monkeypatch.setattr(place, "stat", late)
    with pytest.raises(ConflictError, match="garbage is being collected"):
        mine.raise_it()
    mine.lower()
    assert json.loads(place.get(garbage.FLAG))["token"] == "another"


def test_a_collection_never_lowers_the_flag_of_another(repository: Repository) -> None:
    place = repository.places[0]
    mine = garbage._Flag(place, lambda: 0.0)
    mine.raise_it()
    place.put(garbage.FLAG, json.dumps({"token": "another"}).encode())  # ours stood still, and was taken away
    mine.lower()
    assert place.stat(garbage.FLAG) is not None


def test_a_check_made_after_the_clock_went_back_is_still_the_newest(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = take(repository, 1, b"one" * 100, verified=False)

    def note(state: str, outcome: str) -> None:
        repository.note_state(record.backup_id, state, {"components": {"files:uploads": {"outcome": outcome}}})

    monkeypatch.setattr(clock, "now", lambda: NOW + 400 * DAY)
    note(states.VERIFIED, "verified")
    repository.note_state(record.backup_id, states.PINNED)
    repository.note_state(record.backup_id, states.UNPINNED)
    monkeypatch.setattr(clock, "now", lambda: NOW)
    note(states.FAILED_VERIFICATION, "failed-verification")
    repository.note_state(record.backup_id, states.PINNED)
    found = states.derive(record, repository.states(record.backup_id))
    assert found.state == "failed" and not found.verified
    assert found.pinned


def test_a_pin_whose_note_is_damaged_still_holds(repository: Repository) -> None:
    old = take(repository, 1, b"old" * 100, days_ago=9)
    take(repository, 2, b"new" * 100)
    repository.note_state(old.backup_id, states.PINNED)
    place = repository.places[0]
    name = next(one.name for one in place.list("states/") if one.name.endswith("-pinned.json"))
    place.put(name, place.get(name)[:-40])
    decision = next(
        one for one in prune.preview(repository, POLICY, NOW, DAY).decisions if one.backup_id == old.backup_id
    )
    assert decision.keep and "pinned" in decision.rules[0]


def test_nothing_is_decided_where_the_notes_of_a_place_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = DirectoryPlace(tmp_path / "one"), DirectoryPlace(tmp_path / "other")
    repository = Repository([one, other])
    take(repository, 1, b"old" * 100, days_ago=9)
    take(repository, 2, b"new" * 100)
    Repository([other]).note_state(backup_id(1), states.PINNED)
    listed = other.list

    def list_(prefix: str = "") -> object:
        if prefix.startswith("states/"):
            raise StorageError("the bucket does not answer any more")
        return listed(prefix)

    monkeypatch.setattr(other, "list", list_)
    with pytest.raises(StorageError, match="nothing is decided"):
        prune.preview(repository, POLICY, NOW, DAY)


def test_two_installations_in_one_location_keep_their_own_backups(repository: Repository) -> None:
    ours = take(repository, 1, b"ours" * 100, days_ago=9)
    for number in (2, 3, 4):
        take(repository, number, b"theirs" * number, days_ago=4 - number, installation="1" * 64)
    kept = {one.backup_id for one in prune.preview(repository, POLICY, NOW, DAY).decisions if one.keep}
    assert kept == {ours.backup_id, backup_id(4)}


def test_a_drill_leaves_the_folder_of_another_alone_and_takes_away_that_of_a_dead_one(
    repository: Repository, tmp_path: Path
) -> None:
    record = take(repository, 1, b"one" * 100)
    (tmp_path / "drills/dead").mkdir(parents=True)
    with drill._room(tmp_path, "first", record) as first:
        (first / "registry.db").write_bytes(b"restored")
        with drill._room(tmp_path, "second", record) as second:
            assert second != first and (first / "registry.db").exists()
    assert list((tmp_path / "drills").iterdir()) == []


def test_what_is_restored_to_be_checked_is_nobody_elses_to_read(repository: Repository, tmp_path: Path) -> None:
    record = take(repository, 1, b"one" * 100)
    with sweeping.work_folder(tmp_path, "verify-x") as work, drill._room(tmp_path, "first", record) as room:
        assert work.stat().st_mode & 0o077 == 0 and room.stat().st_mode & 0o077 == 0


def test_what_is_asked_for_by_name_comes_of_the_newest_backup_in_which_just_that_is_verified(
    repository: Repository,
) -> None:
    take(repository, 1, b"old" * 100)
    whole = take(repository, 2, b"new" * 100, verified=False)
    lost = Component("registry", "registry", FAILED, whole.began_at, whole.ended_at, error="it was away")
    named = backup_id(3)
    repository.write_manifest(
        replace(whole, backup_id=named, state="partial", sequence=3, components=(*whole.components, lost))
    )
    repository.note_state(named, states.VERIFIED, {"components": {"files:uploads": {"outcome": "verified"}}})
    assert newest.newest_before(repository, None, ("files:uploads",)).backup_id == named
