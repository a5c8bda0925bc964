"""A version whose model is loaded, and which cannot be made."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.database import Database
from serving.compute.onnx_runtime import OnnxRuntime
from serving.loaded import loading
from tests.unit.registry import kit
from tests.unit.registry.kit import MODEL
from tests.unit.serving.rounds import following, three_versions


@pytest.fixture
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_versions(tmp_path_factory.mktemp("three"), "1")


@pytest.fixture
def database(tmp_path: Path, template: Path) -> Iterator[Database]:
    made = kit.prepared(tmp_path, template)
    yield made
    made.dispose()


def test_its_model_is_closed_and_it_is_tried_again(
    database: Database, tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each try would leave a model in memory that nobody knows of."""
    closed: list[Any] = []
    close = OnnxRuntime.close

    def told(runtime: OnnxRuntime) -> None:
        closed.append(runtime)
        close(runtime)

    def none_can_be_made(*_: Any) -> Any:
        def make(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError("can't start new thread")

        return make

    async def scenario() -> None:
        monkeypatch.setattr(OnnxRuntime, "close", told)
        with monkeypatch.context() as patched:
            patched.setattr(loading, "engine_of", none_can_be_made)
            async with following(database, tmp_path, template) as reconciler:
                assert not reconciler.serving.loaded and len(closed) == 1
                patched.undo()
                await reconciler.again()
                assert (MODEL, "1") in reconciler.serving.loaded and len(closed) == 1

    asyncio.run(scenario())
