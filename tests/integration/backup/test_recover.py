"""A machine is lost and comes back from its backups: all of it, parts of it, and after a kill at any step."""

from __future__ import annotations

import datetime as dt
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from registry import clock, ledger, versions
from registry.connect import open_database
from registry.errors import NotFoundError, RefusedError, UsageError
from registry.schema import AuditEvent
from registry.store import DirectoryStore
from tasks.backup import kinds, prune, recovery, verify
from tasks.backup.repository import open_repository
from tests.integration.backup.machine import ROWS, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_all_is_lost_and_all_comes_back_with_the_audit_chain_longer_by_one_event(machine: Machine) -> None:
    backup_id = machine.back_up()
    assert verify.verify(machine.settings, backup_id).state == "verified"
    events, faults = machine.head()
    assert not faults
    manifest = recovery.prepare(
        machine.settings, recovery.Request(source=backup_id, into=str(machine.folder / "x"))
    ).plan.manifest
    assert manifest.registry is not None
    taken = int(manifest.registry["audit_head"]["seq"])
    assert taken <= events
    epoch, stable = machine.epoch_and_stable()
    machine.lose()

    outcome = machine.recover(source=backup_id)
    assert outcome.state == "recovered" and not outcome.failed
    assert machine.head() == (taken + 1, [])
    again, stable_again = machine.epoch_and_stable()
    assert stable_again == stable == "2"
    assert again != epoch, "servers see by a new epoch that the registry went back"
    assert machine.orders() == ROWS
    assert (machine.folder / "uploads/2026/a.txt").read_text() == "alpha"
    store = DirectoryStore(machine.home / "artifacts")
    database = open_database(machine.settings)
    with database.read() as session:
        for version in ("1", "2"):
            for file in versions.stored_files(versions.get(session, "digits", version)):
                store.path(file.digest)
    database.dispose()


def test_what_is_there_is_not_overwritten_unasked(machine: Machine) -> None:
    backup_id = machine.back_up()
    before = machine.head()
    with pytest.raises(RefusedError, match="is not empty") as refused:
        machine.recover(source=backup_id)
    for name in ("registry", "models", "database:app", "files:uploads"):
        assert name in str(refused.value)
    assert machine.head() == before and machine.orders() == ROWS


def test_by_force_what_is_there_is_saved_and_verified_first(machine: Machine) -> None:
    backup_id = machine.back_up()
    with closing(sqlite3.connect(machine.folder / "app.db")) as app:
        app.execute("DELETE FROM orders WHERE id >= 10")
        app.commit()
    outcome = machine.recover(source=backup_id, components=("database:app",), force=True)
    assert outcome.state == "recovered" and machine.orders() == ROWS
    assert outcome.safety_copy is not None
    aside = machine.recover(source=outcome.safety_copy, components=("database:app",), into=str(machine.folder / "look"))
    assert aside.state == "recovered"
    with closing(sqlite3.connect(machine.folder / "look/databases/app.db")) as app:
        assert app.execute("SELECT count(*) FROM orders").fetchone()[0] == 10


def test_old_data_can_be_looked_at_beside_what_is_live(machine: Machine) -> None:
    backup_id = machine.back_up()
    place = machine.folder / "look"
    outcome = machine.recover(source=str(machine.folder / "backups" / f"{backup_id}.manifest.json"), into=str(place))
    assert outcome.state == "recovered"
    assert (place / "registry.db").exists() and (place / "databases/app.db").exists()
    assert (place / "files/uploads/b.bin").read_bytes() == bytes(range(256)) * 40
    assert any((place / "artifacts").iterdir())
    epoch, _ = machine.epoch_and_stable()
    assert epoch, "the live registry was not touched"


def test_one_folder_of_one_component_comes_back(machine: Machine) -> None:
    backup_id = machine.back_up()
    shutil.rmtree(machine.folder / "uploads")
    events, _ = machine.head()
    outcome = machine.recover(source=backup_id, components=("files:uploads/2026",))
    assert outcome.state == "recovered"
    assert machine.head() == (events + 1, []), "that it was done is on record"
    assert (machine.folder / "uploads/2026/a.txt").read_text() == "alpha"
    assert not (machine.folder / "uploads/b.bin").exists()


def test_where_there_is_no_registry_a_part_comes_back_and_makes_none(machine: Machine) -> None:
    backup_id = machine.back_up()
    machine.lose()
    assert machine.recover(source=backup_id, components=("files:uploads",)).state == "recovered"
    assert not (machine.home / "registry.db").exists()
    outcome = machine.recover(source=backup_id, components=("registry", "models", "database"))
    assert outcome.state == "recovered", outcome


def test_a_time_picks_the_newest_verified_backup_before_it(machine: Machine) -> None:
    first = machine.back_up("database")
    verify.verify(machine.settings, first)
    moment = clock.now()
    second = machine.back_up("database")
    prepared = recovery.prepare(machine.settings, recovery.Request(at=moment, into=str(machine.folder / "x")))
    assert prepared.plan.manifest.backup_id == first
    prepared = recovery.prepare(machine.settings, recovery.Request(at=clock.now(), into=str(machine.folder / "x")))
    assert prepared.plan.manifest.backup_id == first, "the second is newer, and not verified"
    verify.verify(machine.settings, second)
    prepared = recovery.prepare(machine.settings, recovery.Request(at=clock.now(), into=str(machine.folder / "x")))
    assert prepared.plan.manifest.backup_id == second
    with pytest.raises(NotFoundError, match="taken before"):
        recovery.prepare(machine.settings, recovery.Request(at=moment - dt.timedelta(days=1)))


