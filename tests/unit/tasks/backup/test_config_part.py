"""The configuration is kept without a secret, and comes back beside what is there."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.errors import ArtifactError
from registry.settings import load_settings
from tasks.backup import config_part
from tasks.backup.components import Target
from tasks.backup.config_part import ConfigPart
from tests.unit.tasks.backup.shelf import Shelf, taken

SECRETS = ("hunter2", "s3cr3t", "0ld-one", "in-a-url", "w0rd", "by-the-environment")
TEXT = """# modelkeep of the box in the cellar
# password = "0ld-one"   # until March
redis_url = "redis://app:in-a-url@cache:6379/0"   # the cache

[[databases]]
name = "app"
url = "mysql+pymysql://app@db/app"
password = "hunter2"

[[databases]]
name = "other"
url = "postgresql+psycopg://app:s3cr3t@db/other"

[[files]]
name = "uploads"
path = "up"
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setattr(config_part, "system_packages", lambda: b"zstd 1.5\n")
    monkeypatch.setattr(config_part, "installed", lambda: b"SQLAlchemy==2.0.44\n")
    monkeypatch.setenv("MODELKEEP_API_KEY", "w0rd")
    monkeypatch.setenv("MODELKEEP_DATABASES__APP__PASSWORD", "by-the-environment")
    monkeypatch.setenv("MODELKEEP_API_KEY_FILE", "/etc/key")
    monkeypatch.delenv("MODELKEEP_CONFIG", raising=False)
    (tmp_path / "modelkeep.toml").write_text(TEXT)
    settings = load_settings(environ={"MODELKEEP_HOME": str(tmp_path / "home")}, cwd=tmp_path)
    return taken(ConfigPart(settings))


def test_nothing_of_it_holds_a_secret(shelf: Shelf) -> None:
    everything = b"".join(shelf.objects.values()) + "".join(shelf.lines).encode() + str(shelf.record).encode()
    assert [one for one in SECRETS if one.encode() in everything] == []
    assert b"/etc/key" in everything, "the name of a file is no secret"


def test_it_says_which_secrets_have_to_be_filled_in(shelf: Shelf) -> None:
    assert shelf.record.facts["secrets"] == [
        "redis_url", "databases.app.password", "databases.other.url", "MODELKEEP_API_KEY",
        "MODELKEEP_DATABASES__APP__PASSWORD",
    ]  # fmt: skip


def test_the_file_that_is_kept_is_still_the_same_configuration(shelf: Shelf, tmp_path: Path) -> None:
    config_part.restore(shelf, Target(path=tmp_path / "back"))
    kept, was = tomllib.loads((tmp_path / "back" / "modelkeep.toml").read_text()), tomllib.loads(TEXT)
    assert kept["files"] == was["files"]
    assert kept["databases"][0] == {**was["databases"][0], "password": "***"}
    assert "# modelkeep of the box in the cellar" in (tmp_path / "back" / "modelkeep.toml").read_text()
    names = sorted(path.name for path in (tmp_path / "back").iterdir())
    assert names == sorted(shelf.record.facts["files"])
    assert {"prefect.yaml", "pip-freeze.txt", "system-packages.txt", "settings.json", "environment.json"} < set(names)
    assert "sqlalchemy==" in (tmp_path / "back" / "pip-freeze.txt").read_text().lower()
    keys = {row["key"] for row in json.loads((tmp_path / "back" / "settings.json").read_text())}
    assert {"home", "databases.app.url"} <= keys


def test_it_is_verified(shelf: Shelf, tmp_path: Path) -> None:
    found = config_part.verify(shelf, tmp_path)
    assert found.differences == ()
    assert found.checked["files"] == 6


def test_a_live_file_is_never_overwritten_without_force(shelf: Shelf, tmp_path: Path) -> None:
    live = tmp_path / "modelkeep.toml"
    done = config_part.restore(shelf, Target(path=tmp_path))
    assert live.read_text() == TEXT
    assert done["beside"] == ["modelkeep.toml.restored"]
    assert (tmp_path / "modelkeep.toml.restored").read_text() != TEXT
    again = config_part.restore(shelf, Target(path=tmp_path))
    assert again["beside"] == done["beside"], "what came back before is the same and is left"
    config_part.restore(shelf, Target(path=tmp_path, force=True))
    assert "hunter2" not in live.read_text()


def test_a_link_in_its_place_is_not_written_through(shelf: Shelf, tmp_path: Path) -> None:
    outside, back = tmp_path / "outside", tmp_path / "back"
    outside.write_text("precious")
    back.mkdir()
    (back / "modelkeep.toml").symlink_to(outside)
    config_part.restore(shelf, Target(path=back, force=True))
    assert outside.read_text() == "precious"
    assert not (back / "modelkeep.toml").is_symlink()


DAMAGES: dict[str, Callable[[Shelf], None]] = {
    "a flipped bit": lambda shelf: shelf.flip("modelkeep.toml"),
    "other content": lambda shelf: shelf.rewrite("modelkeep.toml", b"home = 1\n"),
    "a file less": lambda shelf: shelf.lines.pop() and None,
    "a missing object": lambda shelf: shelf.objects.clear(),
    "another hash": lambda shelf: shelf.change(files={}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backup_is_never_called_verified(damage: str, shelf: Shelf, tmp_path: Path) -> None:
    DAMAGES[damage](shelf)
    assert config_part.verify(shelf, tmp_path).differences
    with pytest.raises(ArtifactError):
        config_part.restore(shelf, Target(path=tmp_path / "back"))
    assert not list((tmp_path / "back").glob("*"))


def test_the_packages_of_python_and_of_the_system_are_listed_where_it_has_them() -> None:
    assert b"sqlalchemy==2.0" in config_part.installed().lower()
    found = config_part.system_packages()
    assert found is None or all(len(line.split()) == 2 for line in found.splitlines())
