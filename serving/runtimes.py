"""What computes a model: ONNX Runtime, TorchScript or torch.export behind one protocol. Queues and batches are the engine's."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from registry import coreml, exported
from registry.errors import RefusedError, UsageError
from registry.signature import Signature, TensorSpec
from serving.tensors import from_bf16, to_bf16

_ONNX_TYPES = {
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

_ONNX_BF16 = 16
Arrays = Mapping[str, NDArray[Any]]

# Loads take turns, so that the growth of the process can be laid at the door of one model.
_loading = threading.Lock()


class Runtime(Protocol):
    """A loaded model. `run` is called by one thread at a time.

    `memory_bytes` is by how much the process's resident memory grew while the model was loaded, and at least the size
    of its file (memory that an earlier model gave back may be used again without any growth). It leaves out what a
    computation takes for a moment.
    """

    platform: str
    signature: Signature
    memory_bytes: int

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        """The named outputs, or all. BYTES are arrays of `bytes` going in, of `bytes` or `str` coming out.

        Raises UsageError for an input that the runtime cannot carry; whatever else it raises is the model's failure.
        """
        ...

    def close(self) -> None: ...


def load_runtime(path: Path, format: str, *, signature: Signature | None, threads: int = 1) -> Runtime:
    """Load `path` ("onnx", "torchscript" or "pt2"); `signature` is needed where the file has none. Raises RefusedError."""
    if format == "onnx":
        optional = frozenset(spec.name for spec in signature.inputs if spec.optional) if signature else frozenset()
        return OnnxRuntime(path, threads=threads, optional=optional)
    if format == "torchscript":
        if signature is None:
            raise RefusedError(
                f"{path.name}: a TorchScript file does not say what goes in and out; give it a signature"
            )
        return TorchScriptRuntime(path, signature, threads=threads)
    if format == "pt2":
        return ExportedRuntime(path, threads=threads)
    if format == "coreml":
        raise RefusedError(coreml.WHERE_IT_RUNS)
    raise RefusedError(f"{path.name}: format '{format}' is not known; known are onnx, torchscript, pt2 and coreml")


class OnnxRuntime:
    """ONNX Runtime on the CPU: sequential, its threads never spin, so that the event loop keeps its core."""

    platform = "onnxruntime_onnx"

    def __init__(self, path: Path, *, threads: int = 1, optional: frozenset[str] = frozenset()) -> None:
        """`optional` are the inputs that the registry found a default for; the runtime calls every listed weight one."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = 4  # what it raises is logged by the engine, and not for every request
        with _loading:
            before = resident_bytes()
            try:
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's exceptions have no base of their own
                raise RefusedError(f"{path.name}: ONNX Runtime cannot load it: {first_line(error)}") from error
            grown = resident_bytes() - before
        self._session: Any = session
        self._outputs = [node.name for node in session.get_outputs()]
        self.signature = Signature(
            (
                *(_onnx_spec(path, node) for node in session.get_inputs()),
                *(
                    replace(_onnx_spec(path, node), optional=True)
                    for node in session.get_overridable_initializers()
                    if node.name in optional
                ),
            ),
            tuple(_onnx_spec(path, node) for node in session.get_outputs()),
        )
        self._texts = {spec.name for spec in self.signature.inputs if spec.datatype == "BYTES"}
        tensors = (*self.signature.inputs, *self.signature.outputs)
        self._bf16 = {spec.name for spec in tensors if spec.datatype == "BF16"}
        if self._bf16 and self._texts:
            raise RefusedError(
                f"{path.name}: ONNX Runtime's Python side cannot take texts beside BF16; cast the BF16 to FLOAT in the graph"
            )
        self.memory_bytes = max(grown, _weights_bytes(path))

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        if self._texts:
            inputs = {name: _as_text(name, value) if name in self._texts else value for name, value in inputs.items()}
        names = self._outputs if outputs is None else outputs
        if self._bf16:
            return _run_with_bf16(self._session, inputs, names, self._bf16)
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def close(self) -> None:
        self._session = None


