"""Versions that do not fit side by side: who goes, who waits, and what is served when the new one does not load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from registry.database import Database
from registry.errors import ArtifactError, UnavailableError
from serving.api import create_app
from serving.compute.engine import LoadedVersion
from serving.compute.onnx_runtime import OnnxRuntime
from serving.follow.desired import desired
from serving.follow.reconcile import Reconciler
from serving.loaded import loading
from serving.loaded.laststate import Wanted
from serving.loaded.swap import Room, staying
from serving.state import Serving
from serving.statuses import BusyError
from serving.traffic.gate import Gate
from serving.traffic.routing import Route
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL
from tests.unit.serving.helpers import Answer, PythonRuntime, Server, close, load, serve, until
from tests.unit.serving.rounds import following, three_versions

MB = 1 << 20
INFER = f"/v2/models/{MODEL}/infer"
REQUEST = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0, 1.0, 1.0, 1.0]}]}


def wanted(version: str = "2", *, model: str = "m", megabytes: int = 10, measured: int | None = None) -> Wanted:
    files = ({"name": "model.onnx", "digest": "f", "size_bytes": megabytes * MB},)
    return Wanted(model, version, f"digest of {model} {version}", "onnx", files, None, True, measured)


@pytest.fixture
def loaded() -> Iterator[dict[tuple[str, str], LoadedVersion]]:
    """Version 1 of three models, 10 MB each; `m` was asked last, `b` never."""
    found = {}
    for model, asked in (("m", 300.0), ("a", 200.0), ("b", None)):
        runtime = PythonRuntime()
        runtime.memory_bytes = 10 * MB
        found[model, "1"] = load(runtime, model=model)
        found[model, "1"].telemetry.last_inference_unix_seconds = asked
    yield found
    close(*found.values())


@pytest.mark.parametrize(
    ("budget_mb", "keep", "going"),
    [
        (None, [], []),
        (40, [], []),
        (39, [], ["m"]),
        (30, ["a", "b"], ["m"]),
        (29, [], ["m", "b"]),
        (19, [], ["m", "b", "a"]),
        (25, ["m"], ["b", "a"]),
        (10, ["m", "a", "b"], []),
    ],
)
def test_only_what_is_not_wanted_goes_first_of_the_same_model_then_what_was_asked_least_recently(
    loaded: dict[tuple[str, str], LoadedVersion], budget_mb: int | None, keep: list[str], going: list[str]
) -> None:
    room = Room(None if budget_mb is None else budget_mb * MB)
    named = {(model, "1") for model in keep} | {("m", "2")}
    assert [version.model for version in room.leaving([wanted()], loaded, named)] == going
    assert room.leaving([], loaded, named) == []


def test_the_need_is_as_measured_here_else_by_the_validation_else_the_files(
    loaded: dict[tuple[str, str], LoadedVersion], caplog: pytest.LogCaptureFixture
) -> None:
    room = Room(MB)
    assert room.need(wanted(megabytes=10)) == 10 * MB
    assert room.need(wanted(megabytes=10, measured=30 * MB)) == 30 * MB
    assert room.need(wanted(megabytes=10, measured=3 * MB)) == 10 * MB, "it cannot take less than its weights"
    here = load(version="2")
    here.digest, here.runtime.memory_bytes = wanted().digest, 12 * MB
    room.note(here)
    close(here)
    assert room.need(wanted(megabytes=10, measured=30 * MB)) == 12 * MB
    for _ in range(2):
        room.leaving([wanted()], loaded, loaded)
    assert sum("more than the budget" in record.message for record in caplog.records) == 1


def test_requests_wait_no_longer_than_they_may_and_no_more_of_them_than_may() -> None:
    async def run() -> None:
        gate = Gate()
        gate.most_waiting = lambda: 2
        await gate.wait("m", 0.01)  # it is open
        gate.close(["m"])
        with pytest.raises(UnavailableError, match="took longer than"):
            await gate.wait("m", 0.01)
        waiting = [asyncio.create_task(gate.wait("m", 30)) for _ in range(2)]
        await until(lambda: gate.waiting == 2)
        with pytest.raises(BusyError, match="2 requests wait"):
            await gate.wait("m", 30)
        await gate.wait("other", 0.01)
        gate.most_waiting = lambda: 3  # nobody needs what those hold who wait
        waiting.append(asyncio.create_task(gate.wait("m", 30)))
        await until(lambda: gate.waiting == 3)
        gate.open(["m"])
        await asyncio.gather(*waiting)
        assert (gate.waiting, gate.waited, gate.turned_away) == (0, 4, 2) and gate.longest_seconds >= 0.01
        gate.close(["m"])
        again = asyncio.create_task(gate.wait("m", 30))
        await until(lambda: gate.waiting == 1)
        gate.open(["m"])
        gate.close(["m"])  # before the one who waits has had his turn: he waits on
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not again.done()
        gate.open(["m"])
        await again

    asyncio.run(run())


@pytest.mark.parametrize(
    ("places", "others", "answered"),
    [(2, None, 2), (5, None, 5), (2, False, 1), (5, False, 4), (2, True, 1), (5, True, 3)],
)
def test_as_many_may_wait_as_nobody_else_could_use_the_places_of(
    places: int, others: bool | None, answered: int
) -> None:
    """`others`: whether another model is asked; None: there is none."""

    async def run() -> None:
        version, other = load(), load(model="other")
        server = serve(version, other, max_concurrent=places)
        gate = server.serving.gate
        gate.close(["m"])
        if others is not None:
            server.serving.routes["other"] = Route("other", 1, "1")
        if others:
            assert (await server.infer(1, 2, model="other", version="1")).status == 200
        asked = [asyncio.create_task(server.infer(1, 2)) for _ in range(places)]
        await until(lambda: gate.waiting + sum(one.done() for one in asked) == places)
        gate.open(["m"])
        assert sorted([(await one).status for one in asked]) == [200] * answered + [429] * (places - answered)
        close(version, other)

    asyncio.run(run())


# a server with room for one version


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1, 2 and 3; 1 is stable."""
    return three_versions(tmp_path_factory.mktemp("three"), "1")


