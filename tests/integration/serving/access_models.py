"""What the server of the access tests has loaded, and the keys that it knows."""

from __future__ import annotations

import time

import numpy as np

from serving.compute.engine import LoadedVersion
from tests.unit.serving.helpers import Arrays, PythonRuntime

LARGE_BYTES = 8 << 20


def key_text(name: str) -> str:
    """The key of somebody, made of his name."""
    return f"mk_{name.encode().hex():0<12.12}_{name * 43:.43}"


def _sleep(inputs: Arrays) -> dict[str, np.ndarray]:
    time.sleep(float(inputs["x"].flat[0]))
    return {"y": inputs["x"]}


def _swell(inputs: Arrays) -> dict[str, np.ndarray]:
    return {"y": np.zeros((LARGE_BYTES // 8, 2), np.float32)}


def versions() -> list[LoadedVersion]:
    return [
        LoadedVersion(model, "1", "0" * 64, runtime, rows_independent=False, max_batch=1, queue_size=100)
        for model, runtime in (
            ("affine", PythonRuntime()),
            ("slow", PythonRuntime(_sleep)),
            ("large", PythonRuntime(_swell)),
        )
    ]
