"""A box for the end-to-end tests: a home, small models, a real `modelkeep serve`, real traffic, promotions in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from modelkeep.demo import answers
from modelkeep.demo.answers import DirectRuns, Request
from registry import audit, leases, promotions, replicas, routes, versions
from registry.database import Database
from registry.schema import Lease, Route
from registry.store import DirectoryStore

ROOT = Path(__file__).resolve().parents[2]
MODEL = "digits"
LEASE_SECONDS = 2.0
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 45.0
IMAGES = 200
HEAVY = 40
"""Of the images that the traffic sends, the last ones have so much ink that `broken` models fail on them."""
LIMIT_INK = 40
_MIGRATING = threading.Lock()

POLICY: dict[str, Any] = {
    "stages": [0.25, 0.5, 1.0],
    "dwell_seconds": 0.4,
    "minimum_requests": 20,
    "baseline_seconds": 0.5,
    "shadow_seconds": 0.3,
    "shadow_requests": 10,
    "shadow_gate": False,
    "soak_seconds": 0.5,
    "deadline_seconds": 20.0,
    "latency_ratio": 100.0,
    "memory_ratio": 100.0,
    "slow_factor": 50.0,
}
"""Short stages. Slowness is hardly judged: these tests run beside others on two cores."""


def images() -> NDArray[np.float32]:
    """Grey levels in sixteenths, [IMAGES, 1, 8, 8]; the last HEAVY are dark all over (64 of ink, the others below 40)."""
    generator = np.random.default_rng(7)
    made = generator.integers(0, 9, (IMAGES, 1, 8, 8)).astype(np.float32) / 16
    made[-HEAVY:] = 1.0 - made[-HEAVY:] / 16
    return made


def write_traffic(path: Path) -> Path:
    np.savez(path, image=images(), label=np.zeros(IMAGES, dtype=np.int64))
    return path


def build(path: Path, *, seed: int = 1, broken: bool = False, work: int = 0, ballast_mb: int = 0) -> Path:
    """An ONNX model image [n,1,8,8] -> scores [n,10] whose numbers come from `seed`.

    `broken`: its graph looks the ink of an image up in a table that ends at LIMIT_INK, and so raises on heavy images.
    `work`: matrix products of 1,024 x 1,024 that a request costs besides (about 0.3 ms each).
    `ballast_mb`: MB of weights besides, of which a request uses one row.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(seed).normal(size=(64, 10)).astype(np.float32)
    constants = {"w": weights, "b": np.full(10, seed % 7, dtype=np.float32)}
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["plain" if broken else "scores"]),
    ]
    if broken:
        constants["table"] = np.ones(LIMIT_INK, dtype=np.float32)
        nodes += [
            helper.make_node("ReduceSum", ["flat", "axes"], ["ink"], keepdims=1),
            helper.make_node("Cast", ["ink"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["gain"]),
            helper.make_node("Mul", ["plain", "gain"], ["scores"]),
        ]
    if work:
        constants["up"] = np.zeros((64, 1024), dtype=np.float32)
        constants["square"] = np.eye(1024, dtype=np.float32)
        constants["down"] = np.zeros((1024, 10), dtype=np.float32)
        nodes[1].output[0] = "light"
        nodes.append(helper.make_node("MatMul", ["flat", "up"], ["h0"]))
        nodes += [helper.make_node("MatMul", [f"h{k}", "square"], [f"h{k + 1}"]) for k in range(work)]
        nodes.append(helper.make_node("MatMul", [f"h{work}", "down"], ["nothing"]))
        nodes.append(helper.make_node("Add", ["light", "nothing"], ["scores"]))
    if ballast_mb:
        constants["ballast"] = np.zeros((ballast_mb * (1 << 20) // 40, 10), dtype=np.float32)
        constants["row"] = np.array(0, dtype=np.int64)
        nodes[-1].output[0] = "bare"
        nodes.append(helper.make_node("Gather", ["ballast", "row"], ["weightless"]))
        nodes.append(helper.make_node("Add", ["bare", "weightless"], ["scores"]))
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    if broken:
        tensors.append(numpy_helper.from_array(np.array([1], dtype=np.int64), "axes"))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 10])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def write_golden(path: Path, model: Path) -> Path:
    """Golden cases (no heavy image among them) whose labels are what `model` says, so that it has all of them right."""
    cases = images()[: IMAGES - HEAVY : 4]
    direct = DirectRuns({"x": model}, cases)
    labels = []
    for index in range(len(cases)):
        scores = direct.scores("x", index)
        assert scores is not None
        labels.append(int(scores.argmax()))
    np.savez(path, **{"input.image": cases, "label": np.array(labels, dtype=np.int64)})
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def wait_for(what: str, test: Callable[[], Any], *, seconds: float = PATIENCE_SECONDS, every: float = 0.02) -> Any:
    """What `test` returns once it is true; a failure of the test where it does not come true."""
    deadline = time.monotonic() + seconds
    while not (found := test()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(every)
    return found


def stand_still(pid: int, database: Database) -> None:
    """SIGSTOP, at a moment when the process is not within a write to the registry.

    On SQLite a process that stands still within one holds up every other writer, also whoever would withdraw its promotion, for
    as long as it stands. That has a test of its own: tests/integration/registry/test_database.py.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    os.kill(pid, signal.SIGSTOP)
    while database.sqlite and not _takes_writes(str(database.url.database)):
        os.kill(pid, signal.SIGCONT)
        assert time.monotonic() < deadline, f"process {pid} is within a write to the registry at every look"
        time.sleep(0.02)
        os.kill(pid, signal.SIGSTOP)


def _takes_writes(path: str) -> bool:
    with contextlib.closing(sqlite3.connect(path, timeout=2, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            assert "locked" in str(error), error
            return False
        connection.execute("ROLLBACK")
        return True


@dataclass(slots=True)
class Traffic:
    """The open-loop client under way."""

    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> list[Request]:
        """End it; every request that it sent, with what came of it."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=PATIENCE_SECONDS + 15) == 0
        found = answers.read_log(self.log)
        assert found.end is not None, "the client did not end by itself"
        assert found.end["sent"] == len(found.requests), "the log of the client is not complete"
        return found.requests


@dataclass(slots=True)
class Box:
    """A home with its server and its models. `stop` ends whatever was started."""

    folder: Path
    policy: dict[str, Any] = field(default_factory=lambda: dict(POLICY))
    extra: dict[str, str] = field(default_factory=dict)
    port: int = 0
    models: dict[str, Path] = field(default_factory=dict)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _database: Database | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.home.mkdir(exist_ok=True)
        self.port = self.port or free_port()

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def state_folder(self) -> Path:
        return self.home / "serving" / f"production-{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of a process in this box: nothing of the person who runs the tests gets in."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        values = {
            "PYTHONPATH": str(ROOT),
            "MODELKEEP_HOME": str(self.home),
            "MODELKEEP_PROFILE": "cpu",
            "MODELKEEP_LEASE_SECONDS": str(LEASE_SECONDS),
            "MODELKEEP_POLL_SECONDS": str(POLL_SECONDS),
            "MODELKEEP_SERVER__PORT": str(self.port),
            **{f"MODELKEEP_PROMOTION__{name.upper()}": json.dumps(value) for name, value in self.policy.items()},
        }
        return {**kept, **values, **self.extra}

    @property
    def database(self) -> Database:
        """The registry, as the tests look at it."""
        if self._database is None:
            url = self.extra.get("MODELKEEP_DATABASE_URL", f"sqlite:///{self.home}/registry.db")
            database = Database(url, anchors=self.home / "audit.anchors")
            with _MIGRATING:  # Alembic keeps its context in globals: one at a time in a process
                database.prepare()
            self._database = database
        return self._database

    @property
    def store(self) -> DirectoryStore:
        return DirectoryStore(self.home / "artifacts")

    # processes

    def start(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """`python -m …` in this box; its output goes to NAME.log."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=self.folder,
                env={**self.environment, **environment},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def modelkeep(self, *arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "modelkeep", *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def serve(self, *, ready: bool = True, **environment: str) -> subprocess.Popen[bytes]:
        """`modelkeep serve`; returns when it answers (and is ready, unless told otherwise)."""
        process = self.start("server", "modelkeep", "serve", **environment)
        if ready:
            wait_for("the start of the server", lambda: self.is_ready() or process.poll() is not None)
            assert process.poll() is None, self.log("server").read_text()
        return process

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v2/health/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def in_flight(self) -> int:
        """Inference requests that the server has not answered yet."""
        return int(httpx.get(f"{self.url}/health", timeout=5).json()["in_flight"])

    def child_pid(self) -> int:
        """The process that serves, as the supervisor notes it."""
        return int((self.state_folder / "child.pid").read_text())

    def promote(self, version: str, *options: str, model: str = MODEL) -> subprocess.Popen[bytes]:
        """A promotion in a process of its own that waits for `go`: so its start does not cost the test any time."""
        return self.start(f"promote-{version}", "tests.e2e.runner", model, version, *options)

    def start_traffic(self, *, rate: float = 100, seed: int = 1, model: str = MODEL) -> Traffic:
        data = write_traffic(self.folder / "traffic.npz")
        log = self.folder / f"traffic-{len(self._processes)}.jsonl"
        process = self.start(
            "traffic", "modelkeep.demo.traffic", "--url", self.url, "--model", model, "--rate", str(rate),
            "--seed", str(seed), "--log", str(log), "--data", str(data), "--timeout-seconds", str(PATIENCE_SECONDS),
        )  # fmt: skip
        wait_for("the first answers", lambda: log.exists() and log.stat().st_size > 2000)
        return Traffic(process, log)

    def stop(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    print(f"{process.args} did not end by itself: killed")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)
            if process.stdin is not None:
                process.stdin.close()
        if self._database is not None:
            self._database.dispose()

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        """Let go of a process that has ended, and end what it left behind: thousands of them would be too many to keep."""
        assert process.poll() is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdin is not None:
            process.stdin.close()
        self._processes.remove(process)

    # the registry

    def register(self, version: str, path: Path, *, model: str = MODEL, golden: Path | None = None) -> None:
        versions.register(
            self.database, self.store, path, name=model, version=version, golden=golden, max_bytes=1 << 26
        )
        self.models[version] = path

    def add(
        self, version: str, *, seed: int | None = None, broken: bool = False, work: int = 0, golden: Path | None = None
    ) -> Path:
        """Build and register a version of MODEL."""
        seed = int(version) if seed is None else seed
        path = build(self.folder / f"v{version}.onnx", seed=seed, broken=broken, work=work)
        self.register(version, path, golden=golden)
        return path

    def first(self, version: str = "1") -> None:
        """Register a version and make it stable, without validation: what comes before a test's own story."""
        self.add(version)
        self.settle_by_hand(version)

    def settle_by_hand(self, version: str, *, model: str = MODEL) -> None:
        """Make a version stable with a forced promotion in this process (no probe)."""
        from registry.policy import PromotionPolicy

        operation = promotions.begin(
            self.database, environment="production", model=model, version=version,
            policy=PromotionPolicy(**self.policy), strategy="forced", ttl_seconds=60, flow_run_id=None, force_reason="test",
        )  # fmt: skip
        mark_validated(self.database, operation)
        window = {"stage": "soak", "weight": 1.0}
        promotions.promote(self.database, operation, title="by hand", detail="by the test", watch=False, window=window)
        promotions.end(self.database, operation, "promoted", title="by hand", detail="by the test")

    def route(self, model: str = MODEL) -> Route | None:
        with self.database.read() as session:
            return routes.read(session, "production", model)

    def stable(self, model: str = MODEL) -> str | None:
        route = self.route(model)
        return route.stable if route else None

    def weighs(self, version: str) -> bool:
        route = self.route()
        return route is not None and route.candidate == version and route.weight > 0

    def promotion(self, version: str, *, model: str = MODEL) -> dict[str, Any] | None:
        with self.database.read() as session:
            found = promotions.listed(session, model=model, limit=1000)
        return next((row for row in found if row["version"] == version), None)

    def story(self, version: str) -> list[dict[str, Any]]:
        row = self.promotion(version)
        assert row is not None
        with self.database.read() as session:
            return promotions.story(session, row["id"])

    def held_leases(self) -> list[str]:
        with self.database.read() as session:
            return [row.subject for row in session.scalars(select(Lease).where(Lease.state != leases.RELEASED))]

    def audit_faults(self) -> list[str]:
        with self.database.read() as session:
            return audit.verify(session, self.database.anchors).faults

    # the server

    def info(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/api/v2/model-info", timeout=10)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def follows(self) -> bool:
        """Whether the server is at the registry's epoch and generation."""
        with self.database.read() as session:
            pulse = replicas.pulse(session, "production")
        try:
            info = self.info()
        except httpx.HTTPError:
            return False
        return pulse is not None and (info["epoch"], info["generation"]) == (pulse.epoch, pulse.generation)

    def infer(self, *, model: str = MODEL, image: int = 0, timeout: float = 10) -> httpx.Response:
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": images()[image].ravel().tolist()}
        return httpx.post(f"{self.url}/v2/models/{model}/infer", json={"inputs": [tensor]}, timeout=timeout)

    def check(self, requests: list[Request]) -> answers.AnswerCheck:
        """Every answer against what the version that it names answers when it is run directly."""
        return answers.check(requests, DirectRuns(self.models, images()))


def mark_validated(database: Database, operation: promotions.Operation) -> None:
    """Put a validation on record that did not take place: where the test is about what comes after it."""
    promotions.note_validation(
        database, operation, passed=True, report={}, signature=None, rows_independent=True,
        title="not validated, by the test", detail="the test is about what comes after",
    )  # fmt: skip


def go(process: subprocess.Popen[bytes]) -> None:
    """Let a promotion that waits begin."""
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()


def kill(pid: int) -> tuple[float, float]:
    """SIGKILL; the moments between which the process died."""
    before = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    wait_for(f"the end of process {pid}", lambda: not lives(pid), every=0.001)
    return before, time.monotonic()


def lost_in(requests: list[Request], windows: list[tuple[float, float]]) -> tuple[list[Request], list[Request]]:
    """(requests that a kill of the server cost, failures that no kill explains).

    A kill explains a connection that broke with a request in flight at the SIGKILL: sent before the process was dead, ended after
    it was killed. Nothing else: no refusal, no time-out, no answer with an error.
    """
    lost, unexplained = [], []
    for request in requests:
        if request.error is None:
            continue
        broke = request.error in ("reset", "eof")
        in_flight = any(request.sent <= dead and request.finished >= begun for begun, dead in windows)
        (lost if broke and in_flight else unexplained).append(request)
    return lost, unexplained


@contextlib.contextmanager
def box(folder: Path, **options: Any) -> Iterator[Box]:
    made = Box(folder, **options)
    try:
        yield made
    finally:
        made.stop()


def parallel(work: Mapping[str, Callable[[], None]]) -> None:
    """Do several things at the same time; the first failure is raised when all have ended."""
    failures: dict[str, BaseException] = {}

    def guarded(name: str, one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            failures[name] = error

    threads = [threading.Thread(target=guarded, args=item, name=item[0]) for item in work.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, error in failures.items():
        raise AssertionError(f"{name}: {error}") from error
