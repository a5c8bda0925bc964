"""Requests, clients that leave, unloads, promotions, withdrawals, emergencies and loads that fail, in any order, on a server with too little room."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from registry.actor import Who
from registry.database import Database
from registry.errors import ArtifactError, ModelkeepError
from serving.compute.engine import LoadedVersion
from serving.follow.emergency import Emergency, make_room_at_once
from serving.follow.orders import Orders
from serving.loaded.laststate import Wanted
from tests.unit.registry import kit
from tests.unit.serving.boxes import REQUEST, Box
from tests.unit.serving.helpers import until
from tests.unit.serving.rounds import MODELS, following, stable, three_models
from tests.unit.serving.test_hanging_loads import turning

CLIENTS, STEPS, LONG_STEPS = 8, 15, 300
WHO = Who("somebody")


class Chaos:
    """What happens to the server, drawn from a seed; and its clients, who check every answer."""

    def __init__(self, box: Box, database: Database, seed: int) -> None:
        self.box, self.database, self.reconciler = box, database, box.reconciler
        self.random = random.Random(seed)
        self.orders = Orders(self.reconciler, database, timeout_seconds=60.0)
        self.over = False
        self.failing, self.slow_seconds = 0.15, 0.0
        self.statuses: dict[int, int] = {}
        self._real = self.reconciler.load
        self.reconciler.load = self._load  # type: ignore[method-assign]

    def _load(self, version: Wanted) -> LoadedVersion:
        if self.random.random() < self.failing:
            raise ArtifactError("it fails now and then")
        time.sleep(self.random.random() * self.slow_seconds)
        return self._real(version)

    async def client(self) -> None:
        while not self.over:
            model, gone = self.random.choice(MODELS), asyncio.Event()
            if self.random.random() < 0.1:
                asyncio.get_running_loop().call_later(self.random.random() * 0.05, gone.set)
            answer = await self.box.server.ask("POST", f"/v2/models/{model}/infer", orjson.dumps(REQUEST), gone=gone)
            if answer is None:
                continue  # it left
            self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
            if answer.status == 200:
                version = float(answer.headers["x-model-version"])
                want = 4 * ((MODELS.index(model) + 1) * 10 + version)
                assert answer.json()["outputs"][0]["data"][0] == want, f"{model} {version} was answered by another"
            else:
                assert answer.status == 503, answer.body
                await asyncio.sleep(0.01)

    async def step(self) -> None:
        model = self.random.choice(MODELS)
        what = self.random.choice(
            ["unload", "load_again", "load_again", "promote", "withdraw", "emergency", "room", "round", "again"]
        )
        with contextlib.suppress(ModelkeepError):  # it may well not be possible now
            await getattr(self, f"_{what}")(model)
        await asyncio.sleep(self.random.random() * 0.05)

    async def _unload(self, model: str) -> None:
        await self.orders.unload(model, who=WHO, reason="")

    async def _load_again(self, model: str) -> None:
        await self.orders.load(model, who=WHO, reason="")

    async def _promote(self, model: str) -> None:
        await asyncio.to_thread(stable, self.database, model, self._other(model))
        await self.reconciler.once()

    async def _withdraw(self, model: str) -> None:
        operation = await asyncio.to_thread(kit.begin, self.database, self._other(model), model=model)
        await asyncio.to_thread(kit.canary, self.database, operation, 0.5)
        await self.reconciler.once()
        await asyncio.to_thread(kit.end, self.database, operation, "withdrawn")
        await self.reconciler.once()

    async def _emergency(self, model: str) -> None:
        await self.reconciler.once()
        self.reconciler.registry_error = "it does not answer"
        await Emergency(self.reconciler, self.database).roll_back(
            model, "1", who=WHO, reason="", emergency=True, ttl_seconds=30.0
        )
        await self.reconciler.once()

    async def _room(self, model: str) -> None:
        assert self.reconciler.applied is not None
        for version in self.reconciler.applied.versions:
            if version.model == model:
                make_room_at_once(self.reconciler, version)

    async def _round(self, model: str) -> None:
        await self.reconciler.once()

    async def _again(self, model: str) -> None:
        await self.reconciler.again()

    def _other(self, model: str) -> str:
        route = self.reconciler.serving.routes[model]
        return "2" if route.stable == "1" else "1"

    async def run(self, steps: int) -> None:
        clients = [asyncio.create_task(self.client()) for _ in range(CLIENTS)]
        for _ in range(steps):
            await self.step()
            for failed in self.reconciler.residency.failed.values():
                failed.until = min(failed.until, failed.until * self.random.choice([0.0, 1.0]))
        self.over, self.failing = True, 0.0
        await asyncio.gather(*clients)


@pytest.mark.parametrize(
    ("models", "steps", "slow_seconds"),
    [
        pytest.param({"max_concurrent_models": 2}, STEPS, 0.0, id="two places"),
        pytest.param({"max_concurrent_models": 1}, STEPS, 0.0, id="one place"),
        pytest.param({"max_concurrent_models": 1}, STEPS, 0.1, id="slow loads"),
        pytest.param(
            {"max_concurrent_models": 2, "prewarm": False}, LONG_STEPS, 0.0, id="long", marks=pytest.mark.long
        ),
    ],
)
def test_no_request_hangs_or_gets_a_wrong_answer_and_in_the_end_all_is_well(
    tmp_path: Path, models: dict[str, Any], steps: int, slow_seconds: float
) -> None:
    for folder in ("template", "home"):
        (tmp_path / folder).mkdir()
    template = three_models(tmp_path / "template")
    database = kit.prepared(tmp_path / "home", template)
    before = set(threading.enumerate())  # a server that stopped while it loaded may have left a worker in this process

    async def test() -> None:
        async with following(database, tmp_path / "home", template, models=models) as reconciler:
            chaos = Chaos(Box(reconciler), database, seed=steps + len(models))
            chaos.slow_seconds = slow_seconds
            following_by_itself = contextlib.AsyncExitStack()
            if slow_seconds:
                await following_by_itself.enter_async_context(turning(chaos.box))
            await chaos.run(steps)
            for model in MODELS:
                while (await chaos.box.ask(model)).status != 200:
                    reconciler.residency.failed.clear()
                    reconciler._retry = (0.0, 0.0)
                    await reconciler.once()
                    if model in reconciler.unloads.by_model:
                        await chaos.orders.load(model, who=WHO, reason="")
            # Models whose clients left may still be on their way here.
            await until(
                lambda: (
                    not reconciler._leaving.versions
                    and not reconciler.residency.queue
                    and reconciler.residency.waking is None
                    and not reconciler._lock.locked()
                    and not reconciler.loader.attempts
                )
            )
            await following_by_itself.aclose()
            serving = reconciler.serving
            assert (serving.gate.waiting, serving.in_flight) == (0, 0)
            assert all(version.references == 0 for version in serving.loaded.values())
            here = set(threading.enumerate()) - before
            workers = [thread.name for thread in here if thread.name[:2] in ("a/", "b/", "c/")]
            assert len(workers) == len(serving.loaded), "nobody was left behind"
            assert chaos.statuses[200] > 0 and set(chaos.statuses) <= {200, 503}

    try:
        asyncio.run(test())
    finally:
        database.dispose()
