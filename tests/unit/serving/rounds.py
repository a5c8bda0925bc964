"""Servers that follow a registry of three small versions, in this process and without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from registry import versions
from registry.database import Database
from registry.schema import Version
from registry.settings import Settings
from registry.store import DirectoryStore
from serving.reconcile import Reconciler
from serving.state import Serving
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL

NUMBERS = ("1", "2", "3")


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


@asynccontextmanager
async def following(database: Database, home: Path, template: Path) -> AsyncIterator[Reconciler]:
    """A reconciler that has started: it serves what the registry wants. `template` is what `three_versions` made."""
    reconciler = Reconciler(
        Serving(environment=ENVIRONMENT, replica_id="r1", boot_id="boot"), Settings(home=home, profile="cpu"), database,
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
