"""Empty databases of the kind that --registry-database names, and small and read-only file systems to run out of."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.database import Database
from tests.registry_servers import Server
from tests.unit.registry import kit

Mount = Callable[[str], Path]


@pytest.fixture
def blank(tmp_path: Path, registry_server: Server | None) -> Iterator[Callable[[], Database]]:
    """`blank()` is a database without any tables, another one at each call."""
    made: list[Database] = []

    def make() -> Database:
        folder = tmp_path / f"blank{len(made)}"
        folder.mkdir()
        url = f"sqlite:///{folder / 'registry.db'}" if registry_server is None else registry_server.create()
        made.append(Database(url, anchors=folder / "audit.anchors"))
        return made[-1]

    yield make
    for database in made:
        database.dispose()


@pytest.fixture(scope="session")
def _shared(
    tmp_path_factory: pytest.TempPathFactory, registry_server: Server | None
) -> Iterator[tuple[Database, Path]]:
    folder, template = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("template")
    kit.prepared(template).dispose()
    if registry_server is None:
        database = kit.prepared(folder, template / "registry.db")
    else:
        database = Database(registry_server.create(), anchors=folder / "audit.anchors")
        database.prepare()
    yield database, template / "registry.db"
    database.dispose()


@pytest.fixture
def database(_shared: tuple[Database, Path]) -> Database:
    """An empty registry."""
    kit.reset(*_shared)
    return _shared[0]


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
