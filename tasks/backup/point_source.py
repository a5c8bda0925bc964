"""A component as it was at a moment, made in a private server: a source for the restore of its kind, like that of any backup."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from registry import clock
from registry.errors import StorageError
from tasks.backup.components import Part, Source
from tasks.backup.manifest import Component, Entry, Stream
from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import Repository, new_backup_id
from tasks.backup.source import ComponentSource


class PointSource:
    """The content of the private server; its entries of kind `people` (users, roles) are those of the backup."""

    def __init__(self, record: Component, content: Source, backup: Source, people: str) -> None:
        self.record, self._content, self._backup, self._kind = record, content, backup, people
        self._people = [one for one in backup.entries() if one.kind == people]

    def entries(self) -> Iterator[Entry]:
        yield from (one for one in self._content.entries() if one.kind != self._kind)
        yield from self._people

    def open(self, stream: Stream) -> Iterator[bytes]:
        of_backup = any(stream == one.stream for one in self._people)
        return (self._backup if of_backup else self._content).open(stream)


def captured(folder: Path, backup: Source, part: Part, people: str) -> PointSource:
    """What the private server has now, backed up into `folder` as any database is: the restore compares with what is counted here."""
    keeper, at = Repository([DirectoryPlace(folder / "copy")], scratch=folder), clock.text(clock.now())
    with keeper.writer(new_backup_id(clock.now())) as writer:
        sink = writer.component(backup.record.name)
        found = part.capture(sink)
        done = sink.finish()
    kept: dict[str, Any] = {
        name: backup.record.facts[name] for name in ("accounts", "role_passwords") if name in backup.record.facts
    }
    record = replace(
        backup.record, began_at=at, ended_at=clock.text(clock.now()), entries=done.entries, size_bytes=done.size_bytes,
        stored_bytes=done.stored_bytes, new_bytes=done.new_bytes, index=done.index, facts={**found.facts, **kept},
        snapshot=found.snapshot,
    )  # fmt: skip
    return PointSource(record, ComponentSource(keeper, record), backup, people)


@contextlib.contextmanager
def room(folder: Path) -> Iterator[Path]:
    """A folder below `folder` that is gone afterwards. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="point-", dir=folder)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from error
    with made:
        yield Path(made.name)
