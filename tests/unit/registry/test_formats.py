"""Model files: what is accepted, what is refused and why. Nothing that is inspected may run."""

from __future__ import annotations

import io
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from registry.errors import RefusedError, UsageError
from registry.formats import inspect, parse_model_toml
from registry.signature import Signature, TensorSpec

GIB = 1 << 30


def linear(**changes: Any) -> onnx.ModelProto:
    """y = x · w, with a batch of any size; `changes` go to the graph's parts."""
    weights = numpy_helper.from_array(np.ones((4, 2), dtype=np.float32), "w")
    graph = helper.make_graph(
        changes.get("nodes", [helper.make_node("MatMul", ["x", "w"], ["y"])]),
        "linear",
        changes.get("inputs", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])]),
        changes.get("outputs", [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])]),
        changes.get("initializers", [weights]),
    )
    return helper.make_model(graph, producer_name="tests", opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def external(folder: Path, location: str = "w.bin", **entries: str) -> Path:
    """A model whose weights (32 bytes) lie outside it."""
    model = linear()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return save(model, folder / "model.onnx")


def refusal(path: Path, max_bytes: int = GIB) -> str:
    with pytest.raises(RefusedError) as error:
        inspect(path, max_bytes=max_bytes)
    message = str(error.value)
    assert str(path.parent) in message
    return message


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


# ONNX


def test_an_onnx_file_is_described_by_its_graph(tmp_path: Path) -> None:
    path = save(linear(), tmp_path / "m.onnx")
    found = inspect(path, max_bytes=GIB)
    assert (found.format, found.path, found.files, found.size_bytes) == ("onnx", path, (path,), path.stat().st_size)
    assert found.signature is not None
    assert found.signature.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert found.signature.outputs == (TensorSpec("y", "FP32", (-1, 2)),)
    assert found.metadata["parameters"] == 8
    assert found.metadata["opset"] == {"ai.onnx": 17}
    assert found.metadata["producer"] == "tests"
    assert found.metadata["ir_version"] == 8


def test_initialisers_that_are_listed_as_inputs_are_none(tmp_path: Path) -> None:
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4]),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2]),
    ]
    signature = inspect(save(linear(inputs=inputs), tmp_path / "m.onnx"), max_bytes=GIB).signature
    assert signature is not None
    assert [tensor.name for tensor in signature.inputs] == ["x"]


@pytest.mark.parametrize(
    ("elem_type", "datatype"),
    [
        (TensorProto.FLOAT16, "FP16"),
        (TensorProto.DOUBLE, "FP64"),
        (TensorProto.INT64, "INT64"),
        (TensorProto.UINT8, "UINT8"),
        (TensorProto.BOOL, "BOOL"),
        (TensorProto.STRING, "BYTES"),
    ],
)
def test_datatypes_are_named_as_in_the_protocol(elem_type: int, datatype: str, tmp_path: Path) -> None:
    model = linear(
        nodes=[helper.make_node("Identity", ["x"], ["y"])],
        inputs=[helper.make_tensor_value_info("x", elem_type, [])],
        outputs=[helper.make_tensor_value_info("y", elem_type, [])],
        initializers=[],
    )
    signature = inspect(save(model, tmp_path / "m.onnx"), max_bytes=GIB).signature
    assert signature is not None
    assert signature.inputs == (TensorSpec("x", datatype, ()),)


@pytest.mark.parametrize("keep", [1, 20, 60, 0.5, 0.9, 0.99])
def test_a_truncated_onnx_file_is_refused(keep: float, tmp_path: Path) -> None:
    whole = linear().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    refusal(path)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_flipped_byte_is_refused_or_harmless_but_never_an_accident(mask: int, tmp_path: Path) -> None:
    whole, path = linear().SerializeToString(), tmp_path / "m.onnx"
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
        try:
            inspect(path, max_bytes=GIB)
        except RefusedError as error:
            assert str(path) in str(error), position


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"outputs": []}, "without outputs"),
        ({"nodes": [], "initializers": []}, "has no graph"),
        ({"nodes": [helper.make_node("MatMul", ["x", "missing"], ["y"])]}, "not a valid ONNX model"),
        ({"nodes": [helper.make_node("NoSuchOperator", ["x"], ["y"])]}, "not a valid ONNX model"),
        (
            {"inputs": [onnx.ValueInfoProto(name="x", type=helper.make_tensor_type_proto(TensorProto.FLOAT, None))]},
            "input 'x' has no shape",
        ),
        (
            {"outputs": [onnx.ValueInfoProto(name="y", type=helper.make_tensor_type_proto(TensorProto.FLOAT, None))]},
            "output 'y' has no shape",
        ),
        (
            {"inputs": [helper.make_tensor_value_info("x", TensorProto.FLOAT8E4M3FN, [1, 4])]},
            "FLOAT8E4M3FN, which cannot be served",
        ),
        (
            {"inputs": [helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1, 4])]},
            "is a sequence",
        ),
    ],
)
def test_a_graph_that_cannot_be_served_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(save(linear(**changes), tmp_path / "m.onnx"))