@pytest.fixture
def database(tmp_path: Path, template: Path) -> Iterator[Database]:
    made = kit.prepared(tmp_path, template)
    yield made
    made.dispose()


@asynccontextmanager
async def small(database: Database, tmp_path: Path, template: Path) -> AsyncIterator[tuple[Reconciler, Server]]:
    async with following(database, tmp_path, template) as reconciler:
        (version,) = reconciler.serving.loaded.values()
        reconciler.room.budget_bytes = version.runtime.memory_bytes  # for this one, and no other beside it
        app = create_app(reconciler.serving, settings=reconciler.settings, nudge=reconciler.nudge, info=reconciler.info)
        yield reconciler, Server(reconciler.serving, app)


Test = Callable[[Reconciler, Server], Awaitable[None]]


@pytest.fixture
def run(database: Database, tmp_path: Path, template: Path) -> Callable[[Test], None]:
    def running(test: Test) -> None:
        async def whole() -> None:
            async with small(database, tmp_path, template) as (reconciler, server):
                await test(reconciler, server)

        asyncio.run(whole())

    return running


def by(answer: Answer) -> tuple[int, str | None]:
    return answer.status, answer.headers.get("x-model-version")


class Loader:
    """Loads as the server does, tells who was loaded beside, and fails or waits where a test says so."""

    def __init__(self, reconciler: Reconciler) -> None:
        self.reconciler, self.real = reconciler, reconciler.load
        self.beside: list[tuple[str, list[str]]] = []
        self.bad: set[str] = set()
        self.meanwhile: Callable[[str], Any] = lambda version: None
        reconciler.load = self  # type: ignore[method-assign, assignment]

    def __call__(self, version: Wanted) -> LoadedVersion:
        self.beside.append((version.version, sorted(name for _, name in self.reconciler.serving.loaded)))
        self.meanwhile(version.version)
        if version.version in self.bad:
            raise ArtifactError("rotten")
        return self.real(version)


def test_the_old_version_goes_before_the_new_one_comes_and_requests_wait_meanwhile(
    database: Database, run: Callable[[Test], None]
) -> None:
    async def test(reconciler: Reconciler, server: Server) -> None:
        loader, waiting = Loader(reconciler), []
        loop = asyncio.get_running_loop()

        async def ask() -> Answer:
            return await server.post(INFER, REQUEST)

        def meanwhile(version: str) -> None:
            for _ in range(3):
                waiting.append(asyncio.run_coroutine_threadsafe(ask(), loop))
            asyncio.run_coroutine_threadsafe(until(lambda: reconciler.serving.gate.waiting == 3), loop).result(30)

        loader.meanwhile = meanwhile
        assert by(await ask()) == (200, "1")
        kit.stable_by(database, "2")
        await reconciler.once()
        assert loader.beside == [("2", [])], "nothing was loaded beside it"
        answers = [await asyncio.wrap_future(future) for future in waiting]
        assert [by(answer) for answer in answers] == [(200, "2")] * 3
        assert answers[0].json()["outputs"][0]["data"] == [8.0, 8.0]
        told = reconciler.info()["exchanges"]
        assert (told["models"], told["waiting"], told["waited"], told["turned_away"]) == ([], 0, 3, 0)
        assert told["longest_seconds"] > 0
        states = {entry["version"]: entry["state"] for entry in reconciler.info()["states"]}
        assert states == {"1": "ARCHIVED", "2": "IN_USE"}

    run(test)


