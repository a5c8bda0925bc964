"""An allocator with a limit, which keeps what is given back as the allocators of devices do, and a runtime that takes its buffers from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.signature import Signature
from serving.device.devices import Figures
from serving.statuses import OutOfMemoryError
from tests.unit.serving.helpers import ROWS, double

Arrays = Mapping[str, NDArray[Any]]

ROW_BYTES = 512 * 256 * 4
"""What a row of `wide_model` takes in each of its inner tensors."""


def wide_model(path: Path) -> Path:
    """y[n, 256] by way of tensors of [n, 512, 256]: small files in and out, half a megabyte a row in between."""
    from onnx import TensorProto, helper, numpy_helper

    numbers = {"axis": np.array([1], np.int64), "shape": np.array([1, 512, 1], np.int64)}
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axis"], ["a"]),
        helper.make_node("Expand", ["a", "shape"], ["b"]),
        helper.make_node("Tanh", ["b"], ["c"]),
        helper.make_node("ReduceMean", ["c"], ["y"], axes=[1], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 256])],
        [numpy_helper.from_array(value, name) for name, value in numbers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


class Pool:
    """Blocks of bytes. A freed block waits for a request of its own size; only `release` makes room for other sizes."""

    kind = "cpu"
    index = 0
    name = None

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0
        self.kept: dict[int, list[bytearray]] = {}
        self.order: list[str] = []
        self._lock = threading.Lock()

    @contextmanager
    def buffer(self, size: int) -> Iterator[bytearray]:
        with self._lock:
            block = self.kept[size].pop() if self.kept.get(size) else None
            if block is None and self.in_use + self._kept_bytes() + size > self.limit:
                raise OutOfMemoryError(f"{size} bytes more than the limit of {self.limit}", size)
            self.in_use += size
        block = bytearray(size) if block is None else block
        try:
            yield block
        finally:
            with self._lock:
                self.in_use -= size
                self.kept.setdefault(size, []).append(block)

    def _kept_bytes(self) -> int:
        return sum(size * len(blocks) for size, blocks in self.kept.items())

    def figures(self) -> Figures:
        with self._lock:
            reserved = self.in_use + self._kept_bytes()
            return Figures(self.limit, self.in_use, reserved, self.limit - reserved)

    def release(self) -> None:
        self.order.append("release")
        with self._lock:
            self.kept.clear()

    def temperature_celsius(self) -> float | None:
        return None

    def utilisation_percent(self) -> float | None:
        return None


class PoolRuntime:
    """Takes `per_row` bytes a row from the pool for as long as it computes."""

    platform = "python"

    def __init__(
        self,
        pool: Pool,
        per_row: int,
        function: Callable[[Arrays], dict[str, NDArray[Any]]] = double,
        signature: Signature = ROWS,
    ) -> None:
        self.pool, self.per_row, self.function, self.signature = pool, per_row, function, signature
        self.memory_bytes = 0
        self.fitted: list[int] = []
        self.refused: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def run(self, inputs: Arrays, outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        self.entered.set()
        self.gate.wait(30)
        rows = len(inputs["x"])
        try:
            with self.pool.buffer(rows * self.per_row) as block:
                block[-1:] = b"\1"[: len(block)]
                answer = {name: np.array(value) for name, value in self.function(inputs).items()}
        except OutOfMemoryError:
            self.refused.append(rows)
            raise
        self.fitted.append(rows)
        return answer

    def close(self) -> None:
        """Its blocks stay with the pool."""
