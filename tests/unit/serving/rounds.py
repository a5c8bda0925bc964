"""Servers that follow a registry of three small versions, or of three models, in this process and without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from registry import versions
from registry.database import Database
from registry.schema import Version
from registry.settings import Settings
from registry.store import DirectoryStore
from serving.follow.reconcile import Reconciler
from serving.state import Serving
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL

NUMBERS = ("1", "2", "3")
MODELS = ("a", "b", "c")


def three_versions(folder: Path, *stable: str) -> Path:
    """A registry of versions 1, 2 and 3, validated and with their files; `stable` were stable in that order. Its database file."""
    made = kit.prepared(folder)
    for number in NUMBERS:
        path = kit.onnx_file(folder / f"{number}.onnx", scale=float(number))
        versions.register(
            made, DirectoryStore(folder / "artifacts"), path, name=MODEL, version=number, max_bytes=1 << 20
        )
        with made.write(actor="test") as transaction:
            transaction.session.get_one(Version, (MODEL, number)).state = "validated"
            transaction.record("version.validated", f"version:{MODEL}/{number}")
    kit.stable_by(made, *stable)
    made.dispose()
    return folder / "registry.db"


def three_models(folder: Path) -> Path:
    """A registry of the models a, b and c, with a stable version 1 and a validated version 2 each. Its database file."""
    made = kit.prepared(folder)
    for place, model in enumerate(MODELS, start=1):
        for version in ("1", "2"):
            path = kit.onnx_file(folder / f"{model}{version}.onnx", scale=place * 10.0 + float(version))
            versions.register(
                made, DirectoryStore(folder / "artifacts"), path, name=model, version=version, max_bytes=1 << 20
            )
            with made.write(actor="test") as transaction:
                transaction.session.get_one(Version, (model, version)).state = "validated"
                transaction.record("version.validated", f"version:{model}/{version}")
        stable(made, model, "1")
    made.dispose()
    return folder / "registry.db"


def stable(database: Database, model: str, version: str) -> None:
    """Promote a version, through canary and soak where there is one before it."""
    operation = kit.begin(database, version, model=model)
    if operation.stable is not None:
        kit.canary(database, operation)
    kit.promote(database, operation)
    kit.end(database, operation, "promoted")


@asynccontextmanager
async def following(database: Database, home: Path, template: Path, **settings: Any) -> AsyncIterator[Reconciler]:
    """A reconciler that has started: it serves what the registry wants. `template` is what `three_versions` made."""
    reconciler = Reconciler(
        Serving(environment=ENVIRONMENT, replica_id="r1", boot_id="boot"),
        Settings(home=home, profile="cpu", **settings), database,
        DirectoryStore(template.parent / "artifacts"), state_folder=home, address="http://127.0.0.1:1",
    )  # fmt: skip
    await reconciler.start()
    try:
        yield reconciler
    finally:
        for version in reconciler.serving.loaded.values():
            version.close()
        reconciler.caretaker.end()
        await reconciler.stop()
