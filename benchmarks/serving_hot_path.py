"""How fast the server answers V2 inference: one process, a small ONNX model, 1, 16 and 64 connections.

Each request shows an API key, which the server checks; with `--no-guard` it does not look.
`python benchmarks/serving_hot_path.py [--seconds 5]` prints one JSON document. The driver is wrk where it is on the
PATH, otherwise an asyncio client (slower than the server: the document says which). The server runs on the first core
that this process may use, the client on the last one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from serving.process import heaps  # noqa: E402

INFER = "/v2/models/digits/infer"
CONNECTIONS = (1, 16, 64)
HEALTH_PROBES = 200
KEY_ID, KEY_SECRET = "0" * 12, "x" * 43
KEY = f"mk_{KEY_ID}_{KEY_SECRET}"

WRK_SCRIPT = """
local file = io.open(os.getenv("BENCH_BODY"), "rb")
wrk.method, wrk.body = "POST", file:read("*a")
file:close()
wrk.headers["Authorization"] = "Bearer " .. os.getenv("BENCH_KEY")
local length = os.getenv("BENCH_HEADER_LENGTH")
if length ~= "" then wrk.headers["Inference-Header-Content-Length"] = length end
done = function(summary, latency, requests)
    local e = summary.errors
    local bad = e.status + e.connect + e.read + e.write + e.timeout
    local p50, p99 = latency:percentile(50), latency:percentile(99)
    io.write(string.format("RESULT %d %d %d %d %d\\n", summary.requests, summary.duration, p50, p99, bad))
