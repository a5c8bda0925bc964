"""Registering a version: the same bytes are a no-op, other bytes a conflict, and what is refused leaves nothing."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime import InferenceSession
from sqlalchemy import func, select

from registry import formats, states, versions
from registry.database import Database
from registry.errors import ConflictError, ModelkeepError, NotFoundError, RefusedError, StorageError, UsageError
from registry.routes import Desired, change
from registry.schema import Model, Version
from registry.store import DirectoryStore, file_digest, materialise
from registry.versions import Registered
from tests.unit.registry.kit import (
    ENVIRONMENT,
    actions,
    add_version,
    golden_file,
    last_event,
    onnx_file,
    stored,
    verdict,
)

GIB = 1 << 30


@pytest.fixture
def register(database: Database, store: DirectoryStore) -> Callable[..., Registered]:
    def call(path: Path, **changes: Any) -> Registered:
        return versions.register(database, store, path, **({"name": "linear", "max_bytes": GIB} | changes))

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return onnx_file(tmp_path / "in" / "model.onnx")


def rows(database: Database) -> list[Version]:
    with database.read() as session:
        return list(session.scalars(select(Version).order_by(Version.model, Version.ordinal)))


@pytest.fixture
def nothing_happened(database: Database, store: DirectoryStore) -> Callable[[], None]:
    """The tables, the trail and the store are as they were when the test began, the store's way in is empty."""
    events = last_event(database)

    def check() -> None:
        assert rows(database) == []
        with database.read() as session:
            assert session.scalar(select(func.count()).select_from(Model)) == 0
        assert last_event(database) == events
        assert stored(store.folder) == []
        incoming = store.folder / "incoming"
        assert not incoming.exists() or list(incoming.iterdir()) == []

    return check


