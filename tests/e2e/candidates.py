"""Candidates for the promotions of test_many.py: good ones, and bad ones in ten ways, each with the gate that must stop it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.e2e.harness import LIMIT_INK

Gate = Literal["validation", "load", "shadow", "canary", "crash", "soak"]
LATE_INK = 100
"""More than any image has that the traffic sends."""
SLOW_ROUNDS = 1000
"""Matrix products that a slow candidate does for a heavy image: about 0.3 s."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to be bad. `policy` gives the gate that must stop it as much time as it needs."""

    name: str
    gate: Gate
    policy: dict[str, Any] = field(default_factory=dict)

    @property
    def validated(self) -> bool:
        """The probe takes two seconds, so only those pass through it that it must stop."""
        return self.gate == "validation"


LASTING = {"shadow_gate": False, "dwell_seconds": 30.0}
WAYS = (
    Way("raises on every input", "shadow", {"shadow_seconds": 30.0}),
    Way("raises on some inputs", "canary", LASTING),
    Way("rotten in the store", "load"),
    Way("bad by the verdicts of its clients", "canary", LASTING),
    Way("raises on inputs that come later", "soak", {"soak_seconds": 60.0}),
    Way("wrong labels", "validation"),
    Way("answers NaN", "validation"),
    Way("another signature", "validation"),
    Way(
        "slow on some inputs", "canary", {**LASTING, "stages": [0.25, 1.0], "slow_factor": 4.0, "baseline_seconds": 1.0}
    ),
    Way("segfaults", "crash", LASTING),
)


def build(path: Path, number: int, way: Way | None) -> Path:
    """An ONNX model image [n,1,8,8] -> scores [n,10]. All have the same labels, and no two good ones the same scores."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(1).normal(size=(64, 10)).astype(np.float32) * (1 + number / 100)
    name = way.name if way else "good"
    if name == "wrong labels":
        weights = -weights
    output = "logits" if name == "another signature" else "scores"
    limit = {
        "raises on every input": 1,
        "raises on some inputs": LIMIT_INK,
        "raises on inputs that come later": LATE_INK,
    }
    constants = {"w": weights}
    tensors = []
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["plain"])]
    if name in limit:
        # It looks the ink of an image up in a table that ends too soon.
        constants["table"] = np.ones(limit[name], dtype=np.float32)
        tensors.append(numpy_helper.from_array(np.array([1], dtype=np.int64), "axes"))
        nodes += [
            helper.make_node("ReduceSum", ["flat", "axes"], ["ink"], keepdims=1),
            helper.make_node("Cast", ["ink"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["gain"]),
            helper.make_node("Mul", ["plain", "gain"], [output]),
        ]
    elif name == "answers NaN":
        constants["limit"] = np.full((1, 64), 0.49, dtype=np.float32)
        nodes += [
            helper.make_node("Sub", ["limit", "flat"], ["left"]),
            helper.make_node("Sqrt", ["left"], ["root"]),
            helper.make_node("MatMul", ["root", "w"], [output]),
        ]
    elif name == "slow on some inputs":
        nodes += _slow_where_heavy(constants, tensors, output)
    else:
        nodes[1].output[0] = output
    tensors += [numpy_helper.from_array(value, key) for key, value in constants.items()]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", 10])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def _slow_where_heavy(constants: dict[str, Any], tensors: list[Any], output: str) -> list[Any]:
    """A loop that runs SLOW_ROUNDS times where an image of the batch is heavy, else not at all; its result adds nothing."""
    from onnx import TensorProto, helper, numpy_helper

    tensors += [
        numpy_helper.from_array(np.array([1], dtype=np.int64), "axes"),
        numpy_helper.from_array(np.array(SLOW_ROUNDS, dtype=np.int64), "rounds"),
        numpy_helper.from_array(np.array(True), "on"),
    ]
    constants |= {
        "limit": np.array(LIMIT_INK, dtype=np.float32),
        "start": np.zeros((1, 1024), dtype=np.float32),
        "square": np.eye(1024, dtype=np.float32),
        "down": np.zeros((1024, 10), dtype=np.float32),
    }
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on_out"]), helper.make_node("MatMul", ["h", "square"], ["h_out"])],
        "rounds",
        [
            value("round", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("h", TensorProto.FLOAT, [1, 1024]),
        ],
        [value("on_out", TensorProto.BOOL, []), value("h_out", TensorProto.FLOAT, [1, 1024])],
    )
    return [
        helper.make_node("ReduceSum", ["flat", "axes"], ["ink"], keepdims=0),
        helper.make_node("ReduceMax", ["ink"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "limit"], ["heavy"]),
        helper.make_node("Cast", ["heavy"], ["once"], to=TensorProto.INT64),
        helper.make_node("Mul", ["once", "rounds"], ["trips"]),
        helper.make_node("Loop", ["trips", "on", "start"], ["h_end"], body=body),
        helper.make_node("MatMul", ["h_end", "down"], ["nothing"]),
        helper.make_node("Add", ["plain", "nothing"], [output]),
    ]


def spoil(path: Path) -> None:
    """Overwrite a file in the store with as many other bytes."""
    size = path.stat().st_size
    path.chmod(0o644)
    path.write_bytes(b"\0" * size)