end
"""


def small_model(path: Path) -> None:
    """Two convolutions and a linear layer over 8x8 images, with weights that are fixed noise."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    noise = np.random.default_rng(0)

    def weights(name: str, *shape: int) -> Any:
        return numpy_helper.from_array((noise.standard_normal(shape) * 0.1).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("Flatten", ["r2"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w3"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])],
        [weights("w1", 8, 1, 3, 3), weights("w2", 16, 8, 3, 3), weights("w3", 256, 10)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())


def bodies() -> dict[str, tuple[bytes, int | None]]:
    """The request in JSON and in binary, each with the length of its JSON header where it needs one."""
    import numpy as np

    image = (np.arange(64, dtype=np.float32) % 17) / 16
    tensor: dict[str, Any] = {"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32"}
    text = json.dumps({"inputs": [{**tensor, "data": image.tolist()}]}).encode()
    binary = {**tensor, "parameters": {"binary_data_size": image.nbytes}}
    head = json.dumps({"inputs": [binary], "parameters": {"binary_data_output": True}}).encode()
    return {"json": (text, None), "binary": (head + image.tobytes(), len(head))}


async def serve(descriptor: int, path: Path, *, guarded: bool) -> None:
    import uvicorn

    from registry import keys
    from serving.access.auth import Guard, Rules
    from serving.access.keyring import Keyring
    from serving.api import create_app
    from serving.compute.engine import LoadedVersion
    from serving.compute.runtimes import load_runtime
    from serving.http.protocol import bounded_protocol
    from serving.process.collector import freeze_startup_objects
    from serving.state import Serving
    from serving.traffic.routing import Route

    runtime = load_runtime(path, "onnx", signature=None)
    version = LoadedVersion("digits", "1", "0" * 64, runtime, rows_independent=True, max_batch=32, queue_size=1000)
    serving = Serving(environment="production", replica_id="bench", boot_id="0123456789")
    route = Route("digits", 1, "1", watch=True, slow_threshold_seconds=1.0)
    serving.install({"digits": route}, {("digits", "1"): version}, "epoch", 1)
    serving.ready = True

    async def nudge() -> dict[str, Any]:
        return {}

    settings = SimpleNamespace(
        server=SimpleNamespace(request_timeout_seconds=30.0, max_body_bytes=10_000_000, max_receiving_mb=64),
        performance=SimpleNamespace(max_concurrent_requests=256),
        home=path.parent,
    )
    app: Any = create_app(serving, settings=settings, nudge=nudge, info=dict)
    if guarded:
        known = Keyring(path.with_name("keys.json"), "")
        known.install([keys.StoredKey(KEY_ID, "bench", "infer", keys.digest(KEY_SECRET), None, False)], ("epoch", 1))
        app = Guard(app, known, Rules(local=False))
    freeze_startup_objects()
    config = uvicorn.Config(
        app,
        http=bounded_protocol(30.0),
        ws="none",
        lifespan="off",
        access_log=False,
        server_header=False,
        log_level="error",
    )
    await uvicorn.Server(config).serve(sockets=[socket.socket(fileno=descriptor)])


def drive_with_wrk(address: str, folder: Path, kind: str, connections: int, seconds: float) -> dict[str, Any]:
    body, header_length = bodies()[kind]
    (folder / "body").write_bytes(body)
    (folder / "post.lua").write_text(WRK_SCRIPT)
    environment = {**os.environ, "BENCH_BODY": str(folder / "body"), "BENCH_HEADER_LENGTH": str(header_length or "")}
    environment["BENCH_KEY"] = KEY
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", str(folder / "post.lua")]
    done = subprocess.run(
        [*command, f"http://{address}{INFER}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    requests, micros, p50, p99, bad = (int(word) for word in line.split()[1:])
    return figures(requests / (micros / 1e6), p50 / 1e6, p99 / 1e6, bad)


def drive_with_asyncio(address: str, kind: str, connections: int, seconds: float) -> dict[str, Any]:
    body, header_length = bodies()[kind]
    extra = f"inference-header-content-length: {header_length}\r\n" if header_length else ""
    head = f"POST {INFER} HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {KEY}\r\n{extra}content-length: {len(body)}\r\n\r\n"
    request = head.encode() + body
    host, port = address.split(":")
    latencies: list[float] = []
    bad = 0

    async def client(end: float) -> None:
        nonlocal bad
        reader, writer = await asyncio.open_connection(host, int(port))
        while (started := time.perf_counter()) < end:
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            latencies.append(time.perf_counter() - started)
            bad += not answer.startswith(b"HTTP/1.1 200")
        writer.close()

    async def all_clients() -> None:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(client(end) for _ in range(connections)))

    asyncio.run(all_clients())
    cuts = statistics.quantiles(latencies, n=100)
    return figures(len(latencies) / seconds, cuts[49], cuts[98], bad)


def figures(rate: float, p50_seconds: float, p99_seconds: float, bad: int) -> dict[str, Any]:
    return {
        "requests_per_second": round(rate),
        "p50_seconds": round(p50_seconds, 6),
        "p99_seconds": round(p99_seconds, 6),
        "failed": bad,
    }


def health_under_load(address: str, folder: Path, driver: str, seconds: float) -> dict[str, float]:
    """Latency of health checks while 64 connections infer as fast as they can."""
    from concurrent.futures import ThreadPoolExecutor

    latencies: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        if driver == "wrk":
            load = pool.submit(drive_with_wrk, address, folder, "json", 64, seconds)
        else:
            load = pool.submit(drive_with_asyncio, address, "json", 64, seconds)
        time.sleep(0.2)
        while not load.done() and len(latencies) < HEALTH_PROBES:
            started = time.perf_counter()
            with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=30) as answer:
                answer.read()
            latencies.append(time.perf_counter() - started)
        load.result()
    cuts = statistics.quantiles(latencies, n=100)
    return {"p50_seconds": round(cuts[49], 6), "p99_seconds": round(cuts[98], 6), "probes": len(latencies)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=5, help="length of each of the six runs")
    parser.add_argument("--serve", nargs=2, metavar=("FD", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--no-guard", action="store_true", help="leave the check of keys out, to see what it costs")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if options.serve:
        os.sched_setaffinity(0, cores[:1])
        import uvloop

        uvloop.run(serve(int(options.serve[0]), Path(options.serve[1]), guarded=not options.no_guard))
        return
    driver = "wrk" if shutil.which("wrk") else "asyncio"
    with tempfile.TemporaryDirectory() as name, socket.socket() as listener:
        folder = Path(name)
        small_model(folder / "model.onnx")
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--serve",
            str(listener.fileno()),
            str(folder / "model.onnx"),
            *(["--no-guard"] if options.no_guard else []),
        ]
        started = time.perf_counter()
        process = subprocess.Popen(command, pass_fds=[listener.fileno()], env=heaps.environment(os.environ))
        try:
            # The socket listens already: the first request waits in it until the server is there.
            with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=60):
                start_seconds = time.perf_counter() - started
            os.sched_setaffinity(0, cores[-1:])
            results = {}
            for kind in ("json", "binary"):
                for connections in CONNECTIONS:
                    if driver == "wrk":
                        drive_with_wrk(address, folder, kind, connections, 1)
                        result = drive_with_wrk(address, folder, kind, connections, options.seconds)
                    else:
                        result = drive_with_asyncio(address, kind, connections, options.seconds)
                    results[f"{kind}, {connections} connections"] = result
            health = health_under_load(address, folder, driver, options.seconds)
        finally:
            process.terminate()
            process.wait(20)
    document = {
        "driver": driver,
        "keys": not options.no_guard,
        "cores": len(cores),
        "start_to_first_200_seconds": round(start_seconds, 3),
        "inference": results,
        "health_check_under_64_connections": health,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
