"""Where models compute: the profile's device or the CPU, and a CUDA device's figures by its driver and its allocators."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.errors import UnavailableError
from registry.settings import load_settings
from registry.signature import Signature, TensorSpec
from serving.compute.runtimes import load_runtime
from serving.compute.torch_runtime import OnCuda
from serving.device.devices import CpuDevice, CudaDevice, Figures, Place, imported, open_device, place_of
from serving.device.loads import beside_torch
from serving.device.memory import MemoryOptimizer
from tests.unit.serving.helpers import affine_model

MEBIBYTE = 1 << 20


class Driver:
    """NVML as far as it is asked, of one device; what is missing on it raises as there."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, total: int, free: int, *, sensors: bool = True, gone: bool = False) -> None:
        self.total, self.free, self.sensors, self.gone = total, free, sensors, gone

    def nvmlDeviceGetName(self, handle: object) -> bytes:
        return b"Device of a test"

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> Any:
        if self.gone:
            raise self.NVMLError("GPU is lost")
        return types.SimpleNamespace(total=self.total, free=self.free)

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int:
        if not self.sensors:
            raise self.NVMLError("Not Supported")
        return 61

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> Any:
        if not self.sensors:
            raise self.NVMLError("Not Supported")
        return types.SimpleNamespace(gpu=40)


class Torch:
    """The part of torch.cuda that a device asks, with an allocator of its own."""

    def __init__(self, allocated: int, reserved: int, *, begun: bool = True) -> None:
        self.calls: list[str] = []

        def empty_cache() -> None:
            self.calls.append("empty_cache")
            self.reserved = self.allocated

        self.allocated, self.reserved = allocated, reserved
        self.cuda = types.SimpleNamespace(
            is_initialized=lambda: begun,
            memory_allocated=lambda index: self.allocated,
            memory_reserved=lambda index: self.reserved,
            empty_cache=empty_cache,
            synchronize=lambda index: self.calls.append("synchronize"),
        )


def device_of(driver: Driver, torch: Torch, models: Callable[[], int] = int) -> CudaDevice:
    return CudaDevice(0, nvml=driver, handle=object(), models=models, torch=torch)


def test_the_figures_of_a_device_are_its_drivers_and_its_allocators() -> None:
    device = device_of(Driver(4000, 1000), Torch(1500, 2000), models=lambda: 300)
    figures = device.figures()
    assert (figures.total, figures.free, figures.allocated, figures.reserved) == (4000, 1000, 1800, 2300)
    assert figures.utilisation == pytest.approx(2500 / 4000)  # 700 are others', or the driver's own
    assert (device.name, device.temperature_celsius(), device.utilisation_percent()) == ("Device of a test", 61.0, 40.0)


def test_a_torch_that_has_not_begun_is_not_asked() -> None:
    torch = Torch(1500, 2000, begun=False)
    device = device_of(Driver(4000, 3900), torch)
    assert device.figures().allocated == 0
    device.release()
    assert torch.calls == []


def test_a_torch_that_another_thread_is_just_importing_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    device = CudaDevice(0, nvml=Driver(4000, 3900), handle=object())
    assert device.figures().allocated == 0
    device.release()


def test_use_beyond_a_budget_is_more_than_all_of_it() -> None:
    assert Figures(total=100, allocated=120, reserved=150, free=0).utilisation == pytest.approx(1.2)


def test_a_clean_up_on_a_device_collects_empties_then_waits() -> None:
    torch = Torch(1000 * MEBIBYTE, 1600 * MEBIBYTE)
    optimizer = MemoryOptimizer(
        device_of(Driver(4000 * MEBIBYTE, 100 * MEBIBYTE), torch), collect=lambda: torch.calls.append("collect")
    )
    done = optimizer.clean_up("test")
    assert torch.calls == ["collect", "empty_cache", "synchronize"]
    assert done is not None and (done.before_mb, done.after_mb, done.freed_mb) == (1600.0, 1000.0, 600.0)


def test_what_a_device_does_not_tell_is_absent_and_one_that_is_lost_is_an_error() -> None:
    device = device_of(Driver(4000, 1000, sensors=False), Torch(0, 0))
    assert device.temperature_celsius() is None and device.utilisation_percent() is None
    with pytest.raises(UnavailableError, match="device 0 does not tell its memory: GPU is lost"):
        device_of(Driver(1, 1, gone=True), Torch(0, 0)).figures()


def test_the_cpu_has_no_name_and_no_temperature() -> None:
    device = CpuDevice(100)
    assert (device.name, device.temperature_celsius(), device.utilisation_percent()) == (None, None, None)


def test_the_place_follows_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(**values: str) -> Any:
        return load_settings(environ={"MODELKEEP_HOME": str(tmp_path), **values}, cwd=tmp_path)

    cpu = settings(MODELKEEP_PROFILE="cpu", MODELKEEP_SERVER__THREADS="2", MODELKEEP_GPU__LIMIT_ON_CPU="true")
    device = open_device(cpu)
    assert isinstance(device, CpuDevice) and device.budget_bytes == 2048 * MEBIBYTE
    place = place_of(cpu, device, 2048 * MEBIBYTE)
    assert (place.kind, place.threads, place.limited, place.fp16) == ("cpu", 2, True, False)
    small = settings(MODELKEEP_PROFILE="rtx3050-4gb")
    place = place_of(small, device_of(Driver(1, 1), Torch(0, 0)), 3500 * MEBIBYTE)
    assert (place.kind, place.fp16, place.allow_growth, place.tensorrt) == ("cuda", True, True, False)
    assert place.memory_bytes == 3500 * MEBIBYTE
    wanted = settings(MODELKEEP_PROFILE="rtx3050-4gb", MODELKEEP_GPU__COMPUTE="cpu")
    assert isinstance(open_device(wanted), CpuDevice)


