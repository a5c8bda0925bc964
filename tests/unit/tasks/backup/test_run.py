"""A backup as a whole: what is written in which order, what one that fails leaves, and who may run it at the same time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from registry import audit, clock, ledger
from registry.audit import read_anchors
from registry.connect import open_database
from registry.errors import ConflictError, FencedError, LockedError, RefusedError, StorageError, UnavailableError
from registry.schema import AuditEvent, Environment, Lease
from registry.settings import Settings
from tasks.backup import kinds, run, states
from tasks.backup.components import Captured, Sink
from tasks.backup.locking import home_lock
from tasks.backup.manifest import Entry
from tasks.backup.repository import open_repository
from tasks.backup.run import Request, back_up


@dataclass
class Fake:
    """A part whose content is given; `then` runs before it captures."""

    name: str
    content: bytes = b"content"
    kind: str = "fake"
    then: Callable[[], None] = lambda: None
    seen: list[Any] = field(default_factory=list)

    def follow(self, earlier: Any) -> None:
        self.seen.append(dict(earlier))

    def capture(self, sink: Sink) -> Captured:
        self.then()
        sink.progress(len(self.content), len(self.content))
        sink.add(Entry("a", stream=sink.store([self.content])))
        return Captured({"bytes": len(self.content)}, {"at": "now"}, {"fake": "1"})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", backups=[str(tmp_path / "backups")])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fake]]:
    found = [Fake("registry"), Fake("models", b"weights"), Fake("files:uploads", b"pictures")]
    monkeypatch.setattr(kinds, "parts", lambda _settings, _names: list(found))
    yield found


def _events(settings: Settings) -> list[str]:
    database = open_database(settings)
    try:
        with database.read() as session:
            return [
                event.action
                for event in session.query(AuditEvent).order_by(AuditEvent.seq)
                if event.subject.startswith("backup:")
            ]
    finally:
        database.dispose()


def _raise(error: BaseException) -> Callable[[], None]:
    def then() -> None:
        raise error

    return then


def test_a_backup_has_a_manifest_states_events_and_a_line_in_the_ledger(settings: Settings, parts: list[Fake]) -> None:
    told: list[str] = []
    outcome = back_up(settings, Request(reason="before the move"), tell=told.append)
    assert (outcome.state, outcome.exit_code) == ("complete", 0)
    repository = open_repository(settings)
    [manifest] = repository.manifests()
    assert manifest == outcome.manifest
    assert [one.name for one in manifest.components] == ["registry", "models", "files:uploads"]
    assert manifest.components[1].facts == {"bytes": 7}
    assert manifest.components[1].size_bytes == 7
    assert b"".join(repository.source(manifest, "models").open(_stream(repository, manifest, "models"))) == b"weights"
    assert (manifest.sequence, manifest.reason, manifest.requested) == (1, "before the move", ("all",))
    assert manifest.programs["fake"] == "1"
    assert "python" in manifest.programs
    assert manifest.settings["home"] == str(settings.home)
    assert manifest.system["disk"][str(settings.home)]["total_bytes"] > 0
    assert [note.state for note in repository.states(manifest.backup_id)] == [states.RUNNING]
    assert states.derive(manifest, repository.states(manifest.backup_id)).state == "complete"
    assert repository.intents() == []
    assert _events(settings) == ["backup.begun", "backup.completed"]
    document = ledger.read(settings.home)
    assert document is not None
    assert document["last"]["state"] == "complete"
    assert document["components"]["models"]["size_bytes"] == 7
    assert document["installation"] == manifest.installation
    assert any(manifest.backup_id in line for line in told)


def _stream(repository: Any, manifest: Any, component: str) -> Any:
    return next(repository.source(manifest, component).entries()).stream


def test_a_part_learns_what_was_captured_before_it(settings: Settings, parts: list[Fake]) -> None:
    back_up(settings, Request())
    assert parts[0].seen == []
    assert [list(one) for one in parts[1].seen] == [["registry"]]
    assert [list(one) for one in parts[2].seen] == [["registry", "models"]]


def test_backups_are_numbered_whatever_the_clock_says(
    settings: Settings, parts: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = back_up(settings, Request()).manifest
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now.replace(year=now.year - 1))
    second = back_up(settings, Request()).manifest
    assert first is not None
    assert second is not None
    assert second.backup_id < first.backup_id
    assert (first.sequence, second.sequence) == (1, 2)


@pytest.mark.parametrize(
    "error", [UnavailableError("the server is away"), OSError("no such device"), ZeroDivisionError()]
)
def test_a_component_that_fails_makes_the_backup_partial_and_the_others_are_there(
    settings: Settings, parts: list[Fake], error: Exception
) -> None:
    parts[1].then = _raise(error)
    outcome = back_up(settings, Request())
    assert (outcome.state, outcome.exit_code) == ("partial", 3)
    [manifest] = open_repository(settings).manifests()
    assert [one.state for one in manifest.components] == ["complete", "failed", "complete"]
    assert str(error) in str(manifest.components[1].error)
    assert manifest.components[1].index is None
    document = ledger.read(settings.home)
    assert document is not None
    assert document["last"]["errors"] == {"models": manifest.components[1].error}
    assert "backed_up_at" not in document["components"]["models"]


def test_where_every_component_fails_there_is_no_backup(settings: Settings, parts: list[Fake]) -> None:
    for part in parts:
        part.then = _raise(UnavailableError("away"))
    outcome = back_up(settings, Request())
    assert (outcome.state, outcome.exit_code, outcome.manifest) == ("failed", 1, None)
    repository = open_repository(settings)
    assert repository.manifests() == []
    assert [note.state for note in repository.states(outcome.backup_id)] == ["running", "failed"]
    assert _events(settings) == ["backup.begun", "backup.failed"]
    document = ledger.read(settings.home)
    assert document is not None
    assert document["last"]["state"] == "failed"


def test_an_interrupted_backup_is_noted_as_failed_and_leaves_no_intent(settings: Settings, parts: list[Fake]) -> None:
    parts[1].then = _raise(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        back_up(settings, Request())
    repository = open_repository(settings)
    [(_, notes)] = repository.all_states().items()
    assert [note.state for note in notes] == ["running", "failed"]
    assert repository.intents() == []
    assert repository.manifests() == []
    parts[1].then = lambda: None
    assert back_up(settings, Request()).state == "complete"


def test_what_cannot_be_stored_fails_as_a_whole(
    settings: Settings, parts: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.backup.writer import ComponentSink

    def full(sink: ComponentSink) -> None:
        sink.drop()
        raise StorageError("the disk is full")

    monkeypatch.setattr(ComponentSink, "finish", full)
    with pytest.raises(StorageError, match="disk is full"):
        back_up(settings, Request())
    assert open_repository(settings).manifests() == []


def test_two_backups_of_one_home_at_once_name_the_one_that_runs(settings: Settings, parts: list[Fake]) -> None:
    found: list[LockedError] = []

    def another() -> None:
        with pytest.raises(LockedError) as caught:
            back_up(settings, Request())
        found.append(caught.value)

    parts[1].then = another
    assert back_up(settings, Request()).state == "complete"
    assert f"process {os.getpid()}" in str(found[0])
    assert found[0].exit_code == 4


def test_two_homes_of_one_registry_do_not_back_up_at_once(
    settings: Settings, parts: list[Fake], tmp_path: Path
) -> None:
    settings.home.mkdir()
    other = Settings(
        home=tmp_path / "other",
        database_url=settings.database_url,
        backups=settings.backups,
        lease_seconds=600,
    )
    found: list[str] = []

    def another() -> None:
        with pytest.raises(LockedError) as caught:
            back_up(other, Request())
        found.append(str(caught.value))

    parts[1].then = another

    # A lease that does not move is only ended after its time to live: here it beats while the other one looks.
    quick = settings.model_copy(update={"lease_seconds": 0.4})
    assert back_up(quick, Request()).state == "complete"
    assert "backup is locked by" in found[0]


def test_the_lease_is_free_after_a_backup(settings: Settings, parts: list[Fake]) -> None:
    parts[0].then = _raise(UnavailableError("away"))
    back_up(settings, Request())
    database = open_database(settings)
    with database.read() as session:
        assert session.get_one(Lease, "backup").state == "released"
    database.dispose()


def test_without_the_registry_the_rest_is_backed_up_and_it_is_said(
    settings: Settings, parts: list[Fake], tmp_path: Path
) -> None:
    nowhere = settings.model_copy(update={"database_url": "postgresql+psycopg://nobody:geheim42@127.0.0.1:1/none"})
    outcome = back_up(nowhere, Request())
    assert (outcome.state, outcome.exit_code) == ("partial", 3)
    assert [one.state for one in outcome.components] == ["failed", "complete", "complete"]
    assert any("without the registry" in note for note in outcome.notes)
    assert "geheim42" not in json.dumps(outcome.as_dict())


def test_a_registry_that_vanished_is_not_backed_up_as_an_empty_one(settings: Settings, parts: list[Fake]) -> None:
    back_up(settings, Request())
    path = settings.home / "registry.db"
    assert list(read_anchors(settings.home / "audit.anchors"))
    for one in settings.home.glob("registry.db*"):
        one.unlink()
    outcome = back_up(settings, Request())
    assert outcome.state == "partial"
    assert "is gone" in str(outcome.components[0].error)
    assert not path.exists()


def test_a_registry_that_takes_no_writes_is_backed_up_without_a_lease(
    settings: Settings, parts: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry import leases

    told: list[str] = []
    monkeypatch.setattr(leases, "acquire", lambda *_a, **_k: _raise(StorageError("the disk is full"))())
    assert back_up(settings, Request(), tell=told.append).state == "complete"
    assert "without a lease: the disk is full" in told


def test_who_may_change_nothing_backs_up_nothing(
    settings: Settings, parts: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry import actor

    monkeypatch.setattr(actor, "_refusal", "key x has role read")
    with pytest.raises(RefusedError, match="role read"):
        back_up(settings, Request())
    assert not settings.home.exists()


def test_a_restore_in_the_middle_voids_the_backup(settings: Settings, parts: list[Fake]) -> None:
    def restored() -> None:
        database = open_database(settings)
        with database.write() as transaction:
            transaction.session.get_one(Environment, settings.environment).epoch = "another"
        database.dispose()

    parts[1].then = restored
    with pytest.raises(FencedError):
        back_up(settings, Request())
    assert open_repository(settings).manifests() == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from registry.settings import Settings
from tasks.backup import kinds
from tasks.backup.run import Request, back_up
from tasks.backup.components import Captured
from tasks.backup.manifest import Entry

class Part:
    name, kind = "files:x", "fake"
    def capture(self, sink):
        sink.add(Entry("a", stream=sink.store([b"x" * 100])))
        open(os.path.join(__import__("tempfile").gettempdir(), "left"), "w").write("left")
        os.kill(os.getpid(), signal.SIGKILL)

kinds.parts = lambda settings, names: [Part()]
back_up(Settings(home=Path(sys.argv[1]), backups=[sys.argv[2]]), Request())
"""


