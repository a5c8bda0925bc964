"""What looking after a device's memory costs: a look, a clean-up, a batch that is split, and a version exchanged for another.

`python -m benchmarks.gpu_memory`. The exchange is load, first answer and letting go, as the server does it where both versions
do not fit.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._gpu_model import SIGNATURE, seconds, shown, write_model
from registry import profiles
from serving.compute.engine import LoadedVersion
from serving.compute.runtimes import load_runtime
from serving.device.devices import CudaDevice, Place
from serving.device.memory import MemoryOptimizer
from serving.device.memory_limits import BatchLimit

BUDGET_BYTES = 2 << 30


def main() -> None:
    import pynvml
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"this torch has no CUDA: {torch.__version__}")
    pynvml.nvmlInit()
    device = CudaDevice(0, nvml=pynvml, handle=profiles.nvml_handle(0, os.environ))
    print(f"{device.name}, torch {torch.__version__}")
    place = Place("cuda", 0, memory_bytes=BUDGET_BYTES)
    with tempfile.TemporaryDirectory(prefix="modelkeep-gpu-") as folder:
        path = write_model(Path(folder) / "model.pt")
        heavy = write_model(Path(folder) / "heavy.pt", ballast_mb=500)
        runtime: Any = load_runtime(path, "torchscript", signature=SIGNATURE, place=place)
        inputs = {"x": np.zeros((256, 3, 64, 64), np.float32)}
        runtime.run(inputs, None)
        optimizer = MemoryOptimizer(device, budget_bytes=BUDGET_BYTES)
        print(f"a look at the memory:     {shown(seconds(optimizer.profile))}")
        clean_ups, freed, after = [], [], []
        for _ in range(20):
            runtime.run(inputs, None)
            done = optimizer.clean_up("benchmark", now=True)
            assert done is not None
            clean_ups.append(done.seconds)
            freed.append(done.freed_mb)
            begun = time.perf_counter()
            runtime.run(inputs, None)
            after.append(time.perf_counter() - begun)
        usual = seconds(lambda: runtime.run(inputs, None), rounds=50)
        print(f"a clean-up:               {shown(clean_ups)}, {statistics.median(freed):.0f} MB given back")
        print(f"the run that follows it:  {shown(after)} (usual: {shown(usual)})")
        asyncio.run(split(runtime, optimizer))
        times = []
        for _ in range(10):
            begun = time.perf_counter()
            other: Any = load_runtime(heavy, "torchscript", signature=SIGNATURE, place=place)
            other.run({"x": np.zeros((1, 3, 64, 64), np.float32)}, None)
            times.append(time.perf_counter() - begun)
            other.close()
            optimizer.clean_up("benchmark", now=True)
        print(f"500 MB of weights, from the disk to the first answer: {shown(times)}")


async def split(runtime: Any, optimizer: MemoryOptimizer) -> None:
    """A request beyond the memory, the first time and once the limit is learnt."""
    rows = 16384
    version = LoadedVersion(
        "m", "1", "0" * 64, runtime, rows_independent=True, max_batch=32, queue_size=10, limit=BatchLimit(32),
        clean_up=optimizer.ran_out,
    )  # fmt: skip
    inputs = {"x": np.zeros((rows, 3, 64, 64), np.float32)}
    for when in ("at first", "once learnt"):
        begun = time.perf_counter()
        work = version.submit(inputs, None)
        await work.future
        took, learnt = time.perf_counter() - begun, version.limit.learnt
        print(
            f"{rows} rows, {when}: {took:.3f} s, split to {learnt} rows, {version.telemetry.out_of_memory} times out of memory"
        )


if __name__ == "__main__":
    main()
