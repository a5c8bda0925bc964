"""A repository over directories: what is stored once, what is written again, who may read it, and what every place has in the end."""

from __future__ import annotations

import datetime as dt
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import clock
from registry.errors import ArtifactError, ConflictError, NotFoundError, SettingsError, StorageError, UsageError
from tasks.backup import codec
from tasks.backup.codec import CHUNK_BYTES, object_name
from tasks.backup.keyring import BackupKeyError, new_key, open_keyring, read_key, rotate
from tasks.backup.manifest import Entry, ManifestError
from tasks.backup.places import DirectoryPlace, Place, check_name
from tasks.backup.repository import Repository, Scan, locate
from tasks.backup.writer import Writer, cut
from tests.backup_content import FIRST, NAME, SECOND, THIRD, back_up, content, keyed, restored


@pytest.fixture
def place(tmp_path: Path) -> DirectoryPlace:
    return DirectoryPlace(tmp_path / "backups")


def written(place: DirectoryPlace) -> dict[str, int]:
    return {str(path.relative_to(place.folder)): path.stat().st_mtime_ns for path in place.folder.glob("objects/*/*")}


def test_a_second_backup_of_the_same_content_stores_nothing_new(place: DirectoryPlace) -> None:
    files = {**content(), "large": random.Random(3).randbytes(CHUNK_BYTES + 5)}
    first = back_up(Repository([place]), FIRST, files).components[0]
    before = written(place)
    second = back_up(Repository([place]), SECOND, files).components[0]
    assert written(place) == before
    assert second.new_bytes == 0 and first.new_bytes == first.stored_bytes == second.stored_bytes
    files["large"] = files["large"][:-1] + b"x"
    third = back_up(Repository([place]), THIRD, files).components[0]
    assert 0 < third.new_bytes < 5000  # the last chunk and the index
    assert restored(Repository([place]), THIRD) == files


def test_equal_files_of_one_backup_are_stored_once(place: DirectoryPlace) -> None:
    record = back_up(Repository([place]), FIRST, {str(number): b"the same" for number in range(50)}).components[0]
    assert record.size_bytes == 400
    assert len(written(place)) == 2