def test_a_lease_that_was_only_lost_voids_nothing(settings: Settings, parts: list[Fake]) -> None:
    from registry import leases

    def expired() -> None:
        database = open_database(settings)
        with database.write() as transaction:
            leases.preempt(transaction, "backup", settings.environment, reason="nobody saw it beat")
        database.dispose()

    parts[1].then = expired
    assert back_up(settings, Request()).state == "complete"


def test_facts_that_no_manifest_can_hold_are_the_fault_of_their_component(
    settings: Settings, parts: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts[1], "capture", lambda _sink: Captured({"bytes": object()}), raising=False)
    outcome = back_up(settings, Request())
    assert [one.state for one in outcome.components] == ["complete", "failed", "complete"]


def test_what_a_killed_backup_left_is_swept_and_noted_by_the_next(settings: Settings, parts: list[Fake]) -> None:
    died = subprocess.run(
        [sys.executable, "-c", _KILLED, str(settings.home), settings.backups[0]], check=False, timeout=120
    )
    assert died.returncode == -signal.SIGKILL
    repository = open_repository(settings)
    [intent] = repository.intents()
    left = list((settings.home / "backup-work").glob("*/left"))
    assert left
    outcome = back_up(settings, Request())
    assert outcome.state == "complete"
    assert not left[0].exists()
    assert [note.state for note in repository.states(intent.backup_id)] == ["running", "failed"]
    assert repository.intents() == []
    assert any(intent.backup_id in note for note in outcome.notes)
    assert _events(settings) == ["backup.begun", "backup.failed", "backup.begun", "backup.completed"]


