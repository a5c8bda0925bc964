"""ONNX Runtime and torch behind the runtime protocol: signature, types, failures. More of torch is in the integration layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from registry.errors import RefusedError, UsageError
from registry.signature import DATATYPES, Signature, TensorSpec
from serving.compute.runtimes import load_runtime
from tests.unit.serving.helpers import affine_model, identity_model


def test_an_onnx_model_says_what_goes_in_and_out_and_computes(tmp_path: Path) -> None:
    path = affine_model(tmp_path / "model.onnx", scale=3)
    runtime = load_runtime(path, "onnx", signature=None)
    assert runtime.signature.inputs == (TensorSpec("x", "FP32", (-1, 2)),)
    assert runtime.signature.outputs == (TensorSpec("y", "FP32", (-1, 2)),)
    assert runtime.platform == "onnxruntime_onnx"
    assert runtime.memory_bytes >= path.stat().st_size
    x = np.array([[1, 2], [3, 4]], np.float32)
    assert runtime.run({"x": x}, None)["y"].tolist() == [[3, 6], [9, 12]]
    runtime.close()


def test_only_the_outputs_that_are_asked_for_are_answered(tmp_path: Path) -> None:
    runtime = load_runtime(affine_model(tmp_path / "m.onnx", fails_above=9), "onnx", signature=None)
    answer = runtime.run({"x": np.ones((1, 2), np.float32)}, ["z"])
    assert list(answer) == ["z"] and answer["z"].tolist() == [[1, 1]]


def test_a_model_that_fails_inside_raises_and_goes_on(tmp_path: Path) -> None:
    runtime = load_runtime(affine_model(tmp_path / "m.onnx", fails_above=9), "onnx", signature=None)
    with pytest.raises(Exception, match="out of data bounds"):
        runtime.run({"x": np.full((1, 2), 99, np.float32)}, None)
    assert runtime.run({"x": np.ones((1, 2), np.float32)}, None)["y"].tolist() == [[2, 2]]


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_goes_through_onnx_runtime(datatype: str, tmp_path: Path) -> None:
    from onnx import TensorProto

    name = {"BYTES": "STRING", "FP16": "FLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BF16": "BFLOAT16"}.get(
        datatype, datatype
    )
    runtime = load_runtime(
        identity_model(tmp_path / "m.onnx", TensorProto.DataType.Value(name)), "onnx", signature=None
    )
    assert runtime.signature.inputs == (TensorSpec("x", datatype, (-1,)),)
    if datatype == "BYTES":
        x = np.array([b"ab", "é".encode()], dtype=object)
        assert runtime.run({"x": x}, None)["y"].tolist() == ["ab", "é"]
        with pytest.raises(UsageError, match=r"input 'x'.*not UTF-8"):
            runtime.run({"x": np.array([b"\xff"], dtype=object)}, None)
        return
    x = np.array([0, 1], dtype=DATATYPES[datatype])
    y = runtime.run({"x": x}, None)["y"]
    assert y.dtype == x.dtype and y.tolist() == x.tolist()


@pytest.mark.parametrize("format", ["torchscript", "pt2"])
def test_bf16_goes_through_torch_as_float32(format: str, tmp_path: Path) -> None:
    import torch

    class Halved(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x / 2

    signature = Signature((TensorSpec("x", "BF16", (-1,)),), (TensorSpec("y", "BF16", (-1,)),))
    example = torch.ones(3, dtype=torch.bfloat16)
    path = tmp_path / "m"
    if format == "torchscript":
        torch.jit.trace(Halved(), (example,)).save(str(path))
    else:
        torch.export.save(torch.export.export(Halved(), (example,)), str(path))
    runtime = load_runtime(path, format, signature=signature)
    spec = runtime.signature.inputs[0]
    assert spec.datatype == runtime.signature.outputs[0].datatype == "BF16"
    answer = runtime.run({spec.name: np.array([1, -3, 1.0078125], np.float32)}, None)[runtime.signature.outputs[0].name]
    # 1.0078125 is the neighbour of 1, and its half has the same digits.
    assert answer.dtype == np.float32 and answer.tolist() == [0.5, -1.5, 0.50390625]


def test_bf16_goes_through_onnx_runtime_beside_others_but_not_beside_texts(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    def of(**kinds: int) -> Path:
        graph = helper.make_graph(
            [helper.make_node("Identity", [name], [f"{name}_out"]) for name in kinds],
            "several",
            [helper.make_tensor_value_info(name, kind, ["rows", "columns"]) for name, kind in kinds.items()],
            [helper.make_tensor_value_info(f"{name}_out", kind, ["rows", "columns"]) for name, kind in kinds.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        return tmp_path / "m.onnx"

    runtime = load_runtime(of(b=TensorProto.BFLOAT16, n=TensorProto.INT64), "onnx", signature=None)
    for shape in ((2, 1), (0, 1)):
        inputs: dict[str, NDArray[Any]] = {"b": np.full(shape, 1.5, np.float32), "n": np.full(shape, 2**40, np.int64)}
        answer = runtime.run(inputs, None)
        assert {name: array.shape for name, array in answer.items()} == {"b_out": shape, "n_out": shape}
        assert answer["b_out"].tolist() == inputs["b"].tolist() and answer["b_out"].dtype == np.float32
        assert answer["n_out"].tolist() == inputs["n"].tolist()
    assert list(runtime.run(inputs, ["n_out"])) == ["n_out"]
    with pytest.raises(RefusedError, match="cannot take texts beside BF16"):
        load_runtime(of(b=TensorProto.BFLOAT16, t=TensorProto.STRING), "onnx", signature=None)


def test_scalars_stay_scalars_in_torch_and_beside_bf16(tmp_path: Path) -> None:
    import torch
    from onnx import TensorProto, helper

    class Sum(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.sum()

    path = tmp_path / "m.pt"
    torch.jit.trace(Sum(), (torch.ones(2),)).save(str(path))
    signature = Signature((TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", ()),))
    y = load_runtime(path, "torchscript", signature=signature).run({"x": np.ones(3, np.float32)}, None)["y"]
    assert y.shape == () and y == 3

    kinds = {"b": TensorProto.BFLOAT16, "n": TensorProto.INT64}
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in kinds],
        "scalars",
        [helper.make_tensor_value_info(name, kind, []) for name, kind in kinds.items()],
        [helper.make_tensor_value_info(f"{name}_out", kind, []) for name, kind in kinds.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    inputs: dict[str, NDArray[Any]] = {"b": np.array(1.5, np.float32), "n": np.array(7)}
    answer = load_runtime(tmp_path / "m.onnx", "onnx", signature=None).run(inputs, None)
    assert {name: (array.shape, array.item()) for name, array in answer.items()} == {
        "b_out": ((), 1.5),
        "n_out": ((), 7),
    }


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x80\x04\x95"])
def test_what_is_no_onnx_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(RefusedError, match=r"m\.onnx: ONNX Runtime cannot load it"):
        load_runtime(path, "onnx", signature=None)


def test_a_truncated_onnx_model_is_refused(tmp_path: Path) -> None:
    path = affine_model(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RefusedError, match="cannot load it"):
        load_runtime(path, "onnx", signature=None)


def test_unknown_formats_and_missing_signatures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="format 'pickle' is not known"):
        load_runtime(tmp_path / "m.pkl", "pickle", signature=None)
    with pytest.raises(RefusedError, match="give it a signature"):
        load_runtime(tmp_path / "m.pt", "torchscript", signature=None)


def test_an_optional_input_has_its_default_unless_it_is_sent(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper, save

    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "factor")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.array([2], np.float32), "factor")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(tmp_path / "m.onnx"))
    x, factor = TensorSpec("x", "FP32", (-1,)), TensorSpec("factor", "FP32", (1,), optional=True)
    said = Signature((x, factor), (TensorSpec("y", "FP32", (-1,)),))
    runtime = load_runtime(tmp_path / "m.onnx", "onnx", signature=said)
    assert [(spec.name, spec.optional) for spec in runtime.signature.inputs] == [("x", False), ("factor", True)]
    three = np.array([3], np.float32)
    assert runtime.run({"x": three}, None)["y"].tolist() == [6]
    assert runtime.run({"x": three, "factor": three}, None)["y"].tolist() == [9]
    # What the registry does not call an input is none, whatever the file lists.
    assert load_runtime(tmp_path / "m.onnx", "onnx", signature=None).signature.inputs == (x,)
