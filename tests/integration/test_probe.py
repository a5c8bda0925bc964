"""The probe as a real process: what it measures of small real models, and how it ends when they misbehave."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from registry.formats import inspect
from registry.policy import PromotionPolicy
from registry.signature import Signature, TensorSpec
from serving.traffic.capture import name_of
from tasks.probe import ProbeJob, ProbeModel, ProbeResult, run_probe
from tasks.validation import decide

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

CASES = 40


def save(
    path: Path,
    nodes: list[object],
    initializers: dict[str, np.ndarray] | None = None,
    *,
    x: list[object] | None = None,
    y: list[object] | None = None,
) -> ProbeModel:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x or ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y or ["n", None])],
        [numpy_helper.from_array(value, name) for name, value in (initializers or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return ProbeModel(path, "onnx")


def linear(path: Path, *, flipped: bool = False) -> ProbeModel:
    """y = x W: row i has its largest output in column i of the input's largest column; flipped, in the opposite one."""
    weights = np.eye(4, dtype=np.float32)[:: -1 if flipped else 1].copy()
    return save(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights})


def write_golden(path: Path, **more: np.ndarray) -> Path:
    labels = np.arange(CASES) % 4
    inputs = np.eye(4, dtype=np.float32)[labels] + np.random.default_rng(0).normal(0, 0.1, (CASES, 4)).astype("f4")
    np.savez(path, **{"input.x": inputs, "label": labels, **more})
    return path


def probe(job: ProbeJob, *, timeout_seconds: float = 60, memory_mb: int = 2048) -> ProbeResult:
    result = run_probe(job, timeout_seconds=timeout_seconds, memory_mb=memory_mb)
    print(result.log_tail)
    return result


def test_two_models_are_measured_side_by_side_on_the_same_golden_cases(tmp_path: Path) -> None:
    good, bad = linear(tmp_path / "good.onnx"), linear(tmp_path / "bad.onnx", flipped=True)
    result = probe(ProbeJob(bad, good, write_golden(tmp_path / "golden.npz")))
    assert result.outcome == "done", result.problem
    assert result.golden_cases == CASES
    for figures, accuracy in ((result.stable, 1.0), (result.candidate, 0.0)):
        assert figures is not None and figures.golden is not None and figures.latency is not None
        assert figures.golden.accuracy == accuracy
        assert figures.golden.failures == 0
        assert figures.latency.samples >= 100
        assert 0 < figures.latency.p50_seconds <= figures.latency.p95_seconds
        assert figures.load_seconds is not None and figures.load_seconds > 0
        assert figures.memory_bytes is not None and figures.memory_bytes > 0
        assert figures.signature == Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 4)),))
        assert figures.rows_independent is True
    policy = PromotionPolicy(latency_ratio=1000.0)  # microseconds on a busy machine
    report = decide(result, policy, has_stable=True)
    assert [check.name for check in report.errors] == ["accuracy"]
    assert decide(probe(ProbeJob(good, bad, tmp_path / "golden.npz")), policy, has_stable=True).passed


def test_without_golden_cases_random_inputs_are_used_and_named(tmp_path: Path) -> None:
    result = probe(ProbeJob(linear(tmp_path / "m.onnx"), seed=7))
    assert result.outcome == "done"
    assert result.inputs == "random, seed 7"
    assert result.stable is None and result.candidate is not None
    assert result.candidate.golden is None
    assert result.candidate.rows_independent is True
    assert "random rows (seed 7)" in str(result.candidate.rows_how)


def test_rows_that_see_each_other_are_found(tmp_path: Path) -> None:
    mean = save(
        tmp_path / "mean.onnx",
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "m"], ["y"]),
        ],
    )
    result = probe(ProbeJob(mean, golden=write_golden(tmp_path / "golden.npz")))
    assert result.candidate is not None
    assert result.candidate.rows_independent is False
    assert "differ by" in str(result.candidate.rows_how)


def test_a_fixed_first_dimension_is_never_batched(tmp_path: Path) -> None:
    fixed = save(tmp_path / "fixed.onnx", [helper.make_node("Relu", ["x"], ["y"])], x=[1, 4], y=[1, 4])
    result = probe(ProbeJob(fixed, golden=write_golden(tmp_path / "golden.npz")))
    assert result.candidate is not None and result.candidate.golden is not None
    assert result.candidate.golden.failures == 0
    assert result.candidate.rows_independent is False
    assert "does not vary" in str(result.candidate.rows_how)


