"""The names of a classifier's classes: from model.toml to the version that answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from registry import exporting, labels, store, versions
from registry.database import Database
from registry.errors import RefusedError, UsageError
from registry.schema import Version
from registry.store import DirectoryStore
from serving.follow.backstop import wanted_of
from serving.loaded import laststate
from serving.loaded.laststate import LastState
from tests.unit.registry import kit
from tests.unit.registry.kit import onnx_file
from tests.unit.serving.rounds import following

GIB = 1 << 30


def folder_with(folder: Path, toml: str, **files: str) -> Path:
    """A model that answers y in a folder of its own, with what is said about it and what lies beside it."""
    onnx_file(folder / "model.onnx")
    (folder / "model.toml").write_text(toml, encoding="utf-8")
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def registered(database: Database, artifacts: DirectoryStore, path: Path) -> Version:
    made = versions.register(database, artifacts, path, name=kit.MODEL, max_bytes=GIB)
    with database.read() as session:
        row = session.get_one(Version, (kit.MODEL, made.version))
        session.expunge(row)
    return row


def resolved(row: Version, artifacts: DirectoryStore, cache: Path) -> dict[str, tuple[str, ...]]:
    files = [store.StoredFile.from_dict(file) for file in row.files]
    path = store.materialise(artifacts, files, cache)
    return labels.resolved(wanted_of(row).labels or {}, path.parent)


def test_a_list_goes_with_the_version_also_where_the_file_is_registered_alone(
    tmp_path: Path, database: Database, store: DirectoryStore
) -> None:
    folder = folder_with(tmp_path / "in", '[labels]\ny = ["cat", "dog"]\n')
    row = registered(database, store, folder / "model.onnx")
    assert [file["name"] for file in row.files] == ["model.onnx"]
    assert resolved(row, store, tmp_path / "cache") == {"y": ("cat", "dog")}


def test_a_file_of_labels_is_a_part_of_the_artifact(tmp_path: Path, database: Database, store: DirectoryStore) -> None:
    folder = folder_with(tmp_path / "in", '[labels]\ny = "names.txt"\n', names="\ufeff\r\n ein Löwe \n")
    row = registered(database, store, folder)
    assert "names.txt" in {file["name"] for file in row.files}
    assert row.facts["labels"] == {"y": "names.txt"}
    (folder / "names.txt").unlink()  # the artifact has it
    assert resolved(row, store, tmp_path / "cache") == {"y": ("", "ein Löwe")}


@pytest.mark.parametrize("said", ['["cat", "dog"]', '"names.txt"'])
def test_an_export_takes_them_along(said: str, tmp_path: Path, database: Database, store: DirectoryStore) -> None:
    row = registered(database, store, folder_with(tmp_path / "in", f"[labels]\ny = {said}\n", names="cat\ndog\n"))
    exporting.export(database, store, kit.MODEL, row.version, tmp_path / "out")
    versions.register(database, store, tmp_path / "out", name="other", max_bytes=GIB)
    with database.read() as session:
        again = session.get_one(Version, ("other", "1"))
        session.expunge(again)
    assert resolved(again, store, tmp_path / "cache") == {"y": ("cat", "dog")}


def test_a_version_without_labels_has_none(tmp_path: Path, database: Database, store: DirectoryStore) -> None:
    row = registered(database, store, onnx_file(tmp_path / "in" / "model.onnx"))
    assert wanted_of(row).labels is None


@pytest.mark.parametrize(
    ("toml", "files", "said"),
    [
        ('[labels]\nz = ["a"]\n', {}, r"\[labels\] z: the model has no such output; it has y"),
        ('[labels]\ny = "names.txt"\n', {}, r"y = 'names.txt': that file does not belong to the model"),
        ('[labels]\ny = "../names.txt"\n', {}, "does not belong to the model"),
        ('[labels]\ny = "names.txt"\n', {"names": "\n\n"}, "no labels"),
        ('[labels]\ny = "names.txt"\n', {"names": "a\n\x1bb\n"}, "number 1, .* not printable"),
        ("[labels]\ny = []\n", {}, "no labels"),
        ('[labels]\ny = ["a", "b", "c"]\n', {}, "has 3 labels, the output has 2 classes"),
        ('[labels]\ny = "names.txt"\n', {"names": "a\nb\nc\n"}, "has 3 labels, the output has 2 classes"),
        (f"[labels]\ny = {[str(n) for n in range(10_001)]}\n", {}, "a list has at most 10000: use a file"),
    ],
)
def test_labels_that_name_nothing_are_refused(
    toml: str, files: dict[str, str], said: str, tmp_path: Path, database: Database, store: DirectoryStore
) -> None:
    with pytest.raises(RefusedError, match=said):
        registered(database, store, folder_with(tmp_path / "in", toml, **files))


def test_labels_of_a_wrong_kind_are_a_wrong_model_toml(
    tmp_path: Path, database: Database, store: DirectoryStore
) -> None:
    with pytest.raises(UsageError, match=r"labels\.y"):
        registered(database, store, folder_with(tmp_path / "in", "[labels]\ny = 3\n"))


def test_a_file_that_is_not_text_or_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RefusedError, match="cannot be read as UTF-8"):
        labels.read_file(path)
    path.write_bytes(b"a\n" * (labels.MAX_BYTES // 2 + 1))
    with pytest.raises(RefusedError, match="a label a line"):
        labels.read_file(path)


def test_the_last_state_keeps_them(tmp_path: Path, database: Database, store: DirectoryStore) -> None:
    folder = folder_with(tmp_path / "in", '[labels]\ny = ["cat", "dog"]\n')
    wanted = wanted_of(registered(database, store, folder))
    laststate.write(tmp_path / "last.json", LastState("e", 1, (), (wanted,)))
    read = laststate.read(tmp_path / "last.json")
    assert read is not None and read.versions == (wanted,)


def test_a_server_answers_with_them(tmp_path: Path) -> None:
    """From a folder with a file of labels, through the registry, to the codec of the loaded version."""
    made = kit.prepared(tmp_path)
    artifacts = DirectoryStore(tmp_path / "artifacts")
    folder = folder_with(tmp_path / "in", '[labels]\ny = "names.txt"\n', names="cat\ndog\n")
    number = registered(made, artifacts, folder).version
    with made.write(actor="test") as transaction:
        transaction.session.get_one(Version, (kit.MODEL, number)).state = "validated"
        transaction.record("version.validated", f"version:{kit.MODEL}/{number}")
    kit.stable_by(made, number)

    async def scenario() -> None:
        async with following(made, tmp_path / "home", tmp_path / "registry.db") as reconciler:
            await reconciler.once()
            loaded = reconciler.serving.default_version(kit.MODEL)
            assert loaded.codec.labels == {"y": ("cat", "dog")}

    asyncio.run(scenario())
    made.dispose()
