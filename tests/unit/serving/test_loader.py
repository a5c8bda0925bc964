"""Loads that take long, and loads that never end: the others pass, and what hangs is told of, left, and taken should it end after all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from serving.device import loads
from serving.device.devices import Place
from serving.device.loads import Load
from serving.loaded.laststate import LastState, Wanted
from serving.loaded.loader import Attempt, Loader, LoadHangsError, StillLoadingError
from tests.unit.serving.helpers import until

HOUR = 3600.0


def wanted(model: str = "m", version: str = "1", digest: str = "d") -> Wanted:
    return Wanted(model, version, digest, "onnx", ({"name": "model.onnx", "size_bytes": 10},), None, False)


def abandoned(loader: Loader, *versions: Wanted) -> list[tuple[str, int]]:
    return loader.abandoned(LastState("e", 1, (), versions), lambda version: 7)


class Work:
    """Loads that wait for a test's word, by model."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go_on: dict[str, threading.Event] = {}
        self.errors: dict[str, BaseException] = {}

    def holds(self, model: str) -> threading.Event:
        return self.go_on.setdefault(model, threading.Event())

    def __call__(self, version: Wanted) -> Any:
        self.begun.append(version.model)
        if (event := self.go_on.get(version.model)) is not None:
            assert event.wait(60)
        if (error := self.errors.get(version.model)) is not None:
            raise error
        return f"{version.model} is here"


Test = Callable[[Loader, Work], Awaitable[None]]


def run(test: Test, *, limit: float = HOUR, patience: float = 0.02) -> None:
    async def whole() -> None:
        work = Work()
        loader = Loader(work, work, limit_seconds=lambda version: limit, patience_seconds=patience)
        try:
            await test(loader, work)
        finally:
            for event in work.go_on.values():
                event.set()
            await until(lambda: not loader.at_work())
            loader.stop()

    asyncio.run(whole())


def test_what_is_quick_is_loaded_and_what_fails_says_why() -> None:
    async def test(loader: Loader, work: Work) -> None:
        assert await loader.load(wanted(), patient=False) == "m is here"  # type: ignore[comparison-overlap]
        work.errors["bad"] = ValueError("rotten")
        with pytest.raises(ValueError, match="rotten"):
            await loader.load(wanted("bad"))
        work.errors["odd"] = StopIteration()
        with pytest.raises(RuntimeError, match="StopIteration"):
            await loader.load(wanted("odd"))
        assert loader.attempts == [] and loader.as_list() == []

    run(test, patience=60.0)


