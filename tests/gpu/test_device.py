"""torch on a device: answers, memory by NVML and by the allocator, memory that runs out, clean-ups, half precision."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry import profiles
from registry.signature import Signature
from serving.compute.runtimes import load_runtime
from serving.device.devices import CudaDevice, Place
from serving.device.loads import memory_by_type
from serving.device.memory import MemoryOptimizer
from serving.device.memory_limits import BatchLimit
from serving.statuses import OutOfMemoryError
from tests.gpu.conftest import BUDGET_BYTES, WIDE, write_wide
from tests.unit.serving.helpers import close, load

MEBIBYTE = 1 << 20
ROW_BYTES = 512 * 256 * 4


def device_of(driver: Any) -> CudaDevice:
    return CudaDevice(0, nvml=driver, handle=profiles.nvml_handle(0, {}))


def rows(count: int) -> dict[str, Any]:
    return {"x": np.repeat(np.linspace(-1, 1, count, dtype=np.float32), 256).reshape(count, 256)}


def right(inputs: dict[str, Any], y: Any, tolerance: float = 1e-5) -> bool:
    return bool(np.allclose(y, np.tanh(inputs["x"]), atol=tolerance))


def test_the_figures_are_those_of_the_driver(driver: Any) -> None:
    device = device_of(driver)
    figures, handle = device.figures(), driver.nvmlDeviceGetHandleByIndex(0)
    memory = driver.nvmlDeviceGetMemoryInfo(handle)
    assert figures.total == memory.total and abs(figures.free - memory.free) < 256 * MEBIBYTE
    assert 0.0 <= figures.utilisation <= 1.0
    temperature = device.temperature_celsius()
    assert temperature is None or 0 < temperature < 120


def test_answers_are_those_of_the_cpu_and_tensors_of_the_model_are_on_the_device(
    torch_cuda: Any, place: Place, wide: Path
) -> None:
    there: Any = load_runtime(wide, "torchscript", signature=WIDE, place=place)
    here = load_runtime(wide, "torchscript", signature=WIDE)
    inputs = rows(7)
    assert there.device == "cuda:0" and np.allclose(
        there.run(inputs, None)["y"], here.run(inputs, None)["y"], atol=1e-5
    )
    for count in (1, 64, 3):  # buffers in pinned memory are used again, for other sizes too
        assert right(rows(count), there.run(rows(count), None)["y"])
    there.close()


def test_an_exported_program_is_moved_to_the_device(torch_cuda: Any, place: Place, tmp_path: Path) -> None:
    torch = torch_cuda

    class Shifted(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return x * 2 + torch.arange(4, dtype=torch.float32)

    program = torch.export.export(Shifted(), (torch.ones(3, 4),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, str(tmp_path / "m.pt2"))
    runtime: Any = load_runtime(tmp_path / "m.pt2", "pt2", signature=None, place=place)
    name, out = runtime.signature.inputs[0].name, runtime.signature.outputs[0].name
    y = runtime.run({name: np.ones((2, 4), np.float32)}, None)[out]
    assert runtime.device == "cuda:0" and y.tolist() == [[2, 3, 4, 5]] * 2


def test_what_a_model_takes_of_the_device_is_measured(torch_cuda: Any, place: Place, tmp_path: Path) -> None:
    path = write_wide(tmp_path / "m.pt", ballast_mb=64)
    runtime = load_runtime(path, "torchscript", signature=WIDE, place=place)
    found = memory_by_type(runtime)
    assert 64 * MEBIBYTE <= found["device"] < 256 * MEBIBYTE and runtime.memory_bytes == found["device"]
    runtime.close()


def test_a_batch_that_does_not_fit_the_device_is_split_and_answered(
    torch_cuda: Any, driver: Any, place: Place, wide: Path
) -> None:
    async def scenario() -> None:
        optimizer = MemoryOptimizer(device_of(driver), budget_bytes=BUDGET_BYTES)
        runtime: Any = load_runtime(wide, "torchscript", signature=WIDE, place=place)
        most = 2 * BUDGET_BYTES // ROW_BYTES
        version = load(runtime, max_batch=most, limit=BatchLimit(most), clean_up=optimizer.ran_out)
        large = rows(most)
        work = version.submit(large, None)
        await work.future
        assert right(large, work.answer["y"])
        assert version.limit.learnt is not None and version.limit.learnt < most
        assert optimizer.out_of_memory_count >= 1 and optimizer.clean_up_count >= 1
        works = [version.submit(rows(most // 8), None) for _ in range(8)]
        for work in works:
            await work.future
            assert right(rows(most // 8), work.answer["y"])
        assert version.telemetry.total.errors == 0
        close(version)

    asyncio.run(scenario())


def test_memory_that_runs_out_is_told_by_its_size(torch_cuda: Any, place: Place, wide: Path) -> None:
    runtime = load_runtime(wide, "torchscript", signature=WIDE, place=place)
    with pytest.raises(OutOfMemoryError) as caught:
        runtime.run(rows(4 * BUDGET_BYTES // ROW_BYTES), None)
    assert caught.value.requested_bytes is not None and caught.value.requested_bytes > BUDGET_BYTES // 2
    assert right(rows(2), runtime.run(rows(2), None)["y"])


def test_a_clean_up_gives_back_what_the_allocator_holds(torch_cuda: Any, driver: Any, place: Place, wide: Path) -> None:
    optimizer = MemoryOptimizer(device_of(driver), collect=gc.collect)
    runtime = load_runtime(wide, "torchscript", signature=WIDE, place=place)
    runtime.run(rows(BUDGET_BYTES // ROW_BYTES // 8), None)
    before = optimizer.profile()
    done = optimizer.clean_up("test")
    assert done is not None and done.freed_mb > 64 and before.fragmentation_ratio > 0
    assert optimizer.profile().free_mb > before.free_mb


def test_half_precision_is_taken_where_the_golden_cases_agree_and_not_where_they_do_not(
    torch_cuda: Any, place: Place, wide: Path, tmp_path: Path
) -> None:
    half = Place("cuda", 0, memory_bytes=place.memory_bytes, fp16=True)
    np.savez(tmp_path / "golden.npz", **{"input.x": rows(16)["x"]})
    runtime: Any = load_runtime(wide, "torchscript", signature=WIDE, place=half, golden=tmp_path / "golden.npz")
    assert (runtime.precision, runtime.precision_reason) == ("fp16", "fp16: agrees on 16 golden cases")
    y = runtime.run(rows(9), None)["y"]
    assert y.dtype == np.float32 and right(rows(9), y, 1e-2)

    torch = torch_cuda

    class Large(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[name-defined]
            return x * 90000.0

    path = tmp_path / "large.pt"
    torch.jit.trace(Large(), (torch.ones(2, 256),)).save(str(path))
    signature = Signature(WIDE.inputs, WIDE.outputs)
    runtime = load_runtime(path, "torchscript", signature=signature, place=half, golden=tmp_path / "golden.npz")
    assert runtime.precision == "fp32"
