"""ONNX Runtime's CUDA provider, where the installed package has it (onnxruntime-gpu in the place of onnxruntime)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.compute.onnx_runtime import CUDA
from serving.compute.runtimes import load_runtime
from serving.device.devices import Place
from serving.statuses import OutOfMemoryError
from tests.unit.serving.limited import ROW_BYTES, wide_model


@pytest.fixture
def provider(driver: Any) -> str:
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("for want of: an onnxruntime with the CUDA provider (package onnxruntime-gpu)")
    return CUDA


def ones(rows: int) -> dict[str, Any]:
    return {"x": np.ones((rows, 256), np.float32)}


def test_a_session_computes_on_the_device_and_answers_as_the_cpu_does(
    provider: str, place: Place, tmp_path: Path
) -> None:
    there: Any = load_runtime(wide_model(tmp_path / "m.onnx"), "onnx", signature=None, place=place)
    here = load_runtime(tmp_path / "m.onnx", "onnx", signature=None)
    assert there.device == "cuda:0" and there.memory["device"] > 0
    assert np.allclose(there.run(ones(5), None)["y"], here.run(ones(5), None)["y"], atol=1e-5)


def test_an_arena_that_is_full_raises_what_the_engine_splits_by(provider: str, tmp_path: Path) -> None:
    limit = 256 << 20
    runtime: Any = load_runtime(
        wide_model(tmp_path / "m.onnx"), "onnx", signature=None, place=Place("cuda", 0, memory_bytes=limit)
    )
    with pytest.raises(OutOfMemoryError):
        runtime.run(ones(2 * limit // ROW_BYTES), None)
    runtime.trim()
    assert np.allclose(runtime.run(ones(8), None)["y"], np.tanh(1.0), atol=1e-5)


def test_half_precision_is_taken_where_the_golden_cases_agree(provider: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", **{"input.x": ones(4)["x"]})
    runtime: Any = load_runtime(
        wide_model(tmp_path / "m.onnx"),
        "onnx",
        signature=None,
        place=Place("cuda", 0, fp16=True),
        golden=tmp_path / "golden.npz",
    )
    assert (runtime.precision, runtime.precision_reason) == ("fp16", "fp16: agrees on 4 golden cases")
    assert np.allclose(runtime.run(ones(3), None)["y"], np.tanh(1.0), atol=1e-2)