def test_a_file_becomes_a_version_with_its_bytes_and_its_record(
    database: Database, store: DirectoryStore, register: Callable[..., Registered], model: Path, tmp_path: Path
) -> None:
    golden = golden_file(tmp_path / "cases.npz")
    done = register(model, version="1.0", golden=golden, tags={"team": "vision"}, actor="ann")
    digest, size = file_digest(model)
    assert done == Registered(
        "linear", "1.0", digest, "registered", True, "onnx", size, golden_digest=file_digest(golden)[0]
    )
    assert done.as_dict()["digest"] == digest
    (row,) = rows(database)
    assert (row.ordinal, row.tags, row.created_by, row.rows_independent) == (1, {"team": "vision"}, "ann", None)
    assert row.signature is not None
    assert row.signature["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert store.path(digest).read_bytes() == model.read_bytes()
    assert store.path(str(row.golden_digest)).read_bytes() == golden.read_bytes()
    assert stored(store.folder / "incoming") == []
    assert actions(database) == ["model.created", "version.registered"]
    assert verdict(database).holds


# Which version


def test_without_a_version_the_next_number_is_taken(
    database: Database, register: Callable[..., Registered], tmp_path: Path
) -> None:
    given = [None, "7", "release", "1.5", None]
    taken = [
        register(onnx_file(tmp_path / f"{n}.onnx", float(n)), version=version).version
        for n, version in enumerate(given)
    ]
    assert taken == ["1", "7", "release", "1.5", "8"]
    assert [row.ordinal for row in rows(database)] == [1, 2, 3, 4, 5]


def test_models_are_numbered_apart(register: Callable[..., Registered], model: Path) -> None:
    assert [register(model, name=name).version for name in ("a", "b")] == ["1", "1"]


@pytest.mark.parametrize("version", [None, "1"])
def test_the_same_bytes_are_a_no_op_and_it_is_said(
    database: Database, register: Callable[..., Registered], model: Path, tmp_path: Path, version: str | None
) -> None:
    golden = golden_file(tmp_path / "cases.npz")
    first, before = register(model, golden=golden), last_event(database)
    for again in (register(model, version=version), register(model, version=version, golden=golden)):
        assert (again.created, again.version, again.digest) == (False, first.version, first.digest)
        assert again.golden_digest == first.golden_digest
    assert len(rows(database)) == 1
    assert last_event(database) == before


def test_the_same_bytes_may_be_another_version_by_name(register: Callable[..., Registered], model: Path) -> None:
    assert register(model).created
    assert register(model, version="again").created


def test_other_bytes_under_a_version_are_a_conflict_and_are_not_kept(
    database: Database, store: DirectoryStore, register: Callable[..., Registered], model: Path, tmp_path: Path
) -> None:
    register(model, version="1")
    kept, before = stored(store.folder), last_event(database)
    other = onnx_file(tmp_path / "other.onnx", 2.0)
    with pytest.raises(ConflictError, match=r"linear 1 exists with other bytes .* versions never change"):
        register(other, version="1")
    assert (stored(store.folder), last_event(database)) == (kept, before)
    (row,) = rows(database)
    assert row.digest == file_digest(model)[0]


@pytest.mark.parametrize("before", ["without", "with others"])
def test_other_golden_cases_for_the_same_bytes_are_a_conflict_and_not_dropped_silently(
    register: Callable[..., Registered], model: Path, tmp_path: Path, before: str
) -> None:
    register(model, golden=golden_file(tmp_path / "a.npz", 5) if before == "with others" else None)
    with pytest.raises(ConflictError, match=r"linear 1 has these bytes already, with (no|other) golden cases"):
        register(model, golden=golden_file(tmp_path / "b.npz", 6))
    assert register(model, version="2", golden=tmp_path / "b.npz").created


def test_an_archived_version_does_not_stand_in_the_way_of_its_bytes(
    database: Database, register: Callable[..., Registered], model: Path
) -> None:
    register(model)
    with database.write() as transaction:
        row = transaction.session.get_one(Version, ("linear", "1"))
        states.move_version(transaction, row, "archived", reason="old")
    again = register(model)
    assert (again.version, again.created) == ("2", True)


def test_of_two_processes_with_the_same_bytes_one_makes_the_version(
    database: Database,
    store: DirectoryStore,
    register: Callable[..., Registered],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other process is done between our look and our write."""
    real = DirectoryStore.put

    def slow(self: DirectoryStore, path: Path) -> Any:
        monkeypatch.setattr(DirectoryStore, "put", real)
        assert register(model).created
        return real(self, path)

    monkeypatch.setattr(DirectoryStore, "put", slow)
    mine = register(model)
    assert (mine.created, mine.version) == (False, "1")
    assert len(rows(database)) == 1


# What is refused


@pytest.mark.parametrize("name", ["", "a/b", "..", "a..b", "-x", "x" * 129])
@pytest.mark.parametrize("what", ["name", "version"])
def test_a_bad_name_is_refused(
    register: Callable[..., Registered], model: Path, nothing_happened: Callable[[], None], what: str, name: str
) -> None:
    with pytest.raises(UsageError, match=f"is not a (model )?{what}"):
        register(model, **{what: name})
    nothing_happened()


def bad_files(folder: Path) -> dict[str, Path]:
    good = onnx_file(folder / "good.onnx")
    files = {
        "missing": folder / "missing.onnx",
        "empty": folder / "empty.onnx",
        "truncated": folder / "truncated.onnx",
        "pickle": folder / "pickle.onnx",
        "too long": good,
        "folder": folder / "empty folder",
    }
    files["empty"].touch()
    files["truncated"].write_bytes(good.read_bytes()[:-20])
    files["pickle"].write_bytes(pickle.dumps({"weights": [1.0]}))
    files["folder"].mkdir()
    return files


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "pickle", "too long", "folder"])
def test_a_refused_file_leaves_nothing(
    register: Callable[..., Registered], nothing_happened: Callable[[], None], tmp_path: Path, kind: str
) -> None:
    with pytest.raises(RefusedError):
        register(bad_files(tmp_path)[kind], max_bytes=50 if kind == "too long" else GIB)
    nothing_happened()


def bad_golden(folder: Path) -> dict[str, Path]:
    plain = golden_file(folder / "plain.npz").read_bytes()
    files = {name: folder / f"{name}.npz" for name in ("missing", "text", "array", "cut", "rotten", "member")}
    files["text"].write_text("no cases")
    with files["array"].open("wb") as target:
        np.save(target, np.zeros(3))
    files["cut"].write_bytes(plain[: len(plain) // 2])
    with zipfile.ZipFile(files["rotten"], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("input.x.npy", plain)
    rotten = bytearray(files["rotten"].read_bytes())
    rotten[45:75] = b"\xff" * 30
    files["rotten"].write_bytes(rotten)
    with zipfile.ZipFile(files["member"], "w") as archive:
        archive.writestr("input.x", "no array")
    return files | {
        "pickled": golden_file(folder / "pickled.npz", **{"input.x": np.array([{"a": 1}], dtype=object)}),
        "unequal": golden_file(folder / "unequal.npz", label=np.zeros(2, dtype=np.int64)),
        "scalar": golden_file(folder / "scalar.npz", label=np.int64(1)),
        "no rows": golden_file(folder / "none.npz", 0),
        "no input": golden_file(folder / "label.npz", **{"input.x": np.zeros(1)}).rename(folder / "x.npz"),
    }


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("missing", "there is no such file"),
        ("text", "not an .npz file"),
        ("array", "not an .npz file"),
        ("cut", "not an .npz file"),
        ("rotten", "not a readable .npz of plain arrays"),
        ("member", "not a readable .npz of plain arrays"),
        ("pickled", "not a readable .npz of plain arrays"),
        ("unequal", "every array needs the same number of rows, at least one"),
        ("scalar", "every array needs the same number of rows, at least one"),
        ("no rows", "every array needs the same number of rows, at least one"),
        ("no input", "no array is named input.<tensor>"),
    ],
)
def test_golden_cases_that_cannot_be_used_are_refused_and_leave_nothing(
    register: Callable[..., Registered],
    model: Path,
    nothing_happened: Callable[[], None],
    tmp_path: Path,
    kind: str,
    why: str,
) -> None:
    path = bad_golden(tmp_path)[kind]
    if kind == "no input":
        np.savez(path, label=np.zeros(3))
    with pytest.raises(RefusedError) as error:
        register(model, golden=path)
    assert f"golden cases {path}: {why}" in str(error.value)
    nothing_happened()


def torchscript(folder: Path) -> Path:
    import torch

    path = folder / "scripted.pt"
    torch.jit.trace(torch.nn.Linear(4, 2), torch.zeros(1, 4)).save(str(path))
    return path


TENSORS = """
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 4]
[[outputs]]
name = "y"
datatype = "FP32"
shape = [-1, 2]
"""


def test_torchscript_needs_a_model_toml_that_says_what_goes_in_and_out(
    database: Database, register: Callable[..., Registered], nothing_happened: Callable[[], None], tmp_path: Path
) -> None:
    path, described = torchscript(tmp_path), tmp_path / "model.toml"
    with pytest.raises(RefusedError, match=r"put a model\.toml beside it with \[\[inputs\]\] and \[\[outputs\]\]"):
        register(path)
    nothing_happened()
    described.write_text('author = "ann"\n')
    with pytest.raises(RefusedError, match=r"put a model\.toml beside it"):
        register(path)
    described.write_text('wrong = "key"\n')
    with pytest.raises(UsageError, match=r"not a key of model[.]toml"):
        register(path)
    nothing_happened()
    described.write_text('author = "ann"\n' + TENSORS)
    assert register(path).format == "torchscript"
    (row,) = rows(database)
    signature = versions.signature_of(row)
    assert signature is not None
    assert signature.inputs[0].shape == (-1, 4)
    assert row.facts["author"] == "ann"


# External data


@pytest.mark.parametrize("where", ["w.bin", "data/w.bin"])
def test_external_data_is_stored_with_its_place_and_laid_out_again(
    database: Database,
    store: DirectoryStore,
    register: Callable[..., Registered],
    tmp_path: Path,
    where: str,
) -> None:
    path = onnx_file(tmp_path / "in" / "model.onnx", 3.0, external=where)
    done = register(path)
    (row,) = rows(database)
    assert [file["name"] for file in row.files] == ["model.onnx", where]
    main = materialise(store, versions.stored_files(row), tmp_path / "cache")
    assert (main.parent / where).read_bytes() == (path.parent / where).read_bytes()
    assert sum(path.stat().st_size for path in stored(main.parent)) == done.size_bytes
    (answer,) = InferenceSession(str(main)).run(None, {"x": np.ones((1, 4), dtype=np.float32)})
    assert np.array_equal(np.asarray(answer), [[12.0, 12.0]])
    assert not register(path).created
    onnx_file(path, 4.0, external=where)
    with pytest.raises(ConflictError):
        register(path, version="1")


# What happens in between


def test_a_file_that_changes_while_it_is_registered_is_stored_as_it_was_inspected(
    store: DirectoryStore,
    register: Callable[..., Registered],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each time after a look at it, someone puts a pickle in the place of the file."""
    good, real = model.read_bytes(), formats.inspect
    looked_at: list[Path] = []

    def inspected(path: Path, *, max_bytes: int) -> formats.ModelFile:
        looked_at.append(path)
        found = real(path, max_bytes=max_bytes)
        if len(looked_at) == 2:
            model.write_bytes(pickle.dumps("payload"))
        return found

    monkeypatch.setattr(formats, "inspect", inspected)
    done = register(model)
    assert looked_at[0] == model
    assert looked_at[1] != model
    assert store.path(done.digest).read_bytes() == good


def test_a_file_that_is_swapped_before_it_is_copied_is_refused(
    register: Callable[..., Registered],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_happened: Callable[[], None],
) -> None:
    real = formats.inspect

    def swapped(path: Path, *, max_bytes: int) -> formats.ModelFile:
        found = real(path, max_bytes=max_bytes)
        if path == model:
            model.write_bytes(pickle.dumps("payload"))
        return found

    monkeypatch.setattr(formats, "inspect", swapped)
    with pytest.raises(RefusedError, match="pickle"):
        register(model)
    nothing_happened()


def test_golden_cases_that_change_while_they_are_registered_are_stored_as_they_were_counted(
    store: DirectoryStore,
    register: Callable[..., Registered],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden = golden_file(tmp_path / "cases.npz")
    good, real = golden.read_bytes(), versions.formats_golden

    def counted(path: Path, **more: Any) -> dict[str, Any]:
        found = real(path, **more)
        golden.write_bytes(b"other")
        return found

    monkeypatch.setattr(versions, "formats_golden", counted)
    done = register(model, golden=golden)
    assert store.path(str(done.golden_digest)).read_bytes() == good


def test_a_kill_between_the_bytes_and_the_row_is_harmless(
    database: Database,
    store: DirectoryStore,
    register: Callable[..., Registered],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Database, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        register(model)
    monkeypatch.undo()
    assert rows(database) == []
    assert store.has(file_digest(model)[0])
    assert list((store.folder / "incoming").iterdir()) == []
    done = register(model)
    assert (done.created, done.version) == (True, "1")


def test_a_store_that_fails_leaves_no_row(
    database: Database, register: Callable[..., Registered], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("full")

    before = last_event(database)
    monkeypatch.setattr(DirectoryStore, "put", full)
    with pytest.raises(StorageError):
        register(model)
    assert rows(database) == []
    assert last_event(database) == before


# Finding versions


def test_an_unknown_model_or_version_names_what_is_there(database: Database) -> None:
    with database.read() as session, pytest.raises(NotFoundError, match="none is registered yet: modelkeep register"):
        versions.get(session, "digits", "1")
    add_version(database, "1")
    add_version(database, "2")
    with database.read() as session:
        assert versions.get(session, "digits", "2").ordinal == 2
        with pytest.raises(NotFoundError, match="there is no model 'digit'; known are digits"):
            versions.get(session, "digit", "1")
        with pytest.raises(NotFoundError, match="digits has no version '3'; its newest are 2, 1"):
            versions.get(session, "digits", "3")


def test_versions_are_listed_the_newest_first_with_where_they_stand(database: Database) -> None:
    for version in ("1", "2"):
        add_version(database, version)
    add_version(database, "1", model="letters")
    with database.write() as transaction:
        states.place(transaction, "digits", "1", ENVIRONMENT, "stable", reason="")
        states.place(transaction, "digits", "1", "lab", "candidate", reason="")
    with database.read() as session:
        everything = versions.listed(session)
        some = versions.listed(session, "digits", limit=1)
    assert [(row["model"], row["version"]) for row in everything] == [
        ("digits", "2"),
        ("digits", "1"),
        ("letters", "1"),
    ]
    assert everything[1]["environments"] == {ENVIRONMENT: "stable", "lab": "candidate"}
    assert [row["version"] for row in some] == ["2"]


def test_a_candidate_is_held_to_the_golden_cases_of_the_stable_version(database: Database) -> None:
    for version in ("1", "2"):
        add_version(database, version)

    def golden(version: str) -> str | None:
        with database.read() as session:
            return versions.golden_for(session, versions.get(session, "digits", version), ENVIRONMENT)

    with database.write() as transaction:
        transaction.session.get_one(Version, ("digits", "2")).golden_digest = "2" * 64
    assert golden("2") == "2" * 64
    with database.write() as transaction:
        change(transaction, ENVIRONMENT, "digits", Desired(stable="1"), kind="first", reason="")
    assert golden("2") == "2" * 64, "the stable version has none"
    with database.write() as transaction:
        transaction.session.get_one(Version, ("digits", "1")).golden_digest = "1" * 64
    assert golden("2") == "1" * 64


def test_every_error_of_register_is_one_of_ours() -> None:
    for kind in (RefusedError, ConflictError, UsageError, StorageError):
        assert issubclass(kind, ModelkeepError)
