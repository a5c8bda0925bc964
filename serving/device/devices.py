"""Where models compute, and how much memory there is and is taken: the processor or a CUDA device, behind one small interface.

What is done with the figures is serving.device.memory's; how a runtime uses the place is its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from registry import budget, profiles
from registry.errors import UnavailableError
from registry.settings import Settings

log = logging.getLogger("modelkeep.device")


@dataclass(frozen=True, slots=True)
class Figures:
    """Bytes. `allocated` is in use, `reserved` is held by the allocators (never less), `free` is what others may take."""

    total: int
    allocated: int
    reserved: int
    free: int

    @property
    def utilisation(self) -> float:
        """The share that is in use, by whomever: what our allocators hold without using it can be given back.

        Above 1 where a budget is exceeded.
        """
        taken = max(self.total - self.free - (self.reserved - self.allocated), self.allocated)
        return taken / self.total if self.total else 0.0

    @property
    def fragmentation_ratio(self) -> float:
        """The share of what is held that is not in use."""
        return (self.reserved - self.allocated) / self.reserved if self.reserved else 0.0


class Device(Protocol):
    """A place where models compute. Every method may be called from any thread."""

    kind: str
    """"cpu" or "cuda"."""
    index: int
    name: str | None
    """As its driver calls it; None where there is no device."""

    def figures(self) -> Figures:
        """Raises UnavailableError where the device does not answer."""
        ...

    def release(self) -> None:
        """Have the allocators give back what they hold without using it, and wait until that is done."""
        ...

    def temperature_celsius(self) -> float | None: ...
    def utilisation_percent(self) -> float | None:
        """How busy it is computing; None where that is not known."""
        ...


class CpuDevice:
    """No device: the budget for models is the whole, and what the process has taken since it began is what is held.

    The figures in use are those of the C library's allocator; where it has none, those that `models` says.
    """

    kind = "cpu"
    index = 0
    name: str | None = None

    def __init__(self, budget_bytes: int, *, models: Callable[[], int] = int) -> None:
        self.budget_bytes = budget_bytes
        self._models = models
        self._resident = resident_bytes() - _apart["resident"]
        begun = _in_use_bytes()
        self._in_use = None if begun is None else begun - _apart["in use"]

    def figures(self) -> Figures:
        now = _in_use_bytes()
        grown = self._models() if now is None or self._in_use is None else now - self._in_use - _apart["in use"]
        allocated = max(grown, 0)
        reserved = max(resident_bytes() - self._resident - _apart["resident"], allocated)
        return Figures(self.budget_bytes, allocated, reserved, max(self.budget_bytes - reserved, 0))

    def release(self) -> None:
        give_back()

    def temperature_celsius(self) -> float | None:
        return None

    def utilisation_percent(self) -> float | None:
        return None


class CudaDevice:
    """A CUDA device, by NVML and by the allocators of torch and ONNX Runtime.

    `models` says what versions of ONNX Runtime took of its memory: its arenas tell nobody. torch is asked where it is
    in use already, and never imported for it.
    """

    kind = "cuda"

    def __init__(
        self, index: int, *, nvml: Any, handle: Any, models: Callable[[], int] = int, torch: Any = None
    ) -> None:
        self.index = index
        self._nvml, self._handle, self._models, self._given_torch = nvml, handle, models, torch
        try:
            name = nvml.nvmlDeviceGetName(handle)
        except nvml.NVMLError as error:
            raise UnavailableError(f"NVIDIA device {index} does not answer: {error}") from error
        self.name: str | None = name.decode() if isinstance(name, bytes) else str(name)

    def figures(self) -> Figures:
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError as error:
            raise UnavailableError(f"NVIDIA device {self.index} does not tell its memory: {error}") from error
        allocated = reserved = self._models()
        torch = self._torch()
        if torch is not None:
            allocated += int(torch.cuda.memory_allocated(self.index))
            reserved += int(torch.cuda.memory_reserved(self.index))
        return Figures(int(memory.total), allocated, max(reserved, allocated), int(memory.free))

    def release(self) -> None:
        torch = self._torch()
        if torch is not None:
            torch.cuda.empty_cache()
            torch.cuda.synchronize(self.index)

    def temperature_celsius(self) -> float | None:
        sensor = getattr(self._nvml, "NVML_TEMPERATURE_GPU", 0)
        return self._asked(lambda: float(self._nvml.nvmlDeviceGetTemperature(self._handle, sensor)))

    def utilisation_percent(self) -> float | None:
        return self._asked(lambda: float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu))

    def _asked(self, question: Callable[[], float]) -> float | None:
        try:
            return question()
        except self._nvml.NVMLError as error:  # not every device has every sensor
            log.debug("device %d does not say: %s", self.index, error)
            return None

    def _torch(self) -> Any:
        """torch, where it has begun to use the device: asking earlier would make it take a few hundred MB."""
        torch = self._given_torch or sys.modules.get("torch")
        begun = getattr(getattr(torch, "cuda", None), "is_initialized", None)  # None: another thread is importing it
        return torch if begun is not None and begun() else None


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how the runtimes of a process compute. `memory_bytes` is the most that models may take there; None: no limit."""

    kind: str = "cpu"
    index: int = 0
    threads: int = 1
    memory_bytes: int | None = None
    allow_growth: bool = True
    fp16: bool = False
    tensorrt: bool = False
    limited: bool = False
    """On the CPU: what ONNX models compute in, weights apart, is `memory_bytes` together, and runs out beyond it."""


