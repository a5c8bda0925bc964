"""ONNX models by ONNX Runtime: on the CPU, or by its CUDA and TensorRT providers where the installed package has them."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import RefusedError, UsageError
from registry.signature import Signature, TensorSpec
from serving.device.devices import Place, imported, limit_arena
from serving.device.loads import Load
from serving.device.shortage import out_of_memory
from serving.wire.tensors import from_bf16, to_bf16

log = logging.getLogger("modelkeep.onnx")

_TYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(bfloat16)": "BF16",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_BF16 = 16
CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
Arrays = Mapping[str, NDArray[Any]]


def providers(place: Place, available: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """What a session is to compute with, the best first; the CPU alone where the package has nothing for the device."""
    cpu: list[tuple[str, dict[str, str]]] = [(CPU, {})]
    if place.kind != "cuda" or CUDA not in available:
        return cpu
    cuda = {
        "device_id": str(place.index),
        # As much as is needed each time, or twice as much as before.
        "arena_extend_strategy": "kSameAsRequested" if place.allow_growth else "kNextPowerOfTwo",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    if place.memory_bytes is not None:
        cuda["gpu_mem_limit"] = str(place.memory_bytes)
    if not place.tensorrt or TENSORRT not in available:
        return [(CUDA, cuda), *cpu]
    tensorrt = {"device_id": str(place.index), "trt_fp16_enable": "False"}
    return [(TENSORRT, tensorrt), (CUDA, cuda), *cpu]


class OnnxRuntime:
    """Sequential, its threads never spin, so that the event loop keeps its core.

    Raises RefusedError for a file that it cannot load, UnavailableError for one that does not fit the memory.
    """

    platform = "onnxruntime_onnx"

    def __init__(
        self, path: Path, *, place: Place | None = None, optional: frozenset[str] = frozenset(), half: bool = False
    ) -> None:
        """`optional` are the inputs that the registry found a default for; the runtime calls every listed weight one.

        `half`: its weights and computations in half precision, what goes in and comes out as before.
        """
        onnxruntime = imported("onnxruntime")
        place = place or Place()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = place.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = 4  # what it raises is logged by the engine, and not for every request
        wanted = providers(place, onnxruntime.get_available_providers())
        if place.kind == "cuda" and wanted[0][0] == CPU:
            log.warning("%s computes on the CPU: this onnxruntime has no CUDA provider; onnxruntime-gpu has", path.name)
            place, half = Place(threads=place.threads), False
        if place.kind == "cuda":
            onnxruntime.preload_dlls()  # CUDA and cuDNN as torch or their own packages bring them
        elif place.limited and place.memory_bytes is not None:
            limit_arena(place.memory_bytes)
            options.add_session_config_entry("session.use_env_allocators", "1")
        with Load(path, "ONNX Runtime", place, half=half) as load:
            source: Any = _in_half(path) if half else str(path)
            # Its own way out of any error is the CPU, unasked: memory that ran out would look like a missing library.
            session = onnxruntime.InferenceSession(source, options, providers=wanted, enable_fallback=0)
        if place.kind == "cuda" and session.get_providers()[0] == CPU:
            # ONNX Runtime itself only logs that libraries of the provider are missing.
            log.warning(
                "%s computes on the CPU: the CUDA provider does not start (libraries of CUDA missing?)", path.name
            )
            load.memory = {"host": load.memory["host"] + load.memory["device"]}
            place, half = Place(threads=place.threads), False
        self.device = "cpu" if place.kind == "cpu" else f"{place.kind}:{place.index}"
        self.precision = "fp16" if half else "fp32"
        self.memory = load.memory
        self.memory_bytes = load.budget_bytes
        self._session: Any = session
        self._run_options: Any = onnxruntime.RunOptions()
        self._shrinking: Any = None
        self._once: Any = None
        self._shrink = onnxruntime.RunOptions
        self._arena = "cpu:0" if place.kind == "cpu" else f"gpu:{place.index};cpu:0"
        self._outputs = [node.name for node in session.get_outputs()]
        self.signature = Signature(
            (
                *(_spec(path, node) for node in session.get_inputs()),
                *(
                    replace(_spec(path, node), optional=True)
                    for node in session.get_overridable_initializers()
                    if node.name in optional
                ),
            ),
            tuple(_spec(path, node) for node in session.get_outputs()),
        )
        self._texts = {spec.name for spec in self.signature.inputs if spec.datatype == "BYTES"}
        tensors = (*self.signature.inputs, *self.signature.outputs)
        self._bf16 = {spec.name for spec in tensors if spec.datatype == "BF16"}
        if self._bf16 and self._texts:
            raise RefusedError(
                f"{path.name}: ONNX Runtime's Python side cannot take texts beside BF16; cast the BF16 to FLOAT in the graph"
            )

    def run(self, inputs: Arrays, outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        if self._texts:
            inputs = {name: _as_text(name, value) if name in self._texts else value for name, value in inputs.items()}
        names = self._outputs if outputs is None else outputs
        options = self._run_options
        if self._shrinking is not None:
            options, self._shrinking = self._shrinking, None
            self._once = options
        try:
            if self._bf16:
                return _run_with_bf16(self._session, inputs, names, self._bf16, options)
            return dict(zip(names, self._session.run(names, inputs, options), strict=True))
        except Exception as error:
            shortage = out_of_memory(error)
            if shortage is None:
                raise
            raise shortage from error

    def trim(self) -> None:
        """With the next run that succeeds, give back what its arena holds without using it."""
        options = self._shrink()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", self._arena)
        self._shrinking = options

    def interrupt(self) -> None:
        """Give up what is being computed, at the next node of the graph; `run` raises until `resume`. From any thread."""
        self._run_options.terminate = True
        if self._once is not None:
            self._once.terminate = True

    def resume(self) -> None:
        self._run_options.terminate = False

    def close(self) -> None:
        self._session = None


def _in_half(path: Path) -> bytes:
    """The model with its weights and computations in half precision. Raises what ONNX and the converter raise."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(str(path)), keep_io_types=True)
    found: bytes = model.SerializeToString()
    return found


