"""TorchScript and torch.export programs, on the CPU or on a CUDA device."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry import exported
from registry.errors import RefusedError
from registry.signature import Signature
from serving.device.devices import Place, imported
from serving.device.loads import Load
from serving.device.shortage import out_of_memory

log = logging.getLogger("modelkeep.torch")

_prepared: set[int] = set()


class _OnCpu:
    """Tensors stay where they are."""

    name = "cpu"

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._here: AbstractContextManager[Any] = contextlib.nullcontext()

    def allocated(self) -> int:
        return 0

    def loaded(self) -> None:
        """Nothing is under way."""

    def taken(self, array: NDArray[Any]) -> Any:
        # A model may write into its inputs, and those of a request are read-only views of its body.
        return self._torch.from_numpy(np.array(array))

    def computing(self) -> AbstractContextManager[Any]:
        return self._here

    def back(self, tensor: Any) -> Any:
        return tensor.detach().cpu()

    def wait(self) -> None:
        """Nothing is under way."""


class OnCuda:
    """Copies through pinned host memory, which torch keeps for the next time, and a stream for this version alone."""

    def __init__(self, torch: Any, place: Place) -> None:
        self._torch = torch
        self._device = torch.device("cuda", place.index)
        _prepare(torch, place)
        self._stream = torch.cuda.Stream(self._device)
        self.name = f"cuda:{place.index}"

    def allocated(self) -> int:
        return int(self._torch.cuda.memory_allocated(self._device))

    def loaded(self) -> None:
        """Weights are copied and cast on another stream than ours: wait for that."""
        self._torch.cuda.synchronize(self._device)

    @contextlib.contextmanager
    def computing(self) -> Any:
        with self._torch.cuda.device(self._device), self._torch.cuda.stream(self._stream):
            yield

    def taken(self, array: NDArray[Any]) -> Any:
        kind = self._torch.from_numpy(np.empty(0, array.dtype)).dtype
        pinned = self._torch.empty(array.shape, dtype=kind, pin_memory=True)
        np.copyto(pinned.numpy(), array)
        return pinned.to(self._device, non_blocking=True)

    def back(self, tensor: Any) -> Any:
        """Complete only after `wait`."""
        pinned = self._torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor.detach(), non_blocking=True)

    def wait(self) -> None:
        self._stream.synchronize()


def _prepare(torch: Any, place: Place) -> None:
    """Bound this process's part of the device's memory, and take it at once where it shall not grow. Once a process and device."""
    if place.index in _prepared:
        return
    _prepared.add(place.index)
    if place.memory_bytes is None:
        return
    total = torch.cuda.get_device_properties(place.index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, place.memory_bytes / total), place.index)
    if not place.allow_growth:
        # The allocator keeps what it once had.
        free, _ = torch.cuda.mem_get_info(place.index)
        torch.empty(
            min(place.memory_bytes, free) * 9 // 10, dtype=torch.uint8, device=torch.device("cuda", place.index)
        )


class _TorchRuntime:
    """A module of torch."""

    platform = "pytorch"
    signature: Signature

    def __init__(self, module: Any, side: _OnCpu | OnCuda, load: Load, *, threads: int, half: bool) -> None:
        import torch

        self._torch: Any = torch
        self._module: Any = module
        self._side = side
        self._threads = threads
        self._thread: int | None = None
        self._half = half
        self.device = side.name
        self.precision = "fp16" if half else "fp32"
        self.memory = load.memory
        self.memory_bytes = load.budget_bytes
        side.loaded()

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        torch = self._torch
        if self._thread != threading.get_ident():  # OpenMP keeps the number of threads for each calling thread
            torch.set_num_threads(self._threads)
            self._thread = threading.get_ident()
        try:
            wanted = self._computed(inputs, outputs)
        except (RuntimeError, MemoryError) as error:
            shortage = out_of_memory(error)
            if shortage is None:
                raise
        else:
            return {
                name: np.asarray((value.float() if value.dtype is torch.bfloat16 else value).numpy(), order="C")
                for name, value in wanted.items()
            }
        # Not from the error: what it was raised through holds the tensors that are to be given back.
        raise shortage

    def _computed(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None) -> dict[str, Any]:
        """The outputs as tensors of the host, complete."""
        torch, side = self._torch, self._side
        with torch.inference_mode(), side.computing():
            tensors = [side.taken(inputs[spec.name]) for spec in self.signature.inputs]
            for number, spec in enumerate(self.signature.inputs):
                if spec.datatype == "BF16":
                    tensors[number] = tensors[number].to(torch.bfloat16)
                elif self._half and spec.datatype == "FP32":
                    tensors[number] = tensors[number].half()
            named = self._named(self._call(tensors))
            names = [spec.name for spec in self.signature.outputs] if outputs is None else outputs
            wanted = {name: side.back(self._widened(named[name])) for name in names}
            side.wait()
        return wanted

    def _widened(self, tensor: Any) -> Any:
        """In half precision: as the signature has it."""
        return tensor.float() if self._half and tensor.dtype is self._torch.float16 else tensor

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

    def __init__(self, path: Path, signature: Signature, *, place: Place | None = None, half: bool = False) -> None:
        torch = imported("torch")
        if any(spec.datatype == "BYTES" for spec in (*signature.inputs, *signature.outputs)):
            raise RefusedError(f"{path.name}: TorchScript has no tensors of BYTES")
        wanted = place or Place()
        place, side = _side(torch, wanted, path.name)
        half = half and place is wanted
        with Load(path, "TorchScript", place, half=half, taken=side.allocated) as load:
            read: Any = torch.jit.load
            module = read(str(path), map_location=side.name).eval()
            module = module.half() if half else module
        super().__init__(module, side, load, threads=place.threads, half=half)
        self.signature = signature


class ExportedRuntime(_TorchRuntime):
    """A torch.export program. The file is checked again, and torch gets a copy of what was checked, without pickles."""

    platform = "pytorch_export"

    def __init__(self, path: Path, *, place: Place | None = None, half: bool = False) -> None:
        torch = imported("torch")
        importlib.import_module("torch.export")
        wanted = place or Place()
        place, side = _side(torch, wanted, path.name)
        half = half and place is wanted
        with (
            Load(path, "torch.export", place, half=half, taken=side.allocated) as load,
            tempfile.TemporaryDirectory(prefix="modelkeep-pt2-") as folder,
        ):
            clean = Path(folder) / "model.pt2"
            self._program = exported.rewritten(path, clean, max_bytes=sys.maxsize)
            # Its reader brings a compiler along, which is no memory of this model.
            with contextlib.suppress(ImportError):
                importlib.import_module("torch.export.pt2_archive._package")
            load.begin()
            program: Any = torch.export.load(str(clean))
            if place.kind == "cuda":
                # Constants and calls inside the graph name their device too.
                move: Callable[..., Any] = importlib.import_module("torch.export.passes").move_to_device_pass
                program = move(program, side.name)
            module = program.module()
            module = module.half() if half else module
        super().__init__(module, side, load, threads=place.threads, half=half)
        self.signature = self._program.signature

    def _call(self, tensors: list[Any]) -> Any:
        by_name = self.signature.inputs[self._program.positional :]
        return self._module(
            *tensors[: self._program.positional],
            **{spec.name: tensor for spec, tensor in zip(by_name, tensors[self._program.positional :], strict=True)},
        )


def _side(torch: Any, place: Place, name: str) -> tuple[Place, _OnCpu | OnCuda]:
    """Where the model of that name computes: as `place` says, or the CPU where this torch has no CUDA."""
    if place.kind == "cuda" and not torch.cuda.is_available():
        log.warning("%s computes on the CPU: this torch (%s) finds no CUDA device", name, torch.__version__)
        place = Place(threads=place.threads)
    return (place, OnCuda(torch, place)) if place.kind == "cuda" else (place, _OnCpu(torch))


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)
