"""Shipped logs in a bucket with object lock, against our own server: locked as backups are, told where they are not let go."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry import clock
from tasks.backup import log_plan, prune_logs, states, undelete
from tasks.backup.logs import Shelf
from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import Repository
from tasks.backup.s3 import S3Place
from tests.fake_s3 import Server
from tests.unit.tasks.backup.log_history import MariaDB


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "something")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with Server() as server:
        server.store.buckets["bucket"] = {}
        server.store.locks = True
        yield server


def pruned(history: MariaDB, folder: Path) -> tuple[log_plan.OfDatabase, ...]:
    grace = dt.timedelta(days=1)
    return prune_logs.carry_out(history.repository, folder / "home", now=clock.now(), grace=grace).databases


def test_shipped_logs_are_locked_and_a_bucket_that_keeps_them_fails_nothing(own: Server, tmp_path: Path) -> None:
    bucket = S3Place("s3://bucket", endpoint_url=own.url, lock_mode="compliance", sleep=lambda _: None)
    folder = DirectoryPlace(tmp_path / "backups")
    history = MariaDB()
    history.repository = Repository([folder, bucket])
    history.shelf = Shelf(history.repository, "app", keep_until=clock.now() + dt.timedelta(days=30))
    for _ in range(2):
        history.write()
        history.ship()
    history.back_up()
    history.write()
    history.ship()
    locked = {name: one[-1].retention for name, one in own.store.buckets["bucket"].items() if name.startswith("logs/")}
    assert len(locked) == 7 and all(one is not None and one[0] == "COMPLIANCE" for one in locked.values())

    [done] = pruned(history, tmp_path)
    assert list(done.refused) == ["000001/binlog.000001", "000001/binlog.000002"] and done.removed == ()
    assert "credentials do not allow it" in done.text(applied=True)
    for place in (folder, bucket):  # a copy that went here would be brought back from there each time
        assert len([one for one in place.list("logs/") if one.name.endswith(".json")]) == 4

    for versions in own.store.buckets["bucket"].values():
        versions[-1].retention = None
    [done] = pruned(history, tmp_path)
    assert done.removed == ("000001/binlog.000001", "000001/binlog.000002")
    for place in (folder, bucket):
        assert {one.name.split("/")[3].split(".")[1] for one in place.list("logs/app/000001/")} == {"000003"}


def test_a_backup_that_is_put_back_after_its_logs_went_has_them_again_and_keeps_them(
    own: Server, tmp_path: Path
) -> None:
    own.store.versions = True
    history = MariaDB()
    history.repository = Repository([S3Place("s3://bucket", endpoint_url=own.url, sleep=lambda _: None)])
    history.shelf = Shelf(history.repository, "app")
    for _ in range(2):
        history.back_up()
        for _ in range(2):
            history.write()
            history.ship()
    first, second = history.backups
    ways, moment = history.ways(), clock.now()
    for versions in own.store.buckets["bucket"].values():
        for version in versions:
            version.modified = (moment - dt.timedelta(hours=1)).timestamp()
    history.repository.note_state(first.backup_id, states.PRUNED, {"logs": log_plan.stands(first)})
    history.repository.places[0].delete(f"{first.backup_id}.manifest.json")
    history.backups.remove(first)
    after = clock.now() + dt.timedelta(days=2)
    [done] = prune_logs.carry_out(history.repository, tmp_path, now=after, grace=dt.timedelta(days=1)).databases
    assert done.removed == ("000001/binlog.000001", "000001/binlog.000002")
    [back] = undelete.put_back(history.repository.places, moment - dt.timedelta(minutes=1))
    assert len(back.deleted) == 5 and not back.lost
    history.backups = [first, second]
    assert history.ways() == ways
    [done] = prune_logs.carry_out(history.repository, tmp_path, now=after, grace=dt.timedelta(days=1)).databases
    assert done.removed == () and history.ways() == ways
