"""A home with a registry that was lived in, and real artifacts in its store: what backups of the state are taken of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from registry import removal, states, versions
from registry.connect import open_database
from registry.database import Database
from registry.settings import Settings
from registry.store import DirectoryStore
from tests.unit.registry import kit


@dataclass
class House:
    home: Path
    settings: Settings
    database: Database
    store: DirectoryStore

    def register(self, version: str, scale: float, *, model: str = kit.MODEL, external: str | None = None) -> str:
        """A version that has passed its validation. Returns its digest."""
        folder = self.home / "in" / f"{model}-{version}"
        path = kit.onnx_file(folder / "model.onnx", scale, external=external)
        inputs = np.arange(12, dtype=np.float32).reshape(3, 4)
        outputs = inputs @ np.full((4, 2), scale, dtype=np.float32)
        golden = kit.golden_file(
            self.home / f"golden-{model}-{version}.npz", **{"input.x": inputs, "output.y": outputs}
        )
        done = versions.register(
            self.database,
            self.store,
            folder if external else path,
            name=model,
            version=version,
            golden=golden,
            max_bytes=1 << 30,
        )
        with self.database.write() as transaction:
            row = versions.get(transaction.session, model, version)
            row.validation = {"candidate": {"golden": {"accuracy": 1.0}}}
            states.move_version(transaction, row, "validated", reason="test")
        return done.digest

    def archive(self, version: str, *, model: str = kit.MODEL) -> None:
        with self.database.write() as transaction:
            row = versions.get(transaction.session, model, version)
            states.move_version(transaction, row, "archived", reason="test")

    def delete(self, version: str, *, model: str = kit.MODEL) -> None:
        removal.delete(self.database, self.store, model, version, reason="test")


def house(folder: Path) -> House:
    """Versions 1 and 2 were stable one after the other, 3 is there, `old` is archived; a second model has weights in a file of
    their own."""
    settings = Settings(home=folder)
    database = open_database(settings)
    database.prepare()
    found = House(folder, settings, database, DirectoryStore(Path(settings.artifacts)))
    for number, version in enumerate(("1", "2", "3", "old")):
        found.register(version, number + 1.0)
    found.register("1", 7.0, model="Weights", external="weights.bin")
    kit.stable_by(database, "1", "2")
    found.archive("old")
    return found