class _TorchRuntime:
    """A module of torch on the CPU."""

    platform = "pytorch"
    signature: Signature

    def __init__(self, module: Any, *, threads: int, memory_bytes: int) -> None:
        import torch

        self._torch: Any = torch
        self._module: Any = module
        self._threads = threads
        self._thread: int | None = None
        self.memory_bytes = memory_bytes

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        torch = self._torch
        if self._thread != threading.get_ident():  # OpenMP keeps the number of threads for each calling thread
            torch.set_num_threads(self._threads)
            self._thread = threading.get_ident()
        with torch.inference_mode():
            # A model may write into its inputs, and those of a request are read-only views of its body.
            tensors = [torch.from_numpy(np.array(inputs[spec.name])) for spec in self.signature.inputs]
            for number, spec in enumerate(self.signature.inputs):
                if spec.datatype == "BF16":
                    tensors[number] = tensors[number].to(torch.bfloat16)
            named = self._named(self._call(tensors))
        names = [spec.name for spec in self.signature.outputs] if outputs is None else outputs
        wanted = {name: named[name].detach().cpu() for name in names}
        return {
            name: np.asarray((value.float() if value.dtype is torch.bfloat16 else value).numpy(), order="C")
            for name, value in wanted.items()
        }

    def _call(self, tensors: list[Any]) -> Any:
        return self._module(*tensors)

    def _named(self, answer: Any) -> dict[str, Any]:
        names = [spec.name for spec in self.signature.outputs]
        if isinstance(answer, dict):
            missing = [name for name in names if name not in answer]
            if missing:
                raise ValueError(f"the model's answer lacks {_listed(missing)}; it has {_listed(answer)}")
            return answer
        values = list(answer) if isinstance(answer, (tuple, list)) else [answer]
        if len(values) != len(names):
            raise ValueError(f"the model answered {len(values)} tensors, its signature has {len(names)}")
        return dict(zip(names, values, strict=True))

    def close(self) -> None:
        self._module = None


class TorchScriptRuntime(_TorchRuntime):
    """TorchScript. Inputs go in by position, in the signature's order; outputs come out so, or by name."""

    platform = "pytorch_libtorch"

    def __init__(self, path: Path, signature: Signature, *, threads: int = 1) -> None:
        import torch

        if any(spec.datatype == "BYTES" for spec in (*signature.inputs, *signature.outputs)):
            raise RefusedError(f"{path.name}: TorchScript has no tensors of BYTES")
        with _loading:
            before = resident_bytes()
            try:
                load: Any = torch.jit.load
                module = load(str(path), map_location="cpu").eval()
            except (RuntimeError, ValueError, OSError) as error:
                raise RefusedError(f"{path.name}: TorchScript cannot load it: {first_line(error)}") from error
            grown = resident_bytes() - before
        super().__init__(module, threads=threads, memory_bytes=max(grown, _weights_bytes(path)))
        self.signature = signature


class ExportedRuntime(_TorchRuntime):
    """A torch.export program. The file is checked again, and torch gets a copy of what was checked, without pickles."""

    platform = "pytorch_export"

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        import torch.export

        with _loading, tempfile.TemporaryDirectory(prefix="modelkeep-pt2-") as folder:
            clean = Path(folder) / "model.pt2"
            self._program = exported.rewritten(path, clean, max_bytes=sys.maxsize)
            # Its reader brings a compiler along, which is no memory of this model.
            with contextlib.suppress(ImportError):
                importlib.import_module("torch.export.pt2_archive._package")
            before = resident_bytes()
            try:
                module = torch.export.load(str(clean)).module()
            except Exception as error:  # what its deserialiser raises has no base of its own
                raise RefusedError(f"{path.name}: torch.export cannot load it: {first_line(error)}") from error
            grown = resident_bytes() - before
        super().__init__(module, threads=threads, memory_bytes=max(grown, _weights_bytes(path)))
        self.signature = self._program.signature

    def _call(self, tensors: list[Any]) -> Any:
        by_name = self.signature.inputs[self._program.positional :]
        return self._module(
            *tensors[: self._program.positional],
            **{spec.name: tensor for spec, tensor in zip(by_name, tensors[self._program.positional :], strict=True)},
        )


def resident_bytes() -> int:
    """The resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's text, for people who are not to see a stack trace."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _onnx_spec(path: Path, node: Any) -> TensorSpec:
    datatype = _ONNX_TYPES.get(node.type)
    if datatype is None:
        raise RefusedError(f"{path.name}: '{node.name}' has the type {node.type}, which the V2 protocol cannot carry")
    # A dimension is a number, or None or a name where it may vary.
    shape = tuple(n if isinstance(n, int) and n >= 0 else -1 for n in node.shape)
    return TensorSpec(node.name, datatype, shape)


def _run_with_bf16(session: Any, inputs: Arrays, outputs: Sequence[str], bf16: Set[str]) -> dict[str, NDArray[Any]]:
    """ONNX Runtime's own values in and out: its Python side has no arrays of BF16, here they are float32."""
    from onnxruntime import OrtValue

    feeds = {
        name: OrtValue.ortvalue_from_numpy_with_onnx_type(to_bf16(value).view(np.uint16), _ONNX_BF16)
        if name in bf16
        else OrtValue.ortvalue_from_numpy(np.asarray(value, order="C"))
        for name, value in inputs.items()
    }
    answers: dict[str, NDArray[Any]] = {}
    for name, value in zip(outputs, session.run_with_ort_values(outputs, feeds), strict=True):
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


def _weights_bytes(path: Path) -> int:
    """The size of the file, with the ONNX external data that lies beside it."""
    return sum(part.stat().st_size for part in (path, *path.parent.glob(path.name + "?data")))


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)