def open_device(settings: Settings, *, models: Callable[[], int] = int, budget_bytes: int | None = None) -> Device:
    """The device of the profile; the CPU where the profile is cpu, the settings want it, or no device answers (logged)."""
    if settings.hardware.name != profiles.CPU.name and settings.gpu.compute != "cpu":
        found = _cuda(settings.gpu.device, models)
        if not isinstance(found, str):
            return found
        log.warning("profile %s, but models compute on the CPU: %s", settings.hardware.name, found)
    if budget_bytes is None:
        budget_bytes = _budget_without_device(settings)
    return CpuDevice(budget_bytes, models=models)


def place_of(settings: Settings, device: Device, budget_bytes: int | None) -> Place:
    """How runtimes compute on that device by these settings."""
    gpu = settings.gpu
    if device.kind == "cpu":
        return Place(threads=settings.server.threads, memory_bytes=budget_bytes, limited=gpu.limit_on_cpu)
    return Place(
        device.kind,
        device.index,
        settings.server.threads,
        budget_bytes,
        gpu.allow_growth,
        gpu.enable_fp16,
        gpu.compute == "tensorrt",
    )


def resident_bytes() -> int:
    """The resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _budget_without_device(settings: Settings) -> int:
    try:
        return budget.memory_budget_bytes(settings, None)
    except UnavailableError:  # a profile without a bound of its own: the machine's memory is one
        import psutil

        return int(psutil.virtual_memory().total)


def _cuda(index: int, models: Callable[[], int]) -> CudaDevice | str:
    """The device, or why there is none."""
    found = profiles.read_device(index, os.environ)
    if isinstance(found, str):
        return found
    import pynvml

    try:
        pynvml.nvmlInit()  # for as long as this process lives
        handle = profiles.nvml_handle(index, os.environ)
        return f"no device {index}" if handle is None else CudaDevice(index, nvml=pynvml, handle=handle, models=models)
    except (pynvml.NVMLError, UnavailableError) as error:
        return f"device {index} does not answer: {error}"


class _MallInfo(ctypes.Structure):
    """The C library's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@cache
def _c_library() -> Any:
    library = ctypes.CDLL(None)
    if (mallinfo := getattr(library, "mallinfo2", None)) is not None:
        mallinfo.restype = _MallInfo
    return library


def _heap() -> _MallInfo | None:
    """The C library's figures of its heap; None where it has none (other than glibc, or before 2.33)."""
    mallinfo = getattr(_c_library(), "mallinfo2", None)
    return None if mallinfo is None else mallinfo()


def give_back() -> None:
    """Give back to the system what the C library holds without using it. Takes milliseconds; for a thread that may wait."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


SURPLUS_BYTES = 8 << 20
"""What the C library may hold without using it, so that it need not be asked for again: twice the room that is there from the start
(serving.process.headroom).
"""


def give_back_surplus() -> None:
    """`give_back`, where it is worth it: SURPLUS_BYTES or more lie free. Otherwise the pages stay, for who asks next.

    To give back what a version of a few hundred kilobytes leaves, ten seconds before the next one needs as much, is work for nothing,
    and what is taken again is other pages: each time some that hold a little of what stays. Small versions that followed each other for hours
    spread it over ever more pages, a dozen kilobytes an hour.
    """
    heap = _heap()
    if heap is None or int(heap.fordblks) >= SURPLUS_BYTES:
        give_back()


def _in_use_bytes() -> int | None:
    """What was allocated and not freed; None as for `_heap`."""
    heap = _heap()
    return None if heap is None else int(heap.uordblks) + int(heap.hblkhd)


_apart = {"resident": 0, "in use": 0}


def imported(name: str) -> Any:
    """A framework that computes models. What it takes by itself is none of any model's, and none of the budget for them."""
    if name in sys.modules:
        return importlib.import_module(name)
    with apart():
        return importlib.import_module(name)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """What the process takes within it is none of any model's, and none of the budget for them."""
    resident, in_use = resident_bytes(), _in_use_bytes() or 0
    yield
    _apart["resident"] += max(resident_bytes() - resident, 0)
    _apart["in use"] += max((_in_use_bytes() or 0) - in_use, 0)


_arena = threading.Lock()
_arena_bytes: list[int] = []


def limit_arena(limit_bytes: int) -> int:
    """Have all ONNX sessions of this process that ask for it share one arena of this size. Returns the size that holds.

    It can be made once a process: a later call gets the first one's.
    """
    with _arena:
        if not _arena_bytes:
            import onnxruntime

            kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
            info = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
            as_requested = {"max_mem": limit_bytes, "arena_extend_strategy": 1}
            onnxruntime.create_and_register_allocator(info, onnxruntime.OrtArenaCfg(as_requested))
            _arena_bytes.append(limit_bytes)
        return _arena_bytes[0]


def taken_bytes(place: Place) -> int:
    """What is taken of the place's device, by whomever; 0 where models compute on the CPU. By NVML, which needs no framework.

    Raises UnavailableError where the device does not answer.
    """
    if place.kind == "cpu":
        return 0
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            handle = profiles.nvml_handle(place.index, os.environ)
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise UnavailableError(f"NVIDIA device {place.index} does not tell its memory: {error}") from error