def _spec(path: Path, node: Any) -> TensorSpec:
    datatype = _TYPES.get(node.type)
    if datatype is None:
        raise RefusedError(f"{path.name}: '{node.name}' has the type {node.type}, which the V2 protocol cannot carry")
    # A dimension is a number, or None or a name where it may vary.
    shape = tuple(n if isinstance(n, int) and n >= 0 else -1 for n in node.shape)
    return TensorSpec(node.name, datatype, shape)


def _run_with_bf16(
    session: Any, inputs: Arrays, outputs: Sequence[str], bf16: Set[str], options: Any
) -> dict[str, NDArray[Any]]:
    """ONNX Runtime's own values in and out: its Python side has no arrays of BF16, here they are float32."""
    from onnxruntime import OrtValue

    feeds = {
        name: OrtValue.ortvalue_from_numpy_with_onnx_type(to_bf16(value).view(np.uint16), _BF16)
        if name in bf16
        else OrtValue.ortvalue_from_numpy(np.asarray(value, order="C"))
        for name, value in inputs.items()
    }
    answers: dict[str, NDArray[Any]] = {}
    for name, value in zip(outputs, session.run_with_ort_values(outputs, feeds, options), strict=True):
        if name not in bf16:
            answers[name] = value.numpy()
            continue
        size = value.tensor_size_in_bytes()
        answers[name] = from_bf16(ctypes.string_at(value.data_ptr(), size) if size else b"").reshape(value.shape())
    return answers


def _as_text(name: str, value: NDArray[Any]) -> NDArray[Any]:
    """ONNX Runtime takes strings, and would turn `bytes` into their repr."""
    texts = np.empty(value.shape, dtype=object)
    try:
        texts.reshape(-1)[:] = [v.decode() if isinstance(v, bytes) else v for v in value.reshape(-1)]
    except UnicodeDecodeError as error:
        raise UsageError(
            f"input '{name}': this model takes text, and an element is not UTF-8: {error.reason}"
        ) from error
    return texts
