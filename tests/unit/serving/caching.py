"""Servers with a cache of answers, for its tests."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

from serving.caching.cache import ResponseCache
from serving.compute.engine import LoadedVersion
from serving.traffic.routing import Route
from tests.unit.serving.helpers import Server, row, serve

KEY = b"k" * 16
WATCHED = Route("m", 1, "1", watch=True)


def cached(*versions: LoadedVersion, route: Route | None = None, max_mb: int = 1) -> Server:
    """A server with a cache."""
    server = serve(*versions, route=route)
    server.serving.cache = ResponseCache(SimpleNamespace(max_mb=max_mb, ttl_seconds=60.0))
    server.serving.cache.follow(versions)
    return server


def cache_of(server: Server) -> ResponseCache:
    assert server.serving.cache is not None
    return server.serving.cache


def ask(version: LoadedVersion, *values: float, route: Route | None = None) -> Any:
    assert version.answers is not None
    return version.answers.submit(row(*values), None, route)


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*values: Any, **named: Any) -> None:
        asyncio.run(test(*values, **named))

    return run


async def landed() -> None:
    """Let what hangs on answered requests run."""
    for _ in range(3):
        await asyncio.sleep(0)
