"""A rollback at one server: what comes late goes no further, what is loaded in vain is let go, and a fault says what is left to do."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry import attempts, rollbacks
from registry.actor import Who
from registry.database import Database
from registry.errors import ConflictError, UnavailableError, UsageError
from registry.rollbacks import Seen
from serving.api import create_app
from serving.compute.engine import LoadedVersion
from serving.follow.emergency import Emergency
from serving.follow.reconcile import Reconciler
from serving.loaded.laststate import Wanted
from serving.traffic.routing import Route
from serving.views import rollback_page
from tests.unit.registry import kit
from tests.unit.registry.kit import MODEL
from tests.unit.serving.helpers import Answer, Server, until
from tests.unit.serving.rounds import following, three_versions

ME = Who("os:me")
KEPT = ["1", "2", "3"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1, 2 and 3 have been stable in that order."""
    return three_versions(tmp_path_factory.mktemp("three"), *KEPT)


@pytest.fixture
def database(tmp_path: Path, template: Path) -> Iterator[Database]:
    made = kit.prepared(tmp_path, template)
    yield made
    made.dispose()


@asynccontextmanager
async def serving(database: Database, tmp_path: Path, template: Path) -> AsyncIterator[Reconciler]:
    """A server that serves version 3 and keeps what it can go back to."""
    async with following(database, tmp_path, template) as reconciler:
        await until(lambda: reconciler.backstop.kept.names(MODEL) == KEPT)
        yield reconciler


Test = Callable[[Reconciler, Emergency], Awaitable[None]]


@pytest.fixture
def run(database: Database, tmp_path: Path, template: Path) -> Callable[..., None]:
    """Run a test against a server and its emergencies."""

    def running(test: Test) -> None:
        async def whole() -> None:
            async with serving(database, tmp_path, template) as reconciler:
                await test(reconciler, Emergency(reconciler, database, registry_seconds=30.0))

        asyncio.run(whole())

    return running


async def back(
    emergency: Emergency, to: str | None = None, seen: Seen | None = None, *, at_once: bool = True
) -> dict[str, Any]:
    return await emergency.roll_back(MODEL, to, seen=seen, who=ME, reason="off", ttl_seconds=30.0, emergency=at_once)


def stable(database: Database) -> str | None:
    return kit.route(database).stable


def gone(reconciler: Reconciler) -> None:
    """From now on the registry does not answer."""
    reconciler.registry_error = "it is gone"


def now(reconciler: Reconciler) -> Route:
    assert reconciler.applied is not None
    return next(route for route in reconciler.applied.routes if route.model == MODEL)


def become(reconciler: Reconciler, route: Route) -> None:
    """As if the registry had answered in between, and gone again."""
    assert reconciler.applied is not None
    reconciler.applied = replace(reconciler.applied, routes=(route,))


def threads(version: str) -> int:
    return sum(thread.name == f"{MODEL}/{version}" for thread in threading.enumerate())


class Loads:
    """What a server loads, and what happens meanwhile."""

    def __init__(self, reconciler: Reconciler, meanwhile: Callable[[], None]) -> None:
        self.made: list[LoadedVersion] = []
        self._load, self._meanwhile = reconciler.load, meanwhile
        reconciler.load = self  # type: ignore[method-assign, assignment]

    def __call__(self, wanted: Wanted) -> LoadedVersion:
        self.made.append(self._load(wanted))
        if len(self.made) == 1:
            self._meanwhile()
        return self.made[-1]


# late answers


