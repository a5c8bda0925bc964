"""With the real mlflow and coremltools, in an environment of their own: what they write is read and served, what we export they load.

The environment holds `mlflow-skinny`: for the flavours onnx and pytorch and for `mlflow.pyfunc` it has the very files of `mlflow` (the two packages
of 3.17.2 were compared: they differ in what skinny leaves out, the server and its pages). It is kept between runs, by its list of packages.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from registry import exporting, formats, untracked, versions
from registry.signature import TensorSpec
from serving.compute.runtimes import load_runtime
from tests.e2e.harness import Box, box, build, go, images, wait_for
from tests.own_environment import ROOT, own_environment
from tests.unit.registry.kit import onnx_file

PACKAGES = (
    "mlflow-skinny==3.17.2",
    "coremltools==9.0",
    *(f"{name}=={metadata.version(name)}" for name in ("onnx", "onnxruntime", "numpy", "pandas")),
)
pytestmark = pytest.mark.timeout(700)  # the first run installs


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of the environment, made once: 35 s and 600 MB on two idle cores when this was written."""
    folder = own_environment(
        "mlflow", PACKAGES, "--constraint", str(ROOT / "constraints.txt"), without="mlflow and coremltools"
    )
    return folder / "bin" / "python"


def run(python: Path, code: str, *arguments: object) -> Any:
    """Run code in the environment of mlflow; its last line is JSON."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", code, *map(str, arguments)],
        env={**kept, **untracked.SETTINGS, "MLFLOW_DISABLE_TELEMETRY": "true"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


LOG = """
import json, sys
import mlflow, mlflow.onnx, numpy as np, onnx
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
source, target, uri = sys.argv[1:]
mlflow.set_tracking_uri(uri)
spec = lambda name, shape: Schema([TensorSpec(np.dtype("float32"), shape, name)])
signature = ModelSignature(spec("image", (-1, 1, 8, 8)), spec("scores", (-1, 10)))
mlflow.onnx.save_model(
    onnx.load(source), target, signature=signature, metadata={"team": "vision"}, pip_requirements=["onnx", "onnxruntime"]
)
print(json.dumps(mlflow.__version__))
"""

LOAD = """
import json, sys
import mlflow, mlflow.onnx, numpy as np
folder, data, beside = sys.argv[1:]
loaded = mlflow.pyfunc.load_model(folder)
x = np.load(data)["image"]
answer = loaded.predict({"image": x})
graph = mlflow.onnx.load_model(folder)
sums = mlflow.pyfunc.load_model(beside).predict({"x": np.ones((3, 4), np.float32)})["y"]
print(json.dumps({
    "scores": answer["scores"].tolist(), "sums": sums.tolist(), "nodes": len(graph.graph.node), "metadata": loaded.metadata.metadata,
    "inputs": [one["name"] for one in loaded.metadata.signature.inputs.to_dict()],
}))
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Box]:
    with box(tmp_path) as made:
        yield made


