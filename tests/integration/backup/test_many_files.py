"""A folder of very many small files and a huge sparse one, into a real repository: whole, and in memory that does not grow with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MOST_BYTES = 200 << 20
WORK = """
import json, resource, sys
from pathlib import Path
from registry import clock
from tasks.backup import folders
from tasks.backup.components import Target
from tasks.backup.manifest import Component
from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import Repository, new_backup_id
from tasks.backup.source import ComponentSource

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

root, place, back = map(Path, sys.argv[1:])
repository = Repository([DirectoryPlace(place)])
before, now = peak(), clock.text(clock.now())
with repository.writer(new_backup_id(clock.now())) as writer:
    sink = writer.component("files:many")
    captured = folders.FilesPart("files:many", root).capture(sink)
    done = sink.finish()
record = Component("files:many", "files", "complete", now, now, done.entries, done.size_bytes, done.stored_bytes, done.new_bytes,
                   done.index, captured.facts, captured.snapshot, done.warnings)
source = ComponentSource(repository, record)
found = folders.verify(source, back)
print(json.dumps({"grown": peak() - before, "differences": found.differences, "checked": found.checked, "stored": done.stored_bytes,
                  "objects": sum(1 for one in place.rglob("*") if one.is_file()), "warnings": done.warnings}))
"""


def filled(root: Path, count: int) -> None:
    for number in range(count):
        folder = root / f"{number % 97:02d}"
        if number < 97:
            folder.mkdir(parents=True)
        (folder / f"{number:06d}.json").write_bytes(b'{"n": %d}' % number * (1 + number % 40))
    with (root / "sparse").open("wb") as file:
        file.seek(10 << 30)
        file.write(b"end")


def carried(tmp_path: Path, count: int) -> dict[str, Any]:
    filled(tmp_path / "root", count)
    places = [tmp_path / name for name in ("root", "place", "back")]
    done = subprocess.run(
        [sys.executable, "-P", "-c", WORK, *places], check=True, stdout=subprocess.PIPE, timeout=3000,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_very_many_small_files_and_a_sparse_one_of_10_gb(count: int, tmp_path: Path) -> None:
    found = carried(tmp_path, count)
    assert found["differences"] == []
    assert found["checked"]["file"] == count + 1
    assert found["warnings"] == []
    assert found["stored"] < 100 << 20, "holes cost nothing"
    assert found["objects"] < 200 + count / 50, "small files are stored together"
    assert found["grown"] < MOST_BYTES
