"""A small backup made by hand, and read back: what the tests of storage compare."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Mapping
from pathlib import Path

from tasks.backup.keyring import FileKey, Keyring, new_key, open_keyring
from tasks.backup.manifest import COMPLETE, Component, Entry, Manifest
from tasks.backup.places import Place
from tasks.backup.repository import Repository

AT = "2026-11-21T02:00:00.000000Z"
FIRST, SECOND, THIRD = (f"2026112{day}T020000Z-0a1b2c" for day in (1, 2, 3))
NAME = "models"


def content(seed: int = 1) -> dict[str, bytes]:
    """Some that compresses, some that does not, one that is empty; all of it small."""
    draw = random.Random(seed)
    return {
        "weights.bin": draw.randbytes(5000),
        "notes.txt": b"what compresses well. " * 300 + str(seed).encode(),
        "empty": b"",
        "tiny": bytes([seed % 256]),
    }


def back_up(
    repository: Repository,
    backup_id: str,
    files: Mapping[str, bytes],
    *,
    announced: bool = True,
    name: str = NAME,
    keep_until: dt.datetime | None = None,
) -> Manifest:
    """One component with one entry a file. Returns the manifest as it was stored."""
    if announced:
        repository.begin_intent(backup_id, {"pid": 0, "host": "elsewhere"})
    with repository.writer(backup_id, keep_until=keep_until) as writer:
        sink = writer.component(name)
        for path, data in files.items():
            sink.add(Entry(path, stream=sink.store([data])))
        done = sink.finish()
    component = Component(
        name, "files", COMPLETE, AT, AT, done.entries, done.size_bytes, done.stored_bytes, done.new_bytes, done.index
    )
    record = Manifest(backup_id, "an installation", COMPLETE, AT, AT, (name,), (component,))
    repository.write_manifest(record, keep_until=keep_until)
    if announced:
        repository.end_intent(backup_id)
    repository.note_state(backup_id, "sampled", {"components": {}})
    return repository.signed(record)


def restored(repository: Repository, reference: str, name: str = NAME) -> dict[str, bytes]:
    """The files of a backup, as they come back."""
    source = repository.source(repository.manifest(reference), name)
    found = {}
    for entry in source.entries():
        assert entry.stream is not None
        found[entry.name] = b"".join(source.open(entry.stream))
    return found


def keyed(places: list[Place], folder: Path) -> tuple[FileKey, Keyring]:
    """A key file in `folder`, and the keyring that it opens."""
    key = new_key(folder / "backup.key")
    keyring = open_keyring(places, key, create=True)
    assert keyring is not None
    return key, keyring