def test_a_case_that_fails_is_counted_and_the_others_are_judged(tmp_path: Path) -> None:
    # Gather with an index taken from the input: out of range for the one case whose values are large.
    gather = save(
        tmp_path / "gather.onnx",
        [
            helper.make_node("ReduceMax", ["x"], ["top"], axes=[1], keepdims=0),
            helper.make_node("Cast", ["top"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["row"], axis=0),
            helper.make_node("Add", ["x", "row"], ["y"]),
        ],
        {"table": np.zeros((3, 4), np.float32)},
    )
    golden = write_golden(tmp_path / "golden.npz")
    with np.load(golden) as file:
        inputs, labels = file["input.x"], file["label"]
    inputs[5, labels[5]] = 99.0
    np.savez(golden, **{"input.x": inputs, "label": labels})
    result = probe(ProbeJob(gather, linear(tmp_path / "good.onnx"), golden))
    assert result.candidate is not None and result.candidate.golden is not None
    assert result.candidate.golden.failures == 1
    assert str(result.candidate.golden.first_failure).startswith("case 5: ")
    assert result.candidate.golden.labels is not None
    assert sum(result.candidate.golden.labels) == CASES - 1
    assert not decide(result, PromotionPolicy(), has_stable=True).passed


def test_outputs_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    log = save(tmp_path / "log.onnx", [helper.make_node("Log", ["x"], ["y"])])
    result = probe(ProbeJob(log, golden=write_golden(tmp_path / "golden.npz")))
    assert result.outcome == "done"
    assert result.candidate is not None and result.candidate.golden is not None
    assert result.candidate.golden.non_finite > 0
    assert not decide(result, PromotionPolicy(), has_stable=False).passed


def test_expected_outputs_are_compared_with_tolerance(tmp_path: Path) -> None:
    golden = write_golden(tmp_path / "golden.npz")
    with np.load(golden) as file:
        inputs = file["input.x"]
    expected = inputs * (1 + 1e-4)
    expected[7] += 1
    np.savez(golden, **{"input.x": inputs, "output.y": expected})
    result = probe(ProbeJob(linear(tmp_path / "good.onnx"), golden=golden))
    assert result.candidate is not None and result.candidate.golden is not None
    assert result.candidate.golden.labels is None
    assert result.candidate.golden.outputs == [int(i != 7) for i in range(CASES)]


def test_a_file_that_does_not_load_is_a_figure_and_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(linear(tmp_path / "good.onnx").path.read_bytes()[:60])
    result = probe(ProbeJob(ProbeModel(tmp_path / "cut.onnx", "onnx"), linear(tmp_path / "good.onnx")))
    assert result.outcome == "done"
    assert result.candidate is not None and not result.candidate.loaded
    assert "cut.onnx" in str(result.candidate.error)
    assert not decide(result, PromotionPolicy(), has_stable=True).passed


@pytest.mark.parametrize(
    ("arrays", "wrong"),
    [
        ({"image": np.zeros(3)}, "no array 'input.<name>'"),
        ({"input.x": np.zeros((3, 4)), "label": np.zeros(2, int)}, "one entry a case"),
        ({"input.x": np.zeros((3, 4)), "label": np.zeros(3)}, "must be integers"),
        ({"input.x": np.zeros((0, 4))}, "above 0"),
        ({"input.x": np.array([{"a": 1}], dtype=object)}, "not a .npz of plain arrays"),
    ],
)
def test_a_golden_file_that_cannot_be_used_is_named(tmp_path: Path, arrays: dict[str, np.ndarray], wrong: str) -> None:
    np.savez(tmp_path / "golden.npz", **arrays)  # type: ignore[arg-type]
    result = probe(ProbeJob(linear(tmp_path / "m.onnx"), golden=tmp_path / "golden.npz"))
    assert result.outcome == "refused"
    assert wrong in str(result.problem)
    assert not decide(result, PromotionPolicy(), has_stable=False).passed


def test_golden_inputs_that_do_not_fit_the_model_are_failures_with_a_reason(tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", **{"input.x": np.zeros((3, 9), np.float32)})
    result = probe(ProbeJob(linear(tmp_path / "m.onnx"), golden=tmp_path / "golden.npz"))
    assert result.candidate is not None and result.candidate.golden is not None
    assert result.candidate.golden.failures == 3
    assert "is of shape [1, 9], the model takes [-1, 4]" in str(result.candidate.golden.first_failure)
    assert result.candidate.latency is None


def test_memory_beyond_the_limit_is_refused_to_the_model_and_not_taken_from_the_machine(tmp_path: Path) -> None:
    hungry = save(
        tmp_path / "hungry.onnx",
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        {"shape": np.array([200_000_000, 4], np.int64)},
    )
    golden = write_golden(tmp_path / "golden.npz")
    result = probe(ProbeJob(hungry, golden=golden), memory_mb=512)
    report = decide(result, PromotionPolicy(), has_stable=False)
    assert not report.passed
    if result.outcome == "done":  # the runtime turned it into an error
        assert result.candidate is not None and result.candidate.golden is not None
        assert result.candidate.golden.failures == CASES
    else:
        assert "out of the 512 MB" in str(result.problem)


def test_a_model_that_never_ends_is_killed_at_the_time_limit(tmp_path: Path) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_in"], ["go_out"]),
            helper.make_node("Sin", ["v_in"], ["v_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_in", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, None),
        ],
    )
    endless = save(
        tmp_path / "endless.onnx",
        [helper.make_node("Loop", ["count", "go", "x"], ["y"], body=body)],
        {"count": np.array(2**62, np.int64), "go": np.array(True)},
    )
    result = probe(ProbeJob(endless), timeout_seconds=4)
    assert result.outcome == "timeout"
    assert result.problem == "the probe was stopped after 4 s while loading the candidate"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_model_needs_the_signature_it_is_given_and_is_measured_alike(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.jit.trace(torch.nn.Linear(4, 4), torch.zeros(1, 4))
    module.save(str(tmp_path / "m.pt"))
    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 4)),))
    job = ProbeJob(
        ProbeModel(tmp_path / "m.pt", "torchscript", signature),
        linear(tmp_path / "good.onnx"),
        write_golden(tmp_path / "golden.npz"),
    )
    result = probe(job)
    assert result.outcome == "done", result.problem
    assert result.candidate is not None and result.candidate.golden is not None
    assert result.candidate.golden.failures == 0
    assert result.candidate.rows_independent is True
    unsigned = probe(ProbeJob(ProbeModel(tmp_path / "m.pt", "torchscript")))
    assert unsigned.candidate is not None
    assert not unsigned.candidate.loaded and "signature" in str(unsigned.candidate.error)


