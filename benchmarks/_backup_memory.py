"""How much memory a backup takes by the size of what it backs up. As a program it is the backup that measures itself.

`python -m benchmarks._backup_memory files|sqlite|mariadb SOURCE PLACE` prints one JSON document.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FILES, SQLITE, MARIADB = "files", "sqlite", "mariadb"
KINDS = (FILES, SQLITE, MARIADB)
ROW_BYTES = 4 << 10
"""Three of them in a page of InnoDB; larger ones would get pages of their own, half empty."""
TIMEOUT_SECONDS = 3600


def measure(folder: Path, sizes: Sequence[int], kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """{"rows": [{"kind", "size_bytes", "above_bytes", "seconds" …}], "absent": {kind: why}}, one row for each kind and size."""
    from benchmarks._backup_home import NotMeasuredError, room
    from registry.errors import NotFoundError

    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for size in sizes:
        for kind in kinds:
            here = folder / f"{kind}-{size}"
            try:
                # The source, the backup, and SQLite's private copy; a server's log and undo besides.
                room(folder, 4 * size + 500_000_000 * (kind == MARIADB))
                with _source(kind, here, size) as source:
                    rows.append({"kind": kind, "size_bytes": size, **_measured(kind, source, here / "place")})
            except NotMeasuredError as why:
                absent[f"{kind}, {size / 1e6:,.0f} MB"] = str(why)
            except NotFoundError as error:  # a server that is not installed
                absent[kind] = str(error)
            finally:
                subprocess.run(["rm", "-rf", here], check=True)
    return {"rows": rows, "absent": absent}


def _measured(kind: str, source: str, place: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks._backup_memory", kind, source, str(place)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_SECONDS)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextlib.contextmanager
def _source(kind: str, folder: Path, size: int) -> Iterator[str]:
    """A folder, a file or a database of `size` random bytes: nothing of it can be compressed away, and it has no holes."""
    from benchmarks._backup_home import random_file

    folder.mkdir(parents=True)
    if kind == FILES:
        random_file(folder / "files" / "one.bin", size)
        yield str(folder / "files")
    elif kind == SQLITE:
        _random_sqlite(folder / "app.db", size)
        yield str(folder / "app.db")
    else:
        with _random_mariadb(folder, size) as url:
            yield url


def _random_sqlite(path: Path, size: int) -> None:
    import sqlite3

    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA synchronous=OFF")
        database.execute("CREATE TABLE blobs (id INTEGER PRIMARY KEY, body BLOB)")
        count = max(1, size // ROW_BYTES)
        for start in range(0, count, 10_000):
            rows = [(min(10_000, count - start),)]
            database.executemany(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
                f"INSERT INTO blobs (body) SELECT randomblob({ROW_BYTES}) FROM n",
                rows,
            )
            database.commit()


@contextlib.contextmanager
def _random_mariadb(folder: Path, size: int) -> Iterator[str]:
    from tasks.backup import throwaway
    from tasks.backup.mariadb_access import access

    with throwaway.mariadb(folder, options=["--innodb-buffer-pool-size=256M"]) as server:
        url = server.database_url("app")
        with contextlib.closing(access(url).connect(database=False)) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE DATABASE app")
            cursor.execute("CREATE TABLE app.blobs (id INT PRIMARY KEY AUTO_INCREMENT, body MEDIUMBLOB)")
            body = "concat(" + ", ".join(["random_bytes(1024)"] * (ROW_BYTES // 1024)) + ")"
            count = max(1, size // ROW_BYTES)
            for start in range(0, count, 10_000):
                cursor.execute(
                    f"INSERT INTO app.blobs (body) SELECT {body} FROM app.seq_1_to_{min(10_000, count - start)}"
                )
                connection.commit()
        yield url


def status_bytes(field: str) -> int:
    """A line of /proc/self/status that is in kB: VmRSS, VmHWM. Raises LookupError."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise LookupError(f"/proc/self/status has no {field}")


def peaks(rss_before: int) -> dict[str, int]:
    """What this process has taken since, at its peak. By VmHWM, which begins with the program: ru_maxrss begins with whoever started
    it, and is shown beside it.
    """
    return {
        "above_bytes": status_bytes("VmHWM") - rss_before,
        "after_import_bytes": rss_before,
        "vm_hwm_bytes": status_bytes("VmHWM"),
        "ru_maxrss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "children_maxrss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10,
    }


def main() -> None:
    kind, origin, place = sys.argv[1:]
    from registry import clock
    from tasks.backup import folders, mariadb, run, sqlite
    from tasks.backup.places import open_place
    from tasks.backup.repository import Repository, new_backup_id

    parts: dict[str, Any] = {
        FILES: lambda: folders.FilesPart("files:one", Path(origin)),
        SQLITE: lambda: sqlite.Part("database:app", f"sqlite:///{origin}", spool=Path(place).parent),
        MARIADB: lambda: mariadb.Part("database:app", origin),
    }
    assert run.back_up  # what `modelkeep backup` imports is imported
    before = status_bytes("VmRSS")
    repository = Repository([open_place(place)], scratch=Path(place).parent / "scratch")
    began = time.perf_counter()
    with repository.writer(new_backup_id(clock.now())) as writer:
        part = parts[kind]()
        sink = writer.component(part.name)
        part.capture(sink)
        done = sink.finish()
    seconds = round(time.perf_counter() - began, 3)
    print(json.dumps({"seconds": seconds, "content_bytes": done.size_bytes, **peaks(before)}))


if __name__ == "__main__":
    main()