def test_a_profile_of_a_device_on_a_machine_without_one_computes_on_the_cpu_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = load_settings(environ={"MODELKEEP_HOME": str(tmp_path), "MODELKEEP_PROFILE": "8gb"}, cwd=tmp_path)
    assert isinstance(open_device(settings), CpuDevice)
    assert "profile 8gb, but models compute on the CPU: CUDA_VISIBLE_DEVICES=''" in caplog.text


def test_a_torch_without_cuda_computes_on_the_cpu_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("for want of: a torch without CUDA")
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "m.pt"))
    signature = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),))
    np.savez(tmp_path / "g.npz", **{"input.x": np.ones((3, 2), np.float32)})
    device = Place("cuda", 0, fp16=True)
    runtime: Any = load_runtime(
        tmp_path / "m.pt", "torchscript", signature=signature, place=device, golden=tmp_path / "g.npz"
    )
    assert (runtime.device, runtime.precision) == ("cpu", "fp32") and "finds no CUDA device" in caplog.text
    assert runtime.run({"x": np.array([[-1, 2]], np.float32)}, None)["y"].tolist() == [[0, 2]]


def test_an_onnxruntime_without_the_provider_computes_on_the_cpu_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("for want of: an onnxruntime without CUDA")
    runtime: Any = load_runtime(affine_model(tmp_path / "m.onnx"), "onnx", signature=None, place=Place("cuda", 0))
    assert runtime.device == "cpu" and "onnxruntime-gpu has" in caplog.text


def test_what_a_framework_takes_by_itself_is_not_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "framework_of_a_test.py").write_text("held = [bytes(100_000) for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    device = CpuDevice(2048 * MEBIBYTE)
    before = device.figures().allocated
    imported("framework_of_a_test")
    # Other threads of the test run allocate a little as well.
    assert device.figures().allocated - before < 50 * MEBIBYTE
    assert CpuDevice(2048 * MEBIBYTE).figures().allocated < 50 * MEBIBYTE


class Stand:
    """torch with a CUDA device that is the CPU: what is asked of the device is written down, in order."""

    def __init__(self, *, total: int = 1000) -> None:
        import torch

        self._torch = torch
        self.calls: list[str] = []
        note = self.calls.append

        class Stream:
            def __init__(self, device: Any) -> None:
                note("stream")

            def synchronize(self) -> None:
                note("wait")

        @contextmanager
        def inside(name: str) -> Iterator[None]:
            note(f"enter {name}")
            yield
            note(f"leave {name}")

        self.cuda = types.SimpleNamespace(
            is_available=lambda: True,
            Stream=Stream,
            device=lambda device: inside("device"),
            stream=lambda stream: inside("stream"),
            synchronize=lambda device: note("synchronize"),
            get_device_properties=lambda index: types.SimpleNamespace(total_memory=total),
            set_per_process_memory_fraction=lambda share, index: note(f"share {share:g}"),
            mem_get_info=lambda index: (900, total),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def device(self, kind: str, index: int) -> Any:
        return self._torch.device("cpu")

    def empty(self, *shape: Any, **options: Any) -> Any:
        if options.pop("pin_memory", False):
            self.calls.append("pinned")
        else:
            self.calls.append(f"take {shape[0]}")
        return self._torch.empty(*shape, **options)


def test_tensors_go_through_pinned_memory_on_a_stream_of_the_version_and_are_waited_for() -> None:
    torch: Any = Stand()
    side = OnCuda(torch, Place("cuda", 41, memory_bytes=500))
    source = np.arange(6, dtype=np.float32).reshape(2, 3)
    source.setflags(write=False)
    side.loaded()
    with side.computing():
        tensor = side.taken(source)
        back = side.back(tensor + 1)
        side.wait()
    assert back.tolist() == (source + 1).tolist() and tensor.dtype is torch.float32
    assert torch.calls == [
        *("share 0.5", "stream", "synchronize", "enter device", "enter stream", "pinned", "pinned", "wait"),
        *("leave stream", "leave device"),
    ]
    assert side.taken(np.array(7, np.int64)).shape == () and side.name == "cuda:41"


def test_the_share_of_the_device_is_bounded_once_and_taken_at_once_where_it_shall_not_grow() -> None:
    torch: Any = Stand()
    for _ in range(2):
        OnCuda(torch, Place("cuda", 42, memory_bytes=2000, allow_growth=False))
    assert torch.calls == ["share 1", "take 810", "stream", "stream"]
    unbounded: Any = Stand()
    OnCuda(unbounded, Place("cuda", 43))
    assert unbounded.calls == ["stream"]


def test_what_torch_tells_by_itself_is_not_counted_twice() -> None:
    runtimes: list[Any] = [
        types.SimpleNamespace(platform="pytorch_libtorch", memory={"host": 5, "device": 100}, memory_bytes=100),
        types.SimpleNamespace(platform="onnxruntime_onnx", memory={"host": 7, "device": 30}, memory_bytes=30),
        types.SimpleNamespace(platform="onnxruntime_onnx", memory={"host": 9}, memory_bytes=9),  # fell back to the CPU
        types.SimpleNamespace(platform="python", memory_bytes=11),
    ]
    assert [beside_torch(runtime) for runtime in runtimes] == [0, 30, 0, 0]
