"""A server process for the tests: the ONNX models given on the command line behind the real API, on a given socket."""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn

from registry.signature import Signature, TensorSpec
from serving.api import create_app
from serving.compute.engine import LoadedVersion
from serving.compute.runtimes import load_runtime
from serving.http.protocol import bounded_protocol
from serving.state import Serving
from serving.traffic.routing import Route


def _with_optional(model: str, named: list[str]) -> Signature | None:
    """What the registry would know of the model's optional inputs: the file does not say which weights are meant as inputs."""
    inputs = [name for known, name in (item.split("=", 1) for item in named) if known == model]
    return Signature(tuple(TensorSpec(name, "FP32", (1,), optional=True) for name in inputs), ()) if inputs else None


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--receive-timeout", type=float, default=30.0)
    parser.add_argument("--whole", action="append", default=[], help="a model whose rows are not independent")
    parser.add_argument("--optional", action="append", default=[], help="MODEL=INPUT: an input that has a default")
    parser.add_argument("--labels", action="append", default=[], help="MODEL=OUTPUT=LABEL,LABEL: names of its classes")
    parser.add_argument("models", nargs="+", help="NAME=PATH; the version of each is 1")
    options = parser.parse_args()
    loaded = {}
    labels = {
        model: {output: named.split(",")} for model, output, named in (one.split("=", 2) for one in options.labels)
    }
    for model, path in (item.split("=", 1) for item in options.models):
        loaded[model, "1"] = LoadedVersion(
            model,
            "1",
            "0" * 64,
            load_runtime(Path(path), "onnx", signature=_with_optional(model, options.optional)),
            rows_independent=model not in options.whole,
            max_batch=8,
            queue_size=100,
            labels=labels.get(model),
        )
    serving = Serving(environment="production", replica_id="test", boot_id="0123456789")
    serving.install({model: Route(model, 1, "1", watch=True) for model, _ in loaded}, loaded, "epoch", 1)
    serving.ready = True

    async def nudge() -> dict[str, Any]:
        return {"generation": serving.generation}

    def info() -> dict[str, Any]:
        return {"modules": [name for name in ("torch", "prefect", "scipy", "boto3") if name in sys.modules]}

    settings = SimpleNamespace(
        server=SimpleNamespace(request_timeout_seconds=30.0, max_body_bytes=1_000_000, max_receiving_mb=64),
        performance=SimpleNamespace(max_concurrent_requests=256),
    )
    app = create_app(serving, settings=settings, nudge=nudge, info=info)
    config = uvicorn.Config(
        app,
        http=bounded_protocol(options.receive_timeout),
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="error",
    )
    await uvicorn.Server(config).serve(sockets=[socket.socket(fileno=options.fd)])


if __name__ == "__main__":
    asyncio.run(main())
