"""A fresh registry and a fresh store for each test that asks; the schema is made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.database import Database
from registry.store import DirectoryStore
from tests.unit.registry import kit


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty registry, to be copied."""
    folder = tmp_path_factory.mktemp("template")
    kit.prepared(folder).dispose()
    return folder / "registry.db"


@pytest.fixture
def database(tmp_path: Path, template: Path) -> Iterator[Database]:
    opened = kit.prepared(tmp_path, template)
    yield opened
    opened.dispose()


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "artifacts")
