"""What a server tells the registry: a piece that the registry does not take keeps none of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import ProgrammingError

from registry import clock, replicas, unfit
from registry.database import Database
from registry.errors import RefusedError, UnavailableError
from registry.feedback import Verdict
from registry.schema import AuditEvent, Feedback, Reach, Replica, ReplicaCount
from serving.follow.reporting import Reporter, Said
from serving.state import Serving
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, Clock

HALF = "\ud800"
"""Half of a character: what no database takes as it is."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    kit.prepared(folder).dispose()
    return folder / "registry.db"


@pytest.fixture
def database(tmp_path: Path, template: Path) -> Iterator[Database]:
    made = kit.prepared(tmp_path, template)
    for version in ("1", "2"):
        kit.add_version(made, version)
    kit.stable_by(made, "1")
    yield made
    made.dispose()


def in_thread(work: Callable[[], Any]) -> Awaitable[Any]:
    async def done() -> Any:
        return work()

    return done()


class Told:
    """A reporter of a server whose counts are written by hand."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.serving = Serving(environment=ENVIRONMENT, replica_id="r1", boot_id="boot")
        self.serving.epoch, self.serving.generation = "e", 7
        self.counts: list[dict[str, Any]] = []
        self.says: dict[str, Any] = {"models": {"digits": {"stable": "1"}}, "loaded": [], "errors": {}}
        self.errors: dict[tuple[str, str], str] = {}
        self.database, self.clock = database, Clock()
        self.reporter = Reporter(self.serving, database, monotonic=self.clock)
        monkeypatch.setattr(self.serving, "watch_counts", lambda: list(self.counts))

    def count(self, version: str, requests: Any = 1) -> None:
        self.counts.append({"model": "digits", "version": version, "generation": 7, "epoch": "e", "requests": requests})

    def report(self) -> None:
        self.clock.seconds += 60
        said = partial(Said, "http://127.0.0.1:1", clock.now(), self.says, self.errors)
        asyncio.run(self.reporter.report(in_thread, said))

    def rows(self, column: Any) -> list[Any]:
        with self.database.read() as session:
            return list(session.scalars(select(column)))


@pytest.fixture
def told(database: Database, monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(database, monkeypatch)


@pytest.mark.parametrize("bad", [(HALF, 1), ("3", object()), ("3", {1, 2})])
def test_counts_that_are_not_taken_keep_no_others(
    told: Told, bad: tuple[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    told.count("1")
    told.count(*bad)
    told.count("2")
    told.report()
    told.report()
    assert sorted(told.rows(ReplicaCount.version)) == ["1", "2"]
    assert told.rows(Replica.serving) == [told.says]
    assert told.reporter.refused["report"].startswith("a part of it was left out: ")
    assert len([line for line in caplog.messages if "did not take everything" in line]) == 1
    del told.counts[1]
    told.report()
    assert told.reporter.refused == {}, "what is over is no error any more"


def test_switches_that_are_not_taken_keep_no_others_and_the_newest_has_its_own_time(told: Told) -> None:
    times = [clock.now() for _ in range(3)]
    for generation, (epoch, at) in enumerate(zip(["e", HALF, "e"], times, strict=True), 5):
        told.reporter.reached(replicas.Reached(epoch, generation, at))
    told.report()
    assert sorted(told.rows(Reach.generation)) == [5, 7]
    assert told.rows(Replica.reached_at) == [times[2]]
    told.report()
    assert told.reporter.refused == {}


@pytest.mark.parametrize(
    ("says", "kept"),
    [
        ({"errors": {"digits/1": object()}}, {"stable": "1"}),
        ({"models": object()}, None),
    ],
)
def test_a_server_whose_account_is_not_taken_is_still_alive_to_the_registry(
    told: Told, says: dict[str, Any], kept: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told.count("1")
    told.says = {**told.says, **says}
    if kept is None:
        with pytest.raises(RefusedError, match="takes no report of this server: StatementError"):
            told.report()
        return
    told.report()
    (found,) = told.rows(Replica.serving)
    assert found["models"] == {"digits": kept} and "StatementError" in found["errors"]["report"]
    assert told.rows(ReplicaCount.version) == ["1"]


def test_a_report_that_is_not_taken_at_all_keeps_neither_verdicts_nor_errors(told: Told) -> None:
    told.says = {"models": object()}
    told.errors = {("digits", "1"): "does not load"}
    told.serving.feedback.put([Verdict("a", "1", 7, bad=True)])
    with pytest.raises(RefusedError, match="takes no report"):
        told.report()
    assert "version.unloadable" in told.rows(AuditEvent.action)
    assert len(told.serving.feedback) == 0


def test_an_error_that_is_not_taken_is_tried_once_and_the_others_are_on_record(told: Told) -> None:
    told.errors = {("digits", HALF): "does not load", ("digits", "1"): "neither does this"}
    seen = []
    for _ in range(3):
        told.report()
        seen.append(told.rows(AuditEvent.action).count("version.unloadable"))
    assert seen == [1, 1, 1]
    assert "is not on record: UnicodeEncodeError" in told.reporter.refused["unloadable"]
    told.errors = {}
    told.report()
    assert told.reporter.refused == {}


def test_an_error_that_is_taken_as_plain_text_is_no_refusal(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite takes texts of any length; this one takes them as MariaDB does."""
    taken = unfit.note_unloadable

    def at_most_65535(*arguments: Any, error: str, **named: Any) -> None:
        if len(error) > 65535:
            raise RefusedError("Data too long for column 'text'")
        taken(*arguments, error=error, **named)

    monkeypatch.setattr(unfit, "note_unloadable", at_most_65535)
    told.errors = {("digits", "1"): "does not load: " + "x" * 70_000}
    told.report()
    assert told.rows(AuditEvent.action).count("version.unloadable") == 1
    assert told.reporter.refused == {}


def test_of_many_verdicts_the_one_that_is_not_taken_is_left_out(told: Told) -> None:
    operation = kit.begin(told.database, "2")
    _, generation = kit.canary(told.database, operation)
    given = [Verdict(f"r1.abcdef.{generation}.2.{n}", "2", generation, bad=False) for n in range(1200)]
    given[777] = Verdict("r1.abcdef.0.2.777", "2", generation, bad=True, reason=HALF)
    told.serving.feedback.put(given)
    for _ in range(3):
        told.report()
    assert len(told.serving.feedback) == 0
    assert len(told.rows(Feedback.request_id)) == 1199
    assert told.serving.feedback.counts["not_taken"] == 1
    assert "a verdict was left out: UnicodeEncodeError" in told.reporter.refused["feedback"]


@pytest.mark.parametrize(
    "error", [UnavailableError("gone"), ProgrammingError("insert", {}, Exception("permission denied"))]
)
def test_what_is_no_fault_of_a_piece_drops_none(told: Told, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A registry that is away, or that takes nothing from anybody."""

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    told.report()
    told.serving.feedback.put([Verdict("a", "1", 7, bad=True), Verdict("b", "1", 7, bad=True)])
    told.errors = {("digits", "1"): "does not load"}
    event.listen(told.database.engine, "before_cursor_execute", refuse)
    for _ in range(3):
        with pytest.raises(type(error)):
            told.report()
    assert len(told.serving.feedback) == 2
    event.remove(told.database.engine, "before_cursor_execute", refuse)
    told.report()
    assert len(told.serving.feedback) == 0
    assert "version.unloadable" in told.rows(AuditEvent.action)
    assert told.reporter.refused == {}
