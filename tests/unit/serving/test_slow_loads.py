"""Models whose loads take longer than a round waits, where the number of models binds: nobody goes before the other has come."""

from __future__ import annotations

import asyncio

from tests.unit.serving.boxes import VALUE, Box, Run
from tests.unit.serving.helpers import until
from tests.unit.serving.test_hanging_loads import Hold, turning

ONE = {"max_concurrent_models": 1}


def test_one_that_serves_goes_on_until_the_other_has_come_and_no_load_is_thrown_away(run: Run) -> None:
    async def test(box: Box) -> None:
        reconciler, hold = box.reconciler, Hold(box, "b")
        assert box.here == "a"
        box.grow_old()
        async with turning(box):
            asked = asyncio.create_task(box.ask("b"))
            await until(hold.entered.is_set)
            await until(lambda: reconciler.residency.waking is None)
            for _ in range(3):
                assert await box.value("a") == VALUE["a"], "nobody has come for it yet"
                await reconciler.again()
            assert (box.of("a")["state"], box.of("a")["evictions"]) == ("resident", 0)
            hold.go_on.set()
            assert (await asked).status == 200
            assert box.here == "b" and hold.times == 1 and box.of("a")["evictions"] == 1

    run(test, ONE)


def test_two_that_are_asked_in_turns_are_both_answered_in_the_end(run: Run) -> None:
    async def test(box: Box) -> None:
        box.grow_old()
        holds = {model: Hold(box, model) for model in "abc"}
        async with turning(box):
            for model in "bcab":
                asked = asyncio.create_task(box.ask(model))
                await until(holds[model].entered.is_set)
                await until(lambda: box.reconciler.residency.waking is None)
                others = [asyncio.create_task(box.ask(other)) for other in box.here]
                holds[model].go_on.set()
                assert (await asked).status == 200
                assert {answer.status for answer in await asyncio.gather(*others)} == {200}
                await until(lambda: not box.reconciler.residency.queue and not box.reconciler.loader.at_work())
                holds[model].entered.clear()
                holds[model].go_on.clear()
                box.grow_old()

    run(test, ONE)


def test_a_third_that_is_asked_for_meanwhile_costs_the_load_under_way_nothing(run: Run) -> None:
    async def test(box: Box) -> None:
        hold = Hold(box, "b")
        box.grow_old()
        async with turning(box):
            slow = asyncio.create_task(box.ask("b"))
            await until(hold.entered.is_set)
            await until(lambda: box.reconciler.residency.waking is None)
            assert await box.value("c") == VALUE["c"]
            assert box.here == "c", "no more of them than may be here"
            hold.go_on.set()
            assert (await slow).status == 200
            assert box.here == "b" and hold.times == 1

    run(test, ONE)


def test_who_waits_for_one_that_falls_asleep_meanwhile_has_it_woken(run: Run) -> None:
    async def test(box: Box) -> None:
        reconciler, serving = box.reconciler, box.reconciler.serving
        serving.gate.close(["b"])  # as an exchange does
        asked = asyncio.create_task(box.ask("b"))
        await until(lambda: serving.gate.waiting == 1)
        async with reconciler._lock:
            rest = {key: version for key, version in serving.loaded.items() if key[0] != "b"}
            reconciler.let_go(serving.install(serving.routes, rest, serving.epoch, serving.generation), rest)
            reconciler.residency.sleeping["b"] = "an emergency needed its memory"
            reconciler.residency.settle(())
        assert (await asked).status == 200

    run(test)


def test_without_swapping_the_place_of_one_that_is_on_its_way_is_taken(run: Run) -> None:
    async def test(box: Box) -> None:
        hold = Hold(box, "b")
        async with turning(box):
            slow = asyncio.create_task(box.ask("b"))
            await until(hold.entered.is_set)
            await until(lambda: box.reconciler.residency.waking is None)
            assert (box.of("b")["state"], box.here) == ("loading", "")
            answer = await box.ask("c")
            assert answer.status == 503 and "enable_model_swapping is off" in answer.error
            hold.go_on.set()
            assert (await slow).status == 200
            assert box.here == "b" and hold.times == 1

    run(test, {**ONE, "prewarm": False, "enable_model_swapping": False})
