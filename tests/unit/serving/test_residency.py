"""Three models on a server with room for two: who sleeps, who wakes, who waits, and what a load that fails costs."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from registry.database import Database
from registry.errors import ArtifactError
from registry.schema import Reach
from serving.follow.emergency import make_room_at_once
from serving.loaded.laststate import Wanted
from tests.unit.registry import kit
from tests.unit.serving.boxes import REQUEST, TWO, VALUE, Box, Run
from tests.unit.serving.helpers import until
from tests.unit.serving.rounds import MODELS, stable


def test_two_are_here_and_the_third_comes_at_its_first_request_for_the_one_asked_least_recently(run: Run) -> None:
    async def test(box: Box) -> None:
        assert box.here == "ab" and box.of("c")["state"] == "dormant"
        assert await box.value("a") == VALUE["a"]
        box.grow_old()
        assert await box.value("c") == VALUE["c"], "its first request waits and is answered"
        assert box.here == "ac", "b was never asked"
        assert (box.of("b")["state"], box.of("b")["evictions"]) == ("dormant", 1)
        assert box.of("c")["loads"] == 1
        waits = box.reconciler.info()["exchanges"]
        assert (waits["waited"], waits["waiting"], waits["turned_away"]) == (1, 0, 0)
        assert waits["models"] == ["b"]
        assert box.reconciler.info()["errors"] == {}

    run(test)


def test_concurrent_first_requests_load_once(run: Run) -> None:
    async def test(box: Box) -> None:
        box.grow_old()
        assert set(await asyncio.gather(*(box.value("c") for _ in range(20)))) == {VALUE["c"]}
        assert box.loads == ["c"]

    run(test)


def test_one_that_computes_is_drained_before_another_takes_its_memory(run: Run) -> None:
    async def test(box: Box) -> None:
        serving = box.reconciler.serving
        busy = serving.loaded["a", "1"]
        busy.acquire()  # a long request
        box.reconciler.room.budget_bytes = busy.runtime.memory_bytes
        box.grow_old()
        asked = asyncio.create_task(box.ask("c"))
        await until(lambda: not serving.loaded)
        assert not asked.done() and box.loads == []
        busy.release()
        assert (await asked).status == 200 and box.loads == ["c"] and box.here == "c"

    run(test, {"max_concurrent_models": 1})


def test_one_in_use_goes_last_and_without_haste_where_there_is_memory(run: Run) -> None:
    async def test(box: Box) -> None:
        await box.value("b")
        serving = box.reconciler.serving
        busy = serving.loaded["a", "1"]
        busy.acquire()  # a long request
        box.grow_old()
        await box.value("c")
        assert box.here == "ac", "a is in use now, b was asked before"
        await box.value("c")
        box.grow_old()
        serving.loaded["c", "1"].acquire()
        await box.value("b")  # both others are in use, one of them goes when it has answered
        assert len(box.here) == 2 and "b" in box.here
        assert sum(version.references for version in box.reconciler._leaving.versions) == 1
        for version in [*serving.loaded.values(), *box.reconciler._leaving.versions]:
            while version.references:
                version.release()

    run(test)


def test_without_prewarming_nothing_is_loaded_before_it_is_asked_for(run: Run) -> None:
    async def test(box: Box) -> None:
        assert box.reconciler.serving.ready and box.here == ""
        assert (await box.server.get("/v2/models/b/ready")).status == 200, "it answers at its first request"
        assert await box.value("b") == VALUE["b"]
        assert box.here == "b"

    run(test, {**TWO, "prewarm": False})


def test_what_takes_longer_than_the_start_may_comes_in_the_background_in_the_order_of_use(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "used.json").write_text(json.dumps({"format": 1, "used": {"c": 300.0, "b": 200.0}}))

    async def test(box: Box) -> None:
        await until(lambda: box.here == "bc")
        assert box.of("b")["loads"] == box.of("c")["loads"] == 1
        assert box.of("a")["state"] == "dormant"

    run(test, {**TWO, "prewarm_seconds": 0.0})


def test_preloading_loads_all_that_fit_before_the_server_is_ready(run: Run) -> None:
    async def test(box: Box) -> None:
        assert box.here == "abc" and box.reconciler.info()["residency"]["models"]["a"]["state"] == "resident"

    run(test, {"preload_models": True, "prewarm_seconds": 0.0})


def test_use_is_remembered_for_the_next_start(run: Run, tmp_path: Path) -> None:
    async def test(box: Box) -> None:
        box.grow_old()
        await box.value("c")

    run(test)
    used = json.loads((tmp_path / "used.json").read_text())["used"]
    assert list(used) == ["c"]
    run(lambda box: _is(box, "ac"))


async def _is(box: Box, here: str) -> None:
    assert box.here == here


def test_a_damaged_memory_of_use_costs_the_order_alone(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "used.json").write_text('{"format": 1, "used": ["c"]}')
    run(lambda box: _is(box, "ab"))
    assert any("cannot be read" in record.message for record in caplog.records)


def test_the_memory_decides_as_well_as_the_number(run: Run) -> None:
    async def test(box: Box) -> None:
        sizes = {key[0]: version.runtime.memory_bytes for key, version in box.reconciler.serving.loaded.items()}
        assert len(sizes) == 3
        box.reconciler.room.budget_bytes = sizes["a"] + sizes["c"]
        await box.value("a")
        await box.value("c")
        box.grow_old()
        await box.reconciler.again()
        assert box.here == "ac", "the least recently used goes where what is here is more than there may be"
        assert await box.value("b") == VALUE["b"]

    run(test, {})


def test_a_load_that_fails_is_answered_503_and_tried_again_after_a_pause_that_grows(run: Run) -> None:
    async def test(box: Box) -> None:
        now = [1000.0]
        box.reconciler.residency._monotonic = lambda: now[0]
        box.grow_old()
        box.bad = {"c"}
        answer = await box.ask("c")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1") and "rotten" in answer.error
        assert "rotten" in box.reconciler.info()["errors"]["c/1"]
        await until(lambda: box.here == "ab")
        assert await box.value("b") == VALUE["b"], "who went for it is back"
        tries = box.loads.count("c")
        assert "tried again in" in (await box.ask("c")).error and box.loads.count("c") == tries, (
            "not before the pause is over"
        )
        assert (await box.server.get("/v2/models/c/ready")).status == 503
        assert box.reconciler.residency.failed["c"].pause_seconds == 1.0
        now[0] += 1.0
        box.grow_old()
        assert (await box.ask("c")).status == 503
        assert box.reconciler.residency.failed["c"].pause_seconds == 2.0 and box.of("c")["failures"] == 2
        await until(lambda: box.here == "ab")
        now[0] += 2.0
        box.bad = set()
        box.grow_old()
        assert await box.value("c") == VALUE["c"]
        assert box.of("c")["error"] is None and box.reconciler.registry_error is None
        await box.reconciler.once()
        assert box.reconciler.info()["errors"] == {}

    run(test)


def test_what_is_missing_in_the_store_costs_the_others_nothing(
    run: Run, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(box: Box) -> None:
        box.grow_old()

        async def missing(version: Wanted, *, patient: bool) -> None:
            raise ArtifactError(f"{version.model} is not in the store")

        monkeypatch.setattr(box.reconciler.loader, "fetch", missing)
        assert "not in the store" in (await box.ask("c")).error
        assert box.here == "ab" and box.loads == [] and box.of("a")["evictions"] == box.of("b")["evictions"] == 0

    run(test)


def test_models_asked_in_turns_share_one_place_and_each_stays_for_a_while(run: Run) -> None:
    async def test(box: Box) -> None:
        now = [1000.0]
        box.reconciler.residency._monotonic = lambda: now[0]
        box.grow_old()
        assert await box.value("a") == VALUE["a"]
        assert box.here == "a"
        assert await box.value("b") == VALUE["b"]
        waiting = asyncio.create_task(box.ask("a"))
        await until(lambda: box.reconciler.serving.gate.waiting == 1)
        for _ in range(5):  # b came just now: it serves on while a waits
            assert await box.value("b") == VALUE["b"]
        assert not waiting.done()
        now[0] += 60.0
        box.reconciler.residency.rung.set()
        assert (await waiting).status == 200 and box.here == "a"

    run(test, {"max_concurrent_models": 1})


def test_many_clients_of_three_models_in_two_places_are_all_answered_right(run: Run) -> None:
    async def test(box: Box) -> None:
        async def client(place: int) -> None:
            for turn in range(8):
                model = MODELS[(place + turn) % 3]
                assert await box.value(model) == VALUE[model]

        await asyncio.gather(*(client(place) for place in range(9)))
        assert len(box.here) == 2 and box.reconciler.info()["exchanges"]["waited"] > 0

    run(test)


def test_what_a_promotion_judges_never_sleeps(run: Run, database: Database) -> None:
    async def test(box: Box) -> None:
        kit.canary(database, kit.begin(database, "2", model="c"))
        await box.reconciler.once()
        assert {version for model, version in box.reconciler.serving.loaded if model == "c"} == {"1", "2"}
        assert box.here == "c", "its two versions fill both places"
        assert await box.value("a") == VALUE["a"], "nothing else can go, so it comes beside them"
        assert box.here == "ac"
        box.grow_old()
        assert await box.value("b") == VALUE["b"]
        assert box.here == "bc"

    run(test)


def test_a_new_version_of_a_model_that_sleeps_is_loaded_when_it_is_promoted(run: Run, database: Database) -> None:
    async def test(box: Box) -> None:
        assert box.here == "ab"
        stable(database, "c", "2")
        await box.reconciler.once()
        assert "c" in box.here and len(box.here) == 2
        assert (await box.ask("c")).headers["x-model-version"] == "2"

    run(test)


def test_a_model_that_only_sleeps_follows_its_route_and_one_that_fails_does_not(run: Run, database: Database) -> None:
    def behind() -> list[str] | None:
        with database.read() as session:
            return session.scalars(select(Reach.behind)).one()

    async def test(box: Box) -> None:
        assert behind() is None
        box.grow_old()
        box.bad = {"c"}
        assert (await box.ask("c")).status == 503
        await box.reconciler.once()
        assert behind() == ["c"]

    run(test)


def test_without_swapping_nobody_goes_and_the_third_is_told_so(run: Run) -> None:
    async def test(box: Box) -> None:
        answer = await box.ask("c")
        assert answer.status == 503 and "models.enable_model_swapping is off" in answer.error
        assert box.here == "ab" and (await box.server.get("/v2/models/c/ready")).status == 503

    run(test, {**TWO, "enable_model_swapping": False})


def test_who_asks_for_its_inputs_wakes_a_model_and_who_asks_for_its_figures_does_not(run: Run) -> None:
    async def test(box: Box) -> None:
        assert (await box.server.get("/v2/models/c/stats")).status == 503
        index = (await box.server.post("/v2/repository/index", None)).json()
        (entry,) = [one for one in index if one["name"] == "c"]
        assert entry["state"] == "UNAVAILABLE" and "its next request loads it" in entry["reason"]
        assert box.here == "ab"
        box.grow_old()
        assert (await box.server.get("/v2/models/c")).json()["inputs"][0]["name"] == "x"
        box.grow_old()
        config = await box.server.get("/v2/models/c/versions/1/config")
        assert config.status == 200

    run(test)


def test_a_client_that_leaves_gives_its_place_at_the_gate_back(run: Run) -> None:
    async def test(box: Box) -> None:
        gate, gone = box.reconciler.serving.gate, asyncio.Event()
        gate.close(["a"])
        body = json.dumps(REQUEST).encode()
        asked = asyncio.create_task(box.server.ask("POST", "/v2/models/a/infer", body, gone=gone))
        await until(lambda: gate.waiting == 1)
        gone.set()
        assert await asked is None
        assert (gate.waiting, gate.left) == (0, 1)
        assert box.reconciler.serving.unrouted_codes == {499: 1}
        gate.open(["a"])

    run(test)


def test_what_was_waited_for_at_the_gate_is_part_of_the_time_that_a_request_has(run: Run) -> None:
    async def test(box: Box) -> None:
        gate, version = box.reconciler.serving.gate, box.reconciler.serving.loaded["a", "1"]
        real, loop, release = version.runtime.run, asyncio.get_running_loop(), threading.Event()

        def slow(*given: Any) -> Any:
            release.wait(60)
            return real(*given)

        version.runtime.run = slow  # type: ignore[method-assign]
        gate.close(["a"])
        document = {**REQUEST, "parameters": {"timeout": 400_000}}
        began = loop.time()
        asked = asyncio.create_task(box.server.post("/v2/models/a/infer", document))
        await until(lambda: gate.waiting == 1 and loop.time() - began > 0.3)
        gate.open(["a"])
        assert (await asked).status == 504
        assert version.telemetry.total.errors == 0, "most of its time had gone before the version was there"
        release.set()

    run(test)


def test_an_emergency_makes_room_and_waits_for_nobody(run: Run) -> None:
    async def test(box: Box) -> None:
        serving, residency = box.reconciler.serving, box.reconciler.residency
        box.reconciler.room.budget_bytes = sum(version.runtime.memory_bytes for version in serving.loaded.values())
        await box.value("a")
        (coming,) = [v for v in box.reconciler.applied.versions if v.model == "c"]  # type: ignore[union-attr]
        busy = serving.loaded["b", "1"]
        busy.telemetry.last_inference_unix_seconds = 1.0
        make_room_at_once(box.reconciler, coming)
        assert box.here == "a" and residency.sleeping["b"] == "an emergency needed its memory"
        assert await box.value("b") == VALUE["b"]

    run(test)


def test_what_is_loaded_again_for_its_health_goes_first_where_both_do_not_fit(run: Run) -> None:
    async def test(box: Box) -> None:
        serving, reconciler = box.reconciler.serving, box.reconciler
        sick = serving.loaded["a", "1"]
        beside: list[list[str]] = []
        box.meanwhile = lambda version: beside.append(sorted(model for model, _ in serving.loaded))
        assert reconciler.applied is not None
        await reconciler._apply(reconciler.applied, remember=False, anew=("a", "1"))
        assert beside == [["a", "b"]] and serving.loaded["a", "1"] is not sick, "there was room for both"
        reconciler.room.budget_bytes = sum(version.runtime.memory_bytes for version in serving.loaded.values())
        await reconciler._leaving.wait()
        await reconciler._apply(reconciler.applied, remember=False, anew=("a", "1"))
        assert beside[1:] == [["b"]], "its requests waited meanwhile"
        assert await box.value("a") == VALUE["a"]

    run(test)


def test_an_exchange_of_versions_and_a_model_that_wakes_do_not_get_in_each_others_way(
    run: Run, database: Database
) -> None:
    async def test(box: Box) -> None:
        serving = box.reconciler.serving
        box.reconciler.room.budget_bytes = sum(version.runtime.memory_bytes for version in serving.loaded.values())
        box.grow_old()
        stable(database, "a", "2")
        _, *answers = await asyncio.gather(
            box.reconciler.once(), *(box.ask(model) for model in "abcabc"), *(box.ask("c") for _ in range(6))
        )
        assert [answer.status for answer in answers] == [200] * 12
        assert (await box.ask("a")).headers["x-model-version"] == "2"
        assert len(serving.loaded) == 2 and box.reconciler.registry_error is None

    run(test)
