"""A recovery replaces what is live only where that was asked for, and only after just that was saved."""

from __future__ import annotations

import datetime as dt
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from registry import clock
from registry.errors import RefusedError, StorageError
from tasks.backup import kinds, recovery, states, verify
from tasks.backup.written import write_files
from tests.integration.backup.machine import ROWS, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


class Killed(BaseException):
    pass


def changed(machine: Machine, rows: int) -> None:
    """The application has so many orders now, and they are its own."""
    with closing(sqlite3.connect(machine.folder / "app.db")) as app:
        app.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, text TEXT)")
        app.execute("DELETE FROM orders")
        app.executemany("INSERT INTO orders VALUES (?, 'written since')", [(number,) for number in range(rows)])
        app.commit()


def restore_by(monkeypatch: pytest.MonkeyPatch, name: str, act: Any) -> None:
    """Where the component `name` is restored, `act` is called with the module's own restore and its arguments."""
    real = kinds.kind

    class Kind:
        def __init__(self, kind: str) -> None:
            self.module = real(kind)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.module, attribute)

        def restore(self, source: Any, target: Any) -> dict[str, Any]:
            if source.record.name != name:
                return self.module.restore(source, target)  # type: ignore[attr-defined, no-any-return]
            return act(self.module.restore, source, target)  # type: ignore[attr-defined, no-any-return]

    monkeypatch.setattr(kinds, "kind", Kind)