class Slow:
    """A registry that is given up when a test says so. It commits before that and does not say so, or only once it may `go` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, commits_first: bool) -> None:
        self.reached, self.given_up, self.go = threading.Event(), threading.Event(), threading.Event()
        self._real, self._commits_first = rollbacks.roll_back, commits_first
        monkeypatch.setattr(attempts.rollbacks, "roll_back", self._roll_back)
        monkeypatch.setattr(Emergency, "_registry", self._registry)

    def _roll_back(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        done = self._real(*arguments, **options) if self._commits_first else None
        self.reached.set()
        assert self.go.wait(30)
        return done or self._real(*arguments, **options)

    async def _registry(self, call: Callable[[], Any]) -> Any:
        answer = asyncio.ensure_future(asyncio.to_thread(call))
        answer.add_done_callback(lambda done: done.exception())
        await until(self.reached.is_set)
        await until(self.given_up.is_set)
        raise UnavailableError("the registry did not answer")


def test_a_rollback_that_commits_after_it_was_given_up_is_what_the_hold_wants(
    database: Database, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, before = Slow(monkeypatch, commits_first=False), kit.last_event(database)
    slow.given_up.set()

    async def test(reconciler: Reconciler, emergency: Emergency) -> None:
        done = await back(emergency)
        assert (done["by"], done["to"], done["stable"]) == ("hold", "2", "2")
        slow.go.set()
        await until(lambda: stable(database) == "2")
        await reconciler.once()
        assert reconciler.backstop.holds.by_model == {}
        assert reconciler.serving.routes[MODEL].stable == "2"

    run(test)
    assert [action for action in kit.actions(database, before) if action.startswith(("hold", "model"))] == [
        "model.rolled-back", "hold.met",
    ]  # fmt: skip


def test_a_rollback_that_was_committed_though_its_answer_came_too_late_is_not_followed_by_a_hold_one_further_down(
    database: Database, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, commits_first=True)

    async def test(reconciler: Reconciler, emergency: Emergency) -> None:
        asked = asyncio.create_task(back(emergency))
        await until(slow.reached.is_set)
        await reconciler.once()  # this server follows what its own attempt has written
        slow.given_up.set()
        done = await asked
        slow.go.set()
        assert (done["to"], done["stable"], done["by"]) == ("2", "2", "registry")
        assert reconciler.backstop.holds.by_model == {}

    run(test)
    assert stable(database) == "2"


def test_a_client_that_asks_where_it_would_go_can_ask_for_that_as_often_as_it_likes(
    database: Database, run: Callable[..., None]
) -> None:
    async def test(reconciler: Reconciler, emergency: Emergency) -> None:
        aim = await emergency.aim(MODEL, emergency=True)
        assert (aim["to"], aim["by"], aim["seen"]["stable"]) == ("2", "registry", "3")
        seen = Seen(**aim["seen"])
        assert [(await back(emergency, aim["to"], seen))["to"] for _ in range(3)] == ["2", "2", "2"]
        gone(reconciler)
        assert (await back(emergency, aim["to"], seen))["by"] == "registry", "it had said so before it went away"
        with pytest.raises(UsageError, match="give both"):
            await back(emergency, None, seen)

    run(test)
    assert stable(database) == "2"


def test_without_the_registry_too_a_hold_that_is_asked_for_again_goes_no_further(run: Callable[..., None]) -> None:
    async def test(reconciler: Reconciler, emergency: Emergency) -> None:
        gone(reconciler)
        aim = await emergency.aim(MODEL, emergency=True)
        assert (aim["to"], aim["by"]) == ("2", "hold")
        for _ in range(2):
            assert (await back(emergency, aim["to"], Seen(**aim["seen"])))["stable"] == "2"
        with pytest.raises(UnavailableError):
            await emergency.aim(MODEL, emergency=False)

    run(test)


def test_what_is_no_emergency_says_that_it_may_have_been_done_all_the_same(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, commits_first=False)
    slow.given_up.set()

    async def test(_reconciler: Reconciler, emergency: Emergency) -> None:
        with pytest.raises(UnavailableError, match=r"may be on record all the same.*give to 2"):
            await back(emergency, at_once=False)
        slow.go.set()

    run(test)


# holds


def test_a_version_that_was_loaded_in_vain_is_let_go(run: Callable[..., None]) -> None:
    async def test(reconciler: Reconciler, emergency: Emergency) -> None:
        gone(reconciler)
        before = threads("2")
        other = replace(now(reconciler), generation=now(reconciler).generation + 1, stable="1")
        loads = Loads(reconciler, lambda: become(reconciler, other))
        with pytest.raises(ConflictError, match="1 is stable on this server, not 3"):
            await back(emergency)
        assert len(loads.made) == 1
        await until(lambda: threads("2") == before)
        reconciler.load = loads._load  # type: ignore[method-assign]
        assert (await back(emergency, "2"))["stable"] == "2", "it can be loaded again"

    run(test)


def test_a_route_that_only_moved_on_while_the_version_was_loaded_is_held_as_it_is_now_and_nothing_is_loaded_twice(
    run: Callable[..., None],
) -> None:
    async def test(reconciler: Reconciler, emergency: Emergency) -> None:
        gone(reconciler)
        moved = replace(now(reconciler), generation=now(reconciler).generation + 1)
        loads = Loads(reconciler, lambda: become(reconciler, moved))
        done = await back(emergency)
        assert (done["to"], done["generation"], len(loads.made)) == ("2", moved.generation, 1)
        assert reconciler.serving.loaded[MODEL, "2"] is loads.made[0]

    run(test)


def test_requests_are_answered_by_the_version_before_the_hold_is_on_the_disk(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(reconciler: Reconciler, emergency: Emergency) -> None:
        gone(reconciler)
        served: list[str | None] = []
        save = reconciler.backstop.holds.save

        def slow() -> None:
            served.append(reconciler.serving.routes[MODEL].stable)
            save()

        monkeypatch.setattr(reconciler.backstop.holds, "save", slow)
        await back(emergency)
        assert served[0] == "2"

    run(test)


@pytest.mark.parametrize(("weight", "expected"), [(0.0, "2"), (0.25, "3")])
def test_what_had_no_traffic_cannot_be_what_is_wrong_without_the_registry_either(
    run: Callable[..., None], weight: float, expected: str
) -> None:
    async def test(reconciler: Reconciler, emergency: Emergency) -> None:
        gone(reconciler)
        become(reconciler, replace(now(reconciler), candidate="4", weight=weight, shadow=not weight))
        assert (await emergency.aim(MODEL, emergency=True))["to"] == expected

    run(test)


def test_a_hold_stays_until_the_route_that_takes_its_place_is_served(
    database: Database, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kit.last_event(database)

    async def test(reconciler: Reconciler, emergency: Emergency) -> None:
        gone(reconciler)
        await back(emergency)

        async def away() -> None:
            raise UnavailableError("it went away again")

        with monkeypatch.context() as patched:
            patched.setattr(reconciler._upstream, "desired", away)
            await reconciler.once()
            assert stable(database) == "2", "it is on record"
            await reconciler.once()
            await reconciler.again()  # as a model that wakes has it done
        assert reconciler.registry_error is not None
        assert reconciler.serving.routes[MODEL].stable == "2", "what takes its place is not known here yet"
        held = json.loads(reconciler.backstop.holds.path.read_text())["holds"]
        assert [(hold["model"], hold["to"]) for hold in held] == [(MODEL, "2")], "a restart serves it as well"
        await reconciler.once()
        assert reconciler.serving.routes[MODEL].stable == "2"
        assert reconciler.backstop.holds.by_model == {}
        assert json.loads(reconciler.backstop.holds.path.read_text())["holds"] == []

    run(test)
    assert [action for action in kit.actions(database, before) if action.startswith("hold")] == ["hold.written-back"]


# faults


def test_a_fault_is_logged_with_its_trace_and_answered_with_what_is_left_to_do(
    run: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def test(reconciler: Reconciler, emergency: Emergency) -> None:
        gone(reconciler)

        def broken(_wanted: Wanted) -> LoadedVersion:
            raise RuntimeError("the file is odd")

        reconciler.load = broken  # type: ignore[method-assign, assignment]
        app = create_app(
            reconciler.serving, settings=reconciler.settings, nudge=reconciler.nudge, info=reconciler.info,
            routers=[rollback_page.router(emergency, lease_seconds=30.0)],
        )  # fmt: skip
        body = json.dumps({"model": MODEL}).encode()
        with caplog.at_level(logging.ERROR, logger="modelkeep.emergency"):
            answer = await Server(reconciler.serving, app).ask(
                "POST", "/api/v2/rollback", body, {"Content-Type": "application/json"}
            )
        assert isinstance(answer, Answer) and answer.status == 500
        for part in ("RuntimeError: the file is odd", "serves version 3", "keeps 1, 2, 3", "name another one"):
            assert part in answer.error
        (record,) = [record for record in caplog.records if record.name == "modelkeep.emergency"]
        assert record.exc_info is not None and isinstance(record.exc_info[1], RuntimeError)

    run(test)