def test_a_candidate_with_another_optional_input_answers_the_golden_cases_by_its_default(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Mul", ["h", "factor"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("factor", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.eye(4, dtype="f4"), "w"), numpy_helper.from_array(np.ones(1, "f4"), "factor")],
    )
    path = tmp_path / "optional.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    found = inspect(path, max_bytes=2**30).signature
    assert found is not None and [spec.optional for spec in found.inputs] == [False, True]
    result = probe(
        ProbeJob(ProbeModel(path, "onnx", found), linear(tmp_path / "good.onnx"), write_golden(tmp_path / "golden.npz"))
    )
    assert result.outcome == "done", result.problem
    assert result.candidate is not None and result.candidate.golden is not None
    assert result.candidate.signature == found
    assert result.candidate.golden.accuracy == 1.0 and result.candidate.rows_independent is True
    report = decide(result, PromotionPolicy(latency_ratio=1000.0), has_stable=True)
    assert report.passed, report.summary


def test_an_output_is_held_to_its_own_tolerance_and_the_farthest_case_is_named(tmp_path: Path) -> None:
    golden = write_golden(tmp_path / "golden.npz")
    with np.load(golden) as file:
        inputs = file["input.x"]
    expected = inputs + 0.01
    expected[7] += 0.2
    np.savez(golden, **{"input.x": inputs, "output.y": expected})
    model = linear(tmp_path / "good.onnx")
    for limit, right in ((0.05, CASES - 1), (0.5, CASES)):
        result = probe(ProbeJob(model, golden=golden, tolerances={"y": limit}))
        assert result.candidate is not None and result.candidate.golden is not None
        found = result.candidate.golden
        assert found.outputs is not None and sum(found.outputs) == right
        assert found.deviations["y"]["beyond"] == CASES - right
        assert found.deviations["y"]["worst"] == pytest.approx(0.21, abs=1e-4)
        assert found.deviations["y"]["worst_case"] == 7
        report = decide(result, PromotionPolicy(tolerances={"y": limit}), has_stable=False)
        assert report.passed is (right == CASES)


