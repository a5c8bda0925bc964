"""When models were asked last, where the clock of the machine was ahead for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.compute.engine import LoadedVersion
from serving.loaded.use import Use
from serving.state import Serving
from serving.traffic.routing import Route
from tests.unit.serving.helpers import close, load

AHEAD, RIGHT = 1e9, 1e6


class Models:
    """Three models in memory, and a clock that is ahead."""

    def __init__(self, path: Path) -> None:
        self.now = AHEAD
        self.serving = Serving(environment="production", replica_id="r", boot_id="b")
        self.versions: dict[str, LoadedVersion] = {name: load(model=name) for name in "abc"}
        loaded = {(name, "1"): version for name, version in self.versions.items()}
        self.serving.install({name: Route(name, 1, "1") for name in "abc"}, loaded, "epoch", 1)
        self.path = path
        self.use = self.made()

    def made(self) -> Use:
        return Use(self.serving, self.path, clock=lambda: self.now)

    def asked(self, model: str, at: float) -> None:
        self.now = at
        self.versions[model].telemetry.last_inference_unix_seconds = at
        self.use.look()

    def order(self) -> str:
        """The one that was asked last comes last."""
        self.use.look()
        return "".join(sorted("abc", key=self.use.at))


@pytest.fixture
def models(tmp_path: Path) -> Iterator[Models]:
    made = Models(tmp_path / "used.json")
    yield made
    close(*made.versions.values())


def test_who_is_asked_after_a_clock_went_back_was_asked_last(models: Models) -> None:
    models.asked("a", AHEAD)
    models.asked("b", RIGHT)
    models.asked("b", RIGHT + 10)
    models.asked("c", RIGHT + 20)
    assert models.order() == "abc"
    models.asked("a", RIGHT + 30)
    assert models.order() == "bca"
    models.now = RIGHT + 40
    assert models.order() == "bca" and models.use.at("a") == RIGHT + 30, "looking is no use"


def test_what_was_asked_unseen_before_the_clock_went_back_counts_once(models: Models) -> None:
    models.versions["a"].telemetry.last_inference_unix_seconds = AHEAD
    models.asked("b", RIGHT)
    models.asked("b", RIGHT + 10)
    models.asked("c", RIGHT + 20)
    assert models.order() == "abc" and models.use.at("a") == RIGHT


def test_nor_does_the_process_after_go_by_it(models: Models) -> None:
    models.asked("a", AHEAD)
    models.asked("c", AHEAD + 1)
    asyncio.run(models.use.keep(now=True))
    for version in models.versions.values():
        version.telemetry.last_inference_unix_seconds = None
    models.use = models.made()
    models.use.recall()
    models.asked("b", RIGHT)
    models.asked("b", RIGHT + 10)
    assert models.order()[-1] == "b" and models.use.at("a") == RIGHT
