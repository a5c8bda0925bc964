"""Small and read-only file systems to run out of."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Mount = Callable[[str], Path]


@pytest.fixture
def mounted(tmp_path: Path, program: Callable[[str], Path]) -> Iterator[Mount]:
    """`mounted("size=1m")` is a fresh file system of that size in memory. Skipped, and counted, where that is not allowed."""
    mount, umount = program("mount"), program("umount")
    places: list[Path] = []

    def make(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        done = subprocess.run(
            [mount, "-t", "tmpfs", "-o", options, "tmpfs", place],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(
                f"for want of: leave to mount a small file system ({'root' if os.getuid() else 'CAP_SYS_ADMIN'})"
            )
        places.append(place)
        return place

    yield make
    for place in places:
        subprocess.run([umount, "--lazy", place], check=True, timeout=30)


@pytest.fixture
def read_only(program: Callable[[str], Path]) -> Callable[[Path], None]:
    """Makes a mounted file system read-only."""
    mount = program("mount")

    def remount(place: Path) -> None:
        subprocess.run([mount, "-o", "remount,ro", place], check=True, timeout=30)

    return remount
