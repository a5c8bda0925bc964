"""A hold on its way home to a registry that refuses it: asked again ever more seldom, and at once when its route changes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry import routes
from registry.actor import Who
from registry.database import Database
from registry.errors import ConflictError, RefusedError, UnavailableError
from registry.rollbacks import Hold
from registry.routes import Desired
from registry.schema import Environment
from registry.settings import Settings
from registry.store import DirectoryStore
from serving.follow import backstop as backstops
from serving.follow.backstop import Backstop
from serving.follow.holds import Holds
from serving.follow.reconcile import Reconciler
from serving.loaded.laststate import LastState, Wanted
from serving.process import documents
from serving.state import Serving
from serving.traffic.routing import Route
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL, Clock
from tests.unit.serving.helpers import until


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    made = kit.prepared(folder)
    for version in ("1", "2"):
        kit.add_version(made, version)
        kit.add_version(made, version, model="other")
    kit.stable_by(made, "1")
    made.dispose()
    return folder / "registry.db"


@pytest.fixture
def database(tmp_path: Path, template: Path) -> Iterator[Database]:
    made = kit.prepared(tmp_path, template)
    yield made
    made.dispose()


class Registry:
    """Counts what reaches the registry's write_back, which answers as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.asked = 0
        self.error: Exception | None = error
        monkeypatch.setattr(backstops.rollbacks, "write_back", self)

    def __call__(self, *_: Any, **__: Any) -> str:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return "met"


def made(tmp_path: Path, database: Database, clock: Clock) -> Backstop:
    folder = tmp_path / "state"
    folder.mkdir(exist_ok=True)
    return Backstop(
        database, DirectoryStore(tmp_path / "store"), folder=folder, environment=ENVIRONMENT, replica_id="r1",
        monotonic=clock,
    )  # fmt: skip


def seen(database: Database) -> tuple[str, int]:
    with database.read() as session:
        row = session.get_one(Environment, ENVIRONMENT)
        return row.epoch, row.generation


def hold(backstop: Backstop, database: Database, to: str = "1") -> None:
    backstop.holds.put(
        Hold(
            model=MODEL,
            environment=ENVIRONMENT,
            to=to,
            before="1",
            epoch=seen(database)[0],
            generation=kit.route(database).generation,
            actor="key:ops",
            key_id="k1",
            claimed=None,
            reason="bad",
            at="2026-01-01T00:00:00.000000Z",
        )
    )


def polls(backstop: Backstop, database: Database, clock: Clock, seconds: int) -> None:
    now = seen(database)

    async def poll() -> None:
        for _ in range(seconds):
            clock.seconds += 1
            await backstop.write_back(now)

    asyncio.run(poll())


def change(database: Database, model: str) -> None:
    with database.write() as transaction:
        routes.change(transaction, ENVIRONMENT, model, Desired(stable="2"), kind="promote", reason="because")


