"""The flows of backups against a real Prefect server: the states that they end in, and their pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import ledger
from registry.connect import open_database
from registry.schema import AuditEvent
from registry.settings import load_settings
from tasks.backup.locking import home_lock
from tests.prefect_server import newest_page


@pytest.fixture
def home(prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty registry and a folder of the application."""
    found = tmp_path / "home"
    found.mkdir()
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "one").write_bytes(b"picture" * 1000)
    (found / "modelkeep.toml").write_text(f'[[files]]\nname = "uploads"\npath = "{tmp_path}/uploads"\n')
    monkeypatch.setenv("MODELKEEP_HOME", str(found))
    monkeypatch.setenv("MODELKEEP_PROFILE", "cpu")
    yield found


def _back_up(**request: Any) -> Any:
    from flows.backup import Backup, backup

    return backup(Backup(**request), return_state=True)


def _verify(**request: Any) -> Any:
    from flows.verify_backups import VerifyBackups, verify_backups

    return verify_backups(VerifyBackups(**request), return_state=True)


def _data(state: Any) -> Any:
    return getattr(state.data, "result", state.data)


def test_a_backup_ends_complete_with_a_page_and_a_bar_and_is_then_verified(home: Path, prefect_api: str) -> None:
    state = _back_up(components="registry,files", reason="by form")
    assert (state.name, state.type.value) == ("Complete", "COMPLETED"), state.message
    backup_id = _data(state)["backup_id"]
    text = newest_page(prefect_api, "backup")
    for part in (f"# Backup {backup_id}: complete", "| registry | complete |", "| files:uploads | complete |"):
        assert part in text
    database = open_database(load_settings())
    with database.read() as session:
        begun = session.query(AuditEvent).filter_by(action="backup.begun").one()
        assert json.loads(begun.text)["flow_run_id"] == str(state.state_details.flow_run_id)
    database.dispose()

    state = _verify(backup=backup_id)
    assert state.is_completed(), state.message
    assert _data(state)[0]["state"] == "verified"
    assert "| registry | verified |" in newest_page(prefect_api, "backups-verified")
    state = _verify()
    assert state.is_completed()
    assert state.message == "no backup was due"


def test_an_empty_form_backs_up_everything(home: Path, prefect_api: str) -> None:
    from flows.backup import backup

    state = backup(return_state=True)
    assert state.name == "Complete", state.message
    assert [one["name"] for one in _data(state)["components"]] == ["registry", "models", "files:uploads", "config"]


def test_a_component_that_fails_ends_the_run_failed_by_the_name_partial(home: Path, prefect_api: str) -> None:
    (home.parent / "uploads").rename(home.parent / "moved")
    state = _back_up(components="registry,files")
    assert (state.name, state.type.value) == ("Partial", "FAILED"), state.message
    assert _data(state)["state"] == "partial"
    assert "| files:uploads | failed |" in newest_page(prefect_api, "backup")


def test_a_second_one_ends_locked_and_a_wrong_name_refused(home: Path, prefect_api: str) -> None:
    with home_lock(home, "backup"):
        state = _back_up(components="files")
    assert (state.name, state.is_failed()) == ("Locked", True)
    state = _back_up(components="vectors")
    assert (state.name, state.is_failed()) == ("Refused", True)
    assert "vectors" in state.message
    state = _verify(backup="20200101T000000Z-000000")
    assert (state.name, state.is_failed()) == ("Refused", True)


def test_a_damaged_backup_fails_the_scheduled_check_loudly(home: Path, prefect_api: str) -> None:
    backup_id = _data(_back_up(components="files"))["backup_id"]
    for path in (home / "backups" / "objects").glob("*/*"):
        path.chmod(0o644)
        path.write_bytes(b"other bytes")
    state = _verify()
    assert state.is_failed()
    assert backup_id in state.message
    assert "failed-verification" in newest_page(prefect_api, "backups-verified")


