"""A bucket with object lock whose credentials were stolen: what the thief cannot do, and what is put back. Against moto, which is not ours."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import clock
from registry.errors import RefusedError
from tasks.backup.keyring import open_keyring
from tasks.backup.places import Place, open_place
from tasks.backup.repository import Repository
from tasks.backup.undelete import put_back
from tests.backup_content import FIRST, back_up, content, keyed, restored

BUCKET = "s3://vault/modelkeep"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of moto's server, with a bucket "vault" that has versions and object lock."""
    for name, value in (
        ("ACCESS_KEY_ID", "someone"),
        ("SECRET_ACCESS_KEY", "something"),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    _client(url).create_bucket(Bucket="vault", ObjectLockEnabledForBucket=True)
    yield url
    server.stop()


def _client(url: str) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=url)


def _versions(client: Any) -> list[tuple[str, str]]:
    found = client.list_object_versions(Bucket="vault")
    assert not found["IsTruncated"]
    return [(one["Key"], one["VersionId"]) for kind in ("Versions", "DeleteMarkers") for one in found.get(kind, ())]


def test_what_a_thief_deletes_and_overwrites_is_put_back_and_neither_data_nor_key_can_be_purged(
    store: str, tmp_path: Path
) -> None:
    from botocore.exceptions import ClientError

    places: list[Place] = [open_place(BUCKET, endpoint_url=store)]
    key, keyring = keyed(places, tmp_path)
    back_up(Repository(places, keyring), FIRST, content(), keep_until=clock.now() + dt.timedelta(days=30))
    names = [one.name for one in places[0].list()]
    moment = clock.now()
    time.sleep(1.1)  # a store dates its versions in whole seconds

    thief = _client(store)
    purged, denied = set(), set()
    for name, version in _versions(thief):
        try:
            thief.delete_object(Bucket="vault", Key=name, VersionId=version)
            purged.add(name.removeprefix("modelkeep/"))
        except ClientError:
            denied.add(name.removeprefix("modelkeep/"))
    assert {name.partition("/")[0] for name in purged} == {"states"}, "notes are not locked"
    assert denied == set(names) - purged
    for number, name in enumerate(sorted(denied)):
        if number % 2:
            thief.delete_object(Bucket="vault", Key=f"modelkeep/{name}")
        else:
            thief.put_object(Bucket="vault", Key=f"modelkeep/{name}", Body=b"pay")
    with contextlib.suppress(Exception):
        assert restored(Repository(places, open_keyring(places, key)), FIRST) != content()

    [found] = put_back(places, moment)
    assert (len(found.deleted) + len(found.overwritten), found.lost) == (len(denied), {})
    assert restored(Repository(places, open_keyring(places, key)), FIRST) == content()
    [again] = put_back(places, moment)
    assert (again.deleted, again.overwritten) == ([], [])


def test_putting_back_is_refused_where_no_place_keeps_versions(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="keeps no older versions"):
        put_back([open_place(str(tmp_path))], clock.now())
