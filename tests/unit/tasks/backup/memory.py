"""A component that is kept in memory: what a repository does, without one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tasks.backup.components import Captured, Part
from tasks.backup.manifest import COMPLETE, Component, Entry, Stream

WHEN = "2026-11-21T02:00:00.000000Z"


@dataclass
class Memory:
    """A Sink, and then a Source, of one component."""

    kept: dict[str, bytes] = field(default_factory=dict)
    index: list[Entry] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    progress_bytes: list[int] = field(default_factory=list)
    record: Component = field(default_factory=lambda: Component("database:app", "", COMPLETE, WHEN, WHEN))

    def store(self, pieces: Iterable[bytes], *, compress: bool = True) -> Stream:
        data = b"".join(pieces)
        digest = hashlib.sha256(data).hexdigest()
        self.kept[digest] = data
        return Stream(len(data), digest)

    def add(self, entry: Entry) -> None:
        self.index.append(Entry.from_line(entry.line()))

    def progress(self, done_bytes: int, total_bytes: int | None = None) -> None:
        self.progress_bytes.append(done_bytes)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def entries(self) -> Iterator[Entry]:
        return iter(self.index)

    def open(self, stream: Stream) -> Iterator[bytes]:
        data = self.kept[stream.sha256]
        for start in range(0, len(data), 1 << 20):
            yield data[start : start + (1 << 20)]

    def text(self, name: str) -> bytes:
        entry = next(one for one in self.index if one.name == name)
        assert entry.stream is not None
        return self.kept[entry.stream.sha256]

    def everything(self) -> bytes:
        """All that a backup would hold of it, for a search for secrets."""
        lines = "\n".join(entry.line() for entry in self.index)
        return (
            b"\n".join(self.kept.values()) + lines.encode() + repr(self.record).encode() + repr(self.warnings).encode()
        )


def taken(part: Part) -> tuple[Memory, Captured]:
    """The part's backup. What it raised leaves nothing."""
    import json

    memory = Memory()
    captured = part.capture(memory)
    facts: dict[str, Any] = json.loads(json.dumps(captured.facts))  # as the manifest gives it back
    memory.record = Component(
        part.name, part.kind, COMPLETE, WHEN, WHEN, facts=facts, snapshot=json.loads(json.dumps(captured.snapshot)),
        warnings=tuple(memory.warnings),
    )  # fmt: skip
    return memory, captured
