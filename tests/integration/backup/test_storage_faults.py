"""Stores that fail: whatever they do, a backup is complete and restores, or it says that it is not; and the next one is good."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.errors import ModelkeepError, StorageError
from tasks.backup import s3
from tasks.backup.keyring import FileKey, new_key, open_keyring
from tasks.backup.places import DirectoryPlace, Place
from tasks.backup.repository import Repository
from tasks.backup.s3 import S3Place
from tests.backup_content import FIRST, SECOND, back_up, content, restored
from tests.fake_s3 import Fault, Server
from tests.integration.backup.storage_cases import CASES, KEPT, NEVER_WRONG, SPOOLED, SURVIVES, TOLD, Case

MakePlace = Callable[[], S3Place]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def clients(server: Server) -> Iterator[dict[bool, object]]:
    """Two clients for all: one takes longer to make than a case to run. The second gives up on a silent store after a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield {False: s3._client(server.url, 30.0, 30.0), True: s3._client(server.url, 30.0, 0.5)}


@pytest.fixture
def bucket(server: Server, clients: dict[bool, object]) -> MakePlace:
    """`bucket()` is the place s3://bucket/some/prefix, with nothing in it and no faults at first."""
    store = server.store
    store.buckets = {"bucket": {}}
    store.faults = []
    store.requests = []
    store.conditional = store.checksums = True
    store.locks = False
    store.page = 7

    def make() -> S3Place:
        place = S3Place("s3://bucket/some/prefix", endpoint_url=server.url, sleep=lambda _: None)
        place._client = clients[any(fault.kind == "silence" for fault in store.faults)]
        return place

    return make


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> FileKey:
    return new_key(tmp_path_factory.mktemp("key") / "backup.key")


def opened(places: list[Place], key: FileKey, spool: Path | None = None) -> Repository:
    """A fresh process's view."""
    repository = Repository(places, spool=spool)
    repository.keyring = open_keyring(repository.all_places(), key, create=True)
    return repository


def of(outcomes: set[str], *, reading: bool = False) -> list[object]:
    """Every fourth case, and all of them in `make test-long`."""
    return [
        pytest.param(case, id=case.id, marks=() if number % 4 == 0 else pytest.mark.long)
        for number, case in enumerate(CASES)
        if case.outcome in outcomes and case.reading == reading
    ]


def test_every_case_is_another_fault_at_another_step() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 200


@pytest.mark.parametrize("case", of({SURVIVES, TOLD}))
def test_while_a_backup_is_written(case: Case, server: Server, bucket: MakePlace, key: FileKey) -> None:
    store = server.store
    store.checksums = case.checksums
    fault = Fault(case.fault, case.operation, case.name, case.times)
    store.faults = [fault]
    told = None
    try:
        back_up(opened([bucket()], key), FIRST, content())
    except StorageError as error:
        told = str(error)
    assert fault.seen > 0, "the fault was never met: the case tests nothing"
    store.faults = []

    repository = opened([bucket()], key)
    if case.outcome == SURVIVES:
        assert told is None
        assert restored(repository, FIRST) == content()
        assert repository.check(repository.manifest(FIRST)).good
    else:
        assert told is not None and case.word in told
        assert "something" not in told
    scan = repository.scan()
    assert not scan.broken
    for record in scan.manifests:  # whatever counts as a backup is one
        assert restored(repository, record.backup_id) == content()
    back_up(repository, SECOND, content(2))
    assert restored(opened([bucket()], key), SECOND) == content(2)


@pytest.mark.parametrize("case", of({SURVIVES, NEVER_WRONG}, reading=True))
def test_while_a_backup_is_read(case: Case, server: Server, bucket: MakePlace, key: FileKey) -> None:
    back_up(opened([bucket()], key), FIRST, content())
    before = {name: versions[-1].data for name, versions in server.store.buckets["bucket"].items() if versions}
    fault = Fault(case.fault, case.operation, case.name, case.times)
    server.store.faults = [fault]
    found, told = None, None
    try:
        repository = opened([bucket()], key)
        listed = repository.scan()
        if listed.unread or listed.broken:
            told = "; ".join([*listed.unread.values(), *listed.broken.values()])
        else:
            found = restored(repository, FIRST)
    except ModelkeepError as error:
        told = str(error)
    assert fault.seen > 0
    server.store.faults = []
    if case.outcome == SURVIVES:
        assert found == content()
    elif case.word or found is None:
        assert found is None
        assert told is not None and case.word in told
    else:  # what was left out was the line end
        assert found == content()
    after = {name: versions[-1].data for name, versions in server.store.buckets["bucket"].items() if versions}
    assert after == before, "reading changes nothing"
    assert restored(opened([bucket()], key), FIRST) == content()


@pytest.mark.parametrize("case", of({KEPT}))
def test_a_directory_keeps_what_the_store_does_not_take(
    case: Case, server: Server, bucket: MakePlace, key: FileKey, tmp_path: Path
) -> None:
    disk = DirectoryPlace(tmp_path / "backups")
    opened([disk, bucket()], key)  # the data key is made while all is well
    fault = Fault(case.fault, case.operation, case.name, case.times)
    server.store.faults = [fault]
    repository = opened([disk, bucket()], key)
    record = back_up(repository, FIRST, content())
    assert fault.seen > 0
    assert list(repository.down) == [1]
    assert restored(opened([disk], key), FIRST) == content()
    notes = opened([disk], key).states(FIRST)
    assert [note.state for note in notes] == ["kept", "sampled"]
    assert list(notes[0].facts["missing"]) == ["s3://bucket/some/prefix"]
    server.store.faults = []
    assert opened([bucket()], key).manifests() == []

    copied = opened([disk, bucket()], key).copy_missing()
    assert copied.copied == {FIRST: ("s3://bucket/some/prefix",)} and not copied.failed
    alone = opened([bucket()], key)
    assert alone.manifest(FIRST).as_dict() == record.as_dict()
    assert restored(alone, FIRST) == content()
    assert [note.state for note in alone.states(FIRST)] == ["kept", "sampled", "copied"]
    assert opened([disk, bucket()], key).copy_missing().copied == {}


@pytest.mark.parametrize("case", of({SPOOLED}))
def test_the_spool_keeps_what_the_only_store_does_not_take(
    case: Case, server: Server, bucket: MakePlace, key: FileKey, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    opened([bucket()], key, spool)
    fault = Fault(case.fault, case.operation, case.name, case.times)
    server.store.faults = [fault]
    back_up(opened([bucket()], key, spool), FIRST, content())
    assert fault.seen > 0
    server.store.faults = []
    assert opened([bucket()], key).manifests() == [], "the store alone has no whole backup yet"
    assert restored(opened([bucket()], key, spool), FIRST) == content()

    copied = opened([bucket()], key, spool).copy_missing()
    assert copied.copied == {FIRST: ("s3://bucket/some/prefix",)} and not copied.failed
    assert restored(opened([bucket()], key), FIRST) == content()
    assert {one.name.split("/")[0] for one in DirectoryPlace(spool).list()} == {"keys"}