def test_inputs_and_outputs_of_bf16_can_be_served(tmp_path: Path) -> None:
    spec = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["n", 4]) for name in ("x", "y")]
    changes = {"inputs": spec[:1], "outputs": spec[1:], "nodes": [helper.make_node("Identity", ["x"], ["y"])]}
    signature = inspect(save(linear(**changes), tmp_path / "m.onnx"), max_bytes=GIB).signature
    assert signature is not None
    assert [tensor.datatype for tensor in (*signature.inputs, *signature.outputs)] == ["BF16", "BF16"]


# ONNX external data


def test_external_data_inside_the_folder_belongs_to_the_model(tmp_path: Path) -> None:
    path = external(tmp_path, "weights/w.bin", offset="16", length="32")
    (tmp_path / "weights").mkdir()
    data = tmp_path / "weights" / "w.bin"
    data.write_bytes(bytes(48))
    found = inspect(path, max_bytes=GIB)
    assert found.files == (path, data)
    assert found.size_bytes == path.stat().st_size + 48
    assert found.metadata["external_files"] == ["weights/w.bin"]
    assert "that are allowed" in refusal(path, max_bytes=path.stat().st_size + 47)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "", "C:\\w", "..\\secret", "\\w"])
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a").mkdir()
    message = refusal(external(folder, location))
    assert "external data of tensor 'w'" in message
    assert "keep the data beside the model" in message


def test_external_data_through_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "w.bin").write_bytes(bytes(64))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "w.bin").symlink_to(tmp_path / "secret" / "w.bin")
    assert "symbolic link" in refusal(external(folder))
    (folder / "deep").symlink_to(tmp_path / "secret")
    assert "symbolic link" in refusal(external(folder, "deep/w.bin"))


@pytest.mark.parametrize(
    ("entries", "size", "said"),
    [
        ({}, None, "does not exist"),
        ({}, 31, "has 31: it is truncated"),
        ({"offset": "1"}, 32, "from 1 on"),
        ({"length": "33"}, 32, "needs 33 bytes"),
        ({"offset": "-1"}, 64, "from -1 on"),
        ({"offset": "x"}, 64, "not a number"),
        ({"basepath": "/etc"}, 64, "unknown field 'basepath'"),
    ],
)
def test_external_data_that_is_missing_or_too_short_is_refused(
    entries: dict[str, str], size: int | None, said: str, tmp_path: Path
) -> None:
    if size is not None:
        (tmp_path / "w.bin").write_bytes(bytes(size))
    assert said in refusal(external(tmp_path, **entries))


