"""Checking backups: restored in a process of its own and compared; what differs, what could not be checked, what is due."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from registry import ledger
from registry.connect import open_database
from registry.errors import NotFoundError, UsageError
from registry.schema import AuditEvent
from registry.sections import Database, Files
from registry.settings import Settings
from tasks.backup import states, verify
from tasks.backup.manifest import Manifest, ManifestError
from tasks.backup.repository import open_repository
from tasks.backup.run import Request, back_up


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A registry, a SQLite database of the application, and a folder."""
    app = tmp_path / "app.db"
    with sqlite3.connect(app) as connection:
        connection.execute("CREATE TABLE generations (id INTEGER PRIMARY KEY, prompt TEXT)")
        connection.executemany("INSERT INTO generations (prompt) VALUES (?)", [(f"a cat {n}",) for n in range(500)])
    connection.close()
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "one.bin").write_bytes(bytes(range(256)) * 4000)
    return Settings(
        home=tmp_path / "home",
        backups=[str(tmp_path / "backups")],
        databases=[Database(name="app", url=f"sqlite:///{app}")],
        files=[Files(name="uploads", path=uploads)],
    )


def _taken(settings: Settings, *names: str) -> Manifest:
    manifest = back_up(settings, Request(names)).manifest
    assert manifest is not None
    assert manifest.state == "complete"
    return manifest


def _damage(settings: Settings, manifest: Manifest, component: str) -> Path:
    """One bit of the first object that the component's content has."""
    entry = next(one for one in open_repository(settings).source(manifest, component).entries() if one.stream)
    assert entry.stream is not None
    name = entry.stream.chunks[0].object
    path = Path(settings.backups[0]) / "objects" / name[:2] / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    return path


def _row(settings: Settings, component: str) -> dict[str, Any]:
    document = ledger.read(settings.home)
    assert document is not None
    found: dict[str, Any] = document["components"][component]
    return found


def _actions(settings: Settings) -> list[str]:
    database = open_database(settings)
    with database.read() as session:
        found = [event.action for event in session.query(AuditEvent).order_by(AuditEvent.seq)]
    database.dispose()
    return found


def test_a_backup_that_restores_as_it_was_is_verified(settings: Settings) -> None:
    manifest = _taken(settings, "registry", "database", "files")
    assert "verified_as_of" not in _row(settings, "database:app")
    report = verify.verify(settings, manifest.backup_id)
    assert (report.state, report.exit_code) == ("verified", 0), report.summary()
    assert set(report.components) == {"registry", "database:app", "files:uploads"}
    assert report.components["database:app"].checked["rows"] == 500
    standing = states.derive(manifest, open_repository(settings).states(manifest.backup_id))
    assert standing.verified == {"registry", "database:app", "files:uploads"}
    component = manifest.component("database:app")
    assert component is not None
    assert _row(settings, "database:app")["verified_as_of"] == component.began_at
    assert _actions(settings)[-1] == "backup.verified"
    assert list((settings.home / "backup-work").iterdir()) == []


def test_one_flipped_bit_is_found_by_name_and_it_is_no_verified_backup_any_more(settings: Settings) -> None:
    manifest = _taken(settings, "files")
    assert verify.verify(settings, manifest.backup_id).state == "verified"
    _damage(settings, manifest, "files:uploads")
    report = verify.verify(settings, manifest.backup_id)
    assert (report.state, report.exit_code) == ("failed", 1)
    assert report.of(states.FAILED_VERIFICATION) == ["files:uploads"]
    assert "verified_as_of" not in _row(settings, "files:uploads")
    assert _actions(settings)[-1] == "backup.failed-verification"


def test_a_sample_finds_an_object_that_is_gone_and_one_with_another_bit(settings: Settings) -> None:
    manifest = _taken(settings, "files")
    whole = verify.verify(settings, manifest.backup_id, share=0.001)
    assert (whole.state, whole.exit_code) == ("complete", 0)
    assert states.derive(manifest, open_repository(settings).states(manifest.backup_id)).sampled_at is not None
    path = _damage(settings, manifest, "files:uploads")
    assert verify.verify(settings, manifest.backup_id, share=1.0).state == "failed"
    path.unlink()
    assert verify.verify(settings, manifest.backup_id, share=0.001).exit_code == 1