def test_a_backup_of_another_machine_that_is_under_way_is_left_alone(settings: Settings, parts: list[Fake]) -> None:
    repository = open_repository(settings, create=True)
    other = "20261101T000000Z-abcdef"
    repository.begin_intent(other, {"host": "elsewhere", "home": "/h", "pid": 1})
    repository.note_state(other, states.RUNNING, {"sequence": 7})
    outcome = back_up(settings, Request())
    assert [one.backup_id for one in repository.intents()] == [other]
    assert [note.state for note in repository.states(other)] == ["running"]
    assert outcome.manifest is not None
    assert outcome.manifest.sequence == 8


def test_the_lock_says_who_holds_it_and_is_free_when_its_process_is_gone(tmp_path: Path) -> None:
    with home_lock(tmp_path, "backup") as lock:
        lock.note(lease="token")
        with pytest.raises(LockedError, match=f"process {os.getpid()} on "), home_lock(tmp_path, "backup"):
            pass
    with home_lock(tmp_path, "backup") as again:
        assert again.before == {}


def test_the_audit_chain_holds_after_backups(settings: Settings, parts: list[Fake]) -> None:
    for _ in range(2):
        back_up(settings, Request())
    database = open_database(settings)
    with database.read() as session:
        assert audit.verify(session, settings.home / "audit.anchors").faults == []
    database.dispose()


def test_a_place_that_was_away_gets_its_copy_with_the_next_backup(
    settings: Settings, parts: list[Fake], tmp_path: Path
) -> None:
    away = tmp_path / "away"
    away.write_text("a file where the folder should be")
    both = settings.model_copy(update={"backups": [*settings.backups, str(away)]})
    first = back_up(both, Request())
    assert first.exit_code == 3
    assert first.places[settings.backups[0]] == "stored"
    assert first.places[str(away)] != "stored"
    away.unlink()
    second = back_up(both, Request())
    assert second.exit_code == 0
    assert (away / f"{first.backup_id}.manifest.json").exists()
    assert any(first.backup_id in note for note in second.notes)


def test_no_other_error_is_taken_for_one_of_a_component(settings: Settings, parts: list[Fake]) -> None:
    with pytest.raises(ConflictError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run._Backup, "_begin", lambda _self: _raise(ConflictError("taken"))())
        back_up(settings, Request())
    assert open_repository(settings).intents() == []