def test_a_version_that_does_not_load_gives_way_to_the_old_one_and_is_not_tried_again_for_the_same_route(
    database: Database, run: Callable[[Test], None]
) -> None:
    async def test(reconciler: Reconciler, server: Server) -> None:
        loader = Loader(reconciler)
        loader.bad = {"2"}
        kit.stable_by(database, "2")
        await reconciler.once()
        assert [version for version, _ in loader.beside] == ["2", "1"]
        assert by(await server.post(INFER, REQUEST)) == (200, "1")
        assert "rotten" in reconciler.info()["errors"][f"{MODEL}/2"]
        for _ in range(3):  # the pause after a failure is over, again and again
            reconciler._retry = (0.0, 0.0)
            await reconciler.once()
        assert [version for version, _ in loader.beside] == ["2", "1"], "the old version does not go for it again"
        assert by(await server.post(INFER, REQUEST)) == (200, "1")
        assert "until the route changes" in reconciler.info()["errors"][f"{MODEL}/2"]
        loader.bad = set()
        kit.stable_by(database, "3")
        await reconciler.once()
        assert by(await server.post(INFER, REQUEST)) == (200, "3")
        assert reconciler.info()["errors"] == {}

    run(test)


def test_where_neither_loads_the_errors_say_so_and_nobody_waits_for_ever(
    database: Database, run: Callable[[Test], None]
) -> None:
    async def test(reconciler: Reconciler, server: Server) -> None:
        loader = Loader(reconciler)
        loader.bad = {"1", "2"}
        kit.stable_by(database, "2")
        await reconciler.once()
        assert by(await server.post(INFER, REQUEST))[0] == 503
        errors = reconciler.info()["errors"]
        assert "rotten" in errors[f"{MODEL}/2"] and "does not load again" in errors[f"{MODEL}/1"]
        assert reconciler.registry_error is None, "the round itself went well"
        loader.bad = {"2"}  # the fault passes, but for what is rotten
        reconciler._retry = (0.0, 0.0)
        await reconciler.once()
        assert by(await server.post(INFER, REQUEST)) == (200, "1"), "what had to go is owed until it is back"
        reconciler._retry = (0.0, 0.0)
        await reconciler.once()
        assert [version for version, _ in loader.beside] == ["2", "1", "2", "1"], "and is not sent away again"

    run(test)


def test_a_candidate_is_loaded_beside_the_stable_version_whatever_the_budget_says(
    database: Database, run: Callable[[Test], None]
) -> None:
    async def test(reconciler: Reconciler, server: Server) -> None:
        loader = Loader(reconciler)
        operation = kit.begin(database, "2")
        kit.canary(database, operation)
        await reconciler.once()
        assert loader.beside == [("2", ["1"])], "its gates have decided that; the log has a warning"
        assert sorted(name for _, name in reconciler.serving.loaded) == ["1", "2"]

    run(test)


def test_a_candidate_that_goes_for_another_costs_the_stable_version_nothing_and_does_not_come_back(
    database: Database, run: Callable[[Test], None]
) -> None:
    async def test(reconciler: Reconciler, server: Server) -> None:
        loader = Loader(reconciler)
        operation = kit.begin(database, "2")
        kit.canary(database, operation)
        await reconciler.once()
        one, two = (reconciler.serving.loaded[MODEL, version] for version in "12")
        reconciler.room.budget_bytes = one.runtime.memory_bytes + two.runtime.memory_bytes
        kit.end(database, operation, "withdrawn")
        kit.canary(database, kit.begin(database, "3"))  # before the server looked again
        loader.bad = {"3"}
        closed: list[list[str]] = []
        loader.meanwhile = lambda version: closed.append(sorted(reconciler.serving.gate.closed))
        await reconciler.once()
        assert loader.beside[-1] == ("3", ["1"]), "the withdrawn one had to go"
        assert closed == [[]], "nobody waited: the stable version was there all the time"
        assert sorted(name for _, name in reconciler.serving.loaded) == ["1"]
        assert [version for version, _ in loader.beside] == ["2", "3"]
        await until(lambda: not reconciler._leaving.versions)
        states = {entry["version"]: entry["state"] for entry in reconciler.info()["states"]}
        assert states == {"1": "IN_USE", "2": "ARCHIVED"} and reconciler.registry_error is None

    run(test)


