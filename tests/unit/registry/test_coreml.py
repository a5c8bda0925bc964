"""CoreML specifications: their head is read, damage is refused. The files are written by protobuf itself, from Apple's field numbers.

What coremltools writes is read in tests/integration/registry/test_mlflow.py, where it has an environment of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from registry.coreml import WHERE_IT_RUNS
from registry.errors import RefusedError
from registry.formats import inspect
from registry.signature import TensorSpec
from serving.compute.runtimes import load_runtime

GIB = 1 << 30
INT64, DOUBLE, STRING, MESSAGE, BOOL = 3, 1, 9, 11, 8

MESSAGES: dict[str, list[tuple[str, int, int, str]]] = {
    # (name, number, type, message or "" ); a name that ends in * is repeated
    "Model": [
        ("version", 1, INT64, ""), ("description", 2, MESSAGE, "Description"), ("network", 500, MESSAGE, "Empty"),
        ("program", 502, MESSAGE, "Empty"), ("strange", 4711, MESSAGE, "Empty"),
    ],
    "Description": [
        ("input*", 1, MESSAGE, "Feature"), ("output*", 10, MESSAGE, "Feature"), ("predicted", 11, STRING, ""),
        ("metadata", 100, MESSAGE, "Metadata"),
    ],
    "Metadata": [("short", 1, STRING, ""), ("version", 2, STRING, ""), ("author", 3, STRING, ""), ("license", 4, STRING, "")],
    "Feature": [("name", 1, STRING, ""), ("said", 2, STRING, ""), ("type", 3, MESSAGE, "Type")],
    "Type": [
        ("int64", 1, MESSAGE, "Empty"), ("string", 3, MESSAGE, "Empty"), ("image", 4, MESSAGE, "Image"),
        ("array", 5, MESSAGE, "Array"), ("dictionary", 6, MESSAGE, "Empty"), ("optional", 1000, BOOL, ""),
    ],
    "Image": [("width", 1, INT64, ""), ("height", 2, INT64, ""), ("space", 3, INT64, ""), ("range", 31, MESSAGE, "Empty")],
    "Array": [
        ("shape*", 1, INT64, ""), ("kind", 2, INT64, ""), ("choices", 21, MESSAGE, "Choices"), ("range", 31, MESSAGE, "Ranges"),
    ],
    "Choices": [("shapes*", 1, MESSAGE, "Shape")],
    "Shape": [("shape*", 1, INT64, "")],
    "Ranges": [("sizes*", 1, MESSAGE, "Range")],
    "Range": [("low", 1, INT64, ""), ("high", 2, INT64, "")],
    "Empty": [("weights", 1, STRING, "")],
}  # fmt: skip


def message_class(name: str) -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="tests/coreml.proto", package="tests.coreml", syntax="proto3")
    for message, parts in MESSAGES.items():
        made = file.message_type.add(name=message)
        for part, number, kind, inner in parts:
            label = 3 if part.endswith("*") else 1
            made.field.add(
                name=part.rstrip("*"), number=number, type=kind, label=label, type_name=f".tests.coreml.{inner}" if inner else None
            )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tests.coreml.{name}"))


Model = message_class("Model")
FLOAT32, FLOAT16, INT32 = 65568, 65552, 131104


def specification(**changes: Any) -> bytes:
    model = {
        "version": 7,
        "description": {
            "input": [
                {"name": "x", "said": "grey levels", "type": {"array": {"shape": [1, 4], "kind": FLOAT32}}},
                {"name": "photo", "type": {"image": {"width": 32, "height": 16, "space": 20}}},
            ],
            "output": [{"name": "y", "type": {"array": {"shape": [1, 2], "kind": FLOAT16}}}],
            "metadata": {"short": "digits", "author": "ann", "license": "MIT", "version": "3"},
        },
        "program": {"weights": ""},
    }
    return bytes(Model(**{**model, **changes}).SerializeToString())


def written(folder: Path, content: bytes, name: str = "m.mlmodel") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def package(folder: Path, content: bytes, weights: bytes | None = None) -> Path:
    made = folder / "m.mlpackage"
    written(made, content, "Data/com.apple.CoreML/model.mlmodel")
    if weights is not None:
        written(made, weights, "Data/com.apple.CoreML/weights/weight.bin")
    items = {"A": {"path": "com.apple.CoreML/model.mlmodel"}, "B": {"path": "com.apple.CoreML/weights"}}
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": "A"}
    written(made, json.dumps(manifest).encode(), "Manifest.json")
    return made


def refusal(path: Path) -> str:
    with pytest.raises(RefusedError) as error:
        inspect(path, max_bytes=GIB)
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_specification_says_what_it_is(tmp_path: Path) -> None:
    found = inspect(written(tmp_path, specification()), max_bytes=GIB)
    assert found.format == "coreml"
    assert found.signature is not None
    assert found.signature.inputs == (TensorSpec("x", "FP32", (1, 4)), TensorSpec("photo", "UINT8", (3, 16, 32)))
    assert found.signature.outputs == (TensorSpec("y", "FP16", (1, 2)),)
    said = found.metadata
    assert (said["specification_version"], said["model_type"]) == (7, "mlProgram")
    assert (said["description"], said["author"], said["license"], said["model_version"]) == (
        "digits",
        "ann",
        "MIT",
        "3",
    )
    assert said["features"]["inputs"][0]["description"] == "grey levels"


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        ({"shape": [1, 4], "range": {"sizes": [{"low": 1, "high": 8}, {"low": 4, "high": 4}]}}, (-1, 4)),
        ({"shape": [1, 4], "choices": {"shapes": [{"shape": [1, 4]}, {"shape": [2, 4]}]}}, (-1, 4)),
        ({"shape": []}, ()),
    ],
)
def test_a_size_that_may_vary_is_minus_one(array: dict[str, Any], shape: tuple[int, ...], tmp_path: Path) -> None:
    feature = {"name": "x", "type": {"array": {"kind": INT32, **array}}}
    found = inspect(
        written(tmp_path, specification(description={"input": [feature], "output": [feature]})), max_bytes=GIB
    )
    assert found.signature is not None
    assert found.signature.inputs == (TensorSpec("x", "INT32", shape),)


def test_a_classifier_that_answers_a_dictionary_has_features_and_no_signature(tmp_path: Path) -> None:
    described = {
        "input": [{"name": "x", "type": {"array": {"shape": [4], "kind": FLOAT32}}}],
        "output": [{"name": "p", "type": {"dictionary": {}}}, {"name": "label", "type": {"string": {}, "optional": True}}],
        "predicted": "label",
    }  # fmt: skip
    found = inspect(written(tmp_path, specification(description=described)), max_bytes=GIB)
    assert found.signature is None
    assert [one["type"] for one in found.metadata["features"]["outputs"]] == ["dictionary", "optional string"]
    assert found.metadata["predicted_feature"] == "label"


def test_a_package_is_its_manifest_its_specification_and_its_weights(tmp_path: Path) -> None:
    content = specification(program={"weights": "@model_path/weights/weight.bin"})
    found = inspect(package(tmp_path, content, b"123"), max_bytes=GIB)
    assert found.names == [
        "m.mlpackage/Manifest.json",
        "m.mlpackage/Data/com.apple.CoreML/model.mlmodel",
        "m.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
    ]
    assert found.metadata["package_version"] == "1.0.0"
    assert inspect(tmp_path, max_bytes=GIB).names == found.names


def test_a_package_without_what_it_names_is_refused(tmp_path: Path) -> None:
    content = specification(program={"weights": "@model_path/weights/weight.bin"})
    assert "lacks the weights weights/weight.bin" in refusal(package(tmp_path, content))
    outside = specification(program={"weights": "@model_path/../../x.bin"})
    assert "outside the package" in refusal(package(tmp_path, outside))
    made = package(tmp_path, specification())
    (made / "Data/com.apple.CoreML/model.mlmodel").unlink()
    assert "lacks Data/com.apple.CoreML/model.mlmodel" in refusal(made)
    (made / "Manifest.json").write_text('{"itemInfoEntries": []}')
    assert "not the manifest" in refusal(made)
    for bad in ("../../../etc/passwd", "/etc/passwd", "a\\b"):
        manifest = {"fileFormatVersion": "1", "itemInfoEntries": {"A": {"path": bad}}, "rootModelIdentifier": "A"}
        (made / "Manifest.json").write_text(json.dumps(manifest))
        assert "leads out of the package" in refusal(made)
    (made / "Manifest.json").unlink()
    assert "has no Manifest.json" in refusal(made)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x08", "in the middle of a number"),
        (b"\x12\xff\xff\xff\xff\x0f", "says it has"),
        (b"\x0b\x0c", "wire type"),
        (specification(version=0), "specification version 0"),
        (specification(program=None), "holds no model"),
        (specification(program=None, strange={}), "unknown kind 4711"),
        (specification(description={"input": []}), "no inputs"),
        (specification(description={"input": [{"name": "x", "type": {"array": {"kind": 5}}}]}), "unknown kind 5"),
        (specification(description={"input": [{"type": {"array": {"kind": FLOAT32}}}]}), "without a name"),
        (specification(description={"input": [{"name": "x", "type": {"array": {"kind": FLOAT32, "shape": [1 << 50]}}}]}), "the shape"),
    ],
)  # fmt: skip
def test_what_is_no_specification_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    assert said in refusal(written(tmp_path, content))


def test_more_features_than_any_model_has_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    one = specification()
    many = one + b"\x12\x84\x80\x80\x02" + b"\x32\x00" * ((4 << 20) // 2 + 2)
    assert "a description of" in refusal(written(tmp_path, many))


def test_damage_is_refused_or_harmless_but_never_an_accident(tmp_path: Path) -> None:
    whole = specification()
    for position in range(len(whole)):
        for changed in (whole[:position], whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :]):
            path = written(tmp_path, changed)
            try:
                inspect(path, max_bytes=GIB)
            except RefusedError as error:
                assert str(path) in str(error), position


def test_a_runtime_for_it_says_where_it_runs(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"CoreML runs on macOS") as error:
        load_runtime(written(tmp_path, specification()), "coreml", signature=None)
    assert str(error.value) == WHERE_IT_RUNS