@pytest.mark.parametrize(
    "error",
    [RefusedError("digits 1 is archived"), ConflictError("digits 1 is archived"), ValueError("digits 1 is archived")],
)
def test_a_refused_hold_is_tried_ever_more_seldom_and_said_when_the_pause_grows(
    tmp_path: Path,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    clock, registry = Clock(), Registry(monkeypatch, error)
    backstop = made(tmp_path, database, clock)
    hold(backstop, database)
    with caplog.at_level(logging.ERROR, "modelkeep.backstop"):
        polls(backstop, database, clock, 3600)
    # 2, 4, … 256 s, and every 300 s from then on: in an hour 8 tries while the pause grows, and some ten after.
    assert 18 <= registry.asked <= 22
    assert len([line for line in caplog.messages if "asked again in" in line]) == 9
    assert caplog.messages[-1].endswith("digits 1 is archived; asked again in 300 s")
    (text,) = backstop.holds.errors().values()
    assert "digits 1 is archived" in text and "asked again every 300 s" in text
    registry.error = None
    polls(backstop, database, clock, 301)
    asked = registry.asked
    assert backstop.holds.errors() == {}
    polls(backstop, database, clock, 301)
    assert registry.asked == asked, "it has said what it had to say"
    served = LastState(seen(database)[0], seen(database)[1], (Route(MODEL, kit.route(database).generation, "1"),), ())
    asyncio.run(backstop.settle(served))
    assert set(backstop.holds.by_model) == {MODEL}, "its route is served as it was"
    newer = replace(served.routes[0], generation=served.routes[0].generation + 1)
    asyncio.run(backstop.settle(replace(served, routes=(newer,))))
    assert backstop.holds.by_model == {}


def test_a_change_of_its_route_or_a_new_hold_starts_anew(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, registry = Clock(), Registry(monkeypatch, RefusedError("archived"))
    backstop = made(tmp_path, database, clock)
    hold(backstop, database)
    polls(backstop, database, clock, 1000)
    asked = registry.asked
    change(database, "other")
    polls(backstop, database, clock, 2)
    assert registry.asked == asked, "another model's route is nothing to it"
    change(database, MODEL)
    polls(backstop, database, clock, 1)
    assert registry.asked == asked + 1
    assert backstop.holds.refused[MODEL].pause_seconds == 2
    polls(backstop, database, clock, 1000)
    asked = registry.asked
    kit.new_epoch(database)
    polls(backstop, database, clock, 1)
    assert registry.asked == asked + 1, "a registry that was restored may take it"
    polls(backstop, database, clock, 1000)
    asked = registry.asked
    hold(backstop, database, to="0")
    assert backstop.holds.errors() == {}
    polls(backstop, database, clock, 1)
    assert registry.asked == asked + 1


def test_a_hold_that_is_put_while_another_is_refused_is_not_held_against_it(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, registry = Clock(), Registry(monkeypatch, RefusedError("archived"))
    backstop = made(tmp_path, database, clock)
    hold(backstop, database)

    def meanwhile(*_: Any, **__: Any) -> str:
        backstop.holds.put(replace(backstop.holds.by_model[MODEL], to="0"))
        return registry()

    monkeypatch.setattr(backstops.rollbacks, "write_back", meanwhile)
    polls(backstop, database, clock, 1)
    assert backstop.holds.by_model[MODEL].to == "0" and backstop.holds.refused == {}


def test_a_registry_that_does_not_answer_refuses_nothing(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, registry = Clock(), Registry(monkeypatch, UnavailableError("gone"))
    backstop = made(tmp_path, database, clock)
    hold(backstop, database)
    for asked in (1, 2, 3):
        with pytest.raises(UnavailableError):
            polls(backstop, database, clock, 1)
        assert registry.asked == asked
    assert backstop.holds.refused == {}


def test_what_the_registry_itself_refuses_is_among_the_errors_of_model_info(tmp_path: Path, database: Database) -> None:
    reconciler = Reconciler(
        Serving(environment=ENVIRONMENT, replica_id="r1", boot_id="boot"),
        Settings(home=tmp_path, profile="cpu"),
        database,
        DirectoryStore(tmp_path / "store"),
        state_folder=tmp_path,
        address="http://127.0.0.1:1",
    )
    hold(reconciler.backstop, database, to="2")
    asyncio.run(reconciler.backstop.write_back(seen(database)))
    info = reconciler.info()
    assert f"{MODEL} 2 has never been the stable version" in info["errors"][f"hold of {MODEL}"]
    assert "has never been the stable version" in info["holds"][0]["not_written_back"]
    assert kit.route(database).stable == "1"


def test_a_save_that_is_given_up_does_not_overtake_the_next(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        entered, go_on, real, written = threading.Event(), threading.Event(), documents.replace, list[int]()

        def slow(path: Path, document: dict[str, Any]) -> None:
            if not entered.is_set():
                entered.set()
                assert go_on.wait(60)
            real(path, document)
            written.append(len(document["holds"]))

        monkeypatch.setattr(documents, "replace", slow)
        backstop = made(tmp_path, database, Clock())

        def put(model: str) -> asyncio.Task[Any]:
            state, route = LastState("e", 7, (), ()), Route(model, 7, "2")
            return asyncio.create_task(
                backstop.put(state, route, "1", who=Who("me"), reason="bad", serve=lambda _: None)
            )

        first = put("a")
        await until(entered.is_set)
        first.cancel()  # as a client that leaves does
        second = put("b")
        await asyncio.wait({second}, timeout=0.2)
        go_on.set()
        _, not_kept = await second
        assert not_kept is None
        await until(lambda: len(written) == 2)
        again = Holds(backstop.holds.path)
        again.recall()
        assert sorted(again.by_model) == ["a", "b"], "what was put last is on the disk"
        await backstop.stop()

    asyncio.run(test())


def test_what_is_wanted_again_while_files_are_brought_is_not_cleaned_up(tmp_path: Path, database: Database) -> None:
    async def test() -> None:
        backstop = made(tmp_path, database, Clock())
        old = Wanted("m", "1", "a" * 64, "onnx", (), None, True)
        loading = replace(old, version="2", digest="b" * 64)
        for digest in (old.digest, loading.digest, "c" * 64):
            (backstop.kept.cache / digest).mkdir(parents=True)
        clean = backstop.kept.clean
        backstop.kept.clean = lambda *given: clean(*given, grace_seconds=-1)  # type: ignore[method-assign]
        entered, go_on = threading.Event(), threading.Event()

        def bring(*_: Any) -> None:
            entered.set()
            assert go_on.wait(60)

        backstop.kept.bring = bring  # type: ignore[method-assign, assignment]
        wanted, loaded = list[Wanted](), set[str]()
        backstop.look(LastState("e", 7, (), ()), lambda: wanted, lambda: loaded)
        await until(entered.is_set)
        wanted.append(loading)
        loaded.add(old.digest)
        go_on.set()
        await until(lambda: backstop._task is None)
        assert {path.name for path in backstop.kept.cache.iterdir()} == {old.digest, loading.digest}
        await backstop.stop()

    asyncio.run(test())
