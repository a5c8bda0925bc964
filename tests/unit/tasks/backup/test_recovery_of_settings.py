"""By which settings an empty machine recovers, and what it tells a person of what no backup holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.errors import SettingsError
from tasks.backup import recovery
from tasks.backup.manifest import COMPLETE, Component, Manifest
from tasks.backup.remains import notes

WHEN = "2026-11-21T02:00:00.000000Z"


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of a machine with an empty home and the password of a database that nothing here describes."""
    monkeypatch.chdir(tmp_path)
    return {
        "MODELKEEP_HOME": str(tmp_path / "home"), "MODELKEEP_PROFILE": "cpu", "MODELKEEP_DATABASES__SHOP__PASSWORD": "x",
    }  # fmt: skip


def test_on_an_empty_machine_a_password_waits_for_its_database(environ: dict[str, str]) -> None:
    assert recovery.settings_here(environ).databases == []


def test_where_there_is_a_modelkeep_toml_a_password_of_nothing_is_a_mistake(environ: dict[str, str]) -> None:
    home = Path(environ["MODELKEEP_HOME"])
    home.mkdir()
    (home / "modelkeep.toml").write_text('backups = ["/backups"]\n')
    with pytest.raises(SettingsError, match=r"databases\.shop\.url is missing"):
        recovery.settings_here(environ)


def test_a_database_that_the_environment_describes_as_a_whole_counts(environ: dict[str, str]) -> None:
    environ["MODELKEEP_DATABASES__SHOP__URL"] = "mysql+pymysql://app@127.0.0.1/shop"
    assert [one.name for one in recovery.settings_here(environ).databases] == ["shop"]


def test_another_mistake_in_the_environment_is_told(environ: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="MODELKEEP_BACKUPZ is not a setting"):
        recovery.settings_here({**environ, "MODELKEEP_BACKUPZ": "s3://x"})


def test_secrets_of_the_lost_machine_that_nobody_has_set_are_named(environ: dict[str, str]) -> None:
    secrets = ["queues.url", "databases.shop.password", "MODELKEEP_API_KEY", "databases.the-ledger.password"]
    config = Component("config", "config", COMPLETE, WHEN, WHEN, facts={"secrets": secrets})
    manifest = Manifest("20261121T020000Z-000000", "x", COMPLETE, WHEN, WHEN, requested=("all",), components=(config,))
    assert recovery._unset(manifest, environ) == [
        "MODELKEEP_API_KEY", "MODELKEEP_DATABASES__THE_LEDGER__PASSWORD", "MODELKEEP_QUEUES__URL",
    ]  # fmt: skip


def test_what_is_left_to_do_is_told_by_component() -> None:
    restored = {
        "config": {"fill_in": ["queues.url"], "beside": ["modelkeep.toml.restored"]},
        "database:shop": {"rows": 7, "accounts_failed": {"`a`@`%`": "lacks a grant (1227)"}},
        "vectors": {"kept": None},
    }
    assert notes(restored) == [
        "config: no backup holds secrets, set them again: queues.url",
        "config: other files stood there, what came back lies beside them: modelkeep.toml.restored",
        "database:shop: `a`@`%`: lacks a grant (1227)",
    ]
