"""A server without a socket that follows three models, with room for two or for all, and what its loader did."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from registry.database import Database
from registry.errors import ArtifactError
from serving.api import create_app
from serving.compute.engine import LoadedVersion
from serving.follow.orders import Orders
from serving.follow.reconcile import Reconciler
from serving.loaded.laststate import Wanted
from tests.unit.serving.helpers import Answer, Server
from tests.unit.serving.rounds import following

REQUEST = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0, 1.0, 1.0, 1.0]}]}
TWO = {"max_concurrent_models": 2}
SIZE_BYTES = 1 << 20
VALUE = {"a": 44.0, "b": 84.0, "c": 124.0}
"""What version 1 of a model answers to REQUEST."""


class Box:
    """A server that follows the three models, what its loader did, and who orders loads and unloads there."""

    def __init__(self, reconciler: Reconciler) -> None:
        self.reconciler = reconciler
        self.orders = Orders(reconciler, reconciler.database, timeout_seconds=60.0, registry_seconds=60.0)
        reconciler.serving.orders = self.orders
        app = create_app(reconciler.serving, settings=reconciler.settings, nudge=reconciler.nudge, info=reconciler.info)
        self.server = Server(reconciler.serving, app)
        self.loads: list[str] = []
        self.bad: set[str] = set()
        self.meanwhile: Callable[[Wanted], Any] = lambda version: None
        self._real = reconciler.load
        reconciler.load = self._load  # type: ignore[method-assign]
        for loaded in reconciler.serving.loaded.values():
            self._sized(loaded)

    def _load(self, version: Wanted) -> LoadedVersion:
        self.loads.append(version.model)
        self.meanwhile(version)
        if version.model in self.bad:
            raise ArtifactError("rotten")
        return self._sized(self._real(version))

    def _sized(self, loaded: LoadedVersion) -> LoadedVersion:
        """Of one size all: by how much the process grows with so small a model is chance, and a budget here is a sum of them."""
        loaded.runtime.memory_bytes = SIZE_BYTES
        self.reconciler.room.note(loaded)
        return loaded

    async def ask(self, model: str, **headers: str) -> Answer:
        return await self.server.post(f"/v2/models/{model}/infer", REQUEST, headers)

    async def value(self, model: str) -> float:
        answer = await self.ask(model)
        assert answer.status == 200, answer.body
        found: float = answer.json()["outputs"][0]["data"][0]
        return found

    async def order(self, action: str, model: str, document: Any = None) -> Answer:
        return await self.server.post(f"/v2/repository/models/{model}/{action}", document)

    @property
    def here(self) -> str:
        return "".join(sorted({model for model, _ in self.reconciler.serving.loaded}))

    def of(self, model: str) -> dict[str, Any]:
        told: dict[str, Any] = self.reconciler.info()["residency"]["models"][model]
        return told

    def grow_old(self) -> None:
        """Those that came just now have stayed long enough."""
        self.reconciler.residency._since.clear()


Test = Callable[[Box], Awaitable[None]]
Run = Callable[..., None]
"""Runs a test in a server that has started: what the settings `models` say (room for two where nothing is given), and other settings."""


def run_in(database: Database, home: Path, template: Path, test: Test, models: dict[str, Any], **settings: Any) -> None:
    async def whole() -> None:
        async with following(database, home, template, models=models, **settings) as reconciler:
            await test(Box(reconciler))

    asyncio.run(whole())