def test_an_object_that_is_gone_is_seen_before_anything_is_written(machine: Machine) -> None:
    backup_id = machine.back_up()
    machine.lose()
    largest = max(
        (machine.folder / "backups/objects").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    largest.unlink()
    with pytest.raises(RefusedError, match="objects of the backup are not in"):
        machine.recover(source=backup_id)
    assert not (machine.home / "registry.db").exists() and not (machine.folder / "uploads").exists()


def test_a_damaged_object_fails_its_component_and_the_registry_is_not_begun(machine: Machine) -> None:
    backup_id = machine.back_up()
    machine.lose()
    prepared = recovery.prepare(machine.settings, recovery.Request(source=backup_id))
    source = prepared.repository.source(prepared.plan.manifest, "files:uploads")
    chunk = next(
        entry.stream.chunks[0] for entry in source.entries() if entry.stream and entry.stream.size_bytes > 1000
    )
    path = machine.folder / "backups/objects" / chunk.object[:2] / chunk.object
    path.chmod(0o644)
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    outcome = machine.recover(source=backup_id)
    assert outcome.state == "partial"
    assert set(outcome.failed) == {"files:uploads", "registry"}
    assert "not begun" in outcome.failed["registry"] and not (machine.home / "registry.db").exists()
    assert machine.orders() == ROWS, "the others are back"


def test_a_recovery_that_was_killed_at_any_step_goes_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    backup_id = machine.back_up()
    machine.lose()
    restored: list[str] = []
    real = kinds.kind

    class Counted:
        """A kind whose first restore of each component is cut off in the middle."""

        def __init__(self, name: str) -> None:
            self.name, self.module = name, real(name)

        def occupied(self, target: Any) -> str | None:
            return self.module.occupied(target)  # type: ignore[attr-defined, no-any-return]

        def restore(self, source: Any, target: Any) -> dict[str, Any]:
            facts = self.module.restore(source, target)
            restored.append(source.record.name)
            if restored.count(source.record.name) == 1:
                raise Killed  # all is written, and nobody knows
            return facts

    monkeypatch.setattr(kinds, "kind", Counted)
    for _ in range(4):
        with pytest.raises(Killed):
            machine.recover(source=backup_id)
    outcome = machine.recover(source=backup_id)
    assert outcome.state == "recovered" and not outcome.failed
    assert sorted(restored) == sorted(2 * ["models", "database:app", "files:uploads", "registry"])
    assert machine.orders() == ROWS and machine.head()[1] == []


def test_a_plan_says_what_would_come_back_and_changes_nothing(machine: Machine) -> None:
    backup_id = machine.back_up()
    machine.lose()
    before = sorted(str(path) for path in machine.folder.rglob("*"))
    plan = recovery.prepare(machine.settings, recovery.Request(source=backup_id)).plan
    assert [step.component.name for step in plan.steps] == ["models", "database:app", "files:uploads", "registry"]
    assert not plan.problems
    assert any("never restored and compared before" in text for text in plan.warnings)
    assert sorted(str(path) for path in machine.folder.rglob("*")) == before


def test_asking_for_two_ways_at_once_is_refused(machine: Machine) -> None:
    with pytest.raises(UsageError, match="--from and --at"):
        recovery.prepare(machine.settings, recovery.Request(source="x", at=clock.now()))
    with pytest.raises(UsageError, match="--into with --force"):
        recovery.prepare(machine.settings, recovery.Request(source="x", into="/tmp/x", force=True))


def test_recovery_needs_no_prefect(machine: Machine) -> None:
    backup_id = machine.back_up()
    code = (
        "import sys; sys.modules['prefect'] = None\n"
        "from modelkeep.cli import main\n"
        f"code = main(['recover', '--from', '{machine.folder}/backups/{backup_id}.manifest.json', '--into', '{machine.folder}/look', '--json'])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"MODELKEEP_HOME": str(machine.folder / "empty"), "PATH": "/usr/bin:/bin", "MODELKEEP_PROFILE": "cpu"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"state": "recovered"' in done.stdout


def test_what_a_prune_removes_is_on_record_with_its_rules(machine: Machine) -> None:
    first, second = machine.back_up("database"), machine.back_up("database")
    for one in (first, second):
        verify.verify(machine.settings, one)
    sparing = machine.settings.backup.model_copy(
        update={"keep_daily": 0, "keep_weekly": 0, "keep_monthly": 0, "minimum_redundancy": 1}
    )
    settings = machine.settings.model_copy(update={"backup": sparing})
    found = prune.carry_out(settings, open_repository(settings), now=clock.now())
    assert found.removed == (first,)
    database = open_database(settings)
    with database.read() as session:
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "backup.pruned")).one()
        assert first in event.text
    database.dispose()
    known = ledger.read(machine.home)
    assert known is not None and known["components"]["database:app"]["verified_backup_id"] == second
