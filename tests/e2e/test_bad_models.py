"""Models that are bad in every way that a model can be, in a real server: each pays for itself, and another one is served all the while."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from registry.signature import Signature, TensorSpec
from tasks.api_health import check_api_health, check_model_health
from tasks.probe import ProbeJob, ProbeModel, run_probe
from tests.e2e.harness import POLICY, box, go, wait_for
from tests.e2e.test_crashes import answers_by, withdrawn
from tests.unit.serving.helpers import affine_model, request
from tests.unit.serving.stuck import MODEL_TOML

TIMES = 12
SLOW = POLICY | {"stages": [0.5, 1.0], "dwell_seconds": 300.0, "deadline_seconds": 600.0, "soak_seconds": 300.0}


def onnx_model(path: Path, nodes: list[Any], constants: dict[str, Any], rank: int = 2) -> Path:
    """x [rows, 2] -> y, which says of itself that it is [rows, 2]."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "bad",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def bad_models(folder: Path) -> dict[str, Path]:
    """By what is wrong with them. Each is well where the first value of x is not above 100."""
    from onnx import TensorProto, helper

    node = helper.make_node
    heavy = [node("ReduceMax", ["x"], ["most"], keepdims=0), node("Greater", ["most", "limit"], ["heavy"])]
    limit = {"limit": np.float32(100)}
    huge = [
        *heavy,
        node("Cast", ["heavy"], ["once"], to=TensorProto.INT64),
        node("Mul", ["once", "much"], ["size"]),
        node("Reshape", ["size", "one"], ["sizes"]),
        node("ConstantOfShape", ["sizes"], ["block"]),
        node("ReduceSum", ["block"], ["nothing"], keepdims=0),
        node("Add", ["x", "nothing"], ["y"]),
    ]
    shape = [
        *heavy,
        node("Where", ["heavy", "flat", "same"], ["wanted"]),
        node("Reshape", ["x", "wanted"], ["y"]),
    ]
    return {
        "raises": affine_model(folder / "raises.onnx", fails_above=100),
        "nan": onnx_model(
            folder / "nan.onnx", [node("Sub", ["limit", "x"], ["left"]), node("Sqrt", ["left"], ["y"])], limit
        ),
        "shape": onnx_model(
            folder / "shape.onnx",
            shape,
            {**limit, "flat": np.array([2, -1], np.int64), "same": np.array([-1, 2], np.int64)},
        ),
        "memory": onnx_model(
            folder / "memory.onnx", huge, {**limit, "much": np.int64(2**50), "one": np.array([1], np.int64)}
        ),
    }


