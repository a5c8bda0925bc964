"""Shipping of logs, as far as it needs no server: what is known of it afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry import ledger as ledger_file
from registry.errors import LockedError, StorageError
from registry.sections import BackupSection, Database
from registry.settings import Settings
from tasks.backup import ledger, ship
from tasks.backup.log_lock import shipping


def _settings(home: Path, *logs: str) -> Settings:
    databases = [Database(name=name, url=f"sqlite:///{home}/{name}.db") for name in ("app", "shop")]
    return Settings(
        home=home, backups=[str(home / "backups")], databases=databases, backup=BackupSection(logs=list(logs))
    )


def _failed(home: Path) -> dict[str, str]:
    rows = (ledger_file.read(home) or {}).get("logs", {})
    return {name: str(row["failed"]) for name, row in rows.items()}


def test_where_the_backups_do_not_answer_each_database_counts_as_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise StorageError("the bucket does not answer")

    monkeypatch.setattr(ship, "open_repository", away)
    with pytest.raises(StorageError, match="does not answer"):
        ship.ship(_settings(tmp_path, "app", "shop"))
    assert _failed(tmp_path) == {"app": "the bucket does not answer", "shop": "the bucket does not answer"}


def test_logs_that_are_shipped_no_more_are_forgotten_and_two_shipments_do_not_wait(tmp_path: Path) -> None:
    [found] = ship.ship(_settings(tmp_path, "app"))
    assert found.failed is not None and set(_failed(tmp_path)) == {"app"}
    with shipping(tmp_path), pytest.raises(LockedError):
        ship.ship(_settings(tmp_path, "app"))
    assert ship.ship(_settings(tmp_path)) == [] and _failed(tmp_path) == {}
    known = ledger.summary(tmp_path, ["app"])
    assert known is not None and known["logs"]["app"]["covers_until"] is None
