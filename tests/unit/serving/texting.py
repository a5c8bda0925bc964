"""Servers of versions that generate text, for their tests."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson

from serving.api import create_app
from serving.state import Serving
from serving.text import api as text_api
from serving.text.version import TextVersion
from serving.traffic.routing import Route
from tests.unit.serving.helpers import Server, no_nudge
from tests.unit.serving.text_toy import Letters, Toy, toy_model

WORDS = Letters()
GENERATE, COMPLETIONS = "/v1/generate", "/v1/completions"


def text_version(toy: Toy | None = None, version: str = "1", *, model: str = "m", **options: Any) -> TextVersion:
    toy = toy or Toy(toy_model())
    how = {"max_running": 4, "max_waiting": 2, "max_cache_bytes": 1 << 30, "max_batch": 8, **options}
    return TextVersion(
        model, version, "0" * 64, toy, text=toy.model, words=WORDS, rows_independent=True, queue_size=10, **how
    )


def held(version: str = "1", **options: Any) -> tuple[TextVersion, threading.Semaphore]:
    """A version each of whose runs waits for a token of the semaphore."""
    toy = Toy(toy_model())
    toy.gate = threading.Semaphore(0)
    return text_version(toy, version, **options), toy.gate


def serve(*versions: Any, route: Route | None = None, max_concurrent: int = 100, **limits: Any) -> Server:
    serving = Serving(environment="production", replica_id="box-1", boot_id="abcdef0123456789", random=lambda: 0.5)
    routes = {"m": route or Route("m", 1, versions[0].version)}
    routes |= {v.model: Route(v.model, 1, v.version) for v in versions if v.model != "m"}
    serving.install(routes, {(v.model, v.version): v for v in versions}, "epoch", 1)
    serving.ready = True
    settings: Any = SimpleNamespace(
        home=Path("no-home"),
        server=SimpleNamespace(request_timeout_seconds=30.0, max_body_bytes=100_000, max_receiving_mb=64),
        performance=SimpleNamespace(max_concurrent_requests=max_concurrent),
        text=SimpleNamespace(**{"max_tokens": 300, "timeout_seconds": 60.0, **limits}),
    )
    routers = [text_api.router(serving, settings)]
    return Server(serving, create_app(serving, settings=settings, nudge=no_nudge, info=dict, routers=routers))


def expected(prompt: str, most: int) -> str:
    """The greedy answer, by the plainest loop over the toy."""
    toy, ids = Toy(toy_model(cached=False)), WORDS.encode(prompt)
    begin = len(ids)
    for _ in range(most):
        array = np.array([ids])
        answer = toy.run(
            {"input_ids": array, "attention_mask": np.ones_like(array), "position_ids": np.arange(len(ids))[None]}, None
        )
        ids.append(int(answer["logits"][0, -1].argmax()))
    return WORDS.decode(ids[begin:])


def asked(prompt: str = "abc", **more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}


def events(body: bytes) -> list[Any]:
    parts = body.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part if part == "data: [DONE]" else orjson.loads(part[6:]) for part in parts]
