"""The demo's versions as they are built: each has the property that its part of the story needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from modelkeep.demo import models
from modelkeep.demo.answers import DirectRuns
from modelkeep.demo.data import load_digits

DIGITS = load_digits()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return models.build_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def direct(built: dict[str, Path]) -> DirectRuns:
    return DirectRuns(built, DIGITS.traffic.images)


def golden(built: dict[str, Path], name: str) -> float:
    return models.accuracy(built[name], DIGITS.golden)


def test_every_version_has_a_file_and_a_sentence(built: dict[str, Path]) -> None:
    assert list(built) == ["v1", "v2", "v3", "v4", "v5", "v7", "v8"]
    assert set(models.ABOUT) == set(built)


def test_every_file_is_a_valid_onnx_model_with_a_free_batch(built: dict[str, Path]) -> None:
    for path in built.values():
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
        (given,), (taken,) = model.graph.input, model.graph.output
        assert (given.name, taken.name) == ("image", "scores")
        assert given.type.tensor_type.shape.dim[0].dim_param == "n"
        assert [d.dim_value for d in given.type.tensor_type.shape.dim[1:]] == [1, 8, 8]
        assert taken.type.tensor_type.shape.dim[0].dim_param == "n"


def test_v1_is_fair_and_v2_clearly_better(built: dict[str, Path]) -> None:
    assert 0.85 <= golden(built, "v1") <= 0.96
    assert golden(built, "v2") >= golden(built, "v1") + 0.02
    assert golden(built, "v2") >= 0.96


def test_v3_loses_far_more_than_the_two_points_that_may_be_lost(built: dict[str, Path]) -> None:
    assert 0.5 <= golden(built, "v3") <= golden(built, "v2") - 0.05


@pytest.mark.parametrize("name", ["v4", "v7", "v8"])
def test_on_the_golden_cases_it_is_as_good_as_v2(built: dict[str, Path], name: str) -> None:
    assert golden(built, name) >= golden(built, "v2") - 0.02


def test_v4_raises_on_exactly_the_heavy_images_and_on_no_golden_case(
    built: dict[str, Path], direct: DirectRuns
) -> None:
    raised = np.array([direct.error("v4", i) is not None for i in range(len(DIGITS.traffic))])
    assert np.array_equal(raised, DIGITS.traffic.heavy)
    assert "Gather" in (direct.error("v4", int(np.flatnonzero(raised)[0])) or "")
    on_golden = DirectRuns(built, DIGITS.golden.images)
    assert all(on_golden.error("v4", i) is None for i in range(len(DIGITS.golden)))


def test_v4_fails_its_whole_batch_for_one_heavy_image_and_not_alone(built: dict[str, Path]) -> None:
    light, heavy = np.flatnonzero(~DIGITS.traffic.heavy)[:3], np.flatnonzero(DIGITS.traffic.heavy)[:1]
    mixed = DIGITS.traffic.where(np.isin(np.arange(len(DIGITS.traffic)), np.concatenate([light, heavy])))
    with pytest.raises(Exception, match="out of data bounds"):
        models.accuracy(built["v4"], mixed)
    assert models.accuracy(built["v4"], mixed.where(~mixed.heavy)) > 0


@pytest.mark.parametrize("name", ["v1", "v2", "v3", "v4", "v5", "v7", "v8"])
def test_a_batch_answers_as_its_rows_do_alone(built: dict[str, Path], name: str) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(built[name]), providers=["CPUExecutionProvider"])
    rows = DIGITS.golden.images[:16]
    (together,) = session.run(["scores"], {"image": rows})
    alone = np.concatenate([session.run(["scores"], {"image": row[None]})[0] for row in rows])
    assert together.shape == (16, 10)
    assert np.allclose(together, alone, rtol=1e-4, atol=1e-4)


def test_v5_gives_v2s_answers(direct: DirectRuns) -> None:
    for image in range(0, len(DIGITS.traffic), 10):
        ours, theirs = direct.scores("v5", image), direct.scores("v2", image)
        assert ours is not None and theirs is not None
        assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_v5s_work_is_still_there_after_onnx_runtime_has_optimised_the_graph(
    built: dict[str, Path], tmp_path: Path
) -> None:
    import onnxruntime

    convolutions = {}
    for name in ("v2", "v5"):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        onnxruntime.InferenceSession(str(built[name]), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
        convolutions[name] = sum("Conv" in node.op_type for node in nodes)
    assert convolutions["v5"] == convolutions["v2"] + models.ROUNDS


def test_versions_can_be_told_apart_by_their_answers(direct: DirectRuns) -> None:
    """Otherwise comparing an answer with the version that it names would prove nothing."""
    names = ["v1", "v2", "v4", "v7", "v8"]
    light = np.flatnonzero(~DIGITS.traffic.heavy)[:30]
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            for image in light:
                ours, theirs = direct.scores(first, int(image)), direct.scores(second, int(image))
                assert ours is not None and theirs is not None
                assert float(np.abs(ours - theirs).max()) > 0.05


def test_building_twice_gives_the_same_answers(built: dict[str, Path], tmp_path: Path) -> None:
    again = DirectRuns(models.build_all(tmp_path), DIGITS.traffic.images)
    before = DirectRuns(built, DIGITS.traffic.images)
    for image in range(0, 600, 60):
        ours, theirs = again.scores("v2", image), before.scores("v2", image)
        assert ours is not None and theirs is not None
        assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_hostile_files_are_what_they_say_and_writing_them_runs_nothing(tmp_path: Path) -> None:
    files = models.hostile_files(tmp_path)
    assert len(files) == 5
    assert all(path.is_file() for path in files.values())
    assert not (tmp_path / models.MARKER).exists()
    with pytest.raises(Exception, match=r"(?i)pars"):
        onnx.load(str(files["a truncated ONNX file"]))
    assert files["a TorchScript file with the extension .onnx"].read_bytes()[:2] == b"PK"
    weights = onnx.load(
        str(files["an ONNX file whose data point outside its folder"]), load_external_data=False
    ).graph.initializer[0]
    assert [entry.value for entry in weights.external_data] == ["../outside.bin"]
    assert (tmp_path / "outside.bin").is_file()


@pytest.mark.parametrize(
    ("what", "load"),
    [
        ("a pickle with a payload", "import pickle; pickle.load(open({!r}, 'rb'))"),
        ("a torch checkpoint with a payload", "import torch; torch.load({!r}, weights_only=False)"),
    ],
)
def test_the_bait_is_live_a_careless_loader_would_run_it(tmp_path: Path, what: str, load: str) -> None:
    path = models.hostile_files(tmp_path)[what]
    subprocess.run([sys.executable, "-c", load.format(str(path))], check=True, timeout=120)
    assert (tmp_path / models.MARKER).exists()
