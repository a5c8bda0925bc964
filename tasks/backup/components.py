"""What every component of a backup does: be captured, be restored, be compared. One module a kind; `kinds` finds them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tasks.backup.manifest import Component, Entry, Stream


class Sink(Protocol):
    """Where a component's content goes while it is captured."""

    def store(self, pieces: Iterable[bytes], *, compress: bool = True) -> Stream:
        """Store a stream of any length, in constant memory. What is stored already is not stored again.

        Raises StorageError; an exception of `pieces` passes through, and the stream then does not exist.
        """

    def add(self, entry: Entry) -> None:
        """One more line of the component's index."""

    def progress(self, done_bytes: int, total_bytes: int | None = None) -> None:
        """How far the component is, by the bytes of its source."""

    def warn(self, text: str) -> None:
        """Something a person should know, that makes the component no less complete."""


class Source(Protocol):
    """A component of a stored backup, to read from. Every byte is checked against the manifest before it is handed out."""

    record: Component

    def entries(self) -> Iterator[Entry]: ...

    def open(self, stream: Stream) -> Iterator[bytes]:
        """The bytes of a stream, piece by piece. Raises ArtifactError where one is missing or is not what the manifest says."""


@dataclass(frozen=True, slots=True)
class Captured:
    """What capturing found: `facts` to compare a restored copy with, `snapshot`: how the content belongs to one moment."""

    facts: dict[str, Any] = field(default_factory=dict)
    snapshot: dict[str, Any] = field(default_factory=dict)
    programs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Compared:
    """What a restored copy was found to be. Verified where nothing differs and nothing was left out."""

    differences: tuple[str, ...] = ()
    checked: dict[str, Any] = field(default_factory=dict)
    """What was compared: {"tables": 12, "rows": 48_000, ...}, for people."""
    unverifiable: str | None = None
    """Why it could not be restored here (no binaries of its flavour …): it then stays complete."""


class Part(Protocol):
    """A part of this installation that is backed up: made from the settings by the module of its kind."""

    @property
    def name(self) -> str:
        """As in `--components`: "registry", "database:app", "models", "vectors", "queues", "files:uploads", "config"."""

    @property
    def kind(self) -> str: ...

    def capture(self, sink: Sink) -> Captured:
        """Raises any ModelkeepError: the backup is then partial, and its message stands in the manifest."""


class Kind(Protocol):
    """How components of one kind come back. A module that has these three functions."""

    @staticmethod
    def occupied(target: Target) -> str | None:
        """What stands at the target, in words ("12 tables"); None where it is empty. Changes nothing.

        Raises UnavailableError where a server does not answer.
        """

    @staticmethod
    def restore(source: Source, target: Target) -> dict[str, Any]:
        """Bring the component back to `target`. Returns facts of what is there now. Refuses a target that is not empty,
        unless `target.force`. Killed at any moment, the next call starts over or goes on, and never calls a half done."""

    @staticmethod
    def verify(source: Source, folder: Path) -> Compared:
        """Restore into private throwaway servers and files under `folder`, and compare with `source.record.facts`."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a component is brought back to. `url` or `path` name the place; `only` picks a table, a version, a collection …

    `options` are those of the kind (credentials come from the settings, never from a manifest).
    """

    url: str | None = None
    path: Path | None = None
    only: tuple[str, ...] = ()
    force: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[int, int | None], None] = lambda done, total: None
