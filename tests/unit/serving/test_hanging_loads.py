"""A model that never comes to the end of its load: it is told of everywhere, its requests are answered, and the others notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from registry import replicas
from registry.actor import Who
from registry.database import Database
from registry.errors import ModelkeepError
from serving.compute.engine import LoadedVersion
from serving.device import loads
from serving.loaded.laststate import Wanted
from serving.loaded.lifecycle import ModelState
from serving.process.crashmark import Slot
from serving.views import metrics
from tests.unit.registry import kit
from tests.unit.serving.boxes import VALUE, Box, Run
from tests.unit.serving.helpers import until
from tests.unit.serving.rounds import stable

ALL = {"max_concurrent_models": 10}
WHO = Who("somebody")


class Hold:
    """Keeps the loads of one version from ending."""

    def __init__(self, box: Box, model: str, version: str = "1") -> None:
        self.entered, self.go_on, self.times = threading.Event(), threading.Event(), 0
        self.loader = box.reconciler.loader
        self._held, loading = (model, version), box.reconciler.loading
        self._real = loading._load
        loading._load = self._wait  # type: ignore[method-assign]

    def _wait(self, version: Wanted, slot: Slot) -> LoadedVersion:
        if (version.model, version.version) == self._held:
            self.times += 1
            self.entered.set()
            assert self.go_on.wait(60)
        return self._real(version, slot)

    async def hangs(self) -> None:
        """From now on it has taken too long."""
        await until(self.entered.is_set)
        for attempt in self.loader.attempts:
            if attempt.key == self._held:
                attempt.limit_seconds = 1e-3
        await until(lambda: self._held in self.loader.hanging())


@asynccontextmanager
async def turning(box: Box) -> AsyncIterator[None]:
    """The reconciler follows by itself, and does not wait for what takes a moment."""
    box.reconciler.loader.patience_seconds = 0.01
    following = asyncio.create_task(box.reconciler.run())
    try:
        yield
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


def page(box: Box) -> str:
    return metrics.Metrics(box.reconciler.serving).render().decode()


def test_a_new_version_that_hangs_while_it_loads_leaves_the_stable_one_and_is_told_of(
    run: Run, database: Database
) -> None:
    async def test(box: Box) -> None:
        reconciler, hold = box.reconciler, Hold(box, "a", "2")
        async with turning(box):
            kit.canary(database, kit.begin(database, "2", model="a", ttl_seconds=3600.0))
            await until(lambda: any(e["version"] == "2" for e in reconciler.info()["loading"]))
            assert reconciler.errors == {}, "it takes long, which is no error yet"
            stable(database, "b", "2")
            await until(lambda: ("b", "2") in reconciler.serving.loaded)
            assert await box.value("b") == VALUE["b"] / 21 * 22, "another model was promoted meanwhile"
            assert await box.value("a") == VALUE["a"]
            await hold.hangs()
            await until(lambda: ("a", "2") in reconciler.errors)
            why = reconciler.errors["a", "2"]
            assert "hangs while it loads: loading has taken" in why and "health.load_hang_seconds" in why
            health = (await box.server.get("/api/v2/model-health")).json()["models"]
            assert [(m["version"], m["reasons"]) for m in health if m["status"] == "unhealthy"] == [("2", [why])]
            assert (await box.server.get("/v2/models/a/versions/2/ready")).status == 503
            assert (await box.server.get("/v2/models/a/ready")).status == 200
            text = page(box)
            assert "modelkeep_load_hangs_total 1.0" in text
            assert 'modelkeep_loading_seconds{hangs="1",model="a",version="2"}' in text
            assert reconciler.caretaker.lifecycle.state(("a", "2")) is ModelState.ERROR
            await reconciler.once()
            with database.read() as session:
                (said,) = replicas.listed(session)
            assert said["serving"]["errors"]["a/2"] == why, "a promotion reads it there"
            assert await box.value("a") == VALUE["a"] and hold.times == 1
            hold.go_on.set()
            await until(lambda: not reconciler.loader.at_work())

    run(test, ALL)


def test_the_only_version_of_a_model_that_hangs_is_503_at_once_and_served_should_it_come_after_all(run: Run) -> None:
    async def test(box: Box) -> None:
        reconciler, hold = box.reconciler, Hold(box, "a")
        await box.orders.unload("a", who=WHO, reason="")
        async with turning(box):
            loading = asyncio.create_task(box.orders.load("a", who=WHO, reason=""))
            await until(hold.entered.is_set)
            waiting = asyncio.create_task(box.ask("a"))
            await until(lambda: reconciler.serving.gate.waiting >= 1)
            assert await box.value("b") == VALUE["b"]
            await hold.hangs()
            answer = await waiting
            assert answer.status == 503 and answer.headers["retry-after"], "who waited is answered"
            with contextlib.suppress(ModelkeepError):
                await loading
            answer = await box.ask("a")
            assert answer.status == 503 and "hangs while it loads" in answer.error
            assert "hangs while it loads" in (await box.server.get("/v2/models/a/ready")).error
            assert hold.times == 1, "not tried a second time beside itself"
            hold.go_on.set()
            await until(lambda: ("a", "1") in reconciler.serving.loaded)
            assert await box.value("a") == VALUE["a"] and hold.times == 1
            assert reconciler.loader.hanging() == {}
            assert reconciler.caretaker.lifecycle.state(("a", "1")) is ModelState.IN_USE

    run(test, ALL)


def test_what_comes_after_all_and_nobody_wants_any_more_is_let_go(run: Run, database: Database) -> None:
    async def test(box: Box) -> None:
        reconciler, hold, before = box.reconciler, Hold(box, "a", "2"), set(threading.enumerate())
        async with turning(box):
            operation = kit.begin(database, "2", model="a", ttl_seconds=3600.0)
            kit.canary(database, operation)
            await hold.hangs()
            await until(lambda: ("a", "2") in reconciler.errors)
            kit.end(database, operation, "withdrawn")
            await until(lambda: ("a", "2") not in reconciler.errors and not reconciler._behind)
            assert reconciler.watchdog.as_dict()["stuck"] == ["a/2"]
            assert reconciler.watchdog.look([]) == [] and not reconciler.watchdog.restarting, "one is lived with"
            hold.go_on.set()
            await until(lambda: not reconciler.loader.attempts)
            await until(lambda: not reconciler._leaving.versions)
            assert not [t for t in set(threading.enumerate()) - before if t.name == "a/2"], "its worker went"
            assert reconciler.watchdog.as_dict()["stuck"] == []

    run(test, ALL)


def test_with_two_such_that_nobody_wants_the_process_is_replaced(run: Run) -> None:
    async def test(box: Box) -> None:
        ended: list[float] = []
        watchdog = box.reconciler.watchdog
        watchdog._restart = ended.append
        watchdog.abandoned = lambda: [("a/2", 0)]
        watchdog.look([])
        assert not ended
        watchdog.abandoned = lambda: [("a/2", 0), ("b/2", 0)]
        watchdog.look([])
        assert len(ended) == 1

    run(test, ALL)


def test_one_that_holds_memory_that_others_need_has_the_process_replaced(run: Run) -> None:
    async def test(box: Box) -> None:
        ended: list[float] = []
        watchdog = box.reconciler.watchdog
        watchdog._restart, watchdog._budget_bytes = ended.append, 10 << 20
        watchdog.abandoned = lambda: [("a/2", 1 << 20)]
        watchdog.look([])
        assert not ended
        watchdog.abandoned = lambda: [("a/2", 8 << 20)]
        watchdog.look([])
        assert len(ended) == 1

    run(test, ALL)


def test_one_that_others_went_for_gives_them_back_when_it_hangs(run: Run) -> None:
    async def test(box: Box) -> None:
        reconciler, hold = box.reconciler, Hold(box, "c")
        box.grow_old()
        async with turning(box):
            asked = asyncio.create_task(box.ask("c"))
            await hold.hangs()
            answer = await asked
            assert answer.status == 503 and "hangs while it loads" in answer.error
            assert box.of("c")["state"] == "dormant" and "hangs" in box.of("c")["error"]
            await until(lambda: box.here == "ab")
            assert (await box.value("a"), await box.value("b")) == (VALUE["a"], VALUE["b"])
        hold.go_on.set()
        assert reconciler.residency.waking is None

    run(test)


def test_what_came_in_a_later_round_counts_with_the_time_that_it_took(run: Run, database: Database) -> None:
    """By that time it is decided how long a model stays before another has its place."""

    async def test(box: Box) -> None:
        reconciler, loading = box.reconciler, box.reconciler.loading
        real = loading.fetch

        def slow(version: Wanted) -> Path:
            time.sleep(0.3)
            return real(version)

        loading.fetch = slow  # type: ignore[method-assign]
        async with turning(box):
            stable(database, "a", "2")
            await until(lambda: any(attempt.left for attempt in reconciler.loader.attempts))
            await until(lambda: ("a", "2") in reconciler.serving.loaded)
            await until(lambda: box.of("a")["last_load_seconds"] >= 0.3)

    run(test, ALL)


def test_files_that_take_long_hold_up_nobody_else_who_wakes(run: Run) -> None:
    async def test(box: Box) -> None:
        reconciler, entered, go_on = box.reconciler, threading.Event(), threading.Event()
        for model in ("b", "c"):
            await box.orders.unload(model, who=WHO, reason="")
        real = reconciler.loading.fetch

        def fetch(version: Wanted) -> object:
            if version.model == "b":
                entered.set()
                assert go_on.wait(60)
            return real(version)

        reconciler.loader._fetch = fetch
        async with turning(box):
            first = asyncio.create_task(box.orders.load("b", who=WHO, reason=""))
            await until(entered.is_set)
            await box.orders.load("c", who=WHO, reason="")
            assert await box.value("c") == VALUE["c"]
            assert ("b", "1") not in reconciler.serving.loaded and reconciler.residency.fetching == {"b"}
            go_on.set()
            assert await box.value("b") == VALUE["b"]
            await first

    run(test, ALL)


def test_an_emergency_to_a_version_that_hangs_is_refused_at_once(run: Run) -> None:
    async def test(box: Box) -> None:
        reconciler, hold = box.reconciler, Hold(box, "a")
        assert reconciler.applied is not None
        wanted = reconciler.applied.by_key()["a", "1"]
        urgent = asyncio.create_task(reconciler.loader.load(wanted, urgent=True))
        await hold.hangs()
        for task in (urgent, asyncio.ensure_future(reconciler.loader.load(wanted, urgent=True))):
            with pytest.raises(ModelkeepError, match="hangs while it loads: an urgent load has taken"):
                await task
        assert await box.value("a") == VALUE["a"] and hold.times == 1
        hold.go_on.set()
        await until(lambda: not reconciler.loader.at_work())

    run(test, ALL)


def test_other_frameworks_loads_are_let_pass_by_one_that_takes_long(run: Run) -> None:
    """The turns that loads take are of the whole process: what hangs inside a framework gives up its own."""

    async def test(box: Box) -> None:
        reconciler, inside, go_on = box.reconciler, threading.Event(), threading.Event()
        real = loads.resident_bytes
        names = iter([True])

        def measured() -> int:
            if next(names, False):
                inside.set()
                assert go_on.wait(60)
            return real()

        for model in ("a", "b"):
            await box.orders.unload(model, who=WHO, reason="")
        loads.resident_bytes = measured  # type: ignore[assignment]
        try:
            async with turning(box):
                first = asyncio.create_task(box.orders.load("a", who=WHO, reason=""))
                await until(inside.is_set)
                await box.orders.load("b", who=WHO, reason="")
                assert await box.value("b") == VALUE["b"], "while a is inside the framework"
                assert ("a", "1") not in reconciler.serving.loaded
                go_on.set()
                await first
                assert await box.value("a") == VALUE["a"]
        finally:
            go_on.set()
            loads.resident_bytes = real

    run(test, ALL)
