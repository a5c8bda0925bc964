"""A worker that does not come to its end: what the watchdog finds, what the version then answers, what the caretaker asks for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from registry.errors import SettingsError, UnavailableError
from registry.settings import load_settings
from serving.compute.engine import LoadedVersion
from serving.compute.onnx_runtime import OnnxRuntime
from serving.loaded.caretaker import Caretaker
from serving.loaded.health import HealthStatus
from serving.loaded.watchdog import FORGIVEN_SECONDS, STUCK_MOST, Watchdog
from serving.traffic.routing import Route
from serving.traffic.shadow import Copy
from tests.unit.registry.kit import Clock
from tests.unit.serving.helpers import PythonRuntime, close, load, request, row, serve, until
from tests.unit.serving.stuck import endless_model
from tests.unit.serving.test_caretaker import Limits

KEY = ("m", "1")
HANG_SECONDS = 60.0
WATCHED = Route("m", 5, "1", watch=True)


class Looks:
    """A watchdog with a clock that the test moves, and a record of its wish for another process."""

    def __init__(self, budget_bytes: int | None = None) -> None:
        self.clock = Clock()
        self.restarts: list[float] = []
        self.there: list[LoadedVersion] = []
        self.dog = Watchdog(
            HANG_SECONDS,
            budget_bytes=budget_bytes,
            there=lambda: self.there,
            restart=self.restarts.append,
            monotonic=self.clock,
        )

    def watch(self, seconds: float, *versions: LoadedVersion) -> list[LoadedVersion]:
        """Look for so long, as often as it does; everything that it found."""
        found = []
        for _ in range(round(seconds / self.dog.look_seconds)):
            self.clock.seconds += self.dog.look_seconds
            found += self.dog.look(versions)
        return found


async def hanging(looks: Looks, route: Route | None = None, version: str = "1") -> tuple[LoadedVersion, PythonRuntime]:
    """A version that has been found to hang."""
    runtime = PythonRuntime()
    runtime.gate.clear()
    loaded = load(runtime, version)
    loaded.submit(row(1, 2), None, route)
    await until(lambda: loaded.computing)
    looks.watch(2.0, loaded)
    assert looks.watch(HANG_SECONDS, loaded) == [loaded]
    return loaded, runtime


def test_a_computation_that_is_too_long_is_found_once_and_not_before_its_time() -> None:
    async def scenario() -> None:
        looks, runtime = Looks(), PythonRuntime()
        runtime.gate.clear()
        version = load(runtime)
        version.submit(row(1, 2), None)
        await until(lambda: version.computing)
        assert looks.watch(HANG_SECONDS - 1, version) == [] and version.hung is None
        assert looks.watch(3 * HANG_SECONDS, version) == [version]
        assert "health.hang_seconds = 60" in str(version.hung)
        assert looks.dog.as_dict() == {"hangs": 1, "stuck": []}
        close(version)

    asyncio.run(scenario())


def test_many_computations_one_after_the_other_are_no_hang() -> None:
    async def scenario() -> None:
        looks, version = Looks(), load()
        looks.dog.look([version])
        for _ in range(10):
            await version.submit(row(1, 2), None).future
            await until(lambda: not version.computing)
            looks.clock.seconds += HANG_SECONDS / 2
            assert looks.dog.look([version]) == []
        version.computing = 1000  # as if it were seen in the middle of one after the other
        for _ in range(5):
            version.computing += 1
            assert looks.watch(HANG_SECONDS / 2, version) == []
        close(version)

    asyncio.run(scenario())


def test_a_process_that_was_stopped_for_an_hour_has_no_version_that_hangs() -> None:
    async def scenario() -> None:
        looks, runtime = Looks(), PythonRuntime()
        runtime.gate.clear()
        version = load(runtime)
        version.submit(row(1, 2), None)
        await until(lambda: version.computing)
        looks.watch(1.0, version)
        looks.clock.seconds += 3600
        assert looks.dog.look([version]) == []
        close(version)

    asyncio.run(scenario())


def test_who_waits_and_who_comes_is_answered_at_once_and_counted_as_its_error() -> None:
    async def scenario() -> None:
        looks = Looks()
        runtime = PythonRuntime()
        runtime.gate.clear()
        version = load(runtime, max_batch=1)
        server = serve(version, load(version="2"), route=WATCHED)
        in_it = asyncio.create_task(server.infer(1, 2))
        await until(lambda: version.computing)
        behind = asyncio.create_task(server.infer(3, 4))
        await until(lambda: version.queue_length == 1)
        looks.watch(HANG_SECONDS + 1, *server.serving.loaded.values())
        answer = await behind
        assert answer.status == 503 and "hangs" in answer.error and answer.headers["retry-after"]
        for _ in range(3):
            assert (await server.infer(1, 2)).status == 503
        assert (await server.infer(1, 2, version="2")).status == 200, "others serve"
        assert (await server.get("/v2/models/m/ready")).status == 503
        assert (await server.get("/v2/models/m/versions/1/ready")).status == 503
        assert (await server.get("/v2/models/m/versions/2/ready")).status == 200
        counts = version.watch[WATCHED.generation]
        assert (counts.requests, counts.errors) == (4, 4)
        assert counts.error_clusters.events == 1, "one hang is one cause"
        assert version.telemetry.total.errors == 4 and version.telemetry.codes == {503: 4}
        runtime.gate.set()
        assert (await in_it).status == 200, "it came to its end after all"
        close(*server.serving.loaded.values())

    asyncio.run(scenario())


def test_the_share_of_a_candidate_that_hangs_goes_to_the_stable_version() -> None:
    async def scenario() -> None:
        looks = Looks()
        candidate, _ = await hanging(looks, version="2")
        stable = load()
        server = serve(stable, candidate, route=Route("m", 5, "1", "2", 0.9, watch=True), random=lambda: 0.1)
        answer = await server.infer(1, 2)
        assert (answer.status, answer.headers["x-model-version"]) == (200, "1")
        assert (await server.infer(1, 2, version="2")).status == 503, "who names it is told"
        close(stable, candidate)

    asyncio.run(scenario())


def test_a_shadow_copy_for_a_version_that_hangs_is_dropped() -> None:
    async def scenario() -> None:
        looks = Looks()
        version, _ = await hanging(looks)
        stable = load(version="2")
        assert not version.offer(Copy(row(1, 2), None, row(2, 4), stable, None, None))
        close(version, stable)

    asyncio.run(scenario())


def test_one_that_comes_to_its_end_and_is_not_replaced_is_asked_again() -> None:
    async def scenario() -> None:
        looks = Looks()
        version, runtime = await hanging(looks)
        with pytest.raises(UnavailableError, match="hangs"):
            version.submit(row(1, 2), None)
        runtime.gate.set()
        await until(lambda: not version.computing)
        looks.watch(FORGIVEN_SECONDS / 2, version)
        assert version.hung is not None, "whoever looks after it shall have seen it"
        looks.watch(FORGIVEN_SECONDS, version)
        assert version.hung is None
        await version.submit(row(1, 2), None).future
        close(version)

    asyncio.run(scenario())


def test_an_onnx_model_gives_up_and_computes_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        looks, runtime = Looks(), OnnxRuntime(endless_model(tmp_path / "endless.onnx", limit=100))
        version = LoadedVersion("m", "1", "0" * 64, runtime, rows_independent=False, max_batch=1, queue_size=9)
        work = version.submit(row(1000, 1), None)
        await until(lambda: version.computing)
        looks.watch(HANG_SECONDS + 1, version)
        with pytest.raises(Exception, match="terminate"):
            await work.future
        await until(lambda: not version.computing)
        looks.watch(FORGIVEN_SECONDS + 1, version)
        again = version.submit(row(1, 2), None)
        await again.future
        assert again.answer["y"].tolist() == [[2, 4]]
        version.close()
        assert version.join(30)

    asyncio.run(scenario())


# What the caretaker asks for


def look(care: Caretaker, version: LoadedVersion, route: Route) -> list[str]:
    found = []
    for what, unfit in care.look({(version.model, version.version): version}, {"m": route}):
        found.append(what)
        assert "hangs" in unfit.reason
        (care.reloaded if what == "reload" else care.told)(unfit)
    return found


@pytest.mark.parametrize(
    ("route", "steps"),
    [
        (Route("m", 7, "1"), ["reload", "take out", "reload", "reload"]),
        (Route("m", 7, "1", watch=True), ["withdraw"]),
        (Route("m", 7, "2", "1", 0.5, watch=True), ["withdraw"]),
        (Route("m", 7, "2", "1", 0.0, shadow=True, watch=True), ["withdraw"]),
        (Route("m", 7, "1", "2", 0.5, watch=True), ["reload", "take out", "reload", "reload"]),
    ],
    ids=["stable", "in its soak", "candidate", "in shadow", "stable beside a candidate"],
)
def test_what_hangs_is_loaded_again_then_taken_out_and_withdrawn_at_once_where_it_is_judged(
    tmp_path: Path, route: Route, steps: list[str]
) -> None:
    async def scenario() -> None:
        looks = Looks()
        care = Caretaker(tmp_path, Limits(), monotonic=looks.clock)
        version, _ = await hanging(looks)
        found = [step for _ in range(4) for step in look(care, version, route)]
        assert found == steps
        assert care.results[KEY].status is HealthStatus.UNHEALTHY
        assert care.results[KEY].reasons[0].startswith("hangs: one computation has taken")
        close(version)

    asyncio.run(scenario())


# What is left behind


def test_workers_that_cannot_be_ended_have_the_process_replaced_once() -> None:
    async def scenario() -> None:
        looks = Looks()
        versions = [await hanging(looks, version=str(number)) for number in range(STUCK_MOST)]
        for number, (version, _) in enumerate(versions):
            assert looks.restarts == []
            version.close()
            looks.dog.left_behind(version)
            looks.watch(1.0)
            assert looks.dog.as_dict()["stuck"] == [f"m/{n}" for n in range(number + 1)]
        looks.watch(10.0)
        assert len(looks.restarts) == 1 and looks.dog.restarting
        close(*(version for version, _ in versions))

    asyncio.run(scenario())


def test_one_that_ends_after_all_is_no_longer_stuck() -> None:
    async def scenario() -> None:
        looks = Looks()
        version, runtime = await hanging(looks)
        version.close()
        looks.dog.left_behind(version)
        looks.watch(1.0)
        runtime.gate.set()
        assert version.join(30)
        looks.watch(1.0)
        assert looks.dog.stuck == [] and runtime.closed.is_set()

    asyncio.run(scenario())


def test_a_stuck_worker_that_holds_memory_which_the_others_need_has_the_process_replaced() -> None:
    async def scenario() -> None:
        looks = Looks(budget_bytes=1500)  # a version takes 1000
        version, _ = await hanging(looks)
        looks.there = [version]
        assert not looks.dog.fits_again(version)
        assert len(looks.restarts) == 1
        other, fresh = Looks(budget_bytes=1500), load(version="2")
        other.there = [fresh]
        assert other.dog.fits_again(fresh), "one that does not hang is loaded again as ever"
        version.close()
        other.dog.left_behind(version)
        other.watch(1.0)
        assert len(other.restarts) == 1
        close(version, fresh)

    asyncio.run(scenario())


def test_with_room_for_both_a_version_that_hangs_may_be_loaded_again() -> None:
    async def scenario() -> None:
        looks = Looks(budget_bytes=2000)
        version, _ = await hanging(looks)
        looks.there = [version]
        assert looks.dog.fits_again(version) and looks.dog.fits_again(None) and looks.restarts == []
        close(version)

    asyncio.run(scenario())


# Settings


def test_the_limit_is_twice_the_time_of_a_request_and_not_below_it(tmp_path: Path) -> None:
    environ = {"MODELKEEP_HOME": str(tmp_path), "MODELKEEP_PROFILE": "cpu"}
    assert load_settings(environ=environ, cwd=tmp_path).hang_seconds == 60
    longer = {**environ, "MODELKEEP_SERVER__REQUEST_TIMEOUT_SECONDS": "200"}
    assert load_settings(environ=longer, cwd=tmp_path).hang_seconds == 400
    with pytest.raises(
        SettingsError, match=r"health\.hang_seconds = 29 .* shorter than server\.request_timeout_seconds = 30"
    ):
        load_settings(environ={**environ, "MODELKEEP_HEALTH__HANG_SECONDS": "29"}, cwd=tmp_path)


def test_the_number_of_a_run_is_there_only_while_it_lasts() -> None:
    async def scenario() -> None:
        seen: list[int] = []

        def note(inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
            seen.append(version.computing)
            if len(seen) == 2:
                raise ValueError("no")
            return {"y": inputs["x"]}

        version = load(PythonRuntime(note))  # type: ignore[arg-type]
        failed = []
        for _ in range(3):
            future = version.submit(row(1, 2), None).future
            await asyncio.wait([future])
            failed.append(future.exception() is not None)
        await until(lambda: not version.computing)
        assert seen == [1, 2, 3] and failed == [False, True, False]
        close(version)

    asyncio.run(scenario())


def test_a_request_that_names_no_version_is_refused_with_the_words_of_the_hang() -> None:
    async def scenario() -> None:
        looks = Looks()
        version, _ = await hanging(looks)
        server = serve(version)
        answer = await server.post("/v2/models/m/infer", request(1, 2))
        assert answer.status == 503
        assert answer.error.startswith("model 'm' version '1' hangs (one computation has taken 60 s")
        close(version)

    asyncio.run(scenario())
