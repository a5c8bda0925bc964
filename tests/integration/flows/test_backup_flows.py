"""The flows of backups against a real Prefect server: the states that they end in, and their pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.connect import open_database
from registry.schema import AuditEvent
from registry.settings import load_settings
from tasks.backup.locking import home_lock


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


def _page(api: str, key: str) -> str:
    """The newest artifact of a key, as the UI would show it."""
    query = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC", "limit": 1}
    (found,) = httpx.post(f"{api}/artifacts/filter", json=query, timeout=10).raise_for_status().json()
    return str(found["data"])


def test_a_backup_ends_complete_with_a_page_and_a_bar_and_is_then_verified(home: Path, prefect_api: str) -> None:
    state = _back_up(components="registry,files", reason="by form")
    assert (state.name, state.type.value) == ("Complete", "COMPLETED"), state.message
    backup_id = _data(state)["backup_id"]
    text = _page(prefect_api, "backup")
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
    assert "| registry | verified |" in _page(prefect_api, "backups-verified")
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
    assert "| files:uploads | failed |" in _page(prefect_api, "backup")


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
    assert "failed-verification" in _page(prefect_api, "backups-verified")


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
