"""The servers that the benchmarks compare, each on a given core with the same ONNX models: ours as `modelkeep serve` is, and others from the
package index in environments of their own. What cannot be had says why (`Absent`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks._report import HEAVY, KEPT, KEPT_28, SMALL, SMALL_28
from benchmarks._turns import Driver, Target, Turn, in_turns, pinned, two_cores
from registry import keys, versions
from registry.actor import Who
from tests.e2e.harness import Box
from tests.integration.serving.parity import servers as parity
from tests.integration.serving.parity.models import ParityModel
from tests.own_environment import ROOT

START_SECONDS = 120.0
REST_SECONDS = 1.0
CACHE_MB = parity.CACHE_BYTES >> 20
CACHED = (KEPT, KEPT_28)
"""The models whose answers may be kept."""


def side_of(model: str) -> int:
    """Pixels to a side of its images: what its name ends with, as in small-28, or 8."""
    side = model.rpartition("-")[2]
    return int(side) if side.isdecimal() else 8


class Absent(Exception):
    """A server that cannot be measured here, and why."""


def conv_model(path: Path, channels: Sequence[int], side: int = 8) -> Path:
    """Convolutions (3x3, so many channels each) and a linear layer over square images, [n,1,side,side] -> [n,10]; weights are fixed noise."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    noise = np.random.default_rng(0)
    constants, nodes, before, last = [], [], 1, "image"

    def weights(name: str, *shape: int) -> str:
        values = (noise.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        constants.append(numpy_helper.from_array(values, name))
        return name

    for at, count in enumerate(channels):
        nodes.append(helper.make_node("Conv", [last, weights(f"w{at}", count, before, 3, 3)], [f"c{at}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{at}"], [f"r{at}"]))
        before, last = count, f"r{at}"
    nodes.append(helper.make_node("Flatten", [last], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", weights("out", before * side * side, 10)], ["logits"]))
    graph = helper.make_graph(
        nodes, "conv",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])], constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


CHANNELS = {SMALL: (8, 16), HEAVY: (64, 512, 512), KEPT: (8, 16), SMALL_28: (8, 16), KEPT_28: (8, 16)}


def write_models(folder: Path, names: Sequence[str] = tuple(CHANNELS)) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return {name: conv_model(folder / f"{name}.onnx", CHANNELS[name], side_of(name)) for name in names}


def v2_target(
    address: str, path: str, kind: str, *, headers: Mapping[str, str] | None = None, fresh: bool = False, side: int = 8
) -> Target:
    """A V2 request of one image, `kind` "json" or "binary" (its answer too). `fresh`: every request has another number in it."""
    import numpy as np

    image = np.random.default_rng(0).random(side * side, dtype=np.float32)
    tensor: dict[str, Any] = {"name": "image", "shape": [1, 1, side, side], "datatype": "FP32"}
    if kind == "json":
        numbers = [repr(value) for value in image.tolist()]  # 16 or 17 digits, as clients send float32
        if fresh:
            numbers[0] = "0.0000000"
        empty = json.dumps({"inputs": [{**tensor, "data": []}]})
        body = empty.replace('"data": []', f'"data": [{", ".join(numbers)}]').encode()
        place = (body.index(b"[0.0000000") + len(b"[0."), 7) if fresh else None
        return Target(address, path, body, dict(headers or {}), place)
    sized = {**tensor, "parameters": {"binary_data_size": image.nbytes}}
    head = json.dumps({"inputs": [sized], "parameters": {"binary_data_output": True}}).encode()
    told = {**(headers or {}), "Inference-Header-Content-Length": str(len(head))}
    return Target(address, path, head + image.tobytes(), told, (len(head), 4) if fresh else None, binary=True)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers. `kinds` are those that it takes; `plain` has the body of one that does not speak V2."""

    name: str
    address: str
    pid: int
    """The process that was started; those that it started belong to the server too."""
    headers: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("json", "binary")
    models: tuple[str, ...] = (SMALL, HEAVY, KEPT)
    paths: Mapping[str, str] = field(default_factory=dict)
    plain: bytes | None = None

    def target(self, model: str, kind: str, *, fresh: bool = False) -> Target:
        path = self.paths.get(model, f"/v2/models/{model}/infer")
        if self.plain is not None:
            return Target(self.address, path, self.plain, self.headers)
        return v2_target(self.address, path, kind, headers=self.headers, fresh=fresh, side=side_of(model))

    def memory_bytes(self) -> int:
        """What all of its processes have resident, what they share counted once (PSS)."""
        return sum(_resident(pid) for pid in family(self.pid))

    def cpu_seconds(self) -> float:
        """What its processes have computed so far: beside others on the same core it says more than a rate does."""
        return sum(_computed(pid) for pid in family(self.pid))


def family(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [pid]


class Alone:
    """Servers on one core of which only the one whose turn it is runs; the others are stopped (SIGSTOP).

    Servers that idle are not idle: six side by side, with their polls and heartbeats, put 90 ms into another's p99.
    """

    def __init__(self, running: Mapping[str, Server]) -> None:
        self._running = running
        for server in running.values():
            _signal(server, signal.SIGSTOP)

    @contextmanager
    def turn(self, name: str) -> Iterator[Server]:
        """This server runs, and has answered what it is about to be asked for; it is stopped again at the end."""
        server = self._running[name]
        _signal(server, signal.SIGCONT)
        try:
            for model in server.models:
                _awake(server, model)
            yield server
        finally:
            _rest(server)
            _signal(server, signal.SIGSTOP)

    def end(self) -> None:
        """All run again."""
        for server in self._running.values():
            _signal(server, signal.SIGCONT)


def _awake(server: Server, model: str) -> None:
    """It answers again. One that watches its workers may take one for dead that was stopped with it, and start another. Raises Absent."""
    import http.client

    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            ask(server.target(model, server.kinds[0]))
            return
        except (OSError, http.client.HTTPException) as error:
            if not psutil.pid_exists(server.pid) or time.monotonic() > give_up:
                raise Absent(
                    f"{server.name} (process {server.pid}) does not answer after it was stopped: {error!r}"
                ) from error
            time.sleep(0.05)


def _rest(server: Server) -> None:
    """Returns when it computes nothing. Who drives it has gone with requests still in it, and Triton ends (`lock_exception`)
    where it is stopped while it waits for a lock that it shares with its Python: the time for that goes on.
    """
    give_up = time.monotonic() + REST_SECONDS
    before = server.cpu_seconds()
    while time.monotonic() < give_up:
        time.sleep(0.1)
        now = server.cpu_seconds()
        if now == before:
            return
        before = now


def _signal(server: Server, number: signal.Signals) -> None:
    """To all its processes; those that watch others are stopped first and go on last."""
    pids = family(server.pid)
    for pid in reversed(pids) if number == signal.SIGCONT else pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _computed(pid: int) -> float:
    with suppress(FileNotFoundError, ProcessLookupError):
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _resident(pid: int) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


# Ours


def settings() -> dict[str, str]:
    """Everything that a request meets is on; the rate that a key may have is more than there is."""
    return {
        "MODELKEEP_SECURITY__REQUIRE_KEYS": "true",
        "MODELKEEP_SECURITY__RATE_LIMIT": "100000000/second",
        "MODELKEEP_CACHE__MAX_MB": str(CACHE_MB),
        # What an operator has who set nothing; the tests' box is in a hurry.
        "MODELKEEP_POLL_SECONDS": "1",
        "MODELKEEP_LEASE_SECONDS": "30",
    }


@contextmanager
def registered(folder: Path, files: Mapping[str, Path], extra: Mapping[str, str]) -> Iterator[tuple[Box, str]]:
    """A home with these models, each with a route, and the text of a key that may operate."""
    # All of them stay in memory; by profile it would be four.
    together = {"MODELKEEP_MODELS__MAX_CONCURRENT_MODELS": str(max(4, len(files)))}
    one = Box(folder, extra={**settings(), **together, **extra})
    try:
        for name, path in files.items():
            add_model(one, name, path, deterministic=name in CACHED)
        _, text = keys.create(one.database, name="bench", role="operate", who=Who("bench", via="command"), rate="none")
        yield one, text
    finally:
        one.stop()


def add_model(one: Box, name: str, path: Path, *, deterministic: bool = False, routed: bool = True) -> None:
    versions.register(
        one.database, one.store, path, name=name, version="1", facts={"deterministic": deterministic}, max_bytes=1 << 30
    )
    if routed:
        one.settle_by_hand("1", model=name)


@contextmanager
def modelkeep(folder: Path, files: Mapping[str, Path], core: int | None, **extra: str) -> Iterator[Server]:
    """`modelkeep serve`: supervisor and child, a registry in SQLite, keys asked for."""
    with registered(folder, files, extra) as (one, key):
        with pinned(core):
            process = one.serve(ready=False)
        headers = {"Authorization": f"Bearer {key}"}
        server = Server("modelkeep", f"127.0.0.1:{one.port}", process.pid, headers, models=tuple(files))
        answers(server, process, files, log=one.log("server"))
        yield server


def answers(
    server: Server, process: subprocess.Popen[bytes], models: Sequence[str] | Mapping[str, Path], log: Path
) -> None:
    """Returns when it has answered a request of every model with 200. Raises Absent where it does not."""
    give_up = time.monotonic() + START_SECONDS
    said = "it does not listen"
    for model in models:
        target = server.target(model, server.kinds[0])
        while True:
            try:
                status, said = ask(target)
                if status == 200:
                    break
            except OSError as error:
                said = str(error)
            if process.poll() is not None or time.monotonic() > give_up:
                raise Absent(
                    f"{server.name} does not answer: {said[:200]}; {log.read_text()[-600:] if log.exists() else ''}"
                )
            time.sleep(0.02)


def ask(target: Target, *, method: str = "POST", path: str | None = None) -> tuple[int, str]:
    """(status, body) of one request on its own connection."""
    import http.client

    connection = http.client.HTTPConnection(target.address, timeout=START_SECONDS)
    try:
        connection.request(method, path or target.path, target.body if method == "POST" else None, dict(target.headers))
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


# Triton

BATCHING = """
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb
from pathlib import Path


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        images = [pb.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        if len(images) == 1:
            return [pb.InferenceResponse([pb.Tensor("logits", self.session.run(["logits"], {"image": images[0]})[0])])]
        logits = self.session.run(["logits"], {"image": np.concatenate(images)})[0]
        answers, start = [], 0
        for image in images:
            end = start + len(image)
            answers.append(pb.InferenceResponse([pb.Tensor("logits", logits[start:end])]))
            start = end
        return answers
"""
"""Computes together what Triton's dynamic batcher brings together, as ours does."""


def write_triton(model: ParityModel, repository: Path, file: Path, *, batcher: bool = True) -> None:
    folder = repository / model.name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(BATCHING)
    (folder / "1" / "model.onnx").write_bytes(file.read_bytes())
    cache = "response_cache { enable: true }\n" if model.name in CACHED else ""
    side = side_of(model.name)
    (folder / "config.pbtxt").write_text(
        f'name: "{model.name}"\nbackend: "python"\nmax_batch_size: 32\n'
        f'input [{{ name: "image" data_type: TYPE_FP32 dims: [1, {side}, {side}] }}]\n'
        'output [{ name: "logits" data_type: TYPE_FP32 dims: [10] }]\n'
        f"{'dynamic_batching { }' if batcher else ''}\n{cache}instance_group [{{ kind: KIND_CPU count: 1 }}]\n"
    )


@contextmanager
def triton(folder: Path, files: Mapping[str, Path], core: int | None, *, batcher: bool = True) -> Iterator[Server]:
    """`batcher`: with its dynamic batcher, which computes together what waits; without, a request at a time, as it is out of the box."""
    folder.mkdir(parents=True, exist_ok=True)
    logits = (("logits", "FP32", (-1, 10)),)
    models = [
        ParityModel(name, (("image", "FP32", (-1, 1, side_of(name), side_of(name))),), logits, rows=True)
        for name in files
    ]
    write = partial(write_triton, batcher=batcher)
    started = parity.triton(models, next(iter(files.values())).parent, folder, write=write, caching=True)
    try:
        with pinned(core):
            running = started.__enter__()
    except pytest.skip.Exception as skipped:
        raise Absent(str(skipped)) from skipped
    try:
        server = Server("Triton", f"127.0.0.1:{running.port}", running.process.pid, models=tuple(files))
        answers(server, running.process, files, folder / "triton.log")
        yield server
    finally:
        started.__exit__(None, None, None)


def beside_triton(
    folder: Path,
    models: Mapping[str, Path],
    cases: Mapping[str, tuple[str, str, int]],
    rounds: int,
    seconds: float,
) -> dict[str, dict[str, list[Turn]]]:
    """Ours and Triton with its batcher in turns of so many seconds: by case, by server, the turns. `cases`: model, kind, connections.

    Each server has the first core, wrk the last. Raises Absent.
    """
    serving, driving = two_cores()
    driver = Driver(folder, driving)
    found: dict[str, dict[str, list[Turn]]] = {}
    with ExitStack() as stack:
        running = {
            "modelkeep": stack.enter_context(modelkeep(folder / "ours", models, serving)),
            "Triton": stack.enter_context(triton(folder / "triton", models, serving)),
        }
        alone = Alone(running)
        stack.callback(alone.end)
        for case, (model, kind, connections) in cases.items():

            def one(name: str, model: str = model, kind: str = kind, connections: int = connections) -> Turn:
                with alone.turn(name) as server:
                    return driver.turn(server.target(model, kind), connections, seconds, server.cpu_seconds)

            found[case] = in_turns(tuple(running), rounds, one)
    return found


def beside_triton_main(
    about: str | None,
    models: Callable[[Path], Mapping[str, Path]],
    cases: Mapping[str, tuple[str, str, int]],
    shown: Callable[[dict[str, dict[str, list[Turn]]]], str],
    *,
    rounds: int,
    seconds: float,
) -> int:
    """The program of a benchmark that is such a comparison. `models` writes their files into a folder."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seconds", type=float, default=seconds, help="length of a turn")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        print("SKIPPED: wrk is not installed (Debian: apt-get install wrk)")
        return 0
    with tempfile.TemporaryDirectory(prefix="beside-triton-") as folder:
        files = models(Path(folder) / "models")
        found = beside_triton(Path(folder), files, cases, options.rounds, options.seconds)
    print(shown(found))
    failed = sum(turn.failed for turns in found.values() for some in turns.values() for turn in some)
    print(f"\n{failed} requests failed")
    return 0


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, in whatever groups."""
    started = family(process.pid)
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(15)
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(15)


# ONNX Runtime by itself

BY_ITSELF = """
import sys, time
import numpy as np, onnxruntime
path, rows, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
image = np.random.default_rng(0).random((rows, 1, 8, 8), dtype=np.float32)
for _ in range(10):
    session.run(None, {"image": image})
runs, began = 0, time.perf_counter()
while (took := time.perf_counter() - began) < seconds:
    session.run(None, {"image": image})
    runs += 1
print(rows * runs / took)
"""


def onnxruntime_rate(model: Path, rows: int, core: int | None, seconds: float) -> float:
    """Rows a second of ONNX Runtime alone, one thread, batches of `rows`."""
    with pinned(core):
        done = subprocess.run(
            [sys.executable, "-c", BY_ITSELF, str(model), str(rows), str(seconds)],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=seconds + 60,
        )  # fmt: skip
    return float(done.stdout)


def health_latencies(server: Server, path: str, count: int, stop: Any) -> list[float]:
    """Seconds of up to `count` checks, each on a connection of its own, until `stop()` says so."""
    latencies: list[float] = []
    host, port = server.address.split(":")
    head = "".join(f"{name}: {value}\r\n" for name, value in server.headers.items())
    request = f"GET {path} HTTP/1.1\r\nHost: {server.address}\r\n{head}Connection: close\r\n\r\n".encode()
    while len(latencies) < count and not stop():
        began = time.perf_counter()
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(request)
            answer = connection.recv(65536)
            while chunk := connection.recv(65536):
                answer += chunk
        if not answer.startswith(b"HTTP/1.1 200"):
            raise Absent(f"{server.name} answered {path} with {answer[:60]!r}")
        latencies.append(time.perf_counter() - began)
    return latencies
