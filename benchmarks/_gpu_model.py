"""Models and a clock for the benchmarks on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from registry.signature import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 3, 64, 64)),), (TensorSpec("y", "FP32", (-1, 100)),))


def write_model(path: Path, *, ballast_mb: int = 0) -> Path:
    """A convolutional network in TorchScript, x[n, 3, 64, 64] to y[n, 100]; `ballast_mb` of weights besides."""
    import torch

    torch.manual_seed(1)
    layers: list[torch.nn.Module] = []
    for before, after in ((3, 64), (64, 128), (128, 256), (256, 256)):
        layers += [torch.nn.Conv2d(before, after, 3, stride=2, padding=1), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4096, 100)).eval()
    if ballast_mb:
        network.register_buffer("ballast", torch.zeros(ballast_mb << 18))
    with torch.inference_mode():
        torch.jit.trace(network, (torch.zeros(2, 3, 64, 64),)).save(str(path))
    return path


def seconds(work: Callable[[], object], *, rounds: int = 200, warm: int = 20) -> list[float]:
    """How long each of so many runs takes, after some that do not count."""
    for _ in range(warm):
        work()
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return found


def shown(times: list[float]) -> str:
    """The median and the 99th percentile, in milliseconds."""
    cuts = statistics.quantiles(times, n=100)
    return f"{1e3 * statistics.median(times):8.3f} ms median {1e3 * cuts[98]:8.3f} ms p99"
