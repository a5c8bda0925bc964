"""What computes a model: ONNX Runtime, TorchScript or torch.export behind one protocol. Queues and batches are the engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from registry import coreml
from registry.errors import RefusedError
from registry.signature import Signature
from serving.device.devices import Place
from serving.device.devices import resident_bytes as resident_bytes
from serving.device.loads import first_line as first_line

Arrays = Mapping[str, NDArray[Any]]


class Runtime(Protocol):
    """A loaded model. `run` is called by one thread at a time.

    `memory_bytes` is by how much the process's resident memory grew while the model was loaded, and at least the size
    of its file (memory that an earlier model gave back may be used again without any growth); on a device, by how much
    the device's memory did. It leaves out what a computation takes for a moment.
    """

    platform: str
    signature: Signature
    memory_bytes: int

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        """The named outputs, or all. BYTES are arrays of `bytes` going in, of `bytes` or `str` coming out.

        Raises UsageError for an input that the runtime cannot carry, OutOfMemoryError where memory ran out; whatever else it
        raises is the model's failure.
        """
        ...

    def close(self) -> None: ...


def load_runtime(
    path: Path,
    format: str,
    *,
    signature: Signature | None,
    threads: int = 1,
    place: Place | None = None,
    golden: Path | None = None,
) -> Runtime:
    """Load `path` ("onnx", "torchscript" or "pt2"); `signature` is needed where the file has none.

    `place` is where it computes, the CPU with so many `threads` where none is given. In half precision, where the place
    asks for it, the `golden` cases decide. Raises RefusedError, or UnavailableError where memory runs out.
    """
    where = place or Place(threads=threads)
    load = partial(_load, path, format, signature, where)
    if not where.fp16:
        return load(False)
    from serving.compute import precision

    runtime, why = precision.choose(load, golden, path.name)
    runtime.precision_reason = why
    chosen: Runtime = runtime
    return chosen


def _load(path: Path, format: str, signature: Signature | None, place: Place, half: bool) -> Runtime:
    if format == "onnx":
        from serving.compute.onnx_runtime import OnnxRuntime

        optional = frozenset(spec.name for spec in signature.inputs if spec.optional) if signature else frozenset()
        return OnnxRuntime(path, place=place, optional=optional, half=half)
    if format == "torchscript":
        from serving.compute.torch_runtime import TorchScriptRuntime

        if signature is None:
            raise RefusedError(
                f"{path.name}: a TorchScript file does not say what goes in and out; give it a signature"
            )
        return TorchScriptRuntime(path, signature, place=place, half=half)
    if format == "pt2":
        from serving.compute.torch_runtime import ExportedRuntime

        return ExportedRuntime(path, place=place, half=half)
    if format == "coreml":
        raise RefusedError(coreml.WHERE_IT_RUNS)
    raise RefusedError(f"{path.name}: format '{format}' is not known; known are onnx, torchscript, pt2 and coreml")
