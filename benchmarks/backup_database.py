"""A database backed up and brought back, beside `mariadb-dump | zstd -1` and `zstd -d | mariadb`, in turns on one server.

Prints one JSON document. Run by `make bench`, or `python -m benchmarks.backup_database [--mb N] [--turns N] [--levels]`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from registry import clock
from tasks.backup import mariadb, throwaway
from tasks.backup.chain import find
from tasks.backup.components import Target
from tasks.backup.manifest import COMPLETE, Component
from tasks.backup.mariadb_access import access
from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import Repository, new_backup_id
from tasks.backup.source import ComponentSource

MARK = 1.10
DUMP, LOAD = "mariadb-dump | zstd -1", "zstd -d | mariadb"
BACKUP, AGAIN = "modelkeep backup", "modelkeep backup, again, nothing changed"
RECOVER = "modelkeep recover (with all comparisons)"
OPTIONS = ("--single-transaction", "--quick", "--routines", "--triggers", "--events", "--hex-blob")
ROW_BYTES = 600
WORDS = "SELECT seq, concat_ws(' ', md5(seq), md5(seq % 1000), elt(1 + seq % 4, 'open', 'done', 'failed', 'waiting'), seq % 97, "
FILL = (
    WORDS
    + "repeat('some words of a prompt ', 1 + seq % 20), md5(seq + 1)), seq / 7, now() - INTERVAL seq SECOND FROM {database}.seq_1_to_{rows}"
)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def pipe(left: list[str], right: list[str], *, source: Path | None = None, target: Path | None = None) -> None:
    with contextlib.ExitStack() as stack:
        given = stack.enter_context(source.open("rb")) if source else None
        taken = stack.enter_context(target.open("wb")) if target else subprocess.DEVNULL
        first = subprocess.Popen(left, stdin=given, stdout=subprocess.PIPE)
        second = subprocess.Popen(right, stdin=first.stdout, stdout=taken)
        assert first.stdout is not None
        first.stdout.close()
        if (second.wait(), first.wait()) != (0, 0):
            raise SystemExit(f"{left[0]} | {right[0]} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=120, help="size of the dump, about")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--levels", action="store_true", help="also sizes and times of other ways to compress")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modelkeep-bench-") as name:
        folder = Path(name)
        with throwaway.mariadb(folder, options=["--innodb-buffer-pool-size=512M"]) as server:
            print(json.dumps(measured(server, folder, arguments), indent=1))


def fill_tables(connection: Any, database: str, mb: int) -> None:
    """A new database of three tables of text; their dump has about two thirds of `mb`."""
    rows = mb * 1_000_000 // ROW_BYTES
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {database}")
        for table in ("generations", "users", "requests"):
            cursor.execute(
                f"CREATE TABLE {database}.{table} (id INT PRIMARY KEY, body TEXT, cost DOUBLE, made DATETIME, KEY (made))"
            )
            cursor.execute(f"INSERT INTO {database}.{table} {FILL.format(rows=rows // 3, database=database)}")
    connection.commit()


def measured(server: throwaway.Running, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    url = server.database_url("app")
    connection = access(url).connect(database=False)
    fill_tables(connection, "app", arguments.mb)
    socket, zstd = f"--socket={server.socket}", str(find("zstd"))
    dump = [str(find("mariadb-dump")), "--no-defaults", "-uroot", socket, *OPTIONS, "app"]
    load = [str(find("mariadb")), "--no-defaults", "-uroot", socket, "again"]
    packed = folder / "dump.zst"

    def fresh() -> None:
        with connection.cursor() as cursor:
            cursor.execute("DROP DATABASE IF EXISTS again")
            cursor.execute("CREATE DATABASE again")

    part = mariadb.Part("database:app", url)
    times: dict[str, list[float]] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = source = None

    def plain_backup(_turn: int) -> None:
        seconds, _ = timed(lambda: pipe(dump, [zstd, "-1", "-q"], target=packed))
        times.setdefault(DUMP, []).append(seconds)

    def our_backup(turn: int) -> None:
        nonlocal record, source
        repository = Repository([DirectoryPlace(folder / f"backups{turn}")])
        seconds, (record, source) = timed(lambda: taken(repository, part))
        times.setdefault(BACKUP, []).append(seconds)
        seconds, _ = timed(lambda: taken(repository, part))
        times.setdefault(AGAIN, []).append(seconds)

    def plain_restore(_turn: int) -> None:
        fresh()
        seconds, _ = timed(lambda: pipe([zstd, "-d", "-q", "-c"], load, source=packed))
        times.setdefault(LOAD, []).append(seconds)

    def our_restore(_turn: int) -> None:
        fresh()
        seconds, _ = timed(lambda: mariadb.restore(source, Target(url=server.database_url("again"))))
        times.setdefault(RECOVER, []).append(seconds)

    for pair in ((plain_backup, our_backup), (plain_restore, our_restore)):
        for turn in range(arguments.turns):
            for one in pair if turn % 2 == 0 else reversed(pair):
                one(turn)
    connection.close()
    assert record is not None
    medians = {what: round(statistics.median(one), 3) for what, one in times.items()}
    found: dict[str, Any] = {
        "dump_bytes": record.size_bytes,
        "stored_bytes": record.stored_bytes,
        "zstd_bytes": packed.stat().st_size,
        "seconds": medians,
        "all_seconds": {what: [round(value, 3) for value in one] for what, one in times.items()},
        "backup_ratio": round(medians[BACKUP] / medians[DUMP], 3),
        "restore_ratio": round(medians[RECOVER] / medians[LOAD], 3),
        "mark": MARK,
        "memory_kb_above_start": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
    }
    if arguments.levels:
        found["ways"] = {
            " ".join(way): {
                "seconds": round(timed(lambda way=way: pipe(dump, list(way), target=packed))[0], 3),
                "bytes": packed.stat().st_size,
            }
            for way in ((zstd, "-1", "-q"), (zstd, "-3", "-q"), (zstd, "-9", "-q"), ("gzip", "-6"), ("cat",))
        }
    return found


def taken(repository: Repository, part: mariadb.Part) -> tuple[Component, ComponentSource]:
    """The component as a backup stores it, and the way back to it."""
    moment = clock.text(clock.now())
    with repository.writer(new_backup_id(clock.now())) as writer:
        sink = writer.component(part.name)
        captured = part.capture(sink)
        done = sink.finish()
    record = Component(
        part.name, part.kind, COMPLETE, moment, moment, entries=done.entries, size_bytes=done.size_bytes,
        stored_bytes=done.stored_bytes, new_bytes=done.new_bytes, index=done.index, facts=captured.facts, snapshot=captured.snapshot,
    )  # fmt: skip
    return record, ComponentSource(repository, record)


if __name__ == "__main__":
    main()
