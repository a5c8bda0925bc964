"""Backups on real disks: full, read-only, and writers killed at every step; nothing half stays, and the next run is good."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.errors import StorageError
from tasks.backup.places import INCOMING, DirectoryPlace
from tasks.backup.repository import Repository
from tests.backup_content import FIRST, SECOND, back_up, content, restored

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def mounted(tmp_path: Path, program: Callable[[str], Path]) -> Iterator[Callable[[str], Path]]:
    """`mounted("size=1m")` is a file system in memory of that size. Skipped, and counted, where that is not allowed."""
    mount, umount = program("mount"), program("umount")
    places: list[Path] = []

    def make(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        done = subprocess.run(
            [mount, "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, timeout=30, check=False
        )
        if done.returncode != 0:
            pytest.skip("for want of: leave to mount a small file system")
        places.append(place)
        return place

    yield make
    for place in places:
        subprocess.run([umount, "--lazy", place], check=True, timeout=30)


def remount(program: Callable[[str], Path], place: Path, options: str) -> None:
    subprocess.run([program("mount"), "-o", f"remount,{options}", place], check=True, timeout=30)


def left(place: Path) -> list[Path]:
    return sorted((place / INCOMING).glob("*")) if (place / INCOMING).is_dir() else []


@pytest.mark.parametrize("full_after", [0, 1, 3, 5], ids=lambda files: f"after {files} files")
def test_a_full_disk_is_told_with_the_remedy_and_leaves_no_half_file(
    full_after: int, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=2m")
    place = DirectoryPlace(disk / "backups")
    ballast = disk / "ballast"
    stored, lock = 0, threading.Lock()
    really = place.put

    def put(name: str, data: bytes, **options: object) -> None:
        nonlocal stored
        with lock:
            if stored == full_after:
                with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
            stored += 1
        really(name, data, **options)  # type: ignore[arg-type]

    place.put = put  # type: ignore[method-assign]
    with pytest.raises(StorageError, match=r"disk is full.*free some space"):
        back_up(Repository([place]), FIRST, content())
    assert left(disk / "backups") == []
    ballast.unlink()
    fresh = Repository([DirectoryPlace(disk / "backups")])
    assert fresh.manifests() == []
    back_up(fresh, SECOND, content())
    assert restored(fresh, SECOND) == content()


def test_a_read_only_disk_is_told_and_what_is_on_it_can_be_read(
    mounted: Callable[[str], Path], program: Callable[[str], Path], tmp_path: Path
) -> None:
    disk = mounted("size=4m")
    repository = Repository([DirectoryPlace(disk / "backups")])
    back_up(repository, FIRST, content())
    remount(program, disk, "ro")
    fresh = Repository([DirectoryPlace(disk / "backups")])
    with pytest.raises(StorageError, match="mounted read-only"):
        back_up(fresh, SECOND, content(2))
    assert restored(Repository([DirectoryPlace(disk / "backups")]), FIRST) == content()
    both = Repository([DirectoryPlace(disk / "backups"), DirectoryPlace(tmp_path / "other")])
    back_up(both, SECOND, content(2))
    assert list(both.down) == [0]
    assert restored(Repository([DirectoryPlace(tmp_path / "other")]), SECOND) == content(2)
    remount(program, disk, "rw")
    copied = Repository([DirectoryPlace(disk / "backups"), DirectoryPlace(tmp_path / "other")]).copy_missing()
    assert copied.copied == {FIRST: (str(tmp_path / "other"),), SECOND: (str(disk / "backups"),)}
    assert restored(Repository([DirectoryPlace(disk / "backups")]), SECOND) == content(2)


def test_a_file_where_a_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "backups").write_text("no folder")
    with pytest.raises(StorageError, match="could not be written"):
        back_up(Repository([DirectoryPlace(tmp_path / "backups")]), FIRST, content())


# Every step at which a writer can die: before and after each file is renamed into its place, and in the middle of writing it.
KILLED = """
import os, signal, sys
from pathlib import Path
from tasks.backup import places
from tasks.backup.repository import Repository
from tests.backup_content import FIRST, back_up, content

step, moment = int(sys.argv[2]), sys.argv[3]
count = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

real = places.DirectoryPlace.put

def put(self, name, data, **options):
    global count
    count += 1
    if count != step:
        return real(self, name, data, **options)
    if moment == "before":
        die()
    if moment == "middle":
        (self.folder / places.INCOMING).mkdir(parents=True, exist_ok=True)
        (self.folder / places.INCOMING / "0123.tmp").write_bytes(data[: len(data) // 2])
        die()
    real(self, name, data, **options)
    die()

places.DirectoryPlace.put = put
back_up(Repository([places.DirectoryPlace(Path(sys.argv[1]))]), FIRST, content())
print("done", count)
"""
STEPS = [(step, moment) for step in range(1, 8) for moment in ("before", "middle", "after")]


@pytest.mark.parametrize(
    ("step", "moment"),
    [
        pytest.param(
            step, moment, id=f"{moment} file {step}", marks=() if (step + number) % 5 == 0 else pytest.mark.long
        )
        for number, (step, moment) in enumerate(STEPS)
    ],
)
def test_a_writer_killed_at_any_step_leaves_no_backup_or_a_whole_one_and_the_next_is_good(
    step: int, moment: str, tmp_path: Path
) -> None:
    folder = tmp_path / "backups"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(step), moment],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    repository = Repository([DirectoryPlace(folder)])
    scan = repository.scan()
    assert not scan.broken
    for record in scan.manifests:
        assert restored(repository, record.backup_id) == content()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("objects/*/*")}
    back_up(repository, SECOND, content())
    assert restored(repository, SECOND) == content()
    for path, written in before.items():  # what the dead one had brought there was right, and was not written again
        assert path.stat().st_mtime_ns == written
    leftovers = left(folder)
    assert leftovers or moment != "middle"  # otherwise as the other threads of the dead one had it
    assert DirectoryPlace(folder).sweep(older_than_seconds=3600) == 0
    assert DirectoryPlace(folder).sweep(older_than_seconds=-1) == len(leftovers)
    assert left(folder) == []