def test_a_recovery_that_failed_before_it_wrote_gives_no_leave_to_overwrite_later(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = machine.back_up("database")
    (machine.folder / "app.db").unlink()

    def fails(restore: Any, source: Any, target: Any) -> dict[str, Any]:
        raise StorageError("the store does not answer")

    with monkeypatch.context() as patch:
        restore_by(patch, "database:app", fails)
        assert machine.recover(source=backup_id, components=("database:app",)).failed
    changed(machine, 7)
    with pytest.raises(RefusedError, match="is not empty"):
        machine.recover(source=backup_id, components=("database:app",))
    assert machine.orders() == 7


def test_what_was_written_over_a_failed_recovery_is_not_taken_for_its_half(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = machine.back_up("files")
    (machine.folder / "uploads/b.bin").unlink()
    (machine.folder / "uploads/2026/a.txt").unlink()
    (machine.folder / "uploads/2026").rmdir()

    def half(restore: Any, source: Any, target: Any) -> dict[str, Any]:
        (target.path / "b.bin").write_bytes(b"half")
        raise StorageError("the store does not answer any more")

    with monkeypatch.context() as patch:
        restore_by(patch, "files:uploads", half)
        assert machine.recover(source=backup_id, components=("files:uploads",)).failed
    (machine.folder / "uploads/mine.txt").write_text("somebody else's")
    with pytest.raises(RefusedError, match="is not empty"):
        machine.recover(source=backup_id, components=("files:uploads",))
    (machine.folder / "uploads/mine.txt").unlink()
    assert machine.recover(source=backup_id, components=("files:uploads",)).state == "recovered"


def test_a_recovery_that_was_killed_long_ago_gives_no_leave_to_overwrite(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = machine.back_up("database")
    (machine.folder / "app.db").unlink()

    def killed(restore: Any, source: Any, target: Any) -> dict[str, Any]:
        raise Killed

    with monkeypatch.context() as patch:
        restore_by(patch, "database:app", killed)
        with pytest.raises(Killed):
            machine.recover(source=backup_id, components=("database:app",))
    changed(machine, 7)
    later = clock.now() + dt.timedelta(days=8)
    monkeypatch.setattr(clock, "now", lambda: later)
    with pytest.raises(RefusedError, match="is not empty"):
        machine.recover(source=backup_id, components=("database:app",))
    assert machine.orders() == 7


def test_a_safety_copy_holds_what_this_run_replaces_not_what_an_earlier_one_did(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = machine.back_up("database", "files")
    (machine.folder / "app.db").unlink()
    asked: dict[str, Any] = {"source": backup_id, "components": ("database:app", "files:uploads"), "force": True}

    def killed(restore: Any, source: Any, target: Any) -> dict[str, Any]:
        raise Killed

    with monkeypatch.context() as patch:
        restore_by(patch, "database:app", killed)
        saved: list[list[str]] = []
        real = recovery.safety_copy
        patch.setattr(
            recovery,
            "safety_copy",
            lambda settings, names, say: (saved.append(list(names)), real(settings, names, say=say))[1],
        )
        with pytest.raises(Killed):
            machine.recover(**asked)
        assert saved == [["files:uploads"]]
    (machine.folder / "uploads/b.bin").write_bytes(b"newer than the first safety copy")
    outcome = machine.recover(**asked)
    assert outcome.state == "recovered" and outcome.safety_copy is not None
    look = machine.folder / "look"
    machine.recover(source=outcome.safety_copy, into=str(look))
    assert (look / "files/uploads/b.bin").read_bytes() == b"newer than the first safety copy"


def test_what_came_to_an_empty_place_after_the_plan_was_made_is_not_overwritten_even_by_force(machine: Machine) -> None:
    backup_id = machine.back_up("database")
    (machine.folder / "app.db").unlink()
    request = recovery.Request(source=backup_id, components=("database:app",), force=True)
    prepared = recovery.prepare(machine.settings, request)
    changed(machine, 7)
    outcome = recovery.carry_out(prepared, request)
    assert outcome.failed and machine.orders() == 7
    assert machine.recover(source=backup_id, components=("database:app",), force=True).safety_copy is not None
    assert machine.orders() == ROWS


def test_a_configuration_with_its_secrets_is_never_replaced_by_one_without(machine: Machine) -> None:
    toml = machine.home / "modelkeep.toml"
    toml.write_text(toml.read_text() + 'redis_url = "redis://:marked@127.0.0.1:1/0"\n')
    backup_id = machine.back_up("config")
    toml.write_text(toml.read_text() + "# edited since\n")
    before = toml.read_bytes()
    outcome = machine.recover(source=backup_id, components=("config",), force=True)
    assert outcome.state == "recovered" and toml.read_bytes() == before
    assert b"marked" not in (machine.home / "modelkeep.toml.restored").read_bytes()


def test_of_several_installations_in_one_location_the_newest_of_ours_comes_back(
    machine: Machine, tmp_path: Path
) -> None:
    ours = machine.back_up("database")
    other = tmp_path / "other"
    other.mkdir()
    theirs = Machine(other)
    (theirs.home / "modelkeep.toml").write_text((machine.home / "modelkeep.toml").read_text())
    theirs.folder = machine.folder
    theirs.settings = theirs.load()
    newest = theirs.back_up("database", "registry")
    asked = recovery.Request(at=clock.now(), components=("database:app",), into=str(tmp_path / "look"))
    assert recovery.prepare(machine.settings, asked).plan.manifest.backup_id == ours
    named = recovery.Request(source=newest, components=("database:app",), into=str(tmp_path / "look"))
    assert any("another installation" in text for text in recovery.prepare(machine.settings, named).plan.warnings)


def test_what_is_written_to_be_looked_at_is_nobody_elses_to_read(machine: Machine, tmp_path: Path) -> None:
    backup_id = machine.back_up("files")
    prepared = recovery.prepare(machine.settings, recovery.Request(source=backup_id, into=str(tmp_path / "look")))
    folder = tmp_path / "written"
    write_files(prepared.repository.source(prepared.plan.manifest, "files:uploads"), folder)
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert written and all(path.stat().st_mode & 0o077 == 0 for path in [folder, *written])


@pytest.mark.parametrize("outcome", [states.UNVERIFIABLE, states.NOT_VERIFIED, states.FAILED_VERIFICATION])
def test_nothing_is_replaced_on_a_safety_copy_that_was_not_restored_and_compared(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    backup_id = machine.back_up("database")
    changed(machine, 7)

    def checked(settings: Any, named: str, **_: Any) -> verify.Report:
        found = {"database:app": verify.Checked(outcome, "there is no such server here")}
        return verify.Report(named, "complete", found, None, 0.0)

    monkeypatch.setattr(verify, "verify", checked)
    with pytest.raises(
        RefusedError, match=r"is not verified, so nothing was replaced \(database:app: there is no such"
    ):
        machine.recover(source=backup_id, components=("database:app",), force=True)
    assert machine.orders() == 7
