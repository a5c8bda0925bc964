"""The models of the parity test: one ONNX file each, which our server loads itself and Triton's Python backend gives to ONNX Runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.signature import DATATYPES

MAX_BATCH = 8

COMPUTING = """
import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"])
        self.inputs = [one["name"] for one in json.loads(args["model_config"])["input"]]

    def execute(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        given = {name: pb.get_input_tensor_by_name(request, name) for name in self.inputs}
        feed = {name: tensor.as_numpy() for name, tensor in given.items() if tensor is not None}
        names = list(request.requested_output_names())
        try:
            answers = self.session.run(names, feed)
        except Exception as error:
            return pb.InferenceResponse(error=pb.TritonError(str(error)))
        return pb.InferenceResponse([pb.Tensor(name, array) for name, array in zip(names, answers)])
"""
"""Triton's side of a model: ONNX Runtime on one thread."""

PASSING = """
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        self.numpy_has_it = "TYPE_BF16" not in args["model_config"]

    def execute(self, requests):
        return [pb.InferenceResponse([self.one(request.inputs()[0])]) for request in requests]

    def one(self, x):
        return pb.Tensor("y", x.as_numpy()) if self.numpy_has_it else pb.Tensor.from_dlpack("y", x.to_dlpack())
"""
"""The identity, which needs no runtime: a process of each model without one is half as large."""


@dataclass(frozen=True)
class ParityModel:
    """`rows`: its first dimension counts independent rows, so both servers may batch it."""

    name: str
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    rows: bool = False
    optional: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    """Of the classes of its one output."""


def identity(datatype: str) -> ParityModel:
    return ParityModel(f"same-{datatype.lower()}", (("x", datatype, (-1,)),), (("y", datatype, (-1,)),))


AFFINE = ParityModel("affine", (("x", "FP32", (-1, 4)),), (("y", "FP32", (-1, 4)), ("z", "FP32", (-1, 1))), rows=True)
FIXED = ParityModel("fixed", (("x", "FP32", (2, 3)),), (("y", "FP32", (2, 3)),))
GRID = ParityModel("grid", (("x", "INT32", (-1, -1)),), (("y", "INT32", (-1, -1)),))
PAIR = ParityModel(
    "pair", (("a", "FP32", (-1,)), ("b", "FP32", (-1,))), (("sum", "FP32", (-1,)), ("difference", "FP32", (-1,)))
)
OPTIONAL = ParityModel(
    "optional", (("x", "FP32", (-1,)), ("scale", "FP32", (1,))), (("y", "FP32", (-1,)),), optional=("scale",)
)
LABELLED = ParityModel(
    "labelled",
    (("x", "FP32", (-1, 5)),),
    (("y", "FP32", (-1, 5)),),
    rows=True,
    labels=("cat", "dog: small", "", "Löwe"),
)
IDENTITIES = {datatype: identity(datatype) for datatype in DATATYPES}
MODELS = (AFFINE, FIXED, GRID, PAIR, OPTIONAL, LABELLED, *IDENTITIES.values())


def write_onnx(model: ParityModel, path: Path) -> Path:
    """The file that both servers compute with."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    codes = {
        "BYTES": TensorProto.STRING, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
        "BF16": TensorProto.BFLOAT16,
    }  # fmt: skip

    def values(specs: Any) -> list[Any]:
        return [
            helper.make_tensor_value_info(
                name,
                codes.get(datatype) or TensorProto.DataType.Value(datatype),
                [f"{name}{at}" if n < 0 else n for at, n in enumerate(shape)],
            )
            for name, datatype, shape in specs
        ]

    constants = []
    if model is AFFINE:
        constants = [numpy_helper.from_array(np.array([1], np.int64), "axes")]
        nodes = [
            helper.make_node("Add", ["x", "x"], ["y"]),
            helper.make_node("ReduceSum", ["x", "axes"], ["z"], keepdims=1),
        ]
    elif model is PAIR:
        nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    elif model is OPTIONAL:
        constants = [numpy_helper.from_array(np.array([3.0], np.float32), "scale")]
        nodes = [helper.make_node("Mul", ["x", "scale"], ["y"])]
    else:
        nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = helper.make_graph(nodes, model.name, values(model.inputs), values(model.outputs), constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    save(made, str(path))
    return path


def write_triton(model: ParityModel, repository: Path, file: Path) -> None:
    """The model as a folder of Triton's repository."""
    folder = repository / model.name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(PASSING if model in IDENTITIES.values() else COMPUTING)
    (folder / "1" / "model.onnx").write_bytes(file.read_bytes())
    first = 1 if model.rows else 0

    def tensor(name: str, datatype: str, shape: tuple[int, ...]) -> str:
        kind = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
        optional = " optional: true" if name in model.optional else ""
        labels = ' label_filename: "labels.txt"' if model.labels and (name, datatype, shape) in model.outputs else ""
        return f"{{ name: {json.dumps(name)} data_type: {kind} dims: {list(shape[first:])}{optional}{labels} }}"

    if model.labels:
        (folder / "labels.txt").write_text("\n".join(model.labels) + "\n", encoding="utf-8")

    inputs = ", ".join(tensor(*spec) for spec in model.inputs)
    outputs = ", ".join(tensor(*spec) for spec in model.outputs)
    (folder / "config.pbtxt").write_text(
        f'name: "{model.name}"\nbackend: "python"\nmax_batch_size: {MAX_BATCH if model.rows else 0}\n'
        f"input [{inputs}]\noutput [{outputs}]\ninstance_group [{{ kind: KIND_CPU count: 1 }}]\n"
    )
