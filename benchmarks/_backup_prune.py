"""Prune in a location of very many backups. As a program it prunes, and measures itself.

`python -m benchmarks._backup_prune LOCATION` prints one JSON document.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMPONENT = "files:bench"
HOURS = 8
"""From one backup to the next."""
SHARED = 10
"""Objects that every backup has; all others are in one backup only, which is the most there is to do."""
OBJECT_BYTES = 200
GRACE_HOURS = 24
TIMEOUT_SECONDS = 3600


def measure(folder: Path, backups: int, objects: int) -> dict[str, Any]:
    """Seconds of each phase, what it did, and memory."""
    from benchmarks._backup_home import room

    room(folder, 10_000 * objects)
    location = folder / "location"
    began = time.perf_counter()
    made = make(location, backups, objects)
    seconds = round(time.perf_counter() - began, 1)
    command = [sys.executable, "-m", "benchmarks._backup_prune", str(location)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_SECONDS)
    return {"backups": backups, "objects": made, "made_in_seconds": seconds, **json.loads(done.stdout)}


def make(location: Path, backups: int, objects: int) -> int:
    """A location as docs/BACKUP_FORMAT.md describes it, of verified backups, written without waiting for the disk. Returns how many
    objects it has: those that are asked for, and an index for each backup.
    """
    from registry import clock
    from tasks.backup import codec, documents, states
    from tasks.backup.manifest import COMPLETE, SUFFIX, Component, Entry, Manifest, Stream
    from tasks.backup.places import open_place
    from tasks.backup.repository import Repository, new_backup_id

    repository = Repository([open_place(str(location))])
    count = 0

    def put(name: str, data: bytes) -> None:
        path = location / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def stored(plain: bytes) -> Stream:
        nonlocal count
        digest = hashlib.sha256(plain)
        encoded = codec.encode(plain, digest.digest(), None, compress=False)
        put(codec.object_name(encoded.chunk.object), encoded.data)
        count += 1
        return Stream(len(plain), digest.hexdigest(), (encoded.chunk,))

    def file(name: str) -> Entry:
        plain = hashlib.sha512(name.encode()).digest() * (OBJECT_BYTES // 64 + 1)
        return Entry(name, "file", stored(plain[:OBJECT_BYTES]))

    shared = [file(f"shared/{number}") for number in range(SHARED)]
    own = max(1, (objects - SHARED) // backups)
    newest = clock.now() - dt.timedelta(hours=1)
    for number in range(backups):
        at = newest - dt.timedelta(hours=HOURS * (backups - 1 - number))
        moment, backup_id = clock.text(at), new_backup_id(at)
        entries = [*shared, *(file(f"{number}/{which}") for which in range(own))]
        size = OBJECT_BYTES * len(entries)
        index = stored("".join(f"{entry.line()}\n" for entry in entries).encode())
        component = Component(COMPONENT, "files", COMPLETE, moment, moment, len(entries), size, size, size, index)
        record = Manifest(
            backup_id, "of a benchmark", COMPLETE, moment, moment, (COMPONENT,), (component,), sequence=number + 1
        )
        put(f"{backup_id}{SUFFIX}", repository.signed(record).text())
        note = {
            "format": documents.STATE, "format_version": 1, "backup_id": backup_id, "state": states.VERIFIED, "at": moment,
            "host": "bench", "facts": {"components": {COMPONENT: {"outcome": states.VERIFIED}}},
        }  # fmt: skip
        name = f"states/{backup_id}/{at.astimezone(dt.UTC):%Y%m%dT%H%M%S.%fZ}-{states.VERIFIED}.json"
        put(name, documents.text(note, None))
    return count


def main() -> None:
    from benchmarks._backup_memory import peaks, status_bytes
    from registry import clock
    from tasks.backup import prune
    from tasks.backup.places import open_place
    from tasks.backup.repository import Repository
    from tasks.backup.retention import Policy

    location = Path(sys.argv[1])
    before = status_bytes("VmRSS")
    now, grace = clock.now(), dt.timedelta(hours=GRACE_HOURS)
    found: dict[str, Any] = {}
    phases = (
        ("preview", lambda: prune.preview(_fresh(), Policy(), now, grace)),
        ("apply", lambda: prune.apply(_fresh(), Policy(), now=now, grace=grace)),
        ("second_phase", lambda: prune.apply(_fresh(), Policy(), now=now + grace + dt.timedelta(hours=1), grace=grace)),
    )

    def _fresh() -> Repository:
        return Repository([open_place(str(location))], scratch=location.parent / "scratch")

    for name, work in phases:
        began = time.perf_counter()
        done = work()
        found[name] = {
            "seconds": round(time.perf_counter() - began, 3),
            "goes": len(done.goes),
            "removed": len(done.removed),
            "marked": sum(one.marked for one in done.garbage),
            "deleted": sum(one.deleted for one in done.garbage),
            "waits": [one.waits for one in done.garbage if one.waits],
        }
    kept = sum(1 for path in (location / "objects").rglob("*") if path.is_file())
    print(json.dumps({**found, "objects_kept": kept, "memory": peaks(before)}))


if __name__ == "__main__":
    main()