def test_an_emergency_during_an_exchange_is_what_serves_and_nothing_is_loaded_in_vain(
    database: Database, run: Callable[[Test], None]
) -> None:
    async def test(reconciler: Reconciler, server: Server) -> None:
        loader, loop = Loader(reconciler), asyncio.get_running_loop()
        loader.bad = {"2"}
        old = next(version for version in reconciler.applied.versions if version.version == "1")  # type: ignore[union-attr]
        route = reconciler.serving.routes[MODEL]

        def emergency(version: str) -> None:
            if version == "2":
                again = loader.real(old)
                loop.call_soon_threadsafe(reconciler.switch, route, again)
                made.append(again)

        made: list[LoadedVersion] = []
        loader.meanwhile = emergency
        kit.stable_by(database, "2")
        await reconciler.once()
        assert [version for version, _ in loader.beside] == ["2"], "the emergency's own is enough"
        assert reconciler.serving.loaded[MODEL, "1"] is made[0]
        assert by(await server.post(INFER, REQUEST)) == (200, "1")

    run(test)


def test_what_serves_a_model_whose_wanted_version_does_not_load_stays_when_another_model_changes() -> None:
    serving = Serving(environment="production", replica_id="r", boot_id="b")
    a, b = load(model="a", version="1"), load(model="b", version="1")
    serving.install(
        {"a": Route("a", 1, "1"), "b": Route("b", 1, "1"), "c": Route("c", 1, "1")},
        {("a", "1"): a, ("b", "1"): b},
        "e",
        1,
    )
    routes = [Route("a", 2, "2"), Route("b", 2, "2")]  # c is gone
    versions = {("a", "2"), ("b", "2")}
    assert staying(serving, routes, versions, [wanted("2", model="b")]) == {*versions, ("a", "1")}
    close(a, b)


def test_while_a_version_is_exchanged_the_model_is_not_unknown() -> None:
    serving = Serving(environment="production", replica_id="r", boot_id="b")
    serving.gate.close(["m"])
    with pytest.raises(UnavailableError, match="is being exchanged"):
        serving.versions("m")


def test_an_emergency_opens_the_gate(database: Database, run: Callable[[Test], None]) -> None:
    async def test(reconciler: Reconciler, server: Server) -> None:
        (version,) = reconciler.serving.loaded.values()
        reconciler.serving.gate.close([MODEL])
        asked = asyncio.create_task(server.post(INFER, REQUEST))
        await until(lambda: reconciler.serving.gate.waiting == 1)
        reconciler.switch(reconciler.serving.routes[MODEL], version)
        assert by(await asked) == (200, "1")

    run(test)


def test_what_is_on_its_way_out_is_waited_for_before_anybody_else_has_to_go(
    database: Database, run: Callable[[Test], None]
) -> None:
    async def test(reconciler: Reconciler, server: Server) -> None:
        loader = Loader(reconciler)
        (first,) = reconciler.serving.loaded.values()
        reconciler.room.budget_bytes = None
        first.acquire()  # a long request
        kit.stable_by(database, "2")
        await reconciler.once()
        (second,) = reconciler.serving.loaded.values()
        kit.stable_by(database, "3")
        (third,) = desired(database, ENVIRONMENT).versions
        reconciler.room.budget_bytes = second.runtime.memory_bytes + reconciler.room.need(third)
        round = asyncio.create_task(reconciler.once())
        done, _ = await asyncio.wait([round], timeout=0.3)
        assert not done and [version for version, _ in loader.beside] == ["2"]
        assert by(await server.post(INFER, REQUEST)) == (200, "2")
        first.release()
        await round
        assert loader.beside[-1] == ("3", ["2"]), "beside the present one, for which there is room"
        assert by(await server.post(INFER, REQUEST)) == (200, "3")

    run(test)


def test_the_model_of_a_version_that_cannot_be_made_is_closed_and_it_is_tried_again(
    database: Database, tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each try would leave a model in memory that nobody knows of."""
    closed: list[Any] = []
    close = OnnxRuntime.close

    def told(runtime: OnnxRuntime) -> None:
        closed.append(runtime)
        close(runtime)

    def none_can_be_made(*_: Any) -> Any:
        def make(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError("can't start new thread")

        return make

    async def scenario() -> None:
        monkeypatch.setattr(OnnxRuntime, "close", told)
        with monkeypatch.context() as patched:
            patched.setattr(loading, "engine_of", none_can_be_made)
            async with following(database, tmp_path, template) as reconciler:
                assert not reconciler.serving.loaded and len(closed) == 1
                patched.undo()
                await reconciler.again()
                assert (MODEL, "1") in reconciler.serving.loaded and len(closed) == 1

    asyncio.run(scenario())
