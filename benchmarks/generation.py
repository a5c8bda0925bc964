"""Text generation: tokens a second at 1, 4 and 16 streams, against the plainest loops over ONNX Runtime and torch on the same core.

`python -m benchmarks.generation [--rounds 3] [--tokens 96]` prints one JSON document. The loops keep the key/value cache and generate one
text after the other; the server gets as many streams (server-sent events over HTTP) at a time. All on one core with one thread, in turns;
the client of the server has another core. Two models: the small one of the tests, and one of noise that is some 40 times as heavy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import _text_model  # noqa: E402
from serving.process import heaps  # noqa: E402

STREAMS = (1, 4, 16)
PROMPT = "The data set contains"
MODELS = {"small": (_text_model.WIDTH, _text_model.LAYERS), "heavy": (384, 4)}


async def serve(folder: Path, descriptor: int) -> None:
    """The server: the model in `folder` behind the real API."""
    import uvicorn

    from registry.sections import TextSection
    from serving.api import create_app
    from serving.compute.runtimes import load_runtime
    from serving.process.collector import freeze_startup_objects
    from serving.state import Serving
    from serving.text import api
    from serving.text.caches import Caches
    from serving.text.loading import engine_of
    from serving.traffic.routing import Route

    runtime = load_runtime(folder / "model.onnx", "onnx", signature=None)
    text = TextSection()
    version = engine_of(folder / "model.onnx", runtime, text, Caches(None))(
        "m", "1", "0" * 64, runtime, rows_independent=True, max_batch=32, queue_size=64
    )
    serving = Serving(environment="bench", replica_id="bench", boot_id="0" * 16)
    serving.install({"m": Route("m", 1, "1")}, {("m", "1"): version}, "epoch", 1)
    serving.ready = True
    settings: Any = SimpleNamespace(
        home=folder,
        server=SimpleNamespace(request_timeout_seconds=30.0, max_body_bytes=1_000_000, max_receiving_mb=64),
        performance=SimpleNamespace(max_concurrent_requests=256),
        text=text,
    )

    async def nudge() -> dict[str, Any]:
        return {}

    app = create_app(serving, settings=settings, nudge=nudge, info=dict, routers=[api.router(serving, settings)])
    freeze_startup_objects()
    config = uvicorn.Config(app, ws="none", lifespan="off", access_log=False, log_level="error")
    await uvicorn.Server(config).serve(sockets=[socket.socket(fileno=descriptor)])


async def ask(address: str, streams: int, tokens: int) -> tuple[float, list[float]]:
    """(tokens a second of all together, seconds to each stream's first event)."""
    body = {"model": "m", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    firsts: list[float] = []

    async def one(session: aiohttp.ClientSession) -> int:
        began, last = time.perf_counter(), b""
        async with session.post(f"http://{address}/v1/generate", json=body) as answer:
            async for line in answer.content:
                if line.startswith(b"data: "):
                    if not last:
                        firsts.append(time.perf_counter() - began)
                    last = line
        return int(json.loads(last[6:])["usage"]["completion_tokens"])

    async with aiohttp.ClientSession() as session:
        began = time.perf_counter()
        counts = await asyncio.gather(*(one(session) for _ in range(streams)))
        return sum(counts) / (time.perf_counter() - began), firsts


def onnx_loop(folder: Path) -> Callable[[list[int], int], None]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    past = [node for node in session.get_inputs() if node.name.startswith("past")]

    def generate(ids: list[int], tokens: int) -> None:
        cache = [np.zeros((1, node.shape[1], 0, node.shape[3]), dtype=np.float32) for node in past]
        new, total = ids, 0
        for _ in range(tokens):
            end = total + len(new)
            feed = {
                "input_ids": np.array([new]),
                "attention_mask": np.ones((1, end), dtype=np.int64),
                "position_ids": np.arange(total, end)[None],
                **{node.name: part for node, part in zip(past, cache, strict=True)},
            }
            logits, *cache = session.run(None, feed)
            total, new = end, [int(logits[0, -1].argmax())]

    return generate


def torch_loop(folder: Path, width: int, layers: int) -> Callable[[list[int], int], None]:
    import torch

    torch.set_num_threads(1)
    model = _text_model.in_torch(folder, width, layers)

    def generate(ids: list[int], tokens: int) -> None:
        cache, new, total = model.empty(1), torch.tensor([ids]), 0
        with torch.inference_mode():
            for _ in range(tokens):
                end = total + new.shape[1]
                positions = torch.arange(total, end)[None]
                logits, *cache = model(new, torch.ones(1, end, dtype=torch.long), positions, *cache)
                total, new = end, logits[:, -1:].argmax(-1)

    return generate


def loop(folder: Path, kind: str, width: int, layers: int, tokens: int) -> float:
    """Tokens a second of a plain loop, one text after the other."""
    from serving.text.words import Words

    ids = Words.read(folder / "model" / "tokenizer.json").encode(PROMPT)
    generate = onnx_loop(folder / "model") if kind == "onnxruntime" else torch_loop(folder, width, layers)
    generate(ids, 8)
    began = time.perf_counter()
    for _ in range(2):
        generate(ids, tokens)
    return 2 * tokens / (time.perf_counter() - began)


def measure(folder: Path, width: int, layers: int, *, rounds: int, tokens: int, cores: list[int]) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    firsts: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, __file__, "--serve", str(folder / "model"), "--fd", str(listener.fileno())]
        server = subprocess.Popen(command, pass_fds=[listener.fileno()], cwd=ROOT, env=heaps.environment(os.environ))
        os.sched_setaffinity(server.pid, {cores[0]})
        try:
            asyncio.run(ask(address, 1, 8))
            for _ in range(rounds):
                for kind in ("onnxruntime", "torch"):
                    line = [sys.executable, __file__, "--loop", kind, "--folder", str(folder), "--tokens", str(tokens)]
                    line += ["--shape", str(width), str(layers)]
                    done = subprocess.run(
                        ["taskset", "-c", str(cores[0]), *line], capture_output=True, text=True, check=True, cwd=ROOT
                    )
                    found.setdefault(kind, []).append(float(done.stdout))
                for streams in STREAMS:
                    rate, times = asyncio.run(ask(address, streams, tokens))
                    found.setdefault(f"modelkeep, {streams}", []).append(rate)
                    firsts[streams] += times
        finally:
            server.terminate()
            server.wait(20)
    rates = {name: round(statistics.median(values), 1) for name, values in found.items()}
    return {
        "tokens_per_second": rates,
        "of_onnxruntime": {name: round(rate / rates["onnxruntime"], 2) for name, rate in rates.items()},
        "of_torch": {name: round(rate / rates["torch"], 2) for name, rate in rates.items()},
        "first_event_seconds": {streams: round(statistics.median(times), 4) for streams, times in firsts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--fd", type=int)
    parser.add_argument("--loop")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--shape", type=int, nargs=2)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve, options.fd))
        return
    if options.loop is not None:
        print(loop(options.folder, options.loop, *options.shape, options.tokens))
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    report: dict[str, Any] = {"rounds": options.rounds, "tokens": options.tokens, "cores": len(cores)}
    with tempfile.TemporaryDirectory(prefix="generation-") as temporary:
        for name, (width, layers) in MODELS.items():
            folder = Path(temporary) / name
            _text_model.build(folder, steps=0, width=width, layers=layers)
            report[name] = measure(
                folder, width, layers, rounds=options.rounds, tokens=options.tokens, cores=[cores[0], cores[-1]]
            )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