@pytest.mark.parametrize("sizes", [[0], [1], [CHUNK_BYTES], [CHUNK_BYTES + 1], [7, 0, CHUNK_BYTES, 3], [1 << 20] * 33])
def test_a_stream_of_any_pieces_comes_back(sizes: list[int], place: DirectoryPlace) -> None:
    pieces = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    repository = Repository([place])
    with repository.writer(FIRST) as writer:
        stream = writer.component(NAME).store(pieces)
    assert stream.size_bytes == sum(sizes)
    assert len(stream.chunks) == -(-sum(sizes) // CHUNK_BYTES)
    source = repository.source(back_up(repository, FIRST, {"x": b""}), NAME)
    assert b"".join(source.open(stream)) == b"".join(pieces)
    assert [len(one) for one in cut(pieces)] == [one.size_bytes for one in stream.chunks]


def test_an_error_of_the_source_passes_through_and_the_writer_goes_on(place: DirectoryPlace) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(3 * CHUNK_BYTES)
        raise ArtifactError("the dump was killed")

    repository = Repository([place])
    with repository.writer(FIRST) as writer:
        with pytest.raises(ArtifactError, match="the dump was killed"):
            writer.component("database:app").store(broken())
        stream = writer.component("models").store([b"well"])
    assert stream.size_bytes == 4


def test_what_is_marked_as_garbage_is_written_again(place: DirectoryPlace) -> None:
    record = back_up(Repository([place]), FIRST, content())
    marked = next(Repository([place]).chunks(record)).object
    value = {"format": "modelkeep-backup-garbage", "format_version": 1, "objects": {marked: "…"}}
    place.put("gc/20261121T030000Z.json", json.dumps(value).encode())
    before = written(place)
    back_up(Repository([place]), SECOND, content())
    assert [name for name, at in written(place).items() if at != before[name]] == [object_name(marked)]
    for backup_id in (FIRST, SECOND):
        assert restored(Repository([place]), backup_id) == content()


def test_what_compresses_is_compressed_and_the_rest_is_not(place: DirectoryPlace) -> None:
    repository = Repository([place])
    with repository.writer(FIRST) as writer:
        sink = writer.component(NAME)
        assert sink.store([b"again and " * 1000]).chunks[0].codec == "zstd"
        assert sink.store([b"again and " * 1000 + b"again"], compress=False).chunks[0].codec == "plain"
        assert sink.store([random.Random(1).randbytes(10_000)]).chunks[0].codec == "plain"


def test_with_a_key_neither_names_nor_bytes_tell_anything(place: DirectoryPlace, tmp_path: Path) -> None:
    _, keyring = keyed([place], tmp_path)
    text = b"a secret that somebody could guess"
    back_up(Repository([place], keyring), FIRST, {"secret-name.txt": text})
    import hashlib

    guessed = hashlib.sha256(text).hexdigest()
    assert not any(guessed in name for name in written(place))
    for path in place.folder.rglob("*"):
        if path.is_file():
            assert b"secret" not in path.read_bytes().replace(b'"secret"', b"")


def test_a_bomb_is_not_unpacked() -> None:
    import zstandard

    assert codec.expand(zstandard.compress(bytes(1 << 20)), 1000) is None


def test_rotation_rewrites_no_data_and_the_old_key_opens_nothing_any_more(
    place: DirectoryPlace, tmp_path: Path
) -> None:
    second = DirectoryPlace(tmp_path / "second")
    old, keyring = keyed([place, second], tmp_path)
    back_up(Repository([place, second], keyring), FIRST, content())
    before = written(place)
    new = new_key(tmp_path / "new.key")
    rotate([place, second], old, new)
    assert written(place) == before
    for one in (place, second):
        with pytest.raises(BackupKeyError, match=new.key_id):
            open_keyring([one], old)
        repository = Repository([one], open_keyring([one], new))
        assert restored(repository, FIRST) == content()
        assert [note.state for note in repository.states(FIRST)] == ["sampled"]


def test_a_key_is_not_set_for_a_location_that_has_backups_without_one(place: DirectoryPlace, tmp_path: Path) -> None:
    back_up(Repository([place]), FIRST, content())
    with pytest.raises(BackupKeyError, match="another location"):
        open_keyring([place], new_key(tmp_path / "key"), create=True)


def test_a_new_place_gets_the_data_key_of_the_others(place: DirectoryPlace, tmp_path: Path) -> None:
    key, keyring = keyed([place], tmp_path)
    second = DirectoryPlace(tmp_path / "second")
    again = open_keyring([place, second], key, create=True)
    assert again is not None and again.data_key == keyring.data_key
    assert open_keyring([second], key) == keyring


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = new_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key(path) == key and key.secret.hex() not in repr(key)
    with pytest.raises(ConflictError, match="never overwritten"):
        new_key(path)
    path.chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        read_key(path)
    path.chmod(0o600)
    path.write_text(key.secret.hex())
    assert read_key(path) == key
    for text in ("", "# only words\n", "short", "0" * 63, f"{key.secret.hex()}\n{key.secret.hex()}"):
        path.write_text(text)
        with pytest.raises(SettingsError, match="new-key"):
            read_key(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_key(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a/.b", "a\nb", "ä", "a b"]
)
def test_a_name_that_leads_out_or_that_not_every_place_can_hold_is_refused(name: str, place: DirectoryPlace) -> None:
    with pytest.raises(UsageError):
        check_name(name)
    with pytest.raises(UsageError):
        place.put(name, b"")


def test_a_list_is_sorted_and_passes_over_what_is_not_ours(place: DirectoryPlace) -> None:
    names = ["2-first", "objects/aa/1", "objects/ab/2", "objects-else", "states/x/1.json"]
    for name in reversed(names):
        place.put(name, b"x")
    (place.folder / ".incoming" / "half.tmp").write_bytes(b"")
    (place.folder / "lost+found x").mkdir()
    assert [one.name for one in place.list()] == sorted(names)
    assert [one.name for one in place.list("objects/a")] == ["objects/aa/1", "objects/ab/2"]
    assert [one.name for one in place.list("objects")] == ["objects-else", "objects/aa/1", "objects/ab/2"]
    assert [one.name for one in place.list("2")] == ["2-first"]
    assert list(DirectoryPlace(place.folder / "absent").list()) == []


def test_a_manifest_is_written_once(place: DirectoryPlace) -> None:
    repository = Repository([place])
    record = back_up(repository, FIRST, content())
    repository.write_manifest(record)  # the same again changes nothing
    with pytest.raises(ConflictError, match="other content"):
        back_up(repository, FIRST, content(2))
    assert restored(repository, FIRST) == content()


def test_of_two_that_write_one_name_at_once_one_wins_and_the_other_is_told(place: DirectoryPlace) -> None:
    outcomes: list[str] = []
    ready = threading.Barrier(8)

    def write(number: int) -> None:
        ready.wait(30)
        try:
            place.put("keys/one.json", bytes([number]), only_new=True)
            outcomes.append("won")
        except ConflictError:
            outcomes.append("told")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert sorted(outcomes) == ["told"] * 7 + ["won"]


def test_two_backups_of_the_same_content_at_once_both_restore(place: DirectoryPlace, tmp_path: Path) -> None:
    """Each has its own nonces, and whoever was last has written the objects of both."""
    _, keyring = keyed([place], tmp_path)
    files = {**content(), **{str(number): bytes([number]) * 3000 for number in range(40)}}
    ready = threading.Barrier(2)
    failed: list[BaseException] = []

    class Together(Repository):
        """None begins to write before both have looked at what is there: each then writes all of it."""

        def writer(self, *given: Any, **more: Any) -> Writer:
            found = super().writer(*given, **more)
            ready.wait(30)
            return found

    def write(backup_id: str) -> None:
        try:
            back_up(Together([place], keyring), backup_id, files)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(one,)) for one in (FIRST, SECOND)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert failed == []
    repository = Repository([place], keyring)
    for backup_id in (FIRST, SECOND):
        assert restored(repository, backup_id) == files
        assert repository.check(repository.manifest(backup_id)).good


def test_an_object_that_was_written_again_is_right_for_older_backups_too(place: DirectoryPlace, tmp_path: Path) -> None:
    """Other nonce, and stored plain where it was compressed."""
    _, keyring = keyed([place], tmp_path)
    repository = Repository([place], keyring)
    text = {"notes.txt": b"what compresses well. " * 500}
    record = back_up(repository, FIRST, text)
    entry = next(repository.source(record, NAME).entries())
    assert entry.stream is not None
    chunk = entry.stream.chunks[0]
    again = codec.encode(text["notes.txt"], bytes.fromhex(chunk.sha256), keyring, compress=False)
    assert again.chunk.codec != chunk.codec and again.chunk.object == chunk.object
    place.put(object_name(chunk.object), again.data)
    assert restored(repository, FIRST) == text
    assert repository.check(record).good


def test_what_a_backup_leaves_on_the_disk_is_for_its_owner_only(place: DirectoryPlace) -> None:
    back_up(Repository([place]), FIRST, content())
    for path in (place.folder, *place.folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0


def test_a_manifest_of_the_future_of_another_name_or_of_nobody_is_refused(place: DirectoryPlace) -> None:
    repository = Repository([place])
    back_up(repository, FIRST, content())
    name = f"{FIRST}.manifest.json"
    good = json.loads(place.get(name))
    for changed, words in (
        ({**good, "format_version": 2}, "format version 2"),
        ({**good, "format": "tar"}, "no manifest"),
        ({key: one for key, one in good.items() if key != "signature"}, "neither signature nor digest"),
    ):
        place.put(name, json.dumps(changed).encode())
        with pytest.raises(ManifestError, match=words):
            repository.manifest(FIRST)
    place.delete(name)
    place.put(f"{SECOND}.manifest.json", json.dumps(good).encode())
    with pytest.raises(ManifestError, match=f"manifest of backup {FIRST}"):
        repository.manifest(SECOND)
    assert list(repository.scan().broken) == [SECOND]


def test_a_reference_is_an_id_a_path_or_a_url(place: DirectoryPlace, tmp_path: Path) -> None:
    record = back_up(Repository([place]), FIRST, content())
    elsewhere = Repository([DirectoryPlace(tmp_path / "empty")])
    with pytest.raises(NotFoundError, match="backups list"):
        elsewhere.manifest(FIRST)
    assert elsewhere.manifest(f"{place.folder}/{FIRST}.manifest.json") == record
    assert restored(elsewhere, FIRST) == content()  # from then on that location is read as well
    assert locate(f"s3://bucket/x/{FIRST}.manifest.json") == ("s3://bucket/x", FIRST)
    for wrong in ("latest", "../20261121T020000Z-0a1b2c", "s3://bucket/x/"):
        with pytest.raises(UsageError):
            Repository([place]).manifest(wrong) if "/" not in wrong else locate(f"{wrong}x")


def test_an_index_of_many_entries_comes_back_in_order(place: DirectoryPlace) -> None:
    repository = Repository([place])
    with repository.writer(FIRST) as writer:
        sink = writer.component(NAME)
        stream = sink.store([b"one for all"])
        for number in range(30_000):
            sink.add(Entry(f"folder/{number:06d}", stream=stream, facts={"mode": 0o644}))
        done = sink.finish()
    assert done.entries == 30_000 and done.size_bytes == 330_000
    from tasks.backup.manifest import COMPLETE, Component, Manifest

    component = Component(NAME, "files", COMPLETE, "", "", done.entries, index=done.index)
    repository.write_manifest(Manifest(FIRST, "x", COMPLETE, "", "", (NAME,), (component,)))
    names = [entry.name for entry in repository.source(repository.manifest(FIRST), NAME).entries()]
    assert names == [f"folder/{number:06d}" for number in range(30_000)]


def test_what_was_pruned_is_not_brought_back_by_a_place_that_was_away(place: DirectoryPlace, tmp_path: Path) -> None:
    second = DirectoryPlace(tmp_path / "second")
    both = Repository([place, second])
    back_up(both, FIRST, content())
    back_up(both, SECOND, content(2))
    place.delete(f"{FIRST}.manifest.json")
    Repository([place]).note_state(FIRST, "pruned")
    assert Repository([place, second]).copy_missing().copied == {}
    assert [one.backup_id for one in Repository([place]).manifests()] == [SECOND]


def test_a_missing_object_is_named_before_anything_is_restored(place: DirectoryPlace) -> None:
    repository = Repository([place])
    record = back_up(repository, FIRST, content())
    assert repository.missing(record) == []
    name = next(iter(written(place)))
    place.delete(name)
    assert repository.missing(record) == [name]
    assert not repository.check(record, read=False).good


def test_a_disk_that_cannot_be_synced_does_not_count_and_the_other_does(
    place: DirectoryPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = DirectoryPlace(tmp_path / "second")

    def fail() -> None:
        raise StorageError("the disk has errors")

    monkeypatch.setattr(second, "flush", fail)
    repository = Repository([place, second])
    back_up(repository, FIRST, content())
    assert repository.down == {1: "the disk has errors"}
    assert Repository([DirectoryPlace(second.folder)]).manifests() == []
    assert restored(Repository([place]), FIRST) == content()
    with pytest.raises(StorageError, match="no place takes the backup: the disk has errors"):
        back_up(Repository([second]), SECOND, content())


def test_no_manifest_is_written_while_a_place_cannot_lock_the_key_and_every_place_is_asked(tmp_path: Path) -> None:
    asked: list[str] = []

    class Bucket(DirectoryPlace):
        why: str | None = None

        def keep(self, name: str, until: dt.datetime) -> bool:
            asked.append(f"{self.folder.name}/{name}")
            if self.why is not None:
                raise StorageError(f"{name} could not be locked in {self.folder.name}: {self.why}")
            return True

    first, second = Bucket(tmp_path / "first"), Bucket(tmp_path / "second")
    places: list[Place] = [first, second]
    _, keyring = keyed(places, tmp_path)
    key, until = f"keys/{keyring.key_id}.json", clock.now()
    first.why = "the credentials do not allow it"
    with pytest.raises(StorageError, match="credentials do not allow it"):
        back_up(Repository(places, keyring), FIRST, content(), keep_until=until)
    assert asked[-2:] == [f"first/{key}", f"second/{key}"]
    assert Repository(places, keyring).manifests() == []
    first.why, asked[:] = None, []
    back_up(Repository(places, keyring), SECOND, content(2))
    assert asked == []
    back_up(Repository(places, keyring), THIRD, content(3), keep_until=until)
    assert [one for one in asked if "/keys/" in one] == [f"first/{key}", f"second/{key}"]


def test_a_scan_has_one_wording_for_what_is_unknown() -> None:
    assert Scan(()).unanswered is None and Scan(()).unbelieved is None
    found = Scan((), {"b": "it is cut", "a": "no JSON"}, {"s3://bucket": "timeout"})
    assert found.unanswered == "s3://bucket does not answer: timeout"
    assert found.unbelieved == "backup a cannot be read: no JSON; backup b cannot be read: it is cut"


def test_without_a_place_there_is_no_repository() -> None:
    with pytest.raises(UsageError, match="no place"):
        Repository([])


def test_every_error_of_a_disk_has_its_remedy(place: DirectoryPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    for number, words in (
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "errors"),
    ):

        def fail(_: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(StorageError, match=words):
                place.put("keys/x.json", b"x")
        assert place.stat("keys/x.json") is None
        incoming = place.folder / ".incoming"
        assert not incoming.is_dir() or list(incoming.iterdir()) == []