def test_models_that_raise_answer_nan_or_another_shape_or_ask_for_all_memory_fail_alone(tmp_path: Path) -> None:
    with box(tmp_path / "box") as found:
        models = {"good": affine_model(tmp_path / "good.onnx"), **bad_models(tmp_path)}
        never = affine_model(tmp_path / "never.onnx", fails_above=-1)
        for name, path in {**models, "never": never}.items():
            found.register("1", path, model=name)
            found.settle_by_hand("1", model=name)
        found.serve(
            MODELKEEP_HEALTH__ACT="false",
            MODELKEEP_HEALTH__MINIMUM_REQUESTS="5",
            MODELKEEP_HEALTH__WINDOW_SECONDS="600",
            MODELKEEP_MODELS__MAX_CONCURRENT_MODELS="10",
        )
        child = found.child_pid()
        with httpx.Client(base_url=found.url, timeout=60) as client:

            def ask(model: str, *values: float) -> int:
                return client.post(f"/v2/models/{model}/infer", json=request(*values)).status_code

            def health() -> dict[str, str]:
                entries = client.get("/api/v2/model-health").json()["models"]
                return {entry["model"]: entry["status"] for entry in entries}

            assert {name: ask(name, 1, 2) for name in models} == dict.fromkeys(models, 200)
            wait_for(
                "the first look at each",
                lambda: all(
                    "window_requests" in entry for entry in client.get("/api/v2/model-health").json()["models"]
                ),
            )
            assert set(health()) == {*models, "never"}
            came: dict[str, Counter[int]] = {name: Counter() for name in models}
            for _ in range(TIMES):
                for name in models:
                    came[name][ask(name, 1000, 2)] += 1
            assert {name: set(codes) for name, codes in came.items()} == {
                "good": {200},
                "raises": {500},
                "nan": {422},
                "shape": {500},
                "memory": {507},
            }
            assert {name: ask(name, 1, 2) for name in models} == dict.fromkeys(models, 200), "well on other inputs"

            bad = dict.fromkeys(models, "unhealthy") | {"good": "healthy", "never": "unknown"}
            try:
                wait_for("what is found of each", lambda: health() == bad)
            except AssertionError as error:
                raise AssertionError(f"{error}: {client.get('/api/v2/model-health').json()}") from error
        assert found.child_pid() == child
        # As check-health looks at it from the outside.
        api = check_api_health(found.url, timeout_seconds=60)
        assert [(look.asked, look.status_code, look.well) for look in api.looks] == [
            ("/", 200, True),
            ("/health", 200, True),
            ("/docs", 200, True),
            ("/v1/generate", 405, True),
        ]
        assert api.status == "healthy" and api.average_seconds is not None and api.average_seconds > 0
        inferred, said = check_model_health(found.url, timeout_seconds=60)
        assert inferred.status == "degraded" and len(inferred.looks) == len(said) + 1 == len(models) + 2
        assert [look.asked for look in inferred.looks if not look.well] == ["/v2/models/never/versions/1/infer"]
        assert all(entry["memory_bytes"] > 0 for entry in said)
    gone = check_api_health(found.url, timeout_seconds=5)
    assert gone.status == "unhealthy" and gone.average_seconds is None and "no answer" in gone.looks[0].problem
    assert check_model_health(found.url, timeout_seconds=5)[0].status == "unhealthy"


def segfaulting_at_load(folder: Path) -> Path:
    """A TorchScript model whose state writes far out of its memory while it is read."""
    import torch

    class State(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 1
            self.training = False

        @torch.jit.export
        def __getstate__(self) -> tuple[int, bool]:
            return self.factor, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[int, bool]) -> None:
            self.factor = state[0]
            self.training = state[1]
            where = torch.zeros([1, 1], dtype=torch.long) + (1 << 42)
            table = torch.ops.aten._sparse_coo_tensor_unsafe(where, torch.ones([1]), [4]).to_dense()
            self.factor = int(table.sum())

        def forward(self, flat: torch.Tensor) -> torch.Tensor:
            return flat * self.factor

    class Faulty(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = State()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.state(image.flatten(1)[:, :10])

    folder.mkdir()
    (folder / "model.toml").write_text(MODEL_TOML)
    torch.jit.script(Faulty()).save(str(folder / "model.pt"))
    return folder / "model.pt"


def test_a_model_that_segfaults_while_it_is_loaded_is_caught_by_the_probe(tmp_path: Path) -> None:
    path = segfaulting_at_load(tmp_path / "v2")
    signature = Signature((TensorSpec("image", "FP32", (-1, 1, 8, 8)),), (TensorSpec("scores", "FP32", (-1, 10)),))
    result = run_probe(ProbeJob(ProbeModel(path, "torchscript", signature)), timeout_seconds=120, memory_mb=4096)
    assert result.outcome == "crashed"
    assert "SIGSEGV while loading the candidate" in str(result.problem)


def test_a_candidate_that_segfaults_while_a_server_loads_it_is_withdrawn_with_the_second_crash(tmp_path: Path) -> None:
    with box(tmp_path, policy=dict(SLOW)) as found:
        found.first("1")
        found.register("2", segfaulting_at_load(tmp_path / "v2"))
        found.serve()
        child = found.child_pid()
        go(found.promote("2", "--unvalidated"))
        wait_for("a crash by the load", lambda: found.child_pid() != child)
        wait_for("the next child", found.is_ready)
        assert answers_by(found) == "1"
        withdrawn(found, "2")
        assert answers_by(found) == "1"