def test_external_data_of_a_tensor_deep_in_a_subgraph_is_found(tmp_path: Path) -> None:
    outside = TensorProto(name="deep", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="/etc/passwd")
    value = helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])
    branch = helper.make_graph([helper.make_node("Constant", [], ["b"], value=outside)], "branch", [], [value])
    model = linear(
        nodes=[helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
        inputs=[helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    assert "external data of tensor 'deep'" in refusal(save(model, tmp_path / "m.onnx"))


# Which file, and what kind of it


def test_what_is_not_there_is_refused_in_words(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "m.onnx")
    (tmp_path / "gone.onnx").symlink_to(tmp_path / "nowhere")
    assert "which does not exist" in refusal(tmp_path / "gone.onnx")
    (tmp_path / "empty.onnx").touch()
    assert "is empty" in refusal(tmp_path / "empty.onnx")


def test_a_directory_must_hold_exactly_one_model(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "README.md").write_text("hello", encoding="utf-8")
    assert "directory without a model" in refusal(folder)
    path = save(linear(), folder / "a.onnx")
    assert inspect(folder, max_bytes=GIB).path == path
    save(linear(), folder / "b.onnx")
    assert "holds 2 models (a.onnx, b.onnx)" in refusal(folder)


def test_a_link_may_not_leave_its_folder(tmp_path: Path) -> None:
    path = save(linear(), tmp_path / "elsewhere" / "m.onnx")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "m.onnx").symlink_to(path)
    assert "outside its folder" in refusal(folder / "m.onnx")
    save(linear(), folder / "blob.onnx")
    (folder / "latest.onnx").symlink_to("blob.onnx")
    assert inspect(folder / "latest.onnx", max_bytes=GIB).path == folder / "blob.onnx"


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.onnx")
    assert "is a pipe" in refusal(tmp_path / "m.onnx")


def test_a_device_is_refused() -> None:
    assert "is a device" in refusal(Path("/dev/zero"))


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 34)
    assert "models.max_file_bytes" in refusal(path)


def test_more_than_2_gib_in_one_onnx_file_is_impossible_and_said_so(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.write(b"\x08\x08")
        file.truncate(3 << 30)
    assert "external data" in refusal(path, max_bytes=1 << 40)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("suffix", [".onnx", ".pt", ".pth", ".torchscript", ".pkl"])
def test_a_pickle_is_refused_whatever_its_name_and_its_payload_never_runs(
    suffix: str, protocol: int, tmp_path: Path
) -> None:
    path, mark = tmp_path / f"m{suffix}", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Payload(mark), protocol=protocol))
    assert "Python pickle" in refusal(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.onnx", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("m.pt", b"GGUF\x03\x00", "GGUF"),
        ("m.safetensors", (8).to_bytes(8, "little") + b'{"a": 1}', "safetensors"),
        ("m.onnx", (8).to_bytes(8, "little") + b'{"a": 1}', "safetensors"),
        ("m.onnx", b"#!/bin/sh\nrm -rf /\n", "a script"),
        ("m.onnx", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("m.onnx", b'{"a": 1}', "JSON"),
        ("m.onnx", b"hello, this is no model at all", "is not an ONNX file"),
        ("m.pt", b"\x00\x01\x02\x03 not an archive", "not a TorchScript archive"),
        ("m.bin", b"\x08\x08 something", "of an unknown kind"),
    ],
)
def test_another_kind_of_file_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert said in refusal(path)


def test_an_onnx_file_under_another_extension_is_refused(tmp_path: Path) -> None:
    assert "is an ONNX file under the extension .pt" in refusal(save(linear(), tmp_path / "m.pt"))
    assert "models are .onnx" in refusal(save(linear(), tmp_path / "m.bin"))


# TorchScript


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What torch itself writes: scripted, traced, frozen and quantised modules, and its other, unsafe formats."""
    import torch

    from tests.unit.registry import scripted

    folder = tmp_path_factory.mktemp("archives")
    paths = {
        name: folder / f"{name}.pt" for name in ("script", "trace", "frozen", "quantised", "writes", "save", "legacy")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten()).eval()
        example = torch.zeros(1, 1, 8, 8)
        torch.jit.script(scripted.Attributes().eval()).save(str(paths["script"]))
        traced = torch.jit.trace(network, example)
        torch.jit.save(traced, str(paths["trace"]), _extra_files={"notes.txt": b"hello"})
        torch.jit.freeze(traced).save(str(paths["frozen"]))
        dynamic = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(4, 4)))
        torch.jit.script(dynamic).save(str(paths["quantised"]))
        torch.jit.script(scripted.Writes()).save(str(paths["writes"]))
        torch.save(network, paths["save"])
        torch.save(network, paths["legacy"], _use_new_zipfile_serialization=False)
    return paths


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes | None], **added: bytes) -> Path:
    """A copy of an archive with members changed, left out or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
        for name, content in added.items():
            new.writestr(f"{root}/{name}", content)
    return target


