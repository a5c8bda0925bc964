"""A folder that is one model, what a person says about it, MLflow's directories, and the way out again."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sqlalchemy import select

from registry import exporting, folders, formats, modeltoml, versions
from registry.database import Database
from registry.errors import ConflictError, RefusedError, UsageError
from registry.schema import Model, Version
from registry.store import DirectoryStore, materialise
from registry.versions import Registered
from tests.unit.registry.kit import actions, golden_file, onnx_file, stored

GIB = 1 << 30
TENSORS = """
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 4]
[[outputs]]
name = "{output}"
datatype = "FP32"
shape = [-1, 2]
"""


@pytest.fixture
def register(database: Database, store: DirectoryStore) -> Callable[..., Registered]:
    def call(path: Path, **changes: Any) -> Registered:
        return versions.register(database, store, path, **({"name": "linear", "max_bytes": GIB} | changes))

    return call


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    path = tmp_path_factory.mktemp("scripted") / "model.pt"
    torch.jit.trace(torch.nn.Linear(4, 2), torch.zeros(1, 4)).save(str(path))
    return path


def row(database: Database, version: str = "1", name: str = "linear") -> Version:
    with database.read() as session:
        found = session.scalars(select(Version).where(Version.model == name, Version.version == version)).one()
        session.expunge(found)
        return found


def refusal(path: Path, **options: int) -> str:
    with pytest.raises(RefusedError) as error:
        formats.inspect(path, **{"max_bytes": GIB, **options})
    return str(error.value)


def folder_with_labels(folder: Path) -> Path:
    onnx_file(folder / "model.onnx")
    (folder / "labels.txt").write_text("cat\ndog\n")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 1}')
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("left out")
    return folder


# Several files


def test_files_beside_the_model_are_kept_with_it_and_laid_out_again(
    database: Database, store: DirectoryStore, register: Callable[..., Registered], tmp_path: Path
) -> None:
    folder = folder_with_labels(tmp_path / "in")
    done = register(folder)
    found = row(database)
    assert [file["name"] for file in found.files] == ["model.onnx", "labels.txt", "tokenizer/vocab.json"]
    assert done.size_bytes == sum(file["size_bytes"] for file in found.files)
    main = materialise(store, versions.stored_files(found), tmp_path / "cache")
    assert main.name == "model.onnx"
    assert (main.parent / "tokenizer" / "vocab.json").read_text() == '{"a": 1}'
    assert not register(folder).created
    (folder / "labels.txt").write_text("dog\ncat\n")
    assert register(folder).digest != done.digest


def test_golden_cases_in_the_folder_are_no_part_of_the_model(
    database: Database, register: Callable[..., Registered], tmp_path: Path
) -> None:
    folder = folder_with_labels(tmp_path / "in")
    done = register(folder, golden=golden_file(folder / "golden.npz"))
    assert "golden.npz" not in [file["name"] for file in row(database).files]
    assert done.golden_digest is not None


def test_model_toml_may_name_the_file_to_load(
    database: Database, register: Callable[..., Registered], tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    onnx_file(folder / "encoder.onnx")
    onnx_file(folder / "parts" / "decoder.onnx", 2.0)
    onnx_file(folder / "other.onnx", 3.0)
    assert "holds 2 models (encoder.onnx, other.onnx): name one of them, or say which" in refusal(folder)
    (folder / "model.toml").write_text('file = "parts/decoder.onnx"\n')
    first = register(folder)
    names = [file["name"] for file in row(database).files]
    assert names == ["parts/decoder.onnx", "encoder.onnx", "other.onnx", "model.toml"]
    (folder / "model.toml").write_text('file = "encoder.onnx"\n')
    assert register(folder).digest != first.digest


@pytest.mark.parametrize(
    "name", ["../secret.onnx", "/etc/passwd", "missing.onnx", "a\\b", "", "sub", "C:x", "link/x.onnx"]
)
def test_model_toml_cannot_name_a_file_outside(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    onnx_file(folder / "model.onnx")
    onnx_file(tmp_path / "secret.onnx")
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "model.toml").write_text(f"file = {json.dumps(name)}\n")
    assert "file" in refusal(folder)


def test_links_pipes_and_pickles_beside_the_model_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    onnx_file(folder / "model.onnx")
    for name, make, said in (
        ("x.json", lambda path: path.symlink_to("/etc/passwd"), "symbolic link to /etc/passwd"),
        ("d", lambda path: path.symlink_to("/etc", target_is_directory=True), "symbolic link to /etc"),
        ("p", os.mkfifo, "is a pipe"),
        ("vocab.pkl", lambda path: path.write_bytes(pickle.dumps({"a": print})), "is a Python pickle"),
        ("a\nb", lambda path: path.write_text("x"), "cannot be printed"),
        ("x" * 200, lambda path: (path / ("y" * 200) / ("z" * 200)).mkdir(parents=True), None),
    ):
        path = folder / name
        make(path)
        if said is None:
            (path / ("y" * 200) / ("z" * 200) / "file").write_text("x")
            said = "too long"
        assert said in refusal(folder), name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    formats.inspect(folder, max_bytes=GIB)


def test_a_folder_of_too_many_too_deep_or_too_big_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with_labels(tmp_path / "in")
    (folder / "big.bin").write_bytes(bytes(5000))
    assert "that are allowed" in refusal(folder, max_bytes=4000)
    monkeypatch.setattr(folders, "MAX_FILES", 3)
    assert "more than 3 files" in refusal(folder)
    monkeypatch.undo()
    deep = folder
    for _ in range(folders.MAX_DEPTH + 1):
        deep = deep / "d"
    deep.mkdir(parents=True)
    assert "nested more than" in refusal(folder)


def test_a_file_that_vanishes_or_changes_while_a_folder_is_copied_stores_nothing_else(
    store: DirectoryStore,
    register: Callable[..., Registered],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = folder_with_labels(tmp_path / "in")
    real = formats.inspect

    def swapped(path: Path, *, max_bytes: int) -> formats.ModelFile:
        found = real(path, max_bytes=max_bytes)
        if path == folder:
            (folder / "labels.txt").write_bytes(pickle.dumps({"a": print}))
        return found

    monkeypatch.setattr(formats, "inspect", swapped)
    with pytest.raises(RefusedError, match="is a Python pickle"):
        register(folder)
    assert stored(store.folder) == []


# The signature of a TorchScript file is part of the artifact


def test_the_same_torchscript_with_another_signature_is_another_artifact(
    database: Database, store: DirectoryStore, register: Callable[..., Registered], scripted: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(scripted, tmp_path / "model.pt"))
    (tmp_path / "model.toml").write_text(TENSORS.format(output="y"))
    first = register(path)
    (tmp_path / "model.toml").write_text(TENSORS.format(output="scores"))
    second = register(path)
    assert first.digest != second.digest
    assert (second.version, second.created) == ("2", True)
    with pytest.raises(ConflictError, match="exists with other bytes"):
        register(path, version="1")
    assert [file["name"] for file in row(database, "2").files] == ["model.pt", "model.toml"]
    main = materialise(store, versions.stored_files(row(database, "2")), tmp_path / "cache")
    assert 'name = "scores"' in (main.parent / "model.toml").read_text()


def test_a_model_toml_that_decides_nothing_is_no_part_of_the_artifact(
    register: Callable[..., Registered], tmp_path: Path
) -> None:
    path = onnx_file(tmp_path / "in" / "model.onnx")
    first = register(path)
    (path.parent / "model.toml").write_text('description = "later"\n')
    assert register(path).digest == register(path.parent).digest == first.digest


# What a person says


def test_facts_come_from_model_toml_and_options_go_before_it(
    database: Database, register: Callable[..., Registered], tmp_path: Path
) -> None:
    path = onnx_file(tmp_path / "in" / "model.onnx")
    (path.parent / "model.toml").write_text(
        'author = "ann"\ndescription = "from the file"\nkind = "classifier"\ntags = ["small"]\n'
        '[training_metrics]\naccuracy = 0.9\nloss = 0.1\n[metadata]\nteam = "vision"\n'
    )
    facts = modeltoml.given(
        {"description": "from the command", "author": None},
        {"training_metrics.accuracy": "0.98", "ticket": "ML-7", "dependencies": "torch==2.13, numpy"},
    )
    register(path, facts=facts)
    said = row(database).facts
    assert (said["author"], said["description"], said["tags"]) == ("ann", "from the command", ["small"])
    assert said["training_metrics"] == {"accuracy": 0.98, "loss": 0.1}
    assert said["metadata"] == {"team": "vision", "ticket": "ML-7"}
    assert said["dependencies"] == ["torch==2.13", "numpy"]
    assert said["parameters"] == 8
    with database.read() as session:
        model = session.get(Model, "linear")
        assert model is not None and model.kind == "classifier"


def test_the_kind_of_a_model_is_set_once(
    database: Database, register: Callable[..., Registered], tmp_path: Path
) -> None:
    register(onnx_file(tmp_path / "1.onnx"))
    register(onnx_file(tmp_path / "2.onnx", 2.0), kind="extractor")
    assert actions(database)[-2:] == ["model.changed", "version.registered"]
    with pytest.raises(ConflictError, match="linear is a extractor, not a router"):
        register(onnx_file(tmp_path / "3.onnx", 3.0), kind="router")
    with pytest.raises(UsageError, match="'toaster' is not one of classifier, predictor, extractor, router"):
        register(onnx_file(tmp_path / "3.onnx", 3.0), kind="toaster")


# MLflow


def mlflow_model(folder: Path, flavours: dict[str, Any], **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": flavours, **more}))
    return folder


def tensors(*specs: tuple[str | None, str, list[int]]) -> str:
    return json.dumps(
        [
            {**({"name": name} if name else {}), "type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}
            for name, dtype, shape in specs
        ]
    )


ONNX = {"onnx": {"data": "model.onnx"}}


def test_an_mlflow_model_is_its_file_and_where_it_comes_from(
    database: Database, register: Callable[..., Registered], tmp_path: Path
) -> None:
    plain = onnx_file(tmp_path / "plain" / "m.onnx")
    signature = {"inputs": tensors(("x", "float32", [-1, 4])), "outputs": tensors(("y", "float32", [-1, 2]))}
    folder = mlflow_model(
        tmp_path / "ml", ONNX, signature=signature, run_id="abc", mlflow_version="3.17.2", metadata={"team": "vision"}
    )
    shutil.copy(plain, folder / "model.onnx")
    (folder / "code.py").write_text("raise SystemExit")
    done = register(folder)
    assert done.digest == register(plain, name="other").digest
    assert row(database).facts["mlflow"] == {
        "flavour": "onnx", "run_id": "abc", "mlflow_version": "3.17.2", "metadata": {"team": "vision"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        (tensors(("z", "float32", [-1, 4])), "'z' is not in the file, which has 'x'"),
        (tensors(("x", "float64", [-1, 4])), "'x' is FP64 there and FP32 in the file"),
        (tensors(("x", "float32", [-1, 5])), "shape"),
        (tensors(("x", "float32", [4])), "shape"),
        (tensors(("x", "float32", [-1, 4]), ("z", "float32", [1])), "2 there, 1 in the file"),
        (tensors(("x", "complex64", [4])), "cannot be served"),
        ('[{"type": "tensor"}]', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_signature_that_is_not_that_of_the_file_is_refused(signature: str, said: str, tmp_path: Path) -> None:
    folder = mlflow_model(tmp_path / "ml", ONNX, signature={"inputs": signature})
    onnx_file(folder / "model.onnx")
    assert said in refusal(folder)


@pytest.mark.parametrize("listed", ['[{"type": "double", "name": "a"}]', '[{"type": "any", "required": true}]', "[]"])
def test_a_signature_without_tensors_says_nothing_and_is_let_be(listed: str, tmp_path: Path) -> None:
    folder = mlflow_model(tmp_path / "ml", ONNX, signature={"inputs": listed, "outputs": None})
    onnx_file(folder / "model.onnx")
    assert formats.inspect(folder, max_bytes=GIB).format == "onnx"


@pytest.mark.parametrize(
    ("flavours", "said"),
    [
        (
            {"sklearn": {"pickled_model": "model.pkl"}, "python_function": {}},
            "flavours python_function, sklearn; served are",
        ),
        ({}, "names no flavours"),
        ({"onnx": {"data": "../model.onnx"}}, "not a path inside"),
        ({"onnx": {"data": "/etc/passwd"}}, "not a path inside"),
        ({"onnx": {"data": 7}}, "no name of a file"),
        ({"onnx": {"data": "missing.onnx"}}, "is not there"),
        ({"onnx": {"data": "link.onnx"}}, "symbolic link"),
        ({"pytorch": {"model_data": "data"}}, "is not there"),
    ],
)
def test_an_mlflow_model_that_cannot_be_served_says_what_to_do(
    flavours: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = mlflow_model(tmp_path / "ml", flavours)
    onnx_file(folder / "model.onnx")
    onnx_file(tmp_path / "model.onnx")
    (folder / "link.onnx").symlink_to(tmp_path / "model.onnx")
    assert said in refusal(folder)


def test_a_pickled_pytorch_flavour_is_refused_with_the_remedy(tmp_path: Path) -> None:
    import torch

    folder = mlflow_model(tmp_path / "ml", {"pytorch": {"model_data": "data"}})
    (folder / "data").mkdir()
    for content in (torch.nn.Linear(4, 2), None):
        if content is None:
            (folder / "data" / "model.pth").write_bytes(pickle.dumps({}))
        else:
            torch.save(content, folder / "data" / "model.pth")
        assert "serialization_format='pt2'" in refusal(folder)


def test_a_torchscript_flavour_takes_its_signature_from_mlflow(
    database: Database, register: Callable[..., Registered], scripted: Path, tmp_path: Path
) -> None:
    signature = {"inputs": tensors(("x", "float32", [-1, 4])), "outputs": tensors((None, "float32", [-1, 2]))}
    folder = mlflow_model(tmp_path / "ml", {"pytorch": {"model_data": "data"}}, signature=signature)
    (folder / "data").mkdir()
    shutil.copy(scripted, folder / "data" / "model.pth")
    first = register(folder)
    found = versions.signature_of(row(database))
    assert found is not None
    assert [spec.name for spec in (*found.inputs, *found.outputs)] == ["x", "output"]
    assert [file["name"] for file in row(database).files] == ["model.pth", "model.toml"]
    assert not register(folder).created
    again = {"inputs": tensors(("x", "float32", [-1, 4])), "outputs": tensors(("scores", "float32", [-1, 2]))}
    mlflow_model(folder, {"pytorch": {"model_data": "data"}}, signature=again)
    assert register(folder).digest != first.digest


@pytest.mark.parametrize("text", ["a: [", "- 1", "!!python/object/apply:os.mkdir [ran]", "\x00", "a: " + "[" * 5000])
def test_an_mlmodel_that_is_no_plain_yaml_is_refused_and_runs_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MLmodel").write_text(text)
    assert "MLmodel" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


# Out again


@pytest.mark.parametrize("mlflow", [False, True])
@pytest.mark.parametrize("kind", ["onnx", "external", "folder", "torchscript"])
def test_what_is_exported_checks_out_and_registers_as_the_same(
    kind: str,
    mlflow: bool,
    database: Database,
    store: DirectoryStore,
    register: Callable[..., Registered],
    scripted: Path,
    tmp_path: Path,
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    path = source / "model.onnx"
    if kind == "external":
        onnx_file(path, external="w.bin")
    elif kind == "torchscript":
        path = Path(shutil.copy(scripted, source / "scripted.pt"))
        (source / "model.toml").write_text(TENSORS.format(output="y"))
    else:
        onnx_file(path)
        if kind == "folder":
            path = folder_with_labels(tmp_path / "several")
    done = register(
        path, golden=golden_file(tmp_path / "cases.npz"), facts={"author": "ann"}, kind="classifier", tags={"a": "b"}
    )
    target = tmp_path / "out"
    told = exporting.export(database, store, "linear", "1", target, mlflow=mlflow)
    listed = sorted(file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file())
    assert told["files"] == listed
    assert (target / "MLmodel").exists() == mlflow
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=target, check=True, capture_output=True)
    again = register(target, name="linear")
    assert (again.digest, again.created, again.golden_digest) == (done.digest, False, done.golden_digest)
    # Elsewhere, where nothing is known of it.
    other = register(target, name="moved")
    assert (other.digest, other.created, other.golden_digest) == (done.digest, True, done.golden_digest)
    facts = row(database, name="moved").facts
    assert facts["author"] == "ann"
    assert (facts["exported_from"]["model"], facts["exported_from"]["version"]) == ("linear", "1")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_an_export_refuses_what_is_there_and_leaves_it_alone(
    database: Database, store: DirectoryStore, register: Callable[..., Registered], tmp_path: Path
) -> None:
    register(onnx_file(tmp_path / "m.onnx"))
    target = tmp_path / "out"
    target.mkdir()
    exporting.export(database, store, "linear", "1", target)  # an empty one is taken
    before = sorted(target.rglob("*"))
    (target / "mine").write_text("precious")
    for taken in (target, target / "mine"):
        with pytest.raises(ConflictError, match="not empty"):
            exporting.export(database, store, "linear", "1", taken)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ConflictError, match="not empty"):
        exporting.export(database, store, "linear", "1", tmp_path / "link")
    assert sorted(target.rglob("*")) == sorted([*before, target / "mine"])
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


@pytest.mark.parametrize("damage", ["byte", "more", "missing", "manifest", "link", "name"])
def test_an_export_that_was_changed_is_refused(
    damage: str, database: Database, store: DirectoryStore, register: Callable[..., Registered], tmp_path: Path
) -> None:
    register(onnx_file(tmp_path / "m.onnx"))
    target = tmp_path / "out"
    exporting.export(database, store, "linear", "1", target)
    model, manifest = target / "model" / "m.onnx", target / "modelkeep.json"
    said = json.loads(manifest.read_text())
    if damage == "byte":
        content = bytearray(model.read_bytes())
        content[-1] ^= 1
        model.write_bytes(content)
    elif damage == "more":
        (target / "model" / "x.txt").write_text("x")
    elif damage == "missing":
        model.unlink()
    elif damage == "manifest":
        manifest.write_text("{}")
    elif damage == "link":
        model.rename(tmp_path / "real.onnx")
        model.symlink_to(tmp_path / "real.onnx")
    else:
        said["files"][0]["name"] = "../../m.onnx"
        manifest.write_text(json.dumps(said))
    with pytest.raises(RefusedError):
        register(target, name="moved")


def test_an_export_for_mlflow_names_its_inputs_as_mlflow_does(
    database: Database, store: DirectoryStore, register: Callable[..., Registered], tmp_path: Path
) -> None:
    register(onnx_file(tmp_path / "m.onnx"))
    exporting.export(database, store, "linear", "1", tmp_path / "out", mlflow=True)
    document = yaml.safe_load((tmp_path / "out" / "MLmodel").read_text())
    assert set(document["flavors"]) == {"onnx", "python_function"}
    (spec,) = json.loads(document["signature"]["inputs"])
    assert spec == {"name": "x", "type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 4]}}
    assert np.dtype(spec["tensor-spec"]["dtype"]) == np.float32


@pytest.mark.parametrize(
    ("top", "data", "words"), [("{{<<: [{}]}}", "x", "merges"), ("[{}]", "*a9", "no name of a file")]
)
def test_an_mlmodel_that_grows_tenfold_a_line_is_refused_before_it_fills_the_memory(
    top: str, data: str, words: str, tmp_path: Path
) -> None:
    first = "a0: &a0 {k: v}" if "<<" in top else "a0: &a0 [x]"
    lines = [f"a{i}: &a{i} " + top.format(",".join([f"*a{i - 1}"] * 10)) for i in range(1, 10)]
    (tmp_path / "MLmodel").write_text("\n".join([first, *lines, f"flavors: {{onnx: {{data: {data}}}}}"]))
    with pytest.raises(RefusedError, match=words):
        formats.inspect(tmp_path, max_bytes=1 << 20)


def test_an_export_whose_kind_is_no_text_is_refused_and_does_not_reach_the_registry(
    database: Database, store: DirectoryStore, tmp_path: Path
) -> None:
    versions.register(database, store, onnx_file(tmp_path / "m.onnx"), name="m", version="1", max_bytes=1 << 30)
    exporting.export(database, store, "m", "1", tmp_path / "out")
    manifest = tmp_path / "out" / "modelkeep.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "kind": [1]}))
    with pytest.raises(RefusedError, match="kind is a list"):
        formats.inspect(tmp_path / "out", max_bytes=1 << 30)
