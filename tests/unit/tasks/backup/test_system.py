"""What a manifest says of the machine: what was there, and nothing where nothing could be read."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from registry.settings import Settings
from tasks.backup import system


class _NVMLError(Exception):
    pass


def _nvml(**functions: Any) -> ModuleType:
    made: Any = ModuleType("pynvml")
    made.NVMLError = _NVMLError
    made.nvmlInit = made.nvmlShutdown = lambda: None
    made.nvmlSystemGetDriverVersion = lambda: b"550.1"
    made.nvmlDeviceGetCount = lambda: 1
    made.nvmlDeviceGetHandleByIndex = lambda index: index
    made.nvmlDeviceGetName = lambda _handle: "NVIDIA H200"
    made.nvmlDeviceGetMemoryInfo = lambda _handle: SimpleNamespace(total=141 << 30, used=1 << 30)
    vars(made).update(functions)
    return made


def _fails(*_arguments: Any) -> Any:
    raise _NVMLError("driver not loaded")


def test_every_gpu_is_named_with_its_memory_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _nvml())
    assert system.gpus() == [
        {"name": "NVIDIA H200", "memory_total_bytes": 141 << 30, "memory_used_bytes": 1 << 30, "driver": "550.1"}
    ]


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetMemoryInfo", "nvmlSystemGetDriverVersion"])
def test_without_a_driver_that_answers_nothing_is_said_of_gpus(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _nvml(**{function: _fails}))
    assert system.gpus() is None


def test_disks_are_those_of_home_artifacts_and_folders_of_backups(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", backups=[str(tmp_path / "not" / "there"), "s3://bucket/x"])
    found = system.disks(settings)
    assert list(found) == [
        str(tmp_path / "home"),
        str(tmp_path / "home" / "artifacts"),
        str(tmp_path / "not" / "there"),
    ]
    assert all(0 < one["free_bytes"] <= one["total_bytes"] for one in found.values())


def test_settings_are_shown_without_their_secrets(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, database_url="postgresql+psycopg://keeper:geheim@db/registry")
    shown = system.shown_settings(settings)
    assert shown["database_url"] == "postgresql+psycopg://keeper:***@db/registry"
    assert "geheim" not in str(shown)