def test_a_backup_that_was_mended_can_be_verified_again(settings: Settings) -> None:
    manifest = _taken(settings, "files")
    path = _damage(settings, manifest, "files:uploads")
    damaged = path.read_bytes()
    assert verify.verify(settings, manifest.backup_id, share=1.0).state == "failed"
    good = bytearray(damaged)
    good[len(good) // 2] ^= 1
    path.write_bytes(good)
    assert verify.verify(settings, manifest.backup_id).state == "verified"


def test_a_check_that_takes_too_long_is_ended_and_says_nothing_of_the_backup(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = _taken(settings, "files")
    monkeypatch.setattr(verify, "START_SECONDS", 0.0)
    monkeypatch.setattr(verify, "SLOWEST_BYTES_A_SECOND", 1e15)
    report = verify.verify(settings, manifest.backup_id)
    assert (report.state, report.exit_code) == ("complete", 1)
    assert "gave no answer" in str(report.components["files:uploads"].why)


def test_without_room_to_restore_nothing_is_tried_and_it_is_said(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = _taken(settings, "files")
    usage = shutil.disk_usage(settings.home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    report = verify.verify(settings, manifest.backup_id)
    assert (report.state, report.exit_code) == ("complete", 1)
    assert "1000 are free" in str(report.components["files:uploads"].why)


def test_a_process_that_dies_is_no_verification(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = _taken(settings, "files")
    monkeypatch.setattr(verify, "PROCESS", ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    report = verify.verify(settings, manifest.backup_id)
    assert (report.state, report.exit_code) == ("complete", 1)
    assert "ended with -9" in str(report.components["files:uploads"].why)


def test_the_check_works_on_the_cpu_in_a_process_of_its_own(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = _taken(settings, "files")
    seen = "import os, sys; sys.exit(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(verify, "PROCESS", ("-c", seen))
    report = verify.verify(settings, manifest.backup_id)
    assert "''" in str(report.components["files:uploads"].why)


def test_a_failed_component_is_not_checked_and_the_others_count(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.files[0].path.rename(settings.files[0].path.with_name("moved"))
    outcome = back_up(settings, Request(("database", "files")))
    assert outcome.state == "partial"
    report = verify.verify(settings, outcome.backup_id)
    assert (report.state, report.exit_code) == ("partial", 0)
    assert list(report.components) == ["database:app"]
    assert "verified_as_of" in _row(settings, "database:app")


def test_what_cannot_be_believed_or_is_not_there_is_not_checked(settings: Settings) -> None:
    manifest = _taken(settings, "files")
    path = Path(settings.backups[0]) / f"{manifest.backup_id}.manifest.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace('"entries": ', '"entries": "x'))
    with pytest.raises(ManifestError):
        verify.verify(settings, manifest.backup_id)
    with pytest.raises(NotFoundError):
        verify.verify(settings, "20200101T000000Z-000000")
    with pytest.raises(UsageError):
        verify.verify(settings, manifest.backup_id, share=1.5)


def test_due_are_full_ones_wholly_and_the_others_by_a_sample_until_that_is_done(settings: Settings) -> None:
    repository = open_repository(settings, create=True)
    assert verify.due(repository, 0.05) == []
    daily = _taken(settings, "files")
    full = _full(settings)
    assert verify.due(repository, 0.05) == [(full, None), (daily.backup_id, 0.05)]
    repository.note_state(daily.backup_id, states.SAMPLED, {"components": {}})
    repository.note_state(full, states.NOT_VERIFIED, {"components": {}})
    assert verify.due(repository, 0.05) == [(full, None)]
    repository.note_state(full, states.VERIFIED, {"components": {}})
    assert verify.due(repository, 0.05) == []


def _full(settings: Settings) -> str:
    """A manifest that says of itself that all was asked for."""
    from tasks.backup import kinds

    with pytest.MonkeyPatch.context() as patch:
        real = kinds.parts
        patch.setattr(kinds, "parts", lambda settings, _names: real(settings, ("files",)))
        return back_up(settings, Request((kinds.ALL,))).backup_id


@pytest.mark.parametrize("what", ["content", "index"])
def test_after_a_damage_was_found_the_next_backup_writes_the_object_again_and_the_old_one_is_right_too(
    settings: Settings, what: str
) -> None:
    first = _taken(settings, "files")
    component = first.components[0]
    assert component.index is not None
    entries = list(open_repository(settings).source(first, component.name).entries())
    streams = [component.index] if what == "index" else [one.stream for one in entries if one.stream is not None]
    name = max((chunk for stream in streams for chunk in stream.chunks), key=lambda one: one.stored_bytes).object
    path = Path(settings.backups[0]) / "objects" / name[:2] / name
    sound = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert verify.verify(settings, first.backup_id).exit_code == 1

    second = _taken(settings, "files")
    assert path.read_bytes() == sound
    assert verify.verify(settings, second.backup_id).state == "verified"
    assert verify.verify(settings, first.backup_id).state == "verified"
