"""Runtimes written in Python, tiny ONNX models, and an ASGI client without a socket, for the tests of the server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from registry.aliases import Alias
from registry.signature import Signature, TensorSpec
from serving.api import Application, create_app
from serving.compute.engine import LoadedVersion
from serving.state import Serving
from serving.traffic.routing import Route

Arrays = Mapping[str, NDArray[Any]]

ROWS = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),))


def double(inputs: Arrays) -> dict[str, NDArray[Any]]:
    return {"y": inputs["x"] * 2}


class PythonRuntime:
    """Computes with a function. `gate` holds every computation until it is set; `entered` says that one has begun."""

    platform = "python"
    memory_bytes = 1000

    def __init__(self, function: Callable[[Arrays], dict[str, NDArray[Any]]] = double, signature: Signature = ROWS):
        self.function = function
        self.signature = signature
        self.calls: list[dict[str, NDArray[Any]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.closed = threading.Event()

    def run(self, inputs: Arrays, outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        self.entered.set()
        self.gate.wait(30)
        self.calls.append(dict(inputs))
        answer = self.function(inputs)
        return answer if outputs is None else {name: answer[name] for name in outputs}

    def close(self) -> None:
        self.closed.set()


def row(*values: float) -> dict[str, NDArray[Any]]:
    return {"x": np.array([values], dtype=np.float32)}


def load(
    runtime: PythonRuntime | None = None,
    version: str = "1",
    *,
    model: str = "m",
    rows_independent: bool = True,
    max_batch: int = 8,
    queue_size: int = 100,
    **options: Any,
) -> LoadedVersion:
    return LoadedVersion(
        model,
        version,
        "0" * 64,
        runtime or PythonRuntime(),
        rows_independent=rows_independent,
        max_batch=max_batch,
        queue_size=queue_size,
        **options,
    )


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another thread or task does. Its own limit: pytest-timeout's may hit another task, and end only that one."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited 120 s in vain"
        await asyncio.sleep(0.002)


async def no_nudge() -> dict[str, Any]:
    return {"generation": 1}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> str:
        document = self.json()
        assert list(document) == ["error"]
        return str(document["error"])


@dataclass
class Server:
    """The application with the versions that a test gives it, asked without a socket."""

    serving: Serving
    app: Application
    sent: list[dict[str, Any]] = field(default_factory=list)

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | Sequence[bytes] = b"",
        headers: Mapping[str, str] | None = None,
        gone: asyncio.Event | None = None,
    ) -> Answer | None:
        """The answer; None where the application sent none. `gone` set: the client has closed its connection."""
        path, _, query = path.partition("?")
        chunks = [body] if isinstance(body, bytes) else list(body)
        lines = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        if isinstance(body, bytes):
            lines.append((b"content-length", b"%d" % len(body)))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": query.encode(),
            "headers": lines,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        sent: list[dict[str, Any]] = []
        forever = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if chunks:
                chunk = chunks.pop(0)
                return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}
            await (gone or forever).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        self.sent = sent
        if not sent:
            return None
        names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], names, b"".join(message.get("body", b"") for message in sent[1:]))

    async def post(self, path: str, document: Any, headers: Mapping[str, str] | None = None) -> Answer:
        answer = await self.ask("POST", path, orjson.dumps(document), headers)
        assert answer is not None
        return answer

    async def get(self, path: str) -> Answer:
        answer = await self.ask("GET", path)
        assert answer is not None
        return answer

    async def infer(self, *values: float, model: str = "m", version: str | None = None) -> Answer:
        path = f"/v2/models/{model}/infer" if version is None else f"/v2/models/{model}/versions/{version}/infer"
        return await self.post(path, request(*values))


def request(*values: float) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": list(values or (1.0, 2.0))}]}


def serve(
    *versions: LoadedVersion,
    route: Route | None = None,
    timeout_seconds: float = 30.0,
    max_body_bytes: int = 100_000,
    max_concurrent: int = 100,
    random: Callable[[], float] = lambda: 0.5,
    nudge: Callable[[], Awaitable[dict[str, Any]]] = no_nudge,
    info: Callable[[], dict[str, Any]] = dict,
    aliases: Sequence[Alias] = (),
) -> Server:
    """A server of these versions, all of the model "m"; without a route the first one is stable."""
    serving = Serving(environment="production", replica_id="box-1", boot_id="abcdef0123456789", random=random)
    if route is None and versions:
        route = Route("m", 1, versions[0].version)
    routes = {} if route is None else {route.model: route}
    serving.install(routes, {(v.model, v.version): v for v in versions}, "epoch", 1)
    serving.ready = True
    limits = SimpleNamespace(
        server=SimpleNamespace(
            request_timeout_seconds=timeout_seconds, max_body_bytes=max_body_bytes, max_receiving_mb=64
        ),
        performance=SimpleNamespace(max_concurrent_requests=max_concurrent),
    )
    return Server(serving, create_app(serving, settings=limits, nudge=nudge, info=info, aliases=aliases))


def close(*versions: LoadedVersion) -> None:
    for version in versions:
        if isinstance(version.runtime, PythonRuntime):
            version.runtime.gate.set()
        version.close()
        assert version.join(10)


def affine_model(path: Path, scale: float = 2.0, *, fails_above: int | None = None) -> Path:
    """An ONNX model, y = x * scale with x [rows, 2]; with `fails_above`, also a Gather that x beyond it gets wrong."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Mul", ["x", "scale"], ["y"])]
    constants = [helper.make_tensor("scale", TensorProto.FLOAT, [], [scale])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])]
    if fails_above is not None:
        table = [float(k) for k in range(fails_above + 1)]
        constants.append(helper.make_tensor("table", TensorProto.FLOAT, [len(table)], table))
        nodes += [
            helper.make_node("Cast", ["x"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["z"]),
        ]
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["rows", 2]))
    graph = helper.make_graph(
        nodes, "affine", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])], outputs, constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def identity_model(path: Path, onnx_type: int) -> Path:
    """An ONNX model that answers its input, of one ONNX element type and any length."""
    from onnx import helper

    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [helper.make_tensor_value_info("x", onnx_type, ["n"])],
        [helper.make_tensor_value_info("y", onnx_type, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path