def test_the_metric_that_the_golden_file_names_is_compared_in_pairs(tmp_path: Path) -> None:
    golden = write_golden(tmp_path / "golden.npz")
    with np.load(golden) as file:
        inputs = file["input.x"]
    np.savez(golden, **{"input.x": inputs, "target": inputs, "metric": np.array("mean_absolute_error")})
    half = save(
        tmp_path / "half.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.eye(4, dtype="f4") / 2}
    )
    result = probe(ProbeJob(half, linear(tmp_path / "good.onnx"), golden))
    assert result.metric == "mean_absolute_error", result.problem
    assert result.candidate is not None and result.candidate.golden is not None
    scores = result.candidate.golden.scores
    assert scores is not None
    assert scores == pytest.approx(np.abs(inputs / 2).mean(axis=1).tolist(), rel=1e-5)
    policy = PromotionPolicy(latency_ratio=1000.0)
    report = decide(result, policy, has_stable=True)
    assert [check.name for check in report.errors] == ["mean_absolute_error"]
    assert decide(result, policy.model_copy(update={"accuracy_margin": 1.0}), has_stable=True).passed


def test_a_metric_that_nobody_knows_or_that_has_nothing_to_be_measured_by_is_refused(tmp_path: Path) -> None:
    model, golden = linear(tmp_path / "good.onnx"), write_golden(tmp_path / "golden.npz", metric=np.array("f1"))
    result = probe(ProbeJob(model, golden=golden))
    assert result.outcome == "refused"
    assert "'f1' is not known; known are accuracy, exact_match, mean_absolute_error" in str(result.problem)
    write_golden(golden)
    for metric, needs in (("exact_match", "needs 'output.<name>'"), ("mean_absolute_error", "needs 'target' or")):
        result = probe(ProbeJob(model, golden=golden, metric=metric))
        assert result.outcome == "refused" and needs in str(result.problem)


def test_a_replay_runs_the_same_requests_through_both_versions_one_after_the_other(tmp_path: Path) -> None:
    golden = write_golden(tmp_path / "golden.npz")
    good, flipped = linear(tmp_path / "good.onnx"), linear(tmp_path / "flipped.onnx", flipped=True)
    result = probe(ProbeJob(flipped, good, golden, replay=30))
    assert result.outcome == "done", result.problem
    found = result.replay
    assert found is not None
    assert (found["requests"], found["of"], found["inputs"]) == (30, CASES, "golden")
    assert found["compared"] == 30 and found["disagreements"]["top"] == 30
    assert found["candidate"]["errors"] == found["stable"]["errors"] == 0
    assert found["slow_threshold_seconds"] == pytest.approx(1.25 * found["stable_p95_seconds"])
    same = probe(ProbeJob(good, good, golden, replay=1000)).replay
    assert same is not None
    assert same["requests"] == CASES and same["disagreements"] == {"top": 0, "tolerance": 0, "exact": 0}


def test_a_version_that_fails_in_a_replay_is_counted_and_one_that_does_not_load_is_named(tmp_path: Path) -> None:
    golden, good = write_golden(tmp_path / "golden.npz"), linear(tmp_path / "good.onnx")
    wide = save(tmp_path / "wide.onnx", [helper.make_node("Relu", ["x"], ["y"])], x=["n", 9], y=["n", 9])
    found = probe(ProbeJob(wide, good, golden, replay=30)).replay
    assert found is not None
    assert found["candidate"]["errors"] == 30 and "is of shape" in found["candidate"]["first_error"]
    assert found["compared"] == 0
    (tmp_path / "cut.onnx").write_bytes(good.path.read_bytes()[:60])
    found = probe(ProbeJob(ProbeModel(tmp_path / "cut.onnx", "onnx"), good, golden, replay=30)).replay
    assert found is not None and str(found["problem"]).startswith("the candidate does not load")


def test_captured_requests_are_replayed_as_their_clients_sent_them(tmp_path: Path) -> None:
    folder = tmp_path / "captured"
    folder.mkdir()
    value = np.eye(4, dtype="<f4")
    tensor = {"name": "x", "datatype": "FP32"}
    for number in range(12):
        if number % 3 == 0:  # JSON, two rows
            document = {"inputs": [{**tensor, "shape": [2, 4], "data": value[:2].tolist()}]}
            header, body = None, json.dumps(document).encode()
        elif number % 3 == 1:  # binary, one row
            document = {"inputs": [{**tensor, "shape": [1, 4], "parameters": {"binary_data_size": 16}}]}
            text = json.dumps(document).encode()
            header, body = len(text), text + value[2:3].tobytes()
        else:  # raw
            header, body = 0, value.tobytes()
        (folder / name_of(1_700_000_000_000_000_000 + number, header)).write_bytes(body)
    good, flipped = linear(tmp_path / "good.onnx"), linear(tmp_path / "flipped.onnx", flipped=True)
    found = probe(ProbeJob(flipped, good, replay=1000, captured=folder)).replay
    assert found is not None
    assert (found["requests"], found["of"], found["inputs"]) == (12, 12, "captured")
    assert found["stable"]["errors"] == 0 and found["compared"] == 12 and found["disagreements"]["top"] == 12
    wide = save(tmp_path / "wide.onnx", [helper.make_node("Relu", ["x"], ["y"])], x=["n", 9], y=["n", 9])
    found = probe(ProbeJob(wide, good, replay=1000, captured=folder)).replay
    assert found is not None
    assert found["candidate"]["errors"] == 12 and "the model takes [-1, 9]" in found["candidate"]["first_error"]
    (tmp_path / "empty").mkdir()
    refused = probe(ProbeJob(flipped, good, replay=10, captured=tmp_path / "empty"))
    assert refused.outcome == "refused" and "no captured requests" in str(refused.problem)


