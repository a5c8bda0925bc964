"""Other servers from the package index, each in an environment of its own, with the models of the comparison on ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks._report import HEAVY, SMALL
from benchmarks._servers import Absent, Server, answers, end
from benchmarks._turns import pinned
from registry import untracked
from tests.integration.serving.parity import servers as parity
from tests.own_environment import own_environment

MLSERVER = ("mlserver==1.7.1", "onnxruntime==1.31.1")
LITSERVE = ("litserve==0.2.19", "onnxruntime==1.31.1", "uvloop")
BENTOML = ("bentoml==1.4.39", "onnxruntime==1.31.1")

SESSION = """
import os
import numpy as np
import onnxruntime

def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
"""

ON_MLSERVER = (
    SESSION
    + """
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class Onnx(MLModel):
    async def load(self):
        self.session = session(self._settings.parameters.uri)
        return True

    async def predict(self, payload):
        image = self.decode(payload.inputs[0], default_codec=NumpyCodec).astype(np.float32, copy=False)
        logits = self.session.run(["logits"], {"image": image})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", logits)])
"""
)

ON_LITSERVE = (
    SESSION
    + """
import sys
import litserve

class Api(litserve.LitAPI):
    def __init__(self, path, api_path):
        super().__init__(api_path=api_path)
        self.path = path

    def setup(self, device):
        self.session = session(self.path)

    def decode_request(self, request):
        return np.asarray(request["data"], dtype=np.float32).reshape(1, 1, 8, 8)

    def predict(self, image):
        return self.session.run(["logits"], {"image": image})[0]

    def encode_response(self, logits):
        return {"logits": logits.tolist()}

if __name__ == "__main__":
    port, *models = sys.argv[1:]
    apis = [Api(path, "/" + name) for name, path in (model.split("=", 1) for model in models)]
    litserve.LitServer(apis, accelerator="cpu").run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="error")
"""
)

ON_BENTOML = (
    SESSION
    + """
import json
import bentoml

MODELS = json.loads(os.environ["BENCH_MODELS"])

@bentoml.service(workers=1, traffic={"timeout": 60})
class Digits:
    def __init__(self):
        self.sessions = {name: session(path) for name, path in MODELS.items()}

    def answer(self, name, data):
        image = np.asarray(data, dtype=np.float32).reshape(1, 1, 8, 8)
        return {"logits": self.sessions[name].run(["logits"], {"image": image})[0].tolist()}

    @bentoml.api
    def small(self, data: list[float]) -> dict:
        return self.answer("small", data)

    @bentoml.api
    def heavy(self, data: list[float]) -> dict:
        return self.answer("heavy", data)
"""
)


def _environment(name: str, packages: tuple[str, ...]) -> Path:
    try:
        return own_environment(name, packages, without=name)
    except pytest.skip.Exception as skipped:
        raise Absent(str(skipped)) from skipped


def _plain() -> bytes:
    import numpy as np

    return json.dumps({"data": np.random.default_rng(0).random(64, dtype=np.float32).tolist()}).encode()


@contextmanager
def _started(
    server: Server, command: list[str], folder: Path, core: int | None, **environment: str
) -> Iterator[Server]:
    log = folder / "server.log"
    with log.open("w") as output, pinned(core):
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            env={
                "PATH": f"{Path(command[0]).parent}:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1",
                "BENTOML_DO_NOT_TRACK": "true", **untracked.SETTINGS, **environment,
            },
        )  # fmt: skip
    try:
        server = replace(server, pid=process.pid)
        answers(server, process, server.models, log)
        yield server
    finally:
        end(process)


@contextmanager
def mlserver(folder: Path, files: Mapping[str, Path], core: int | None) -> Iterator[Server]:
    """In one process (no parallel workers), as it is out of the box otherwise."""
    env = _environment("mlserver", MLSERVER)
    port, grpc, metrics = parity.free_port(), parity.free_port(), parity.free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "onnx_on_mlserver.py").write_text(ON_MLSERVER)
    (folder / "settings.json").write_text(
        json.dumps(
            {"host": "127.0.0.1", "http_port": port, "grpc_port": grpc, "metrics_port": metrics, "parallel_workers": 0}
        )
    )
    for name in (SMALL, HEAVY):
        (folder / name).mkdir()
        settings = {"name": name, "implementation": "onnx_on_mlserver.Onnx", "parameters": {"uri": str(files[name])}}
        (folder / name / "model-settings.json").write_text(json.dumps(settings))
    server = Server("MLServer", f"127.0.0.1:{port}", 0, models=(SMALL, HEAVY), kinds=("json",))
    with _started(
        server, [str(env / "bin" / "mlserver"), "start", "."], folder, core, PYTHONPATH=str(folder)
    ) as running:
        yield running


@contextmanager
def litserve(folder: Path, files: Mapping[str, Path], core: int | None) -> Iterator[Server]:
    env = _environment("litserve", LITSERVE)
    port = parity.free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "on_litserve.py").write_text(ON_LITSERVE)
    models = (SMALL, HEAVY)
    server = Server(
        "LitServe", f"127.0.0.1:{port}", 0, kinds=("json",), models=models,
        paths={name: f"/{name}" for name in models}, plain=_plain(),
    )  # fmt: skip
    command = [str(env / "bin" / "python"), "on_litserve.py", str(port), *(f"{name}={files[name]}" for name in models)]
    with _started(server, command, folder, core) as running:
        yield running


@contextmanager
def bentoml(folder: Path, files: Mapping[str, Path], core: int | None) -> Iterator[Server]:
    env = _environment("bentoml", BENTOML)
    port = parity.free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "on_bentoml.py").write_text(ON_BENTOML)
    models = (SMALL, HEAVY)
    server = Server(
        "BentoML", f"127.0.0.1:{port}", 0, {"Content-Type": "application/json"}, ("json",), models,
        {name: f"/{name}" for name in models}, _plain(),
    )  # fmt: skip
    command = [str(env / "bin" / "bentoml"), "serve", "on_bentoml:Digits", "--host", "127.0.0.1", "--port", str(port)]
    named = json.dumps({name: str(files[name]) for name in models})
    with _started(server, command, folder, core, BENCH_MODELS=named) as running:
        yield running
