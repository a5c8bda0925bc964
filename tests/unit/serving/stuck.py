"""Models that never come to the end of a computation: one that can be told to give up (ONNX), one that cannot (TorchScript)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

ENDLESS_ROUNDS = 2**60


def endless_model(path: Path, *, limit: float) -> Path:
    """An ONNX model y = 2 x with x [rows, 2] that goes round and round where a value of x is above `limit`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on_out"]), helper.make_node("MatMul", ["h", "square"], ["h_out"])],
        "rounds",
        [
            value("round", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("h", TensorProto.FLOAT, [1, 8]),
        ],
        [value("on_out", TensorProto.BOOL, []), value("h_out", TensorProto.FLOAT, [1, 8])],
    )
    constants = {
        "limit": np.array(limit, dtype=np.float32),
        "rounds": np.array(ENDLESS_ROUNDS, dtype=np.int64),
        "on": np.array(True),
        "start": np.zeros((1, 8), dtype=np.float32),
        "square": np.eye(8, dtype=np.float32),
        "two": np.array(2, dtype=np.float32),
    }
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "limit"], ["heavy"]),
        helper.make_node("Cast", ["heavy"], ["once"], to=TensorProto.INT64),
        helper.make_node("Mul", ["once", "rounds"], ["trips"]),
        helper.make_node("Loop", ["trips", "on", "start"], ["h_end"], body=body),
        helper.make_node("ReduceSum", ["h_end"], ["nothing"], keepdims=0),
        helper.make_node("Mul", ["x", "two"], ["doubled"]),
        helper.make_node("Add", ["doubled", "nothing"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "endless",
        [value("x", TensorProto.FLOAT, ["rows", 2])],
        [value("y", TensorProto.FLOAT, ["rows", 2])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def endless_script(folder: Path, *, limit: float) -> Path:
    """A TorchScript model image [n,1,8,8] -> scores [n,10] that goes round and round where the ink of an image is above `limit`."""
    import torch

    class Endless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.limit = float(limit)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            flat = image.flatten(1)
            spin = flat.sum(dim=[1])
            while bool((spin > self.limit).any()):
                spin = spin * 1.0
            return flat[:, :10] + 0.0

    folder.mkdir()
    (folder / "model.toml").write_text(MODEL_TOML)
    torch.jit.script(Endless()).save(str(folder / "model.pt"))
    return folder / "model.pt"


MODEL_TOML = """
[[inputs]]
name = "image"
datatype = "FP32"
shape = [-1, 1, 8, 8]
[[outputs]]
name = "scores"
datatype = "FP32"
shape = [-1, 10]
"""


def endless_load(path: Path, *, side: int = 3000) -> Path:
    """An ONNX model y = x with x [rows, 2] that takes ONNX Runtime an hour to load: it computes constants beforehand, here the means of
    all windows of a third of the side of a large square.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    value, node = helper.make_tensor_value_info, helper.make_node
    zeros = numpy_helper.from_array(np.zeros(1, dtype=np.float32))
    nodes = [
        node("ConstantOfShape", ["shape"], ["square"], value=zeros),
        node("AveragePool", ["square"], ["means"], kernel_shape=[side // 3, side // 3]),
        node("ReduceMin", ["means"], ["nothing"], keepdims=0),
        node("Add", ["x", "nothing"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "endless load",
        [value("x", TensorProto.FLOAT, ["rows", 2])],
        [value("y", TensorProto.FLOAT, ["rows", 2])],
        [numpy_helper.from_array(np.array([1, 1, side, side], dtype=np.int64), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def endless_script_load(folder: Path) -> Path:
    """A TorchScript model image [n,1,8,8] -> scores [n,10] whose own code for loading never ends; it holds the interpreter meanwhile."""
    import torch

    class Endless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        @torch.jit.export
        def __getstate__(self) -> tuple[int, bool]:
            return (self.count, self.training)

        @torch.jit.export
        def __setstate__(self, state: tuple[int, bool]) -> None:
            self.count = state[0]
            self.training = state[1]
            while self.count >= 0:
                self.count = (self.count + 1) % 1000

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.flatten(1)[:, :10] + 0.0

    folder.mkdir()
    (folder / "model.toml").write_text(MODEL_TOML)
    torch.jit.script(Endless()).save(str(folder / "model.pt"))
    return folder / "model.pt"
