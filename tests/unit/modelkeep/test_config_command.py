"""`modelkeep config`: what it shows, what it writes, and that nothing is half written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modelkeep.config_command import config_app, set_value
from registry.errors import SettingsError, StorageError, UsageError
from registry.settings import load_settings

COMMENTED = """# our box
log_level = "DEBUG"  # chatty

[server]
port = 9000 # taken by another

[[databases]]
name = "My-App"
url = "mysql+pymysql://app:geheim@db/app"
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELKEEP_HOME", str(tmp_path))
    monkeypatch.setenv("MODELKEEP_PROFILE", "cpu")
    return tmp_path


def test_a_change_keeps_comments_and_everything_else(home: Path) -> None:
    file = home / "modelkeep.toml"
    file.write_text(COMMENTED, encoding="utf-8")
    change = set_value("server.port", "9100")
    assert (change.before, change.after, change.path, change.overridden_by) == (9000, 9100, str(file), None)
    assert file.read_text(encoding="utf-8") == COMMENTED.replace("9000", "9100")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("log_level", "ERROR", "ERROR"),
        ("lease_seconds", "20", 20.0),
        ("servers", "http://a:1,http://b:2", ["http://a:1", "http://b:2"]),
        ("server.port", "9100", 9100),
        ("gpu.memory_fraction", "0.5", 0.5),
        ("models.preload_models", "true", True),
        ("performance.batch_size", "4", 4),
        ("database.pool_size", "9", 9),
        ("prefect.port", "4300", 4300),
        ("promotion.stages", "0.1,1", [0.1, 1.0]),
        ("monitoring.prometheus_port", "9999", 9999),
        ("logging.format", "text", "text"),
        ("alerts.cpu_advise_percent", "70", 70.0),
        ("security.rate_limit", "5/second", "5/second"),
        ("vectors.collections", "a,b", ["a", "b"]),
    ],
)
def test_any_section_persists(key: str, text: str, value: object, home: Path) -> None:
    set_value(key, text)
    settings = load_settings()
    found = {row["key"]: row for row in settings.describe()}[key]
    assert found["value"] == value
    assert found["source"] == f"modelkeep.toml ({home / 'modelkeep.toml'})"


def test_a_named_table_is_found_by_its_name_or_added(home: Path) -> None:
    (home / "modelkeep.toml").write_text(COMMENTED, encoding="utf-8")
    set_value("databases.my-app.url", "sqlite:////app.db")
    set_value("databases.other.url", "sqlite:////other.db")
    assert [(d.name, d.url) for d in load_settings().databases] == [
        ("My-App", "sqlite:////app.db"),
        ("other", "sqlite:////other.db"),
    ]


def test_what_would_not_hold_is_refused_and_the_file_is_as_it_was(home: Path) -> None:
    file = home / "modelkeep.toml"
    file.write_text(COMMENTED, encoding="utf-8")
    for key, text, said in (
        ("server.port", "abc", "server.port = 'abc'"),
        ("gpu.max_memory_mb", "4096", "profile cpu allows at most 2048"),
        ("promotion.stages", "[0.1", "is not valid JSON"),
        ("database_url", "mysql://x", "mysql+pymysql"),
    ):
        with pytest.raises(SettingsError) as error:
            set_value(key, text)
        assert said in str(error.value)
    assert file.read_text(encoding="utf-8") == COMMENTED
    assert [path.name for path in home.iterdir()] == ["modelkeep.toml"]


def test_an_unknown_key_names_the_nearest_and_a_section_its_keys(home: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean 'server\.port'"):
        set_value("server.prot", "1")
    with pytest.raises(UsageError, match="is a section: set one of its keys"):
        set_value("server", "{}")


def test_a_new_file_is_for_its_owner_only(home: Path) -> None:
    change = set_value("log_level", "ERROR")
    assert change.before is None
    assert (home / "modelkeep.toml").stat().st_mode & 0o777 == 0o600


def test_a_home_that_cannot_be_written_is_a_clear_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    monkeypatch.setenv("MODELKEEP_HOME", str(home / "file" / "below"))
    with pytest.raises(StorageError, match="cannot be written"):
        set_value("log_level", "ERROR")


def test_a_change_that_the_environment_overrides_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELKEEP_SERVER__PORT", "1")
    assert set_value("server.port", "2").overridden_by == "MODELKEEP_SERVER__PORT"
    assert load_settings().server.port == 1


def test_secrets_are_neither_shown_nor_repeated(home: Path) -> None:
    (home / "modelkeep.toml").write_text(COMMENTED, encoding="utf-8")
    change = set_value("databases.my-app.url", "mysql+pymysql://app:auch-geheim@db/app")
    assert (change.before, change.after) == ("mysql+pymysql://app:***@db/app", "mysql+pymysql://app:***@db/app")
    for arguments in (["show"], ["show", "--json"]):
        assert "geheim" not in CliRunner().invoke(config_app, arguments).stdout


def test_show_prints_one_json_document_or_a_table(home: Path) -> None:
    (home / "modelkeep.toml").write_text(COMMENTED, encoding="utf-8")
    shown = json.loads(CliRunner().invoke(config_app, ["show", "--json"]).stdout)
    assert (shown["profile"], shown["config_file"]) == ("cpu", str(home / "modelkeep.toml"))
    assert {"key": "server.host", "value": "127.0.0.1", "source": "default"} in shown["settings"]
    table = CliRunner().invoke(config_app, ["show"], env={"COLUMNS": "160"}).stdout
    assert "server.port" in table
    assert "9000" in table


def test_validate_says_what_is_wrong_with_exit_code_2(home: Path) -> None:
    assert CliRunner().invoke(config_app, ["validate"]).exit_code == 0
    (home / "modelkeep.toml").write_text("[server]\nprot = 1\n", encoding="utf-8")
    result = CliRunner().invoke(config_app, ["validate", "--json"])
    assert result.exit_code == 2
    answer = json.loads(result.stdout)
    assert answer["valid"] is False
    assert "did you mean 'server.port'?" in answer["problems"][0]
    assert isinstance(CliRunner().invoke(config_app, ["validate"]).exception, SettingsError)


def test_set_prints_what_it_changed(home: Path) -> None:
    result = CliRunner().invoke(config_app, ["set", "server.port", "9100", "--json"])
    assert json.loads(result.stdout)["after"] == 9100
