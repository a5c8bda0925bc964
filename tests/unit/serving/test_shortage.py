"""Memory that ran out, told from a model's own failure: by what the runtimes really say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from registry.errors import RefusedError, UnavailableError
from registry.signature import Signature, TensorSpec
from serving.compute.runtimes import load_runtime
from serving.device.devices import Place, limit_arena
from serving.device.loads import Load
from serving.device.shortage import out_of_memory, requested_bytes
from serving.statuses import OutOfMemoryError
from tests.unit.serving.limited import ROW_BYTES, wide_model

MEBIBYTE = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Expand node. Name:'' Status Message: "
            "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, "
            "onnxruntime::Stream*) Available memory of 11795200 is smaller than requested bytes of 67108864",
            67108864,
        ),
        ("BFCArena: Failed to allocate memory for requested buffer of size 4096", 4096),
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=box ; expr=cudaMalloc((void**)&p, size);", None),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", None),
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 3.81 GiB", int(2.5 * 1024**3)),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", 20 * MEBIBYTE),
        (
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 281474976710656 bytes. Error code 12",
            2**48,
        ),
    ],
)
def test_what_the_allocators_say_is_understood(text: str, size: int | None) -> None:
    found = out_of_memory(RuntimeError(text))
    assert found is not None and found.requested_bytes == size == requested_bytes(text)


def test_other_failures_are_not_taken_for_it() -> None:
    assert out_of_memory(RuntimeError("index 7 is out of bounds")) is None
    assert out_of_memory(ValueError("memory of the goldfish is out")) is None
    assert out_of_memory(MemoryError()) is not None
    known = OutOfMemoryError("x", 3)
    assert out_of_memory(known) is known


def test_an_onnx_model_whose_arena_is_full_raises_it_and_computes_less_afterwards(tmp_path: Path) -> None:
    limit = limit_arena(48 * MEBIBYTE)
    assert limit_arena(1) == limit  # one a process
    place = Place(memory_bytes=limit, limited=True)
    runtime = load_runtime(wide_model(tmp_path / "wide.onnx"), "onnx", signature=None, place=place)
    rows = limit // ROW_BYTES
    with pytest.raises(OutOfMemoryError) as caught:
        runtime.run({"x": np.ones((rows, 256), np.float32)}, None)
    assert caught.value.requested_bytes == rows * ROW_BYTES
    runtime.trim()  # type: ignore[attr-defined]
    y = runtime.run({"x": np.ones((8, 256), np.float32)}, None)["y"]
    assert np.allclose(y, np.tanh(1.0), atol=1e-5)
    free = load_runtime(tmp_path / "wide.onnx", "onnx", signature=None)
    assert free.run({"x": np.ones((rows, 256), np.float32)}, None)["y"].shape == (rows, 256)


def test_a_torch_model_that_asks_for_more_than_there_is_raises_it(tmp_path: Path) -> None:
    import torch

    class Greedy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(1 << 45, dtype=torch.float32)[:1] + x

    path = tmp_path / "m.pt"
    torch.jit.script(Greedy()).save(str(path))
    signature = Signature((TensorSpec("x", "FP32", (1,)),), (TensorSpec("y", "FP32", (1,)),))
    runtime = load_runtime(path, "torchscript", signature=signature)
    with pytest.raises(OutOfMemoryError) as caught:
        runtime.run({"x": np.ones(1, np.float32)}, None)
    assert caught.value.requested_bytes == 1 << 47


def test_memory_that_ran_out_holds_no_tensor_of_the_computation(tmp_path: Path) -> None:
    import gc

    import torch

    class Greedy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(1 << 45, dtype=torch.float32)[:1] + x

    path = tmp_path / "m.pt"
    torch.jit.script(Greedy()).save(str(path))
    signature = Signature((TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", (-1,)),))
    runtime = load_runtime(path, "torchscript", signature=signature)
    with pytest.raises(OutOfMemoryError) as caught:
        runtime.run({"x": np.ones(12345, np.float32)}, None)
    assert caught.value.__context__ is None and caught.value.__cause__ is None
    held = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (12345,)]
    assert held == []


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (MemoryError(), (UnavailableError, "ONNX Runtime ran out of memory")),
        (RuntimeError("CUDA failure 2: out of memory"), (UnavailableError, "ran out of memory")),
        (RuntimeError("bad magic\nand more"), (RefusedError, "ONNX Runtime cannot load it: bad magic$")),
        (RefusedError("refused before"), (RefusedError, "^refused before$")),
    ],
)
def test_a_load_that_runs_out_is_told_from_a_file_that_does_not_load(
    raised: Exception, told: tuple[type[Exception], str], tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"12345")
    with pytest.raises(told[0], match=told[1]), Load(path, "ONNX Runtime", Place()):
        raise raised
    with Load(path, "ONNX Runtime", Place()) as load:  # the turn was given back
        pass
    assert load.memory["host"] >= 5 and load.budget_bytes == load.memory["host"]


def test_what_a_load_takes_of_a_device_is_told_by_its_allocator_and_is_what_the_budget_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"x" * 1000)
    told = iter([100, 7000, 7000, 7000])
    place = Place("cuda", 0)
    with Load(path, "TorchScript", place, taken=lambda: next(told)) as load:
        pass
    assert (load.memory["device"], load.budget_bytes) == (6900, 6900) and "host" in load.memory
    with Load(path, "TorchScript", place, half=True, taken=lambda: next(told)) as load:
        pass
    assert load.memory["device"] == 500  # nothing new was needed; in half precision its weights take half of the file
