"""A fresh registry and a fresh store for each test that asks; the schema is made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.database import Database
from registry.store import DirectoryStore
from tests.registry_servers import Server
from tests.unit.registry import kit


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty registry, to be copied."""
    folder = tmp_path_factory.mktemp("template")
    kit.prepared(folder).dispose()
    return folder / "registry.db"


@pytest.fixture(scope="session")
def engine(
    tmp_path_factory: pytest.TempPathFactory, template: Path, registry_server: Server | None
) -> Iterator[Database]:
    """One engine for all tests, since what costs is that each compiles every statement anew."""
    folder = tmp_path_factory.mktemp("registry")
    if registry_server is None:
        opened = kit.prepared(folder, template)
    else:
        opened = Database(registry_server.create(), anchors=folder / "audit.anchors")
        opened.prepare()
    yield opened
    opened.dispose()


@pytest.fixture
def database(engine: Database, template: Path) -> Database:
    """An empty registry, on the database that --registry-database names."""
    kit.reset(engine, template)
    return engine


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "artifacts")
