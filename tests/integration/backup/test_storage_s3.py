"""A bucket: against moto, which is not ours, the whole way; against our own server what moto does not do (locks, no conditions)."""

from __future__ import annotations

import datetime as dt
import itertools
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import clock
from registry.errors import ConflictError, SettingsError, StorageError
from tasks.backup.codec import CHUNK_BYTES
from tasks.backup.keyring import open_keyring
from tasks.backup.places import Place, open_place
from tasks.backup.repository import Repository
from tasks.backup.s3 import S3Place
from tests.backup_content import FIRST, SECOND, back_up, content, keyed, restored
from tests.fake_s3 import Server


@pytest.fixture(scope="module", autouse=True)
def credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The URL of moto's server, with a bucket "backups"."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    import boto3

    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="backups")
    yield url
    server.stop()


@pytest.fixture
def own() -> Iterator[Server]:
    with Server() as server:
        server.store.buckets["bucket"] = {}
        yield server


def quick(server: Server, **options: Any) -> S3Place:
    return S3Place("s3://bucket", endpoint_url=server.url, sleep=lambda _: None, **options)


def test_the_whole_way_through_a_store_that_is_not_ours(moto: str, tmp_path: Path) -> None:
    place = open_place("s3://backups/some/prefix", endpoint_url=moto)
    places: list[Place] = [place]
    key, keyring = keyed(places, tmp_path)
    files = {**content(), "large": bytes(range(256)) * (CHUNK_BYTES // 256) + b"and more"}
    repository = Repository(places, keyring)
    back_up(repository, FIRST, files)
    again = back_up(repository, SECOND, files).components[0]
    assert again.new_bytes == 0
    fresh = Repository([open_place("s3://backups/some/prefix/", endpoint_url=moto)], open_keyring(places, key))
    assert restored(fresh, FIRST) == files
    assert fresh.check(fresh.manifest(SECOND)).good
    assert [note.state for note in fresh.states(FIRST)] == ["sampled"]
    assert fresh.intents() == []
    assert fresh.manifest(f"s3://backups/some/prefix/{FIRST}.manifest.json") == fresh.manifest(FIRST)
    with pytest.raises(ConflictError):
        place.put(f"{FIRST}.manifest.json", b"other", only_new=True)
    assert place.delete(f"{FIRST}.manifest.json") and not place.delete(f"{FIRST}.manifest.json")
    assert list(open_place("s3://backups/other", endpoint_url=moto).list()) == []


def test_a_store_that_knows_no_conditions_still_never_overwrites_a_manifest(own: Server) -> None:
    own.store.conditional = False
    place = quick(own)
    place.put("keys/one.json", b"first", only_new=True)
    place.put("keys/one.json", b"first", only_new=True)
    with pytest.raises(ConflictError):
        place.put("keys/one.json", b"second", only_new=True)
    assert place.get("keys/one.json") == b"first"


def test_objects_are_locked_until_the_date_and_longer_when_they_are_used_again(own: Server) -> None:
    own.store.locks = True
    place = quick(own, lock_mode="compliance")
    repository = Repository([place])
    soon, late = clock.now() + dt.timedelta(days=1), clock.now() + dt.timedelta(days=30)
    with repository.writer(FIRST, keep_until=soon) as writer:
        chunk = writer.component("models").store([b"weights"]).chunks[0]
    name = f"objects/{chunk.object[:2]}/{chunk.object}"
    with pytest.raises(StorageError, match="credentials do not allow it"):
        place.delete(name)
    assert place.stat(name) is not None
    assert own.store.buckets["bucket"][name][-1].retention is not None
    assert place.keep(name, late)
    retention = own.store.buckets["bucket"][name][-1].retention
    assert retention is not None and retention[0] == "COMPLIANCE" and retention[1].startswith(f"{late:%Y-%m-%d}")
    assert place.keep(name, soon)  # never for less
    assert own.store.buckets["bucket"][name][-1].retention == retention


def test_a_bucket_without_locks_keeps_without_them(own: Server) -> None:
    place = quick(own)
    assert not place.can_lock()
    place.put("objects/aa/x", b"x", keep_until=clock.now() + dt.timedelta(days=1))
    assert place.get("objects/aa/x") == b"x"
    assert not place.keep("objects/aa/x", clock.now())


def test_without_credentials_it_says_which_to_set(own: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        quick(own).put("objects/aa/x", b"x")


def test_a_store_that_is_not_there_is_told_after_all_attempts_and_then_at_once() -> None:
    pauses: list[float] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens, and nobody else can have the port
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        place = S3Place("s3://bucket", endpoint_url=url, sleep=pauses.append)
        with pytest.raises(StorageError, match="in 5 attempts"):
            place.get("objects/aa/x")
        assert len(pauses) == 4 and all(late > early for early, late in itertools.pairwise(pauses))
        with pytest.raises(StorageError, match="in 1 attempt:"):
            place.get("objects/aa/x")
        assert len(pauses) == 4


def test_what_else_lies_in_the_bucket_is_not_ours(own: Server) -> None:
    place = quick(own)
    place.put("objects/aa/x", b"x")
    for name in ("objects/.hidden", "objects/aa/", "with blank", "ünd"):
        own.store.buckets["bucket"][name] = own.store.buckets["bucket"]["objects/aa/x"]
    assert [one.name for one in place.list()] == ["objects/aa/x"]


@pytest.mark.parametrize("url", ["s3://", "s3:///path", "http://bucket"])
def test_a_url_that_names_no_bucket_is_refused(url: str) -> None:
    with pytest.raises(SettingsError):
        S3Place(url)
