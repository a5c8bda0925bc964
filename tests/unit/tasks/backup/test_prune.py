"""Backups go by the policy, their objects in two phases: what a backup under way may need is never deleted."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import platform
from pathlib import Path

import pytest

from registry import clock
from registry.errors import ConflictError, StorageError
from tasks.backup import garbage, prune, states, whose
from tasks.backup.manifest import COMPLETE, Component, Entry, Manifest
from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import Repository
from tasks.backup.retention import Policy

NOW = dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
POLICY = Policy(daily=0, weekly=0, monthly=0, minimum_redundancy=1, unverified_days=3)
INTENT = {"pid": os.getpid(), "host": platform.node(), "boot_id": whose.boot_id()}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository([DirectoryPlace(tmp_path / "backups")])


def backup_id(number: int) -> str:
    return f"202611{number:02}T020000Z-{number:06x}"


def take(
    repository: Repository,
    number: int,
    *contents: bytes,
    verified: bool = True,
    days_ago: float = 0,
    installation: str = "0" * 64,
) -> Manifest:
    """A backup of one component that holds these contents, each a file."""
    named, at = backup_id(number), clock.text(NOW - days_ago * DAY)
    with repository.writer(named) as writer:
        sink = writer.component("files:uploads")
        for index, content in enumerate(contents):
            sink.add(Entry(f"{index}.bin", stream=sink.store([content], compress=False)))
        done = sink.finish()
    component = Component(
        "files:uploads",
        "files",
        COMPLETE,
        at,
        at,
        done.entries,
        done.size_bytes,
        done.stored_bytes,
        done.new_bytes,
        done.index,
    )
    record = Manifest(named, installation, COMPLETE, at, at, ("all",), (component,), sequence=number)
    repository.write_manifest(record)
    if verified:
        repository.note_state(named, states.VERIFIED, {"components": {"files:uploads": {"outcome": "verified"}}})
    return record


def run(repository: Repository, now: dt.datetime = NOW, grace: dt.timedelta = DAY) -> prune.Pruned:
    return prune.apply(repository, POLICY, now=now, grace=grace)


def objects(repository: Repository) -> int:
    return sum(1 for _ in repository.places[0].list("objects/"))


def whole(repository: Repository, record: Manifest) -> bool:
    return bool(repository.check(record).good)


def test_a_preview_says_why_and_deletes_nothing(repository: Repository) -> None:
    take(repository, 1, b"old" * 100, days_ago=9)
    take(repository, 2, b"new" * 100)
    before = sorted(stat.name for stat in repository.places[0].list())
    found = prune.preview(repository, POLICY, NOW, DAY)
    assert found.goes == [backup_id(1)]
    assert all(decision.rules for decision in found.decisions)
    assert sorted(stat.name for stat in repository.places[0].list()) == before


def test_a_backup_goes_at_once_and_its_objects_a_day_later(repository: Repository) -> None:
    take(repository, 1, b"only in the old one" * 100, b"in both" * 100, days_ago=9)
    kept = take(repository, 2, b"in both" * 100, b"only in the new one" * 100)
    there = objects(repository)

    first = run(repository)
    assert first.removed == (backup_id(1),)
    assert first.garbage[0].marked == 2, "a file of its own, and its index"
    assert objects(repository) == there
    assert [one.backup_id for one in repository.manifests()] == [kept.backup_id]

    assert run(repository, NOW + DAY / 2).garbage[0].deleted == 0
    later = run(repository, NOW + DAY)
    assert later.garbage[0].deleted == 2
    assert objects(repository) == there - 2
    assert not list(repository.places[0].list("gc/"))
    assert whole(repository, kept)


def test_an_object_that_is_needed_again_is_not_deleted(repository: Repository) -> None:
    take(repository, 1, b"comes back" * 100, days_ago=9)
    take(repository, 2, b"other" * 100)
    run(repository)
    again = take(repository, 3, b"comes back" * 100, b"more" * 100)
    assert run(repository, NOW + 2 * DAY).garbage[0].deleted == 1, "the index of the first backup alone"
    assert whole(repository, again)


def test_nothing_is_deleted_while_a_backup_is_under_way(repository: Repository) -> None:
    take(repository, 1, b"old" * 100, days_ago=9)
    take(repository, 2, b"new" * 100)
    run(repository)
    repository.begin_intent(backup_id(3), INTENT)
    waits = run(repository, NOW + 2 * DAY).garbage[0]
    assert waits.deleted == 0 and waits.waits is not None and backup_id(3) in waits.waits
    repository.end_intent(backup_id(3))
    assert run(repository, NOW + 2 * DAY).garbage[0].deleted == 2


def test_a_backup_whose_process_is_dead_holds_nothing_up(repository: Repository) -> None:
    take(repository, 1, b"old" * 100, days_ago=9)
    take(repository, 2, b"new" * 100)
    run(repository)
    repository.begin_intent(backup_id(3), {**INTENT, "pid": 4_000_000})
    assert run(repository, NOW + 2 * DAY).garbage[0].deleted == 2


def test_an_object_written_between_its_mark_and_the_deletion_stays(repository: Repository) -> None:
    """A backup that was killed before its manifest, after the mark: what it wrote is younger than the mark knows."""
    take(repository, 1, b"comes back" * 100, days_ago=9)
    take(repository, 2, b"other" * 100)
    run(repository)
    with repository.writer(backup_id(3)) as writer:
        sink = writer.component("files:uploads")
        sink.store([b"comes back" * 100], compress=False)
        sink.finish()
    assert run(repository, NOW + 2 * DAY).garbage[0].deleted == 1
    assert run(repository, NOW + 4 * DAY).garbage[0].deleted == 1, "nobody needed it after all"


def test_while_a_manifest_cannot_be_read_nothing_is_marked_or_deleted(repository: Repository, tmp_path: Path) -> None:
    take(repository, 1, b"old" * 100, days_ago=9)
    take(repository, 2, b"new" * 100)
    run(repository)
    (tmp_path / "backups" / f"{backup_id(4)}.manifest.json").write_text('{"format": "modelkeep-backup"')
    found = run(repository, NOW + 2 * DAY)
    assert found.garbage[0].deleted == 0 and "cannot be read" in str(found.garbage[0].waits)
    assert backup_id(4) in found.unreadable


def test_while_an_index_is_damaged_nothing_is_deleted(repository: Repository) -> None:
    take(repository, 1, b"old" * 100, days_ago=9)
    record = take(repository, 2, b"new" * 100)
    run(repository)
    index = record.components[0].index
    assert index is not None
    place = repository.places[0]
    name = f"objects/{index.chunks[0].object[:2]}/{index.chunks[0].object}"
    place.put(name, bytes(byte ^ 1 for byte in place.get(name)))
    found = run(repository, NOW + 2 * DAY).garbage[0]
    assert found.deleted == 0 and "index of files:uploads" in str(found.waits)


def test_two_collections_do_not_run_at_once(repository: Repository) -> None:
    repository.places[0].put(garbage.FLAG, json.dumps({"token": "another", **INTENT}).encode())
    with pytest.raises(ConflictError, match="garbage is being collected"):
        garbage.collect(repository, now=NOW, grace=DAY)
    assert repository.places[0].stat(garbage.FLAG) is not None


def test_the_flag_of_a_killed_collection_is_no_obstacle(repository: Repository) -> None:
    repository.places[0].put(garbage.FLAG, json.dumps({"token": "dead", **INTENT, "pid": 4_000_000}).encode())
    garbage.collect(repository, now=NOW, grace=DAY)
    assert repository.places[0].stat(garbage.FLAG) is None


@pytest.mark.parametrize(
    ("more", "doing", "what"),
    [
        ({}, "garbage is being collected", "a collection of garbage"),
        ({"doing": "garbage"}, "garbage is being collected", "a collection of garbage"),
        ({"doing": "logs"}, "shipped logs are being deleted", "a deletion of shipped logs"),
        ({"doing": ["of the future"]}, "garbage is being collected", "a collection of garbage"),
    ],
)
def test_who_meets_a_deletion_is_told_what_it_does(
    more: dict[str, object], doing: str, what: str, repository: Repository
) -> None:
    place = repository.places[0]
    place.put(garbage.FLAG, json.dumps({"token": "another", **more, **INTENT}).encode())
    with pytest.raises(ConflictError, match=doing):
        garbage.collect(repository, now=NOW, grace=DAY)
    said, dead = list[str](), json.dumps({"token": "another", **more, **INTENT, "pid": 4_000_000}).encode()

    def die(_: float) -> None:
        if place.get(garbage.FLAG) != dead:
            place.put(garbage.FLAG, dead)

    garbage.wait_for_deletion(repository, sleep=die, say=said.append)
    assert said[0].startswith(f"{doing} in ") and said[-1].startswith(f"{what} in ") and "cut off" in said[-1]


def test_a_collection_says_in_its_flag_that_it_is_one(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    place, seen = repository.places[0], list[object]()
    put = place.put

    def watched(name: str, data: bytes, *, only_new: bool = False, keep_until: dt.datetime | None = None) -> None:
        if name == garbage.FLAG:
            seen.append(json.loads(data)["doing"])
        put(name, data, only_new=only_new, keep_until=keep_until)

    monkeypatch.setattr(place, "put", watched)
    garbage.collect(repository, now=NOW, grace=DAY)
    assert seen == ["garbage"]


def test_a_backup_waits_for_the_end_of_a_deletion(repository: Repository) -> None:
    place = repository.places[0]
    place.put(garbage.FLAG, json.dumps({"token": "another", **INTENT}).encode())
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            place.delete(garbage.FLAG)

    garbage.wait_for_deletion(repository, sleep=sleep)
    assert len(looks) == 3


def test_a_backup_does_not_wait_for_a_deletion_that_stands_still(repository: Repository) -> None:
    place = repository.places[0]
    place.put(garbage.FLAG, json.dumps({"token": "another", **INTENT}).encode())
    passed = [0.0]

    def sleep(seconds: float) -> None:
        passed[0] += 30.0

    garbage.wait_for_deletion(repository, monotonic=lambda: passed[0], sleep=sleep)
    assert place.stat(garbage.FLAG) is None and passed[0] > garbage.STALE_SECONDS


def test_a_deletion_whose_flag_was_taken_away_stops(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    take(repository, 1, b"one" * 100, b"two" * 100, days_ago=9)
    take(repository, 2, b"new" * 100)
    run(repository)
    monkeypatch.setattr(garbage, "_BEAT_SECONDS", 0.0)
    place = repository.places[0]
    delete = place.delete

    def stolen(name: str) -> bool:
        gone = delete(name)
        if name.startswith("objects/"):
            delete(garbage.FLAG)
        return gone

    monkeypatch.setattr(place, "delete", stolen)
    found = garbage.collect(repository, now=NOW + 2 * DAY, grace=DAY)[0]
    assert found.deleted == 1 and "flag was taken away" in str(found.waits)


def test_a_prune_that_was_killed_at_any_step_is_finished_by_the_next(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    place = repository.places[0]
    steps = 0
    put, delete = place.put, place.delete

    def count(limit: int) -> None:
        nonlocal steps
        steps += 1
        if steps > limit:
            raise Killed

    for limit in range(12):
        steps = 0
        kept = take(repository, 2 * limit + 2, b"new" * 100, b"kept" * limit)
        take_old = take(repository, 2 * limit + 1, b"old" * 50, bytes([limit]) * 500, verified=False, days_ago=9)
        monkeypatch.setattr(place, "put", lambda *a, limit=limit, **k: (count(limit), put(*a, **k))[1])
        monkeypatch.setattr(place, "delete", lambda name, limit=limit: (count(limit), delete(name))[1])
        with contextlib.suppress(Killed):
            run(repository, NOW + (limit + 4) * DAY)
        monkeypatch.setattr(place, "put", put)
        monkeypatch.setattr(place, "delete", delete)
        flag = place.stat(garbage.FLAG)
        if flag is not None:  # a process that was killed is dead: here it is this one
            delete(garbage.FLAG)
        run(repository, NOW + (limit + 4) * DAY)
        assert whole(repository, kept)
        assert take_old.backup_id not in [one.backup_id for one in repository.manifests()]


def test_nothing_is_decided_while_a_place_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = DirectoryPlace(tmp_path / "one"), DirectoryPlace(tmp_path / "other")
    repository = Repository([one, other])
    take(repository, 1, b"old" * 100, days_ago=9)
    take(repository, 2, b"new" * 100)

    def gone(prefix: str = "") -> object:
        raise StorageError("the bucket does not answer")

    monkeypatch.setattr(other, "list", gone)
    with pytest.raises(StorageError, match=r"nothing is decided.*other does not answer: the bucket does not answer"):
        prune.preview(repository, POLICY, NOW, DAY)
