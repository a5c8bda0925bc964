"""torch on a device: rows a second and latency by batch, in full and half precision, with host memory pinned or not.

`python -m benchmarks.gpu_inference`. Through the same runtime that the server uses; the device is the first visible one.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._gpu_model import SIGNATURE, seconds, shown, write_model
from serving.compute.runtimes import load_runtime
from serving.device.devices import Place

BATCHES = (1, 8, 32, 128)


def main() -> None:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"this torch has no CUDA: {torch.__version__}")
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory(prefix="modelkeep-gpu-") as folder:
        path = write_model(Path(folder) / "model.pt")
        golden = Path(folder) / "golden.npz"
        np.savez(golden, **{"input.x": random.standard_normal((32, 3, 64, 64)).astype(np.float32)})
        for wanted in ("fp32", "fp16"):
            place = Place("cuda", 0, fp16=wanted == "fp16")
            runtime: Any = load_runtime(path, "torchscript", signature=SIGNATURE, place=place, golden=golden)
            note = "" if runtime.precision == wanted else f" (not taken: {runtime.precision_reason})"
            for batch in BATCHES:
                inputs = {"x": random.standard_normal((batch, 3, 64, 64)).astype(np.float32)}
                times = seconds(lambda inputs=inputs, runtime=runtime: runtime.run(inputs, None))
                rate = batch / statistics.median(times)
                print(f"{wanted}, batch {batch:4}: {rate:9.0f} rows/s, {shown(times)}{note}")
            runtime.close()
    for megabytes in (1, 16, 64):
        host = torch.zeros(megabytes << 18)
        copies = {"pageable": host, "pinned": host.pin_memory()}
        for name, source in copies.items():

            def copy(source: Any = source) -> None:
                source.to("cuda:0", non_blocking=True)
                torch.cuda.synchronize(0)

            times = seconds(copy, rounds=100)
            print(
                f"copy of {megabytes:3} MB, {name:>8}: {megabytes / statistics.median(times) / 1024:6.1f} GiB/s, {shown(times)}"
            )


if __name__ == "__main__":
    main()
