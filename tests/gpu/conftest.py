"""Tests on a real NVIDIA device. What a machine lacks (a torch with CUDA, ONNX Runtime's CUDA provider) skips its tests, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.signature import Signature, TensorSpec
from serving.device.devices import Place

HERE = Path(__file__).parent
BUDGET_BYTES = 1 << 30
"""Of the device, for every test of a process: torch takes such a bound once."""
WIDE = Signature((TensorSpec("x", "FP32", (-1, 256)),), (TensorSpec("y", "FP32", (-1, 256)),))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    """NVML, begun; a machine without a device that answers skips."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        pytest.skip(f"for want of: an NVIDIA device that its driver answers for ({error})")
    try:
        if not pynvml.nvmlDeviceGetCount():
            pytest.skip("for want of: an NVIDIA device")
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


@pytest.fixture(scope="session")
def torch_cuda(driver: Any) -> Any:
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"for want of: a build of torch with CUDA (this is {torch.__version__})")
    return torch


@pytest.fixture(scope="session")
def place(driver: Any) -> Place:
    return Place("cuda", 0, memory_bytes=BUDGET_BYTES)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """TorchScript, x[n, 256] to y[n, 256] by way of tensors of [n, 512, 256]: half a megabyte a row each."""
    return write_wide(tmp_path / "wide.pt")


def write_wide(path: Path, *, ballast_mb: int = 0) -> Path:
    import torch

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ballast", torch.zeros(ballast_mb << 18))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.unsqueeze(1).expand(-1, 512, -1).tanh().mean(1)

    torch.jit.script(Wide()).save(str(path))
    return path
