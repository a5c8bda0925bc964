"""A disk that is full while an artifact is stored, or laid out for a promotion: refused in words, nothing half done, and it works once there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import func, select

from registry import promotions, versions
from registry.database import Database
from registry.errors import StorageError
from registry.schema import Version
from registry.store import DirectoryStore
from tasks import promotion
from tasks.lease import Keeper
from tasks.promoting import Promoting
from tests.e2e.harness import ROOT
from tests.unit.registry import kit

Mount = Callable[[str], Path]
pytestmark = pytest.mark.sqlite
WEIGHTS_BYTES = 400_000


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    return ballast


def in_two_files(folder: Path) -> Path:
    """An ONNX model with its weights beside it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir()
    weights = numpy_helper.from_array(np.zeros((2, WEIGHTS_BYTES // 8), dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WEIGHTS_BYTES // 8])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(folder / "wide.onnx"), save_as_external_data=True, location="wide.bin", size_threshold=0)
    return folder / "wide.onnx"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """A registry on a disk of its own, with room."""
    (tmp_path / "registry").mkdir()
    made = kit.prepared(tmp_path / "registry")
    yield made
    made.dispose()


def test_register_on_a_full_disk_leaves_no_version_and_no_file_and_works_when_there_is_room(
    mounted: Mount, tmp_path: Path, database: Database
) -> None:
    home, model = mounted("size=8m"), in_two_files(tmp_path / "wide")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MODELKEEP_")},
        "PYTHONPATH": str(ROOT), "MODELKEEP_HOME": str(home), "MODELKEEP_PROFILE": "cpu", "MODELKEEP_DATABASE_URL": str(database.url),
    }  # fmt: skip

    def register() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "modelkeep", "register", str(model), "--name", "wide"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def stored() -> list[Path]:
        return [path for path in home.rglob("*") if path.is_file() and path.name != "ballast"]

    ballast = fill(home)
    before = kit.last_event(database), stored()
    done = register()
    assert done.returncode == 1, done.stdout
    assert "No space left" in done.stderr and "Traceback" not in done.stderr
    assert (kit.last_event(database), stored()) == before
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Version)) == 0
    ballast.unlink()
    done = register()
    assert done.returncode == 0, done.stderr
    with database.read() as session:
        row = versions.get(session, "wide", "1")
    store = DirectoryStore(home / "artifacts")
    assert all(store.path(file["digest"]) for file in row.files)
    assert kit.verdict(database).holds


def test_a_promotion_whose_disk_is_full_fails_with_the_reason_and_leaves_no_half_file(
    mounted: Mount, tmp_path: Path, database: Database
) -> None:
    """The cache is on another disk than the store, so that the files of a version have to be copied."""
    disk, store = mounted("size=1m"), DirectoryStore(tmp_path / "artifacts")
    versions.register(database, store, in_two_files(tmp_path / "wide"), name=kit.MODEL, version="1", max_bytes=1 << 26)
    fill(disk)
    operation = kit.begin(database, "1")
    work = Promoting(database, store, disk / "cache", operation, Keeper(operation.held))
    with pytest.raises(StorageError, match="No space left") as error:
        promotion.validate(work)
    assert promotion.failed(work, error.value).outcome == "failed"
    assert [path.name for path in disk.rglob("*") if path.is_file()] == ["ballast"]
    with database.read() as session:
        assert promotions.get(session, operation.id).state == "failed"
        assert "free some space" in promotions.story(session, operation.id)[-1]["detail"]
        assert versions.get(session, kit.MODEL, "1").state == "registered"
    assert kit.verdict(database).holds
    (disk / "ballast").unlink()
    again = kit.begin(database, "1")
    report = promotion.validate(Promoting(database, store, disk / "cache", again, Keeper(again.held)))
    assert report.passed, report.summary
