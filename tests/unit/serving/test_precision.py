"""Half precision where the golden cases agree, and full precision, said so, where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.signature import Signature, TensorSpec
from serving.compute.golden import Golden
from serving.compute.onnx_runtime import CPU, CUDA, TENSORRT, providers
from serving.compute.precision import agrees, choose
from serving.compute.runtimes import load_runtime
from serving.device.devices import Place
from serving.device.loads import memory_by_type
from tests.unit.serving.helpers import ROWS, affine_model

HALF = Place(fp16=True)


def golden(path: Path, *rows: list[float]) -> Path:
    with path.open("wb") as file:
        np.savez(file, **{"input.x": np.array(rows, np.float32)})
    return path


def torch_model(path: Path, kind: str, function: Any) -> tuple[Path, Signature]:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([[1.5, 0.25], [0.5, 2.0]]), requires_grad=False)

        def forward(self, x: Any) -> Any:
            return function(x @ self.weight)

    example = torch.ones(3, 2)
    if kind == "torchscript":
        torch.jit.trace(Model(), (example,)).save(str(path))
    else:
        rows = torch.export.Dim("n")
        torch.export.save(torch.export.export(Model(), (example,), dynamic_shapes=({0: rows},)), str(path))
    return path, Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),))


def test_an_onnx_model_that_agrees_computes_in_half_precision_with_the_types_that_it_had(tmp_path: Path) -> None:
    cases = golden(tmp_path / "g.npz", [1, 2], [0.5, -3])
    runtime: Any = load_runtime(
        affine_model(tmp_path / "m.onnx", scale=3), "onnx", signature=None, place=HALF, golden=cases
    )
    assert (runtime.precision, runtime.precision_reason) == ("fp16", "fp16: agrees on 2 golden cases")
    assert runtime.signature.inputs[0].datatype == "FP32"
    y = runtime.run({"x": np.array([[1, 2]], np.float32)}, None)["y"]
    assert y.dtype == np.float32 and y.tolist() == [[3, 6]]


def test_a_model_whose_golden_cases_are_texts_is_not_loaded_a_second_time_to_find_that_out(tmp_path: Path) -> None:
    cases = tmp_path / "g.npz"
    with cases.open("wb") as file:
        np.savez(file, **{"input.prompt": np.array(["a", "b"])})
    loads: list[bool] = []

    def load(half: bool) -> Any:
        loads.append(half)
        return load_runtime(affine_model(tmp_path / "m.onnx"), "onnx", signature=None)

    runtime, why = choose(load, cases, "m")
    assert runtime.precision == "fp32" and loads == [False]
    assert why == "fp32: its golden cases are not the graph's inputs (x), as those of texts are"


def test_without_golden_cases_or_with_values_beyond_its_range_it_stays_in_full_precision(tmp_path: Path) -> None:
    path = affine_model(tmp_path / "m.onnx", scale=90000)
    runtime: Any = load_runtime(path, "onnx", signature=None, place=HALF)
    assert (runtime.precision, "no golden cases" in runtime.precision_reason) == ("fp32", True)
    runtime = load_runtime(path, "onnx", signature=None, place=HALF, golden=golden(tmp_path / "g.npz", [2, 1]))
    assert runtime.precision == "fp32" and "output 'y'" in runtime.precision_reason
    assert runtime.run({"x": np.array([[2, 1]], np.float32)}, None)["y"].tolist() == [[180000, 90000]]


def test_a_golden_file_that_cannot_be_used_leaves_full_precision(tmp_path: Path) -> None:
    (tmp_path / "g.npz").write_bytes(b"no archive")
    runtime: Any = load_runtime(
        affine_model(tmp_path / "m.onnx"), "onnx", signature=None, place=HALF, golden=tmp_path / "g.npz"
    )
    assert runtime.precision == "fp32" and "not a .npz" in runtime.precision_reason


def test_another_top_class_is_no_agreement(tmp_path: Path) -> None:
    # In half precision both are 2048, and the first of two equals is the top.
    cases = golden(tmp_path / "g.npz", [2048, 2049])
    runtime: Any = load_runtime(
        affine_model(tmp_path / "m.onnx", scale=1), "onnx", signature=None, place=HALF, golden=cases
    )
    assert (runtime.precision, runtime.precision_reason) == ("fp32", "fp32: case 0: another top class")


@pytest.mark.parametrize("kind", ["torchscript", "pt2"])
def test_torch_models_are_decided_alike(kind: str, tmp_path: Path) -> None:
    path, signature = torch_model(tmp_path / "m", kind, lambda y: y * 2)
    cases = golden(tmp_path / "g.npz", [1, 2], [0.5, -3])
    runtime: Any = load_runtime(path, kind, signature=signature, place=HALF, golden=cases)
    assert runtime.precision == "fp16", runtime.precision_reason
    name, out = runtime.signature.inputs[0].name, runtime.signature.outputs[0].name
    if kind == "torchscript":
        y = runtime.run({name: np.array([[1, 2]], np.float32)}, None)[out]
        assert y.dtype == np.float32 and y.tolist() == [[5, 8.5]]
    path, signature = torch_model(tmp_path / "large", kind, lambda y: y * 40000)
    runtime = load_runtime(path, kind, signature=signature, place=HALF, golden=cases)
    assert runtime.precision == "fp32"


def test_the_providers_follow_the_place_and_the_package() -> None:
    device = Place("cuda", 1, memory_bytes=1000, allow_growth=False, tensorrt=True)
    everything = [TENSORRT, CUDA, CPU]
    assert [name for name, _ in providers(device, everything)] == everything
    assert [name for name, _ in providers(Place("cuda", 1), everything)] == [CUDA, CPU]
    assert [name for name, _ in providers(device, [CUDA, CPU])] == [CUDA, CPU]
    assert [name for name, _ in providers(device, [CPU])] == [CPU]
    assert [name for name, _ in providers(Place(), everything)] == [CPU]
    # ONNX Runtime takes no numbers there.
    assert dict(providers(device, everything))[TENSORRT]["trt_fp16_enable"] == "False"
    options = dict(providers(device, everything))[CUDA]
    assert (options["device_id"], options["gpu_mem_limit"]) == ("1", "1000")
    assert options["arena_extend_strategy"] == "kNextPowerOfTwo"
    assert dict(providers(Place("cuda"), everything))[CUDA]["arena_extend_strategy"] == "kSameAsRequested"


def test_a_runtime_says_what_type_of_memory_it_took(tmp_path: Path) -> None:
    runtime: Any = load_runtime(affine_model(tmp_path / "m.onnx"), "onnx", signature=None)
    assert memory_by_type(runtime) == {"host": runtime.memory_bytes} and runtime.device == "cpu"


class Answering:
    """A runtime that answers one array."""

    def __init__(self, answer: list[float], signature: Signature = ROWS) -> None:
        self.answer, self.signature = answer, signature

    def run(self, inputs: Any, outputs: Any) -> dict[str, Any]:
        return {"y": np.array([self.answer], np.float32)}


def test_other_infinities_or_other_types_are_no_agreement() -> None:
    cases = Golden({"x": np.ones((1, 2), np.float32)}, None, {})
    inf = float("inf")
    assert agrees(Answering([inf, 1.0]), Answering([inf, 1.0]), cases) is None
    assert "other infinities" in str(agrees(Answering([1.0, inf]), Answering([1.0, -inf]), cases))
    other = Signature((TensorSpec("x", "FP16", (-1, 2)),), ROWS.outputs)
    assert "other types" in str(agrees(Answering([1.0, 2.0]), Answering([1.0, 2.0], other), cases))
