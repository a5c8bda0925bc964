"""What can be asked for, and what a word of it comes to."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from registry.errors import SettingsError, UsageError
from registry.settings import Settings
from tasks.backup import kinds
from tasks.backup.components import Sink
from tasks.backup.kinds import ALL, DAILY, parts, wanted
from tasks.backup.manifest import ManifestError


class _Part:
    kind = "fake"

    def __init__(self, name: str) -> None:
        self.name = name

    def capture(self, sink: Sink) -> Any:
        raise AssertionError("nobody captures here")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Two databases and a folder; no vectors, no queues."""
    there = {
        "registry": ["registry"],
        "models": ["models"],
        "database": ["database:app", "database:log"],
        "vectors": [],
        "queues": [],
        "files": ["files:uploads"],
        "config": ["config"],
    }
    for name, found in there.items():
        module: Any = ModuleType(f"made_up_{name}")
        module.parts = lambda _settings, found=found: [_Part(one) for one in found]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(kinds, "GROUPS", {name: (f"made_up_{name}",) for name in there})
    return Settings(home=tmp_path)


def _names(settings: Settings, *names: str) -> list[str]:
    return [part.name for part in parts(settings, names)]


def test_all_is_what_is_configured_in_the_order_of_a_backup(settings: Settings) -> None:
    assert _names(settings, ALL) == [
        *("registry", "models", "database:app", "database:log", "files:uploads", "config"),
    ]


def test_daily_is_registry_models_and_the_databases(settings: Settings) -> None:
    assert _names(settings, DAILY) == ["registry", "models", "database:app", "database:log"]


def test_one_of_several_can_be_named_and_the_order_is_not_that_of_the_names(settings: Settings) -> None:
    assert _names(settings, "files", "database:log", "registry") == ["registry", "database:log", "files:uploads"]


def test_what_is_named_twice_is_backed_up_once(settings: Settings) -> None:
    assert _names(settings, "database", "database:app", ALL).count("database:app") == 1


@pytest.mark.parametrize("name", ["vectors", "queues", "database:nobody", "files:other"])
def test_what_is_named_and_not_configured_is_an_error(settings: Settings, name: str) -> None:
    with pytest.raises(UsageError, match=name):
        parts(settings, (ALL, name))


@pytest.mark.parametrize("text", ["", " , ", "everything", "registry,modells", "database;models"])
def test_a_wrong_word_is_told_with_the_right_ones(text: str) -> None:
    with pytest.raises(UsageError, match="registry, models, database"):
        wanted(text)


def test_words_are_taken_once_each() -> None:
    assert wanted("models, registry,models,database:app,daily") == ("models", "registry", "database:app", "daily")


def test_a_part_that_cannot_even_begin_is_not_left_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_settings: Settings) -> list[Any]:
        raise SettingsError("password_file cannot be read")

    monkeypatch.setattr(sys.modules["made_up_database"], "parts", broken)
    found = parts(settings, (ALL,))
    [unready] = [part for part in found if part.name == "database"]
    with pytest.raises(SettingsError, match="password_file"):
        unready.capture(None)  # type: ignore[arg-type]


def test_a_kind_of_a_later_release_is_told() -> None:
    with pytest.raises(ManifestError, match="tape"):
        kinds.kind("tape")
