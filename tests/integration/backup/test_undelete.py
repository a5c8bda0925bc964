"""A bucket with object lock whose credentials were stolen: what the thief cannot do, and what is put back.

Against moto, which is not ours; whole backups against our own server, since moto cannot tell how long something is locked.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import clock
from registry.errors import ModelkeepError, RefusedError
from tasks.backup.keyring import open_keyring
from tasks.backup.places import Place, open_place
from tasks.backup.repository import Repository
from tasks.backup.undelete import put_back
from tests.backup_content import FIRST, back_up, content, keyed, restored
from tests.fake_s3 import Server

BUCKET = "s3://vault/modelkeep"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCESS_KEY_ID", "someone"), ("SECRET_ACCESS_KEY", "else"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.fixture
def moto() -> Iterator[str]:
    """The URL of moto's server, with a bucket "vault" that has versions and object lock."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    _client(url).create_bucket(Bucket="vault", ObjectLockEnabledForBucket=True)
    yield url
    server.stop()


@pytest.fixture
def own() -> Iterator[Server]:
    with Server() as server:
        server.store.buckets["vault"] = {}
        server.store.locks = server.store.versions = True
        server.store.page = 3
        yield server


def _client(url: str) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=url)


def robbed(url: str) -> tuple[set[str], set[str]]:
    """Every version is purged that can be, the rest is deleted or overwritten: (names that were purged, names that are locked)."""
    from botocore.exceptions import ClientError

    thief = _client(url)
    pages = thief.get_paginator("list_object_versions").paginate(Bucket="vault")
    purged, locked = set(), set()
    for one in [one for page in pages for one in page["Versions"]]:
        try:
            thief.delete_object(Bucket="vault", Key=one["Key"], VersionId=one["VersionId"])
            purged.add(one["Key"])
        except ClientError as error:
            assert error.response["Error"]["Code"] == "AccessDenied"
            locked.add(one["Key"])
    for number, key in enumerate(sorted(locked)):
        if number % 2:
            thief.delete_object(Bucket="vault", Key=key)
        else:
            thief.put_object(Bucket="vault", Key=key, Body=b"pay")
    return purged - locked, locked


def test_in_a_store_that_is_not_ours_locked_objects_are_put_back(moto: str) -> None:
    place = open_place(BUCKET, endpoint_url=moto)
    names = [f"objects/aa/{number}" for number in range(4)]
    for name in names:
        place.put(name, name.encode(), keep_until=clock.now() + dt.timedelta(days=30))
    place.put("intents/x.json", b"{}")
    moment = clock.now()
    time.sleep(1.1)  # this store dates its versions in whole seconds
    purged, locked = robbed(moto)
    assert (purged, locked) == ({"modelkeep/intents/x.json"}, {f"modelkeep/{name}" for name in names})
    [found] = put_back([place], moment)
    assert (found.deleted, found.overwritten, found.lost) == (names[1::2], names[::2], {})
    assert [place.get(name) for name in names] == [name.encode() for name in names]


def test_a_whole_backup_survives_a_thief_and_neither_its_data_nor_its_key_can_be_purged(
    own: Server, tmp_path: Path
) -> None:
    places: list[Place] = [open_place(BUCKET, endpoint_url=own.url)]
    key, keyring = keyed(places, tmp_path)
    back_up(Repository(places, keyring), FIRST, content(), keep_until=clock.now() + dt.timedelta(days=30))
    names = {f"modelkeep/{one.name}" for one in places[0].list()}
    moment = clock.now()
    purged, locked = robbed(own.url)
    assert {name.split("/")[1] for name in purged if name in names} == {"states"}, "only notes are not locked"
    assert locked == names - purged
    with pytest.raises(ModelkeepError):
        restored(Repository(places, open_keyring(places, key)), FIRST)

    [found] = put_back(places, moment)
    assert (len(found.deleted) + len(found.overwritten), found.lost) == (len(locked), {})
    assert restored(Repository(places, open_keyring(places, key)), FIRST) == content()
    [again] = put_back(places, moment)
    assert (again.deleted, again.overwritten) == ([], [])


def test_putting_back_is_refused_where_no_place_keeps_versions(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="keeps no older versions"):
        put_back([open_place(str(tmp_path))], clock.now())
