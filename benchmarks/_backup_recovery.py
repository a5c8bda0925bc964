"""From a backup to everything that it was taken of, on an empty home: seconds by component and size, with all comparisons."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._backup_home import Home, random_file, room, sqlite_file, weights_file
from benchmarks.backup_database import fill_tables
from registry.errors import NotFoundError
from tasks.backup import recovery, throwaway
from tasks.backup.mariadb_access import access

COUNT = 10
EVENTS_A_MB = 200
"""The registry is smaller than the rest, as it is in life: about a sixth."""
LARGE_FILE, SMALL_FILE = 1_000_000, 10_000


def measure(folder: Path, sizes_mb: Sequence[int], rounds: int) -> dict[str, Any]:
    """{"rows": [{"component", "size_bytes", "seconds": [one a round]}], "absent": {component: why}}."""
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        server: throwaway.Running | None = None
        try:
            server = stack.enter_context(throwaway.mariadb(folder, options=["--innodb-buffer-pool-size=512M"]))
        except NotFoundError as error:
            absent["database:mariadb"] = str(error)
        for mb in sizes_mb:
            room(folder, 20 * mb * 1_000_000)
            rows += _size(folder / f"{mb}", mb, rounds, server)
            shutil.rmtree(folder / f"{mb}")
    return {"rows": rows, "absent": absent}


def _size(folder: Path, mb: int, rounds: int, server: throwaway.Running | None) -> list[dict[str, Any]]:
    location = folder / "backups"
    origin = None if server is None else server.database_url(f"from{mb}")
    home = Home(folder / "live", mariadb_url=origin, files=True)
    _fill(home, location, mb, server)
    taken = home.back_up(location, "registry", "models", "database", "files")
    found = {
        one.name: {"component": one.name, "mb": mb, "size_bytes": one.size_bytes, "seconds": []}
        for one in taken.components
    }
    whole: dict[str, Any] = {
        "component": "all of them, with the plan", "mb": mb, "seconds": [],
        "size_bytes": sum(one.size_bytes for one in taken.components),
    }  # fmt: skip
    for number in range(rounds):
        # Another home, other paths, another database: empty, as on a new machine.
        into = None if server is None else server.database_url(f"into{mb}")
        back = Home(folder / f"back{number}", mariadb_url=into, files=True)
        request = recovery.Request(source=taken.backup_id)
        began = time.perf_counter()
        prepared = recovery.prepare(back.settings(location), request, environ={})
        outcome = recovery.carry_out(prepared, request)
        whole["seconds"].append(round(time.perf_counter() - began, 3))
        if outcome.state != "recovered":
            raise RuntimeError(f"the recovery is {outcome.state}: {json.dumps(outcome.failed)}")
        for name, seconds in outcome.seconds.items():
            found[name]["seconds"].append(seconds)
        shutil.rmtree(back.folder)
        _drop(server, f"into{mb}")
    _drop(server, f"from{mb}")
    return [*found.values(), whole]


def _fill(home: Home, location: Path, mb: int, server: throwaway.Running | None) -> None:
    size = mb * 1_000_000
    versions = []
    for number in range(COUNT):
        path = home.folder / f"{number}.onnx"
        weights_file(path, size // COUNT, number)
        versions.append(home.store().put(path))
        path.unlink()
    home.registry(location, versions, max(100, EVENTS_A_MB * mb))
    sqlite_file(home.database, size)
    for number in range(size // 2 // LARGE_FILE):
        random_file(home.uploads / "large" / f"{number}.bin", LARGE_FILE)
    for number in range(size // 2 // SMALL_FILE):
        random_file(home.uploads / f"{number % 100:02}" / f"{number}.bin", SMALL_FILE)
    if server is not None:
        with contextlib.closing(access(server.url).connect(database=False)) as connection:
            fill_tables(connection, f"from{mb}", mb * 3 // 2 or 1)


def _drop(server: throwaway.Running | None, name: str) -> None:
    if server is None:
        return
    with contextlib.closing(access(server.url).connect(database=False)) as connection, connection.cursor() as cursor:
        cursor.execute(f"DROP DATABASE IF EXISTS {name}")
