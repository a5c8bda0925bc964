"""The watchman: takes up what nobody carries, in step with other watchmen, and survives a registry that is away."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry import leases, promotions
from registry.database import Database
from registry.errors import UnavailableError
from registry.settings import Settings
from tasks import observation
from tasks.watchman import Watchman, opened, run
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, Clock
from tests.unit.tasks import soaking
from tests.unit.tasks.soaking import orphan, report
from tests.unit.tasks.soaking import soaking as begin_soak


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    soaking.prepared(folder).dispose()
    return folder / "registry.db"


@pytest.fixture
def database(tmp_path: Path, template: Path) -> Iterator[Database]:
    opened = soaking.prepared(tmp_path, template)
    yield opened
    opened.dispose()


def watchman(database: Database, monotonic: Clock, name: str = "watchman:a") -> Watchman:
    return Watchman(database, ttl_seconds=8.0, poll_seconds=0.5, name=name, monotonic=monotonic)


def rounds(monotonic: Clock, seconds: int, *watchmen: Watchman) -> None:
    for _ in range(seconds):
        monotonic.seconds += 1
        for found in watchmen:
            found.look()


def state_of(database: Database, identity: str) -> str:
    with database.read() as session:
        return promotions.get(session, identity).state


def test_a_soak_whose_flow_has_died_is_carried_to_its_end(database: Database) -> None:
    operation, monotonic = begin_soak(database), Clock()
    alone = watchman(database, monotonic)
    rounds(monotonic, 29, alone)
    assert alone.carries == [] and state_of(database, operation.id) == "soaking"
    rounds(monotonic, 3, alone)  # nobody has beaten for 30 s
    assert alone.carries == [operation.id]
    rounds(monotonic, 70, alone)
    assert alone.carries == [] and state_of(database, operation.id) == "promoted"
    steps = soaking.steps(database, operation)
    assert steps[-2:] == ["orphaned", "promoted"]
    assert kit.verdict(database).faults == []


def test_a_version_that_turns_bad_without_its_flow_is_taken_back(database: Database) -> None:
    operation, monotonic = begin_soak(database), Clock()
    orphan(database)
    alone = watchman(database, monotonic)
    rounds(monotonic, 2, alone)
    report(database, "2", operation.progress["soak"]["generation"], requests=300, errors=200)
    rounds(monotonic, 1, alone)
    assert state_of(database, operation.id) == "withdrawn"
    assert kit.route(database).stable == "1"


def test_a_living_flow_is_left_alone(database: Database) -> None:
    operation, monotonic = begin_soak(database), Clock()
    alone = watchman(database, monotonic)
    for _ in range(60):
        leases.beat(database, operation.held)
        rounds(monotonic, 1, alone)
    assert alone.carries == []


def test_of_two_watchmen_one_carries_and_the_other_takes_over_when_it_dies(database: Database) -> None:
    operation, monotonic = begin_soak(database), Clock()
    orphan(database)
    first, second = watchman(database, monotonic), watchman(database, monotonic, "watchman:b")
    rounds(monotonic, 20, first, second)
    assert (first.carries, second.carries) == ([operation.id], [])
    rounds(monotonic, 10, second)  # the first is stopped, or dead
    assert second.carries == [operation.id]
    rounds(monotonic, 1, first)  # and wakes
    assert first.carries == []
    rounds(monotonic, 60, first, second)
    assert state_of(database, operation.id) == "promoted"


def test_a_watchman_that_is_told_to_end_leaves_its_soaks_to_the_next_at_once(database: Database) -> None:
    operation, monotonic = begin_soak(database), Clock()
    orphan(database)
    first, second = watchman(database, monotonic), watchman(database, monotonic, "watchman:b")
    rounds(monotonic, 1, first)
    first.let_go()
    rounds(monotonic, 1, second)
    assert second.carries == [operation.id]


def test_the_flow_run_that_comes_back_takes_its_soak_back(database: Database) -> None:
    operation, monotonic = begin_soak(database, run="run-1"), Clock()
    orphan(database)
    alone = watchman(database, monotonic)
    rounds(monotonic, 3, alone)
    again = kit.begin(database, "2", flow_run_id="run-1")
    assert (again.id, again.resumed) == (operation.id, True)
    rounds(monotonic, 9, alone)
    assert alone.carries == [] and state_of(database, operation.id) == "soaking"


def test_a_dead_canary_is_withdrawn_where_no_server_does_it(database: Database) -> None:
    operation, monotonic = kit.begin(database, "2"), Clock()
    kit.canary(database, operation)
    alone = watchman(database, monotonic)
    rounds(monotonic, 32, alone)
    assert state_of(database, operation.id) == "withdrawn"
    assert kit.route(database).candidate is None


def test_one_soak_that_cannot_be_judged_keeps_no_other_waiting(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.add_version(database, "1", model="other")
    kit.add_version(database, "2", model="other")
    operation, monotonic = begin_soak(database), Clock()
    orphan(database)
    first = kit.begin(database, "1", model="other")
    kit.promote(database, first, watch=False)
    kit.end(database, first, "promoted")
    first = kit.begin(database, "2", model="other", policy=soaking.POLICY)
    kit.canary(database, first)
    kit.promote(database, first)
    orphan(database)
    alone = watchman(database, monotonic)
    real = observation.soak_window

    def broken(database: Database, which: promotions.Operation) -> object:
        if which.model == "other":
            raise ValueError("counts that make no sense")
        return real(database, which)

    monkeypatch.setattr(observation, "soak_window", broken)
    rounds(monotonic, 70, alone)
    assert state_of(database, operation.id) == "promoted"
    assert state_of(database, first.id) == "soaking"
    monkeypatch.undo()
    rounds(monotonic, 130, alone)
    assert state_of(database, first.id) == "promoted"


def test_one_soak_that_cannot_be_taken_up_keeps_no_other_waiting(database: Database) -> None:
    kit.add_version(database, "1", model="other")
    operation, monotonic = begin_soak(database), Clock()
    orphan(database)
    other = kit.begin(database, "1", model="other", policy=soaking.POLICY)
    kit.promote(database, other)
    promotions.let_go(database, other, "its process was killed")
    with database.write(actor="test") as transaction:
        row = promotions.get(transaction.session, other.id)
        row.policy = {**row.policy, "of_a_newer_release": 1}
    alone = watchman(database, monotonic)
    rounds(monotonic, 70, alone)
    assert state_of(database, operation.id) == "promoted"
    assert state_of(database, other.id) == "soaking"


def test_one_soak_that_was_taken_from_a_watchman_that_ends_keeps_it_from_leaving_no_other(database: Database) -> None:
    for version in "12":
        kit.add_version(database, version, model="other")
    operation, monotonic = begin_soak(database), Clock()
    orphan(database)
    first = kit.begin(database, "1", model="other")
    kit.promote(database, first, watch=False)
    kit.end(database, first, "promoted")
    other = kit.begin(database, "2", model="other", policy=soaking.POLICY)
    kit.canary(database, other)
    kit.promote(database, other)
    promotions.let_go(database, other, "its process was killed")
    alone = watchman(database, monotonic)
    rounds(monotonic, 1, alone)
    assert alone.carries == [operation.id, other.id]
    with database.write(actor="test") as transaction:
        leases.preempt(transaction, operation.held.subject, ENVIRONMENT, reason="")
    alone.let_go()
    with database.read() as session:
        assert other.id in promotions.orphans(session)


def test_it_survives_a_registry_that_is_away(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    looks, stopping = [], threading.Event()

    class Away(Watchman):
        def look(self) -> None:
            looks.append(1)
            if len(looks) < 4:
                raise UnavailableError("the registry does not answer")
            stopping.set()
            super().look()

        def rest_seconds(self) -> float:
            return 0.0

    run(Away(database, ttl_seconds=8.0, poll_seconds=0.5), stopping)
    assert len(looks) == 4
    said = [record.message for record in caplog.records if record.name == "modelkeep.watchman"]
    assert sum("does not answer" in line for line in said) == 1, "said once, not at every look"
    assert any("answers again" in line for line in said)


class Rounds(threading.Event):
    """Told to end after some rounds of waiting; `meanwhile` happens in the first."""

    def __init__(self, most: int, meanwhile: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.most, self.meanwhile = most, meanwhile

    def wait(self, timeout: float | None = None) -> bool:
        self.meanwhile()
        self.most -= 1
        if not self.most:
            self.set()
        return self.is_set()


def test_a_registry_that_is_gone_is_not_made_anew_and_is_watched_when_it_is_there(tmp_path: Path) -> None:
    settings, path = Settings(home=tmp_path), tmp_path / "registry.db"
    assert opened(settings, Rounds(3)) is None
    assert not path.exists()
    found = opened(settings, Rounds(3, lambda: kit.prepared(tmp_path).dispose()))
    assert found is not None and found.revision() is not None
    found.dispose()


def test_its_imports_are_light() -> None:
    code = "import sys, tasks.watchman; print([m for m in ('numpy', 'torch', 'onnx', 'prefect', 'fastapi') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout.strip() == "[]"


def test_stale_leases_of_every_environment_are_seen(database: Database) -> None:
    kit.begin(database, "2")
    with database.read() as session:
        found = leases.beats_everywhere(session)
    assert [beat.subject for beat in found[ENVIRONMENT]] == [leases.subject_of(ENVIRONMENT, kit.MODEL)]
