"""The artifact store: bytes under their digest, written once, verified at every read, whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from registry.errors import ArtifactError, SettingsError, StorageError
from registry.store import DirectoryStore, StoredFile, artifact_digest, file_digest, materialise, open_store
from tests.unit.registry.kit import stored

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(CONTENT)
    return path


def rot(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(CONTENT[:-1] + b"?")


def test_a_file_is_kept_under_its_sha_256_and_cannot_be_written_to(store: DirectoryStore, source: Path) -> None:
    assert store.put(source) == StoredFile("model.onnx", DIGEST, len(CONTENT))
    place = store.path(DIGEST)
    assert place == store.folder / DIGEST[:2] / DIGEST
    assert place.read_bytes() == CONTENT
    assert place.stat().st_mode & 0o777 == 0o444
    assert store.has(DIGEST)
    assert stored(store.folder) == [place]


def test_the_same_bytes_twice_are_kept_once_and_left_alone(store: DirectoryStore, source: Path) -> None:
    store.put(source)
    before = store.path(DIGEST).stat()
    other = source.rename(source.with_name("other.onnx"))
    assert store.put(other) == StoredFile("other.onnx", DIGEST, len(CONTENT))
    assert (store.path(DIGEST).stat().st_ino, store.path(DIGEST).stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )
    assert len(stored(store.folder)) == 1


def test_rotten_bytes_are_found_when_they_are_read_and_healed_by_storing_again(
    store: DirectoryStore, source: Path
) -> None:
    store.put(source)
    rot(store.path(DIGEST))
    with pytest.raises(ArtifactError, match=f"artifact {DIGEST} .* is corrupt: its bytes hash to") as error:
        store.path(DIGEST)
    assert "restore it from a backup, or register the file again" in str(error.value)
    store.put(source)
    assert store.path(DIGEST).read_bytes() == CONTENT
    assert len(stored(store.folder)) == 1


def test_missing_bytes_are_an_error_that_names_the_digest(store: DirectoryStore) -> None:
    assert not store.has(DIGEST)
    with pytest.raises(ArtifactError, match=f"artifact {DIGEST} is not in"):
        store.path(DIGEST)


@pytest.mark.parametrize("digest", ["", "abc", "../" * 21 + "x", "A" * 64, "g" * 64, "a" * 65, "/" + "a" * 63])
def test_what_is_no_digest_is_refused(store: DirectoryStore, digest: str) -> None:
    for call in (store.path, store.has):
        with pytest.raises(ArtifactError, match="is no artifact digest"):
            call(digest)


def test_a_file_that_is_not_there_cannot_be_stored_and_leaves_nothing(store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match=r"nothing\.onnx could not be stored .*No such file.* Nothing was left behind"
    ):
        store.put(tmp_path / "nothing.onnx")
    assert stored(store.folder) == []


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "check the disk"),
    ],
)
def test_a_disk_that_fails_before_the_bytes_are_safe_leaves_nothing(
    store: DirectoryStore, source: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    def broken(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match=remedy):
        store.put(source)
    assert stored(store.folder) == []
    assert not store.has(DIGEST)


def test_bytes_are_on_disk_before_they_have_their_name(
    store: DirectoryStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    real = os.fsync

    def watched(descriptor: int) -> None:
        seen.append(store.has(DIGEST))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    store.put(source)
    assert seen == [False, True, True], "the file before its rename, then both folders"


def test_what_is_kept_is_what_was_read_although_the_source_changes_meanwhile(
    store: DirectoryStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def overwritten(descriptor: int) -> None:
        source.write_bytes(b"other")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", overwritten)
    assert store.put(source).digest == DIGEST
    assert store.path(DIGEST).read_bytes() == CONTENT


def test_writers_of_the_same_bytes_at_once_do_not_disturb_each_other(store: DirectoryStore, source: Path) -> None:
    start = threading.Barrier(4)

    def put(_: int) -> set[str]:
        start.wait()
        return {store.put(source).digest for _ in range(10)}

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(put, range(4))) == [{DIGEST}] * 4
    assert stored(store.folder) == [store.path(DIGEST)]


def test_an_intake_is_gone_whatever_happens_in_it(store: DirectoryStore) -> None:
    with pytest.raises(ZeroDivisionError), store.intake() as private:
        (private / "half").write_bytes(b"x")
        raise ZeroDivisionError
    assert not private.exists()
    assert list((store.folder / "incoming").iterdir()) == []


def test_what_a_killed_writer_left_can_be_cleaned_up(store: DirectoryStore, source: Path) -> None:
    store.put(source)
    incoming = store.folder / "incoming"
    (incoming / "tmpabc").write_bytes(b"half")
    (incoming / "tmpdir").mkdir()
    (incoming / "tmpdir" / "half").write_bytes(b"half")
    assert store.clean_incoming() == 2
    assert stored(store.folder) == [store.path(DIGEST)]


# Artifacts of several files


def parts(store: DirectoryStore, folder: Path) -> list[StoredFile]:
    files = []
    for name, content in (("model.onnx", b"graph"), ("data/w.bin", b"weights"), ("b.bin", b"bias")):
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        put = store.put(path)
        files.append(StoredFile(name, put.digest, put.size_bytes))
    return files


def test_an_artifact_of_one_file_has_that_file_s_digest(source: Path) -> None:
    assert artifact_digest([StoredFile("any name", *file_digest(source))]) == DIGEST


def test_the_digest_of_several_files_depends_on_names_and_bytes_and_not_on_their_order() -> None:
    a, b = StoredFile("a", "0" * 64, 1), StoredFile("b", "1" * 64, 1)
    digest = artifact_digest([a, b])
    assert artifact_digest([b, a]) == digest
    assert artifact_digest([StoredFile("c", a.digest, 1), b]) != digest
    assert artifact_digest([StoredFile("a", b.digest, 1), StoredFile("b", a.digest, 1)]) != digest


def test_one_file_is_loaded_from_where_it_is_stored(store: DirectoryStore, source: Path, tmp_path: Path) -> None:
    assert materialise(store, [store.put(source)], tmp_path / "cache") == store.path(DIGEST)
    assert not (tmp_path / "cache").exists()


def test_several_files_lie_together_under_the_names_that_they_refer_to(store: DirectoryStore, tmp_path: Path) -> None:
    files = parts(store, tmp_path)
    main = materialise(store, files, tmp_path / "cache")
    assert main.name == "model.onnx"
    assert main.read_bytes() == b"graph"
    assert (main.parent / "data" / "w.bin").read_bytes() == b"weights"
    assert materialise(store, files, tmp_path / "cache") == main
    assert len(stored(tmp_path / "cache")) == 3


def test_every_file_of_an_artifact_is_verified(store: DirectoryStore, tmp_path: Path) -> None:
    files = parts(store, tmp_path)
    materialise(store, files, tmp_path / "cache")
    rot(store.path(files[1].digest))
    with pytest.raises(ArtifactError, match=f"artifact {files[1].digest} .* is corrupt"):
        materialise(store, files, tmp_path / "cache")


def test_where_links_cannot_be_made_copies_serve_and_are_made_anew_each_time(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_file_system(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "hardlink_to", another_file_system)
    files = parts(store, tmp_path)
    main = materialise(store, files, tmp_path / "cache")
    main.write_bytes(b"rotten")
    assert materialise(store, files, tmp_path / "cache").read_bytes() == b"graph"
    assert store.path(files[0].digest).read_bytes() == b"graph"


def test_a_server_and_a_flow_may_lay_out_the_same_artifact_at_once(store: DirectoryStore, tmp_path: Path) -> None:
    files, start = parts(store, tmp_path), threading.Barrier(4)

    def lay_out(_: int) -> set[bytes]:
        start.wait()
        return {materialise(store, files, tmp_path / f"cache{n}").read_bytes() for n in range(20)}

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lay_out, range(4))) == [{b"graph"}] * 4
    assert len(stored(tmp_path / "cache0")) == 3, "nothing but the files is left"
    for file in files:
        store.path(file.digest)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../escape", "a/../../escape"])
def test_a_name_that_leads_out_of_the_folder_is_not_laid_out(store: DirectoryStore, tmp_path: Path, name: str) -> None:
    files = parts(store, tmp_path)
    with pytest.raises(ArtifactError, match="leads out of the folder"):
        materialise(store, [files[0], StoredFile(name, files[1].digest, 7)], tmp_path / "cache")


# Where a store is


@pytest.mark.parametrize("location", ["{}/artifacts", "file://{}/artifacts"])
def test_a_folder_is_a_store(tmp_path: Path, location: str) -> None:
    assert open_store(location.format(tmp_path)).folder == tmp_path / "artifacts"


@pytest.mark.parametrize("location", ["s3://bucket/models", "http://host/models"])
def test_a_store_elsewhere_is_refused_clearly(location: str) -> None:
    with pytest.raises(SettingsError) as error:
        open_store(location)
    assert f"artifacts = {location!r}: this release keeps artifacts in a directory only" in str(error.value)
    assert "MODELKEEP_ARTIFACTS" in str(error.value)
