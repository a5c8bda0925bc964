"""The emergency of the command line, whose registry answers too late: the servers are asked for what may be on record already."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelkeep import emergency
from registry import attempts, rollbacks
from registry.database import Database
from registry.rollbacks import Seen
from registry.settings import Settings
from tasks import emergency as at_the_servers
from tasks.rollback import RollbackResult
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """Versions 1, 2 and 3 have been stable in that order."""
    made = kit.prepared(tmp_path)
    for number in ("1", "2", "3"):
        kit.add_version(made, number)
    kit.stable_by(made, "1", "2", "3")
    yield made
    made.dispose()


class Asked:
    """What the servers are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.to: str | None = None
        self.seen: Seen | None = None
        self.why = ""
        monkeypatch.setattr(at_the_servers, "at_servers", self)

    def __call__(self, _addresses: object, *, to: str | None, seen: Seen | None, why: str, **_: Any) -> RollbackResult:
        self.to, self.seen, self.why = to, seen, why
        return RollbackResult(MODEL, ENVIRONMENT, None, str(to), None, (), {})


def roll_back(database: Database, to: str | None = None) -> RollbackResult:
    settings = Settings(home=Path(str(database.url.database)).parent, profile="cpu")
    return emergency.roll_back(settings, ENVIRONMENT, MODEL, to, None, "off")


def test_what_was_committed_though_its_answer_came_too_late_is_what_the_servers_are_asked_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = Asked(monkeypatch), rollbacks.roll_back
    committed, go = threading.Event(), threading.Event()

    def silent(*arguments: Any, **options: Any) -> dict[str, Any]:
        done = real(*arguments, **options)
        committed.set()
        assert go.wait(30)
        return done

    wait = emergency._Call.wait

    def waiting(call: emergency._Call, _seconds: float) -> Any:
        assert committed.wait(30)
        return wait(call, 0.0)

    monkeypatch.setattr(attempts.rollbacks, "roll_back", silent)
    monkeypatch.setattr(emergency._Call, "wait", waiting)
    roll_back(database)
    go.set()
    assert kit.route(database).stable == "2"
    assert asked.seen is not None
    assert (asked.to, asked.seen.stable, "did not answer within" in asked.why) == ("2", "3", True)


def test_an_attempt_that_had_not_decided_yet_when_the_servers_were_asked_changes_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real, go, over = Asked(monkeypatch), rollbacks.aim, threading.Event(), threading.Event()

    def late(*arguments: Any, **options: Any) -> rollbacks.Aim:
        assert go.wait(30)
        return real(*arguments, **options)

    run = emergency._Call._run

    def running(call: emergency._Call) -> None:
        run(call)
        over.set()

    monkeypatch.setattr(emergency, "REGISTRY_SECONDS", 0.0)
    monkeypatch.setattr(attempts.rollbacks, "aim", late)
    monkeypatch.setattr(emergency._Call, "_run", running)
    roll_back(database)
    go.set()
    assert over.wait(30)
    assert (asked.to, asked.seen, kit.route(database).stable) == (None, None, "3")


def test_a_command_that_is_repeated_with_the_version_goes_no_further(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    Asked(monkeypatch)
    monkeypatch.setattr(emergency, "REGISTRY_SECONDS", 30.0)
    assert [roll_back(database, "2").to_version for _ in range(2)] == ["2", "2"]
    assert kit.route(database).stable == "2"