def test_one_for_which_no_thread_can_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(loader: Loader, work: Work) -> None:
        def fail(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await loader.load(wanted())
            under_way = loader.attempts.copy()
            loader.attempts.clear()  # else the end of this test would wait for it for ever
            assert under_way == []
        assert await loader.load(wanted()) == "m is here"  # type: ignore[comparison-overlap]

    run(test)


def test_one_that_takes_long_is_gone_on_without_and_taken_when_it_is_there() -> None:
    async def test(loader: Loader, work: Work) -> None:
        go_on, told = work.holds("slow"), list[str]()
        loader.changed = lambda: told.append("changed")
        with pytest.raises(StillLoadingError):
            await loader.load(wanted("slow"), patient=False)
        with pytest.raises(StillLoadingError):
            await loader.load(wanted("slow"), patient=False)
        assert await loader.load(wanted("quick")) == "quick is here"  # type: ignore[comparison-overlap]
        assert [entry["model"] for entry in loader.as_list()] == ["slow"] and not loader.take_news()
        assert loader.hanging() == {} and not loader.loaded(wanted("slow"))
        go_on.set()
        await until(lambda: told)
        assert loader.take_news() and not loader.take_news() and loader.loaded(wanted("slow"))
        assert await loader.load(wanted("slow"), patient=False) == "slow is here"  # type: ignore[comparison-overlap]
        assert work.begun == ["slow", "quick"], "it was loaded once"

    run(test)


def test_two_that_want_the_same_wait_for_one_load() -> None:
    async def test(loader: Loader, work: Work) -> None:
        go_on = work.holds("m")
        first, second = (asyncio.create_task(loader.load(wanted(), patient=patient)) for patient in (True, True))
        await until(lambda: work.begun)
        go_on.set()
        assert {await first, await second} == {"m is here"}  # type: ignore[comparison-overlap]
        assert work.begun == ["m"]

    run(test)


def test_one_that_never_ends_is_told_of_once_and_not_tried_beside_itself() -> None:
    async def test(loader: Loader, work: Work) -> None:
        go_on, found = work.holds("m"), list[str]()
        loader.found = lambda version, why: found.append(why)
        with pytest.raises(
            LoadHangsError, match=r"hangs while it loads: loading has taken .* health.load_hang_seconds = 0.05"
        ):
            await loader.load(wanted())
        for urgent in (False, True):
            with pytest.raises(LoadHangsError):
                await loader.load(wanted(), urgent=urgent)
        assert work.begun == ["m"] and loader.hangs == 1 and len(found) == 1
        assert list(loader.hanging()) == [("m", "1")] and loader.at_work()
        assert loader.as_list()[0]["hangs"] == found[0]
        assert abandoned(loader) == abandoned(loader, wanted(digest="other")) == [("m/1", 7)]
        assert abandoned(loader, wanted()) == []
        go_on.set()
        await until(loader.take_news)
        assert await loader.load(wanted()) == "m is here"  # type: ignore[comparison-overlap]
        assert loader.hanging() == {} and not abandoned(loader)

    run(test, limit=0.05)


def test_who_went_on_without_it_learns_that_it_hangs() -> None:
    async def test(loader: Loader, work: Work) -> None:
        work.holds("m")
        with pytest.raises(StillLoadingError):
            await loader.load(wanted(), patient=False)
        await until(loader.take_news)
        with pytest.raises(LoadHangsError):
            await loader.load(wanted(), patient=False)

    run(test, limit=0.2)


def test_an_urgent_load_does_not_wait_for_one_that_takes_long() -> None:
    async def test(loader: Loader, work: Work) -> None:
        work.holds("m")
        with pytest.raises(StillLoadingError):
            await loader.load(wanted(), patient=False)
        work.go_on = {}
        assert await loader.load(wanted(), urgent=True) == "m is here"  # type: ignore[comparison-overlap]
        both = [asyncio.create_task(loader.load(wanted(), urgent=True)) for _ in range(2)]
        await asyncio.gather(*both)
        assert work.begun == ["m"] * 4, "two that are urgent share nothing: each lets go of what it does not serve"

    async def whole() -> None:
        work = Work()
        held = work.holds("m")
        loader = Loader(work, work, limit_seconds=lambda version: HOUR, patience_seconds=0.02)
        try:
            await test(loader, work)
        finally:
            held.set()
            await until(lambda: not loader.at_work())
            loader.stop()

    asyncio.run(whole())


def test_what_came_after_all_and_nobody_wants_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.loaded.loader.LoadedVersion", str)

    async def test(loader: Loader, work: Work) -> None:
        go_on = work.holds("m")
        work.holds("bad")
        work.errors["bad"] = ValueError("rotten")
        for model in ("m", "bad"):
            with pytest.raises(StillLoadingError):
                await loader.load(wanted(model), patient=False)
        assert loader.unclaimed([]) == [] and loader.at_work()
        go_on.set()
        work.holds("bad").set()
        await until(lambda: not loader.at_work())
        assert loader.unclaimed([wanted(), wanted("bad")]) == [], "they are wanted"
        assert loader.unclaimed([wanted("bad")]) == ["m is here"]  # type: ignore[comparison-overlap]
        assert loader.unclaimed([]) == [] and loader.attempts == []

    run(test)


def test_a_wait_that_is_cancelled_leaves_the_load_to_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.loaded.loader.LoadedVersion", str)

    async def test(loader: Loader, work: Work) -> None:
        go_on = work.holds("m")
        waiting = asyncio.create_task(loader.load(wanted()))
        await until(lambda: work.begun)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        await until(lambda: not loader.at_work())
        assert loader.unclaimed([]) == ["m is here"]  # type: ignore[comparison-overlap]

    run(test)


def test_a_process_that_was_stopped_for_an_hour_has_no_load_that_hangs() -> None:
    now = [0.0]

    async def whole() -> None:
        work = Work()
        go_on = work.holds("m")
        loader = Loader(work, work, limit_seconds=lambda version: 5.0, patience_seconds=60.0, monotonic=lambda: now[0])
        waiting = asyncio.create_task(loader.load(wanted()))
        await until(lambda: work.begun)
        now[0] += HOUR
        await until(lambda: loader.attempts[0].seconds > 0)
        assert loader.attempts[0].seconds <= 1.0 and loader.hanging() == {}
        go_on.set()
        assert await waiting == "m is here"  # type: ignore[comparison-overlap]

    asyncio.run(whole())


# Whose memory


class Loading(threading.Thread):
    """A load on a thread of its own, which ends at a test's word."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.load = Load(path, "a framework", Place())
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with self.load:
            self.begun.set()
            self.go_on.wait(60)

    def end(self) -> dict[str, int]:
        self.go_on.set()
        self.join(60)
        return self.load.memory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "model.onnx"
    made.write_bytes(bytes(1000))
    return made


def test_loads_take_turns_until_one_takes_so_long_that_others_pass(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown = iter(range(0, 10**9, 5000))
    monkeypatch.setattr(loads, "resident_bytes", lambda: next(grown))
    first = Loading(path)
    assert first.begun.wait(60)
    second = Loading(path)
    while second.ident not in loads.waiting():
        assert not second.begun.is_set()
    assert first.ident is not None
    loads.let_pass(first.ident)
    assert second.begun.wait(60), "it is let pass"
    assert second.end() == {"host": 1000} and first.end() == {"host": 1000}, "whose growth it was cannot be told"
    third = Loading(path)
    assert third.begun.wait(60)
    assert third.end() == {"host": 5000}, "by what it grew"


def test_beside_one_that_hangs_others_are_measured_as_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown = iter(range(0, 10**9, 5000))
    monkeypatch.setattr(loads, "resident_bytes", lambda: next(grown))
    stuck = Loading(path)
    assert stuck.begun.wait(60) and stuck.ident is not None
    loads.give_up(stuck.ident)
    other = Loading(path)
    assert other.begun.wait(60)
    assert other.end() == {"host": 5000}
    assert stuck.end() == {"host": 1000}


def test_who_waits_for_the_turn_of_another_does_not_hang(path: Path) -> None:
    async def test(loader: Loader, work: Work) -> None:
        first = Loading(path)
        assert first.begun.wait(60)

        def load(version: Wanted) -> Any:
            with Load(path, "a framework", Place()):
                return "here"

        loader._load = load
        waiting = asyncio.create_task(loader.load(wanted()))
        await until(loads.waiting)
        attempt: Attempt[Any] = loader.attempts[0]
        looks = 0

        async def look() -> None:
            nonlocal looks
            while looks < 5:
                await asyncio.sleep(0.05)
                looks += 1

        await look()
        assert attempt.hung is None
        first.end()
        assert await waiting == "here"  # type: ignore[comparison-overlap]

    run(test, limit=0.1)