def test_the_commands_run_the_flows_and_end_with_their_exit_codes(
    home: Path, prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from modelkeep.cli import main

    assert main(["backup", "--components", "registry,files", "--json"]) == 0
    taken = json.loads(capsys.readouterr().out)
    assert taken["state"] == "complete"
    assert main(["backups", "verify", taken["backup_id"], "--sample", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["components"]["registry"]["outcome"] == "sampled"
    with home_lock(home, "backup"):
        assert main(["backup", "--components", "files"]) == 4
    (home.parent / "uploads").rename(home.parent / "moved")
    assert main(["backup", "--components", "registry,files"]) == 3
    assert main(["backup", "--components", "files"]) == 1
    assert "files:uploads" in capsys.readouterr().out


def test_logs_are_shipped_or_the_run_says_whose_are_not(home: Path, prefect_api: str) -> None:
    from flows.ship_logs import ShipLogs, ship_logs

    state = ship_logs(return_state=True)
    assert (state.name, state.type.value) == ("Shipped", "COMPLETED"), state.message
    database = f'[[databases]]\nname = "app"\nurl = "sqlite:///{home}/app.db"\n[backup]\nlogs = ["app"]\n'
    (home / "modelkeep.toml").write_text(database)
    state = ship_logs(return_state=True)
    assert (state.name, state.type.value) == ("Failed", "FAILED")
    assert "app: NOT SHIPPED" in str(state.message) and "of MariaDB and PostgreSQL only" in str(state.message)
    state = ship_logs(ShipLogs(databases=["shop"]), return_state=True)
    assert (state.name, state.type.value) == ("Refused", "FAILED") and "shop: [backup] logs has app" in str(
        state.message
    )
    assert set((ledger.read(home) or {})["logs"]) == {"app"}
    (home / "modelkeep.toml").write_text("")
    assert ship_logs(return_state=True).name == "Shipped" and "logs" not in (ledger.read(home) or {})


def test_a_recovery_is_planned_unless_told_otherwise_then_carried_out_and_refused_over_what_is_there(
    home: Path, prefect_api: str, tmp_path: Path
) -> None:
    from flows.recover import Recover, recover

    backup_id = _data(_back_up(components="files"))["backup_id"]
    asked = {"source": backup_id, "components": ["files:uploads"]}
    refused = recover(Recover(**asked, dry_run=False), return_state=True)
    assert (refused.name, refused.type.value) == ("Refused", "FAILED") and "is not empty" in str(refused.message)

    picture = tmp_path / "uploads" / "one"
    picture.unlink()
    picture.parent.rmdir()
    planned = recover(Recover(**asked), return_state=True)
    assert (planned.name, planned.type.value) == ("Planned", "COMPLETED"), planned.message
    assert not picture.exists()
    done = recover(Recover(**asked, dry_run=False, reason="the disk died"), return_state=True)
    assert (done.name, done.type.value) == ("Recovered", "COMPLETED"), done.message
    assert picture.read_bytes() == b"picture" * 1000
    assert "files:uploads" in newest_page(prefect_api, f"recovered-{backup_id.lower()}")
    with open_database(load_settings()).read() as session:
        (event,) = session.query(AuditEvent).filter(AuditEvent.action == "backup.restored")
        assert "the disk died" in event.text


def test_a_prune_shows_its_rules_and_fails_where_a_manifest_cannot_be_read(home: Path, prefect_api: str) -> None:
    from flows.prune_backups import PruneBackups, prune_backups

    backup_id = _data(_back_up(components="files"))["backup_id"]
    looked = prune_backups(PruneBackups(apply=False), return_state=True)
    assert looked.type.value == "COMPLETED" and looked.message == "0 of 1 backups would go"
    assert f"| {backup_id} | complete | stays |" in newest_page(prefect_api, "retention")
    pruned = prune_backups(return_state=True)
    assert pruned.type.value == "COMPLETED" and pruned.message == "0 of 1 backups removed"
    (home / "backups" / "20200101T000000Z-aaaaaa.manifest.json").write_text("{")
    failed = prune_backups(return_state=True)
    assert failed.type.value == "FAILED" and "20200101T000000Z-aaaaaa" in str(failed.message)


def test_a_drill_ends_passed_with_its_page_and_failed_where_the_location_is_damaged(
    home: Path, prefect_api: str
) -> None:
    from flows.recovery_drill import RecoveryDrill, recovery_drill

    _back_up(components="registry,files")
    passed = recovery_drill(RecoveryDrill(damage="cut-object"), return_state=True)
    # Without models nothing can be served, and that is said: this installation backs none up here.
    assert passed.type.value == "FAILED" and "nothing could be served" in str(passed.message)
    _back_up(components="registry,models,files")
    passed = recovery_drill(RecoveryDrill(damage="cut-object"), return_state=True)
    assert (passed.name, passed.type.value) == ("Passed", "COMPLETED"), passed.message
    page = newest_page(prefect_api, "recovery-drill")
    assert "| files:uploads |" in page and "an object ends in its middle" in page and (home / "drill.html").exists()
    for path in (home / "backups" / "objects").rglob("*"):
        if path.is_file():
            path.chmod(0o600)
            path.write_bytes(path.read_bytes()[:-1])
    failed = recovery_drill(return_state=True)
    assert failed.type.value == "FAILED" and "files:uploads" in str(failed.message)
