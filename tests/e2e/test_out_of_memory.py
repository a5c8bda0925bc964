"""A server whose memory for models is really limited: what does not fit is split, and everybody is answered."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.e2e.harness import box, wait_for
from tests.unit.serving.limited import ROW_BYTES, wide_model

BUDGET_MB = 48


def test_requests_that_do_not_fit_the_arena_are_split_and_answered_and_the_report_tells_of_it(tmp_path: Path) -> None:
    with box(tmp_path / "box") as made:
        made.extra |= {"MODELKEEP_GPU__MAX_MEMORY_MB": str(BUDGET_MB), "MODELKEEP_GPU__LIMIT_ON_CPU": "true"}
        (made.folder / "model.toml").write_text("max_batch = 24\n")
        made.register("1", wide_model(made.folder / "wide.onnx"), model="wide")
        made.settle_by_hand("1", model="wide")
        made.serve()

        def asked(rows: int) -> Any:
            """The status of an answer, and whether each of its rows is right."""
            x = np.linspace(-1, 1, rows, dtype=np.float32)
            tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 256], "data": np.repeat(x, 256).tolist()}
            answer = httpx.post(f"{made.url}/v2/models/wide/infer", json={"inputs": [tensor]}, timeout=30)
            if answer.status_code != 200:
                return answer.text
            y = np.array(answer.json()["outputs"][0]["data"]).reshape(rows, 256)
            return bool(np.allclose(y, np.tanh(x)[:, None], atol=1e-5))

        large = 3 * (BUDGET_MB << 20) // ROW_BYTES
        assert asked(large) is True
        with ThreadPoolExecutor(8) as clients:
            assert list(clients.map(asked, [5] * 24)) == [True] * 24
        report = asked_for(made.url)
        assert report["device"] is None and report["profile"]["total_mb"] == 0
        assert report["memory"]["total_mb"] == BUDGET_MB and report["out_of_memory_count"] >= 1
        (model,) = report["models"]
        assert model["batch_rows_most"] == 24 and 1 <= model["rows_learnt"] < large
        assert report["cleanup_events_count"] >= 1
        wait_for("a sample", lambda: asked_for(made.url)["performance"]["sample"])
        metrics = httpx.get(f"{made.url}/metrics", timeout=10).text
        assert 'modelkeep_out_of_memory_failed_total{model="wide",version="1"} 0.0' in metrics
        assert httpx.get(f"{made.url}/api/gpu/profile", timeout=10).json()["models"][0]["computes_on"] == "cpu"


def asked_for(url: str) -> dict[str, Any]:
    return dict(httpx.get(f"{url}/api/gpu/optimization-report", timeout=10).json())
