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


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[Database]:
    """One engine for all tests, since what costs is that each compiles every statement anew."""
    opened = kit.prepared(tmp_path_factory.mktemp("registry"), template)
    yield opened
    opened.dispose()


@pytest.fixture
def database(engine: Database, template: Path) -> Database:
    """An empty registry."""
    kit.reset(engine, template)
    return engine


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "artifacts")