@pytest.mark.parametrize("name", ["script", "trace", "frozen", "quantised"])
def test_what_torch_jit_writes_is_accepted(name: str, archives: dict[str, Path]) -> None:
    found = inspect(archives[name], max_bytes=GIB)
    assert (found.format, found.signature, found.files) == ("torchscript", None, (archives[name],))
    assert found.size_bytes == archives[name].stat().st_size
    assert found.metadata["weights_bytes"] > 0


@pytest.mark.parametrize(("name", "said"), [("save", "torch.save archive"), ("legacy", "Python pickle")])
def test_what_torch_save_writes_is_refused(name: str, said: str, archives: dict[str, Path]) -> None:
    assert said in refusal(archives[name])


def test_an_archive_under_a_wrong_extension_is_refused(archives: dict[str, Path], tmp_path: Path) -> None:
    for source, suffix, said in (
        ("trace", ".onnx", "TorchScript archive under the extension .onnx"),
        ("trace", ".zip", "TorchScript archive under the extension .zip"),
        ("save", ".onnx", "torch.save archive"),
    ):
        path = tmp_path / f"m{suffix}"
        path.write_bytes(archives[source].read_bytes())
        assert said in refusal(path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_refused(keep: float, archives: dict[str, Path], tmp_path: Path) -> None:
    whole = archives["trace"].read_bytes()
    path = tmp_path / "m.pt"
    path.write_bytes(whole[: int(len(whole) * keep)])
    assert "damaged or truncated" in refusal(path)


def test_a_damaged_member_is_named(archives: dict[str, Path], tmp_path: Path) -> None:
    content = bytearray(archives["trace"].read_bytes())
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as archive:
        info = next(item for item in archive.infolist() if item.filename.endswith("/data.pkl"))
    content[info.header_offset + 200] ^= 0xFF
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    assert "data.pkl" in refusal(path)


@pytest.mark.parametrize("member", ["data.pkl", "constants.pkl", "code/__torch__.py.debug_pkl", "extra/notes"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_payload_in_any_pickle_of_an_archive_is_refused_and_never_runs(
    member: str, protocol: int, archives: dict[str, Path], tmp_path: Path
) -> None:
    mark, path = tmp_path / "ran", tmp_path / "m.pt"
    payload = pickle.dumps(Payload(mark), protocol=protocol)
    rewritten(archives["script"], path, lambda name, old: None if name == member else old, **{member: payload})
    message = refusal(path)
    assert member in message
    assert ("posix.mkdir" if protocol == 2 else "STACK_GLOBAL") in message
    assert not mark.exists()


@pytest.mark.parametrize(
    "asked",
    ["torch.load", "torch._utils._rebuild_parameter", "torch.nn.modules.linear.Linear", "__torch__.torch.classes.x.Y"],
)
def test_a_global_that_torchscript_never_writes_is_refused(
    asked: str, archives: dict[str, Path], tmp_path: Path
) -> None:
    module, _, name = asked.rpartition(".")
    content = b"\x80\x02c" + f"{module}\n{name}\n.".encode()
    path = rewritten(archives["trace"], tmp_path / "m.pt", lambda n, old: content if n == "constants.pkl" else old)
    assert asked in refusal(path)


def test_a_pickle_that_goes_on_after_its_end_is_refused(archives: dict[str, Path], tmp_path: Path) -> None:
    path = rewritten(
        archives["trace"], tmp_path / "m.pt", lambda n, old: old + b"\x80\x02." if n == "constants.pkl" else old
    )
    assert "goes on after the end" in refusal(path)


def test_code_that_writes_files_when_it_runs_is_refused(archives: dict[str, Path]) -> None:
    assert "uses 'save'" in refusal(archives["writes"])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ('torch.from_file("/etc/x", True, 100)', "from_file"),
        ("torch . save(x)", "save"),
        ('getattr(torch, "\\163ave")(x)', "by escapes"),
        ('getattr(torch, "\\x73ave")(x)', "by escapes"),
        ("ops.c10d.send(x)", "c10d"),
    ],
)
def test_calls_that_reach_outside_are_found_however_they_are_spelled(
    call: str, said: str, archives: dict[str, Path], tmp_path: Path
) -> None:
    def change(name: str, old: bytes) -> bytes:
        return old + f"\n    {call}\n".encode() if name.endswith("container.py") else old

    assert said in refusal(rewritten(archives["trace"], tmp_path / "m.pt", change))


def test_two_members_of_one_name_are_refused(archives: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rewritten(archives["trace"], path, lambda name, old: old, **{"data.pkl": b"\x80\x02."})
    assert "same name" in refusal(path)


def test_members_outside_the_folder_of_the_archive_are_refused(archives: dict[str, Path], tmp_path: Path) -> None:
    path = rewritten(archives["trace"], tmp_path / "m.pt", lambda name, old: old, **{"../../x": b"x"})
    assert "outside its one folder" in refusal(path)


def test_a_zip_bomb_is_refused_before_it_unpacks(archives: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(archives["trace"].read_bytes())
    with zipfile.ZipFile(path, "a", compression=zipfile.ZIP_DEFLATED) as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/data/9", bytes(32 << 20))
    assert "zip bomb" in refusal(path)
    assert "unpacks to" in refusal(path, max_bytes=1 << 20)


def test_a_plain_zip_archive_is_no_model(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("a/readme.txt", "hello")
    assert "without a model" in refusal(tmp_path / "m.pt")


# model.toml


def test_model_toml_says_what_a_file_cannot(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(
        """
description = "digits"
author = "ann"
tags = ["cnn", "small"]
dependencies = ["torch==2.13.0"]
[training_metrics]
accuracy = 0.98
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 1, 8, 8]
[[outputs]]
name = "y"
datatype = "FP32"
shape = [-1, 10]
""",
        encoding="utf-8",
    )
    told = parse_model_toml(path)
    assert told.signature is not None
    assert told.signature.inputs == (TensorSpec("x", "FP32", (-1, 1, 8, 8)),)
    assert told.facts == {
        "description": "digits",
        "author": "ann",
        "tags": ["cnn", "small"],
        "dependencies": ["torch==2.13.0"],
        "training_metrics": {"accuracy": 0.98},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("descripton = 'x'", "descripton: not a key of model.toml"),
        ("author = 1", "author"),
        ("[author", "not valid TOML"),
        ("[[inputs]]\nname = 'x'\ndatatype = 'FLOAT'\nshape = [1]", "'FLOAT' is not one of BOOL"),
        ("[[inputs]]\nname = 'x'\ndatatype = 'FP32'\nshape = [-2]", "-1 for any"),
        ("[[inputs]]\nname = 'x'\ndatatype = 'FP32'\nshape = [1]", "both [[inputs]] and [[outputs]]"),
        ("[[inputs]]\nname = ''\ndatatype = 'FP32'\nshape = [1]", "empty or there twice"),
    ],
)
def test_a_wrong_model_toml_names_the_key(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        parse_model_toml(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_model_toml_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        parse_model_toml(tmp_path / "model.toml")


def test_looking_at_an_archive_needs_no_torch(archives: dict[str, Path]) -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path; from registry.formats import inspect; "
        f"inspect(Path({str(archives['trace'])!r}), max_bytes=1 << 30); "
        "print([name for name in ('torch', 'onnx', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def scaled(*, weight: bool, ir_version: int = 8) -> onnx.ModelProto:
    """y = x W factor; the factor is an input with a default, the weights are none (without them it is the only initialiser)."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
        helper.make_tensor_value_info("factor", TensorProto.FLOAT, [1]),
    ]
    nodes = [helper.make_node("Mul", ["h" if weight else "x", "factor"], ["y"])]
    values = [numpy_helper.from_array(np.array([2.0], np.float32), "factor")]
    if weight:
        nodes.insert(0, helper.make_node("MatMul", ["x", "w"], ["h"]))
        values.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)


def test_an_input_with_a_default_is_optional_where_the_file_lists_it_and_not_its_weights(tmp_path: Path) -> None:
    signature = inspect(save(scaled(weight=True), tmp_path / "m.onnx"), max_bytes=GIB).signature
    assert signature is not None
    assert signature.inputs == (TensorSpec("x", "FP32", (-1, 4)), TensorSpec("factor", "FP32", (1,), optional=True))
    assert signature.required == signature.inputs[:1]
    assert Signature.from_dict(signature.as_dict()) == signature
    only = inspect(save(scaled(weight=False), tmp_path / "only.onnx"), max_bytes=GIB).signature
    assert only is not None and [tensor.name for tensor in only.inputs] == ["x"]
