"""A registry of three models for the tests of what a server has in memory; a module that needs another one has its own fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.database import Database
from tests.unit.registry import kit
from tests.unit.serving.boxes import TWO, Run, Test, run_in
from tests.unit.serving.rounds import three_models


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def database(tmp_path: Path, template: Path) -> Iterator[Database]:
    made = kit.prepared(tmp_path, template)
    yield made
    made.dispose()


@pytest.fixture
def run(database: Database, tmp_path: Path, template: Path) -> Run:
    def running(test: Test, models: dict[str, Any] | None = None, **settings: Any) -> None:
        run_in(database, tmp_path, template, test, TWO if models is None else models, **settings)

    return running
