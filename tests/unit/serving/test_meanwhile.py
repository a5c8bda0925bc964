"""What others do to the models of a server while one of them is being loaded, and what a step that fails half-way leaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from registry.actor import Who
from registry.database import Database
from registry.errors import ArtifactError, UnavailableError
from serving.follow.emergency import Emergency, make_room_at_once
from serving.follow.orders import Orders
from serving.follow.reconcile import Reconciler
from serving.follow.unloads import Order, Unloads
from serving.loaded import laststate
from serving.loaded.caretaker import Caretaker
from serving.loaded.laststate import LastState, Wanted
from serving.loaded.lifecycle import ModelState
from serving.process import documents
from tests.unit.registry import kit
from tests.unit.serving.boxes import VALUE, Box, Run
from tests.unit.serving.helpers import until
from tests.unit.serving.rounds import following, stable

WHO = Who("somebody")
Test = Callable[[Box, Orders], Awaitable[None]]


@pytest.fixture
def run(run: Run) -> Run:
    """Tests that order loads and unloads as well."""

    def running(test: Test, **models: Any) -> None:
        run(lambda box: test(box, box.orders), models or None)

    return running


class Pause:
    """Holds the loader in the middle of a load of one model."""

    def __init__(self, box: Box, model: str) -> None:
        self.model, self.entered, self.go_on = model, threading.Event(), threading.Event()
        box.meanwhile = self._wait

    def _wait(self, version: Wanted) -> None:
        if version.model == self.model:
            self.entered.set()
            assert self.go_on.wait(60)


def workers(model: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(f"{model}/")]


async def gone(reconciler: Reconciler) -> None:
    await until(lambda: not reconciler._leaving.versions)


def test_a_model_that_is_unloaded_while_another_wakes_goes_once(run: Run) -> None:
    async def test(box: Box, orders: Orders) -> None:
        await box.value("a")
        box.grow_old()
        pause = Pause(box, "c")
        asked = asyncio.create_task(box.ask("c"))
        await until(pause.entered.is_set)
        await orders.unload("a", who=WHO, reason="")
        await gone(box.reconciler)
        pause.go_on.set()
        assert (await asked).status == 200
        await box.reconciler.again()
        await gone(box.reconciler)
        assert (box.of("c")["failures"], box.here) == (0, "c"), "the round under way came to its end"
        assert box.reconciler.caretaker.lifecycle.state(("a", "1")) is ModelState.ARCHIVED
        assert not workers("a") and not workers("b") and len(workers("c")) == 1

    run(test)


def test_a_version_that_is_unloaded_while_it_is_loaded_once_more_leaves_nothing_behind(run: Run) -> None:
    async def test(box: Box, orders: Orders) -> None:
        reconciler, pause = box.reconciler, Pause(box, "a")
        caretaker, wanted = reconciler.caretaker, reconciler.applied
        assert wanted is not None
        real = reconciler.load

        def load(version: Wanted) -> Any:
            caretaker.lifecycle.move((version.model, version.version), ModelState.DOWNLOADING)  # as the load begins
            return real(version)

        reconciler.load = load  # type: ignore[method-assign]
        again = asyncio.create_task(reconciler._apply(wanted, remember=False, anew=("a", "1")))
        await until(pause.entered.is_set)
        await orders.unload("a", who=WHO, reason="")
        await gone(reconciler)
        pause.go_on.set()
        await again
        await gone(reconciler)
        assert box.here == "b" and not workers("a")
        assert caretaker.lifecycle.state(("a", "1")) is ModelState.ARCHIVED

    run(test)


def test_a_version_that_went_while_another_was_loaded_does_not_come_back_closed(run: Run) -> None:
    async def test(box: Box, orders: Orders) -> None:
        reconciler = box.reconciler
        await box.value("a")
        box.grow_old()
        pause = Pause(box, "c")
        asked = asyncio.create_task(box.ask("c"))
        await until(pause.entered.is_set)
        old = reconciler.serving.loaded["a", "1"]
        # An emergency took its memory, and the next one brought it back.
        wanted = next(v for v in reconciler.applied.versions if v.model == "a")  # type: ignore[union-attr]
        reconciler.residency.sleeping["a"] = "an emergency needed its memory"
        rest = {key: version for key, version in reconciler.serving.loaded.items() if version is not old}
        reconciler.let_go(
            reconciler.serving.install(reconciler.serving.routes, rest, reconciler.serving.epoch, 1), rest
        )
        await gone(reconciler)
        fresh = await asyncio.to_thread(reconciler.load, wanted)
        reconciler.switch(reconciler.serving.routes["a"], fresh)
        pause.go_on.set()
        assert (await asked).status == 200
        await reconciler.again()
        assert reconciler.serving.loaded["a", "1"] is fresh and await box.value("a") == VALUE["a"]

    run(test)


def test_without_swapping_two_that_are_asked_for_at_once_do_not_push_out_who_is_here(run: Run) -> None:
    async def test(box: Box, orders: Orders) -> None:
        await box.value("a")
        answers = await asyncio.gather(box.ask("b"), box.ask("c"))
        assert sorted(answer.status for answer in answers) == [200, 503]
        assert "enable_model_swapping is off" in next(answer.error for answer in answers if answer.status == 503)
        assert "a" in box.here and len(box.here) == 2
        assert not any(box.of(model)["evictions"] for model in "abc")

    run(test, max_concurrent_models=2, prewarm=False, enable_model_swapping=False)


def test_without_swapping_a_load_by_hand_pushes_nobody_out_either(run: Run) -> None:
    async def test(box: Box, orders: Orders) -> None:
        await orders.unload("b", who=WHO, reason="")
        await box.value("c")
        assert box.here == "ac"
        with pytest.raises(Exception, match="enable_model_swapping is off"):
            await orders.load("b", who=WHO, reason="")
        assert box.here == "ac"

    run(test, max_concurrent_models=2, enable_model_swapping=False)


def test_an_emergency_takes_no_memory_from_what_another_emergency_holds(run: Run) -> None:
    async def test(box: Box, orders: Orders) -> None:
        reconciler = box.reconciler
        reconciler.registry_error = "gone"
        await Emergency(reconciler, reconciler.database).roll_back(
            "b", "1", who=WHO, reason="", emergency=True, ttl_seconds=30.0
        )
        await reconciler.again()
        await box.value("a")  # so that b would go first by use
        loaded = reconciler.serving.loaded.values()
        reconciler.room.budget_bytes = sum(version.runtime.memory_bytes for version in loaded)
        (coming,) = [v for v in reconciler.applied.versions if v.model == "c"]  # type: ignore[union-attr]
        make_room_at_once(reconciler, coming)
        assert box.here == "b"

    run(test)


def test_a_model_that_is_unloaded_while_its_files_cannot_be_had_is_unloaded_and_does_not_sleep(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(box: Box, orders: Orders) -> None:
        reconciler, asked_for, go_on = box.reconciler, asyncio.Event(), asyncio.Event()

        async def missing(version: Wanted, *, patient: bool) -> None:
            asked_for.set()
            await go_on.wait()
            raise ArtifactError("not in the store")

        monkeypatch.setattr(reconciler.loader, "fetch", missing)
        box.grow_old()
        asked = asyncio.create_task(box.ask("c"))
        await asked_for.wait()
        await orders.unload("c", who=WHO, reason="for the night")
        assert "for the night" in (await asked).error
        assert reconciler._tidying is not None
        await reconciler._tidying
        go_on.set()
        await until(lambda: reconciler.residency.waking is None)
        assert "c" not in reconciler.serving.sleeping and "c" not in reconciler.residency.failed
        assert "for the night" in (await box.ask("c")).error

    run(test)


def test_a_candidate_whose_files_are_missing_keeps_no_stable_version_asleep(
    run: Run, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(box: Box, orders: Orders) -> None:
        reconciler = box.reconciler
        kit.canary(database, kit.begin(database, "2", model="c"))
        await reconciler.once()
        await orders.unload("c", who=WHO, reason="")
        await gone(reconciler)
        real = reconciler.loader.fetch

        async def fetch(version: Wanted, *, patient: bool) -> None:
            if version.version == "2":
                raise ArtifactError("not in the store")
            await real(version, patient=patient)

        monkeypatch.setattr(reconciler.loader, "fetch", fetch)
        assert "1" in (await orders.load("c", who=WHO, reason=""))["versions"]

    run(test)


def test_a_round_that_fails_by_our_own_fault_is_tried_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(box: Box, orders: Orders) -> None:
        reconciler = box.reconciler
        box.grow_old()

        def fault(routes: Any) -> None:
            raise ValueError("a fault of our own")

        monkeypatch.setattr(reconciler.reporter, "supersede", fault)
        with pytest.raises(ValueError, match="fault of our own"):
            await reconciler.again()
        monkeypatch.undo()
        assert reconciler._retry is not None
        reconciler._retry = (0.0, 1.0)
        await reconciler.once()
        assert reconciler._retry is None and await box.value("a") == VALUE["a"]

    run(test)


def test_a_time_out_of_the_system_ends_one_round_and_not_the_following(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(box: Box, orders: Orders) -> None:
        async def late() -> None:
            raise TimeoutError(110, "Connection timed out")

        monkeypatch.setattr(box.reconciler, "_wanted", late)
        await box.reconciler.once()
        assert box.reconciler.registry_error == "no answer in time ([Errno 110] Connection timed out)"
        monkeypatch.undo()
        await box.reconciler.once()
        assert box.reconciler.registry_error is None

    run(test)


def test_whatever_keeps_the_last_report_from_the_registry_the_rest_is_ended(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(box: Box, orders: Orders) -> None:
        async def fault(*_: Any) -> None:
            raise ValueError("a fault of our own")

        monkeypatch.setattr(box.reconciler.reporter, "report", fault)
        await box.reconciler.stop()
        assert "did not reach the registry: a fault of our own" in caplog.text
        with pytest.raises(RuntimeError, match="after shutdown"):
            box.reconciler._thread.submit(int)

    run(test)


def test_a_save_that_is_given_up_does_not_overtake_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        entered, go_on, real = threading.Event(), threading.Event(), documents.replace

        def slow(path: Path, document: dict[str, Any]) -> None:
            if not entered.is_set():
                entered.set()
                assert go_on.wait(60)
            real(path, document)

        monkeypatch.setattr(documents, "replace", slow)
        unloads = Unloads(tmp_path / "unloaded.json", environment="production", replica_id="r")
        unloads.put(Order.now("model.unloaded", "a", WHO, ""))
        first = asyncio.create_task(unloads.save())
        await until(entered.is_set)
        first.cancel()  # as the registry's patience does
        unloads.put(Order.now("model.unloaded", "b", WHO, ""))
        second = asyncio.create_task(unloads.save())
        await asyncio.wait({second}, timeout=0.2)
        go_on.set()
        assert await second is None
        await asyncio.wait({first})
        await until(lambda: not unloads._saving.locked())
        again = Unloads(tmp_path / "unloaded.json", environment="production", replica_id="r")
        again.recall()
        assert sorted(again.by_model) == ["a", "b"], "what was put last is on the disk"

    asyncio.run(test())


def test_a_file_of_unloads_that_is_damaged_in_its_second_half_is_not_half_in_force(tmp_path: Path) -> None:
    path = tmp_path / "unloaded.json"
    unloads = Unloads(path, environment="production", replica_id="r")
    unloads.put(Order.now("model.unloaded", "a", WHO, ""))
    asyncio.run(unloads.save())
    path.write_text(path.read_text().replace('"untold": [{"action"', '"untold": [{"act"'))
    again = Unloads(path, environment="production", replica_id="r")
    again.recall()
    assert again.by_model == {} and again.untold == []


def test_an_order_that_cannot_be_put_on_record_does_not_stop_the_rest(tmp_path: Path, database: Database) -> None:
    async def test() -> None:
        unloads = Unloads(tmp_path / "unloaded.json", environment="production", replica_id="r")
        for model in ("a", "b"):
            unloads.put(Order.now("model.unloaded", model, WHO, ""))
        left = list(unloads.untold)

        async def in_thread(work: Any) -> None:
            if work.args[1] is left[0]:
                raise ValueError("it cannot be written")
            work()

        await unloads.tell(database, in_thread)
        assert unloads.untold == left[:1]

    asyncio.run(test())


def test_two_loads_of_one_version_at_once_may_end_in_any_order(tmp_path: Path) -> None:
    caretaker, key = Caretaker(tmp_path, _Limits()), ("m", "1")
    wanted = Wanted("m", "1", "0" * 64, "onnx", (), None, True, None)
    first, second = caretaker.begin(wanted), caretaker.begin(wanted)
    caretaker.loading(wanted, first)
    caretaker.lifecycle.settle([key], {key})
    caretaker.loading(wanted, second)
    caretaker.lifecycle.settle([key], {key})
    caretaker.failed(wanted, second, "no")
    assert caretaker.lifecycle.state(key) is ModelState.IN_USE, "the other copy serves"
    caretaker.end()


class _Limits:
    max_memory_mb, response_seconds, error_rate = 1024, 1.0, 0.1
    window_seconds, minimum_requests = 60.0, 10


def test_nothing_is_put_off_while_the_server_ends(run: Run) -> None:
    async def test(box: Box, orders: Orders) -> None:
        await until(lambda: box.here == "abc")
        box.reconciler.serving.ready = False  # as a stop does at once
        assert not box.reconciler.residency.postpones("a") and box.of("a")["state"] == "resident"

    run(test, prewarm_seconds=0.0)


def test_who_is_behind_is_told_so_also_when_another_model_is_unloaded(run: Run, database: Database) -> None:
    async def test(box: Box, orders: Orders) -> None:
        reconciler = box.reconciler
        box.bad = {"a"}
        stable(database, "a", "2")
        await reconciler.once()
        assert reconciler.reporter._reached.maxlen
        reconciler.reporter._reached.clear()
        await orders.unload("b", who=WHO, reason="")
        assert next(one.behind for one in reconciler.reporter._reached) == ("a", "b")

    run(test)


def test_a_version_that_does_not_load_keeps_no_other_route_from_the_last_state(run: Run, database: Database) -> None:
    async def test(box: Box, orders: Orders) -> None:
        reconciler = box.reconciler
        box.bad = {"b"}
        stable(database, "b", "2")
        await reconciler.once()
        stable(database, "a", "2")
        await reconciler.once()
        assert ("b", "2") in reconciler.errors
        kept = laststate.read(reconciler.state_file)
        assert kept is not None and reconciler.applied is not None
        wanted = {route.model: route for route in reconciler.applied.routes}
        routes = {route.model: route for route in kept.routes}
        assert (routes["a"], routes["c"]) == (wanted["a"], wanted["c"])
        assert (routes["b"].stable, routes["b"].generation) == ("1", wanted["b"].generation), (
            "a hold over it stays in force"
        )
        assert {key for key in kept.by_key() if key[0] != "c"} == {("a", "2"), ("b", "1")}
        assert kept.generation < reconciler.applied.generation, (
            "else a server that starts with it follows the registry no more"
        )
        box.bad = set()
        reconciler._retry = (0.0, 1.0)
        await reconciler.once()
        assert laststate.read(reconciler.state_file) == reconciler.applied

    run(test, max_concurrent_models=3)


def test_a_candidate_that_was_held_back_comes_though_the_registry_goes_away_in_that_moment(
    tmp_path: Path, template: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.canary(database, kit.begin(database, "2", model="a"))

    async def test() -> None:
        async with following(database, tmp_path, template) as reconciler:
            assert ("a", "2") not in reconciler.serving.loaded, "the stable versions come first"

            async def away() -> LastState:
                raise UnavailableError("it went away")

            with monkeypatch.context() as patched:
                patched.setattr(reconciler._upstream, "desired", away)
                await reconciler.once()
            assert reconciler.registry_error is not None
            await reconciler.once()
            assert ("a", "2") in reconciler.serving.loaded

    asyncio.run(test())