def test_large_answers_make_a_replay_shorter_and_are_not_held_against_the_candidate(tmp_path: Path) -> None:
    folder = tmp_path / "captured"
    folder.mkdir()
    document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.0, 1.0, 2.0, 3.0]}]}
    for number in range(120):
        (folder / name_of(1_700_000_000_000_000_000 + number, None)).write_text(json.dumps(document))
    times = np.array([1, 1 << 18], np.int64)
    large = save(tmp_path / "large.onnx", [helper.make_node("Tile", ["x", "times"], ["y"])], {"times": times})  # 4 MB
    found = probe(ProbeJob(large, large, replay=1000, captured=folder), memory_mb=800).replay
    assert found is not None and found["problem"] is None
    assert found["candidate"]["first_error"] is None and found["candidate"]["errors"] == 0
    assert 20 <= found["requests"] == found["compared"] < found["of"] == 120


# --- how it ends: a stand-in for a model whose native code does what Python cannot make one do


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr("tasks.probe.PROBE_ARGUMENTS", ("-c", textwrap.dedent(program)))


def test_a_segmentation_fault_is_reported_with_its_signal_and_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        monkeypatch,
        """
        import json, os, signal, sys
        sys.stdin.read()
        print(json.dumps({"phase": "loading the candidate"}), flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
        """,
    )
    result = probe(ProbeJob(ProbeModel(tmp_path / "m.onnx", "onnx")))
    assert result.outcome == "crashed"
    assert result.problem == "the probe was ended by SIGSEGV while loading the candidate"


def test_a_kill_by_the_kernel_and_an_exit_without_a_result_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ProbeJob(ProbeModel(tmp_path / "m.onnx", "onnx"))
    stand_in(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "most often the kernel, out of memory" in str(probe(job).problem)
    stand_in(monkeypatch, "x = bytearray(10 ** 12)")
    assert "out of the 2048 MB" in str(probe(job).problem)
    stand_in(monkeypatch, "import sys; sys.exit('no such thing')")
    assert "exit code 1 and no result (no such thing) before it began" in str(probe(job).problem)


def ended(pid: int) -> bool:
    """Whether the process is gone, or a zombie that nobody has waited for; a killed one takes a moment to die."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(200):
        try:
            if stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_what_the_probe_started_dies_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch,
        f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        sys.exit(3)
        """,
    )
    assert probe(ProbeJob(ProbeModel(tmp_path / "m.onnx", "onnx"))).outcome == "crashed"
    pid = int((tmp_path / "pid").read_text())
    assert ended(pid), f"process {pid} outlived the probe"


def test_the_probe_gets_no_credentials_and_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELKEEP_DATABASE_URL", "mysql+pymysql://user:secret@db/x")
    stand_in(monkeypatch, "import os, sys; sys.exit(repr((sorted(os.environ), os.environ['CUDA_VISIBLE_DEVICES'])))")
    problem = str(probe(ProbeJob(ProbeModel(tmp_path / "m.onnx", "onnx"))).problem)
    assert "MODELKEEP" not in problem
    assert "''" in problem


def test_a_folder_named_serving_in_the_working_directory_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    model = linear(tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    result = probe(ProbeJob(ProbeModel(Path("m.onnx"), "onnx")))
    assert result.outcome == "done", result.problem
    assert model.path.exists()


def test_a_job_that_makes_no_sense_ends_with_exit_code_2_and_says_what_is_missing() -> None:
    import json
    import subprocess

    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "serving.probe"],
        input=b'{"stable": null}',
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert json.loads(done.stdout.splitlines()[-1]) == {"error": "the job is not valid: KeyError: 'candidate'"}