def test_a_model_that_mlflow_wrote_is_promoted_and_served_and_what_we_export_mlflow_loads(
    python: Path, served: Box, tmp_path: Path
) -> None:
    source = build(tmp_path / "digits.onnx", seed=5)
    written = tmp_path / "written-by-mlflow"
    version = run(python, LOG, source, written, f"sqlite:///{tmp_path}/mlflow.db")
    assert (written / "MLmodel").is_file()
    done = served.modelkeep("register", str(written), "--name", "digits", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == "1"
    with served.database.read() as session:
        row = versions.get(session, "digits", "1")
        assert row.facts["mlflow"]["mlflow_version"] == version
        assert row.facts["mlflow"]["metadata"] == {"team": "vision"}
    served.serve()
    promotion = served.promote("1")
    go(promotion)
    assert promotion.wait(timeout=120) == 0, served.log("promote-1").read_text()
    wait_for("the model to be served", lambda: served.stable() == "1" and served.follows())
    # As the model itself answers, computed here.
    some = images()[:5]
    runtime = load_runtime(source, "onnx", signature=None)
    want = runtime.run({"image": some}, None)["scores"]
    body = {"inputs": [{"name": "image", "shape": [5, 1, 8, 8], "datatype": "FP32", "data": some.ravel().tolist()}]}
    answer = httpx.post(f"{served.url}/v2/models/digits/infer", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-model-version"] == "1"
    (scores,) = [one for one in answer.json()["outputs"] if one["name"] == "scores"]
    assert np.allclose(np.array(scores["data"]).reshape(5, 10), want, atol=1e-5)

    # And out again.
    target = tmp_path / "exported"
    done = served.modelkeep("models", "export", "digits", "1", str(target), "--mlflow", "--json")
    assert done.returncode == 0, done.stderr
    np.savez(tmp_path / "some.npz", image=some)
    served.register("1", onnx_file(tmp_path / "in" / "model.onnx", 3.0, external="w.bin"), model="beside")
    exporting.export(served.database, served.store, "beside", "1", tmp_path / "beside", mlflow=True)
    loaded = run(python, LOAD, target, tmp_path / "some.npz", tmp_path / "beside")
    assert loaded["sums"] == [[12.0, 12.0]] * 3
    assert np.allclose(np.array(loaded["scores"]), want, atol=1e-5)
    assert loaded["inputs"] == ["image"]
    assert loaded["nodes"] > 0
    assert (loaded["metadata"]["modelkeep_model"], loaded["metadata"]["modelkeep_version"]) == ("digits", "1")


COREML = """
import json, sys
import coremltools as ct, numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.models import datatypes
from coremltools.models.neural_network import NeuralNetworkBuilder
folder, = sys.argv[1:]
builder = NeuralNetworkBuilder([("x", datatypes.Array(4))], [("y", datatypes.Array(2))])
builder.add_inner_product("inner", np.ones((2, 4)), np.zeros(2), 4, 2, True, "x", "y")
builder.spec.description.metadata.author = "ann"
ct.utils.save_spec(builder.spec, folder + "/network.mlmodel")
@mb.program(input_specs=[mb.TensorSpec(shape=(1, 64))])
def program(x):
    return mb.linear(x=x, weight=np.ones((32, 64), np.float32), bias=np.zeros(32, np.float32), name="y")
made = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=ct.target.macOS13)
made.short_description = "sums"
made.save(folder + "/program.mlpackage")
print(json.dumps(ct.__version__))
"""


def test_what_coremltools_writes_is_registered_rejected_with_the_reason_and_exported_whole(
    python: Path, served: Box, tmp_path: Path
) -> None:
    run(python, COREML, tmp_path)
    network = formats.inspect(tmp_path / "network.mlmodel", max_bytes=1 << 30)
    assert network.signature is not None
    assert network.signature.inputs == (TensorSpec("x", "FP64", (4,)),)
    assert (network.metadata["model_type"], network.metadata["author"]) == ("neuralNetwork", "ann")
    program = formats.inspect(tmp_path / "program.mlpackage", max_bytes=1 << 30)
    assert "program.mlpackage/Data/com.apple.CoreML/weights/weight.bin" in program.names
    assert (program.metadata["model_type"], program.metadata["description"]) == ("mlProgram", "sums")
    assert program.signature is not None
    assert (program.signature.inputs[0].name, program.signature.inputs[0].shape) == ("x", (1, 64))

    served.register("1", tmp_path / "program.mlpackage", model="sums")
    served.serve()
    promotion = served.promote("1", model="sums")
    go(promotion)
    assert promotion.wait(timeout=120) == 1
    with served.database.read() as session:
        row = versions.get(session, "sums", "1")
        assert row.state == "rejected"
        assert "CoreML runs on macOS" in json.dumps(row.validation)
    exporting.export(served.database, served.store, "sums", "1", tmp_path / "out")
    again = formats.inspect(tmp_path / "out", max_bytes=1 << 30)
    assert again.names == program.names
