"""Shipped logs in a bucket with object lock, against our own server: locked as backups are, told where they are not let go."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry import clock
from tasks.backup import prune_logs
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


def pruned(history: MariaDB, folder: Path) -> tuple[prune_logs.OfDatabase, ...]:
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
