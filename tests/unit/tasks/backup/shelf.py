"""A backup of one component in memory: what a part stores, what a kind reads, and ways to damage it in between."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from registry.errors import ArtifactError, ModelkeepError
from tasks.backup.components import Captured, Part
from tasks.backup.manifest import COMPLETE, FAILED, Chunk, Component, Entry, Stream

CHUNK = 64 << 10


class Shelf:
    """`Sink` and `Source` in one."""

    def __init__(self, name: str = "test", kind: str = "test") -> None:
        self.objects: dict[str, bytes] = {}
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self.streams = 0
        self.new_bytes = 0
        self.record = Component(name, kind, COMPLETE, "2026-11-21T02:00:00.000000Z", "2026-11-21T02:01:00.000000Z")
        self.on_store: Callable[[], None] = lambda: None
        self.captured = Captured()

    # --- a sink ---

    def store(self, pieces: Iterable[bytes], *, compress: bool = True) -> Stream:
        self.streams += 1
        self.on_store()
        data = b"".join(pieces)
        return self.put(data)

    def put(self, data: bytes) -> Stream:
        chunks = []
        for at in range(0, len(data), CHUNK):
            piece = data[at : at + CHUNK]
            name = hashlib.sha256(piece).hexdigest()
            self.new_bytes += 0 if name in self.objects else len(piece)
            self.objects[name] = piece
            chunks.append(Chunk(name, len(piece), name, len(piece), name, "plain"))
        return Stream(len(data), hashlib.sha256(data).hexdigest(), tuple(chunks))

    def add(self, entry: Entry) -> None:
        self.lines.append(entry.line())

    def progress(self, done_bytes: int, total_bytes: int | None = None) -> None:
        assert total_bytes is None or done_bytes <= total_bytes

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    # --- a source ---

    def entries(self) -> Iterator[Entry]:
        for line in self.lines:
            yield Entry.from_line(line)

    def open(self, stream: Stream) -> Iterator[bytes]:
        for chunk in stream.chunks:
            data = self.objects.get(chunk.object)
            if data is None:
                raise ArtifactError(f"object {chunk.object[:12]} is missing")
            if hashlib.sha256(data).hexdigest() != chunk.sha256:
                raise ArtifactError(f"object {chunk.object[:12]} has other bytes")
            yield data

    # --- damage ---

    def entry(self, name: str) -> Entry:
        return next(one for one in self.entries() if one.name == name)

    def flip(self, name: str) -> None:
        """One bit in the first object of an entry."""
        stream = self.entry(name).stream
        assert stream is not None
        data = bytearray(self.objects[stream.chunks[0].object])
        data[len(data) // 2] ^= 1
        self.objects[stream.chunks[0].object] = bytes(data)

    def rewrite(self, name: str, data: bytes) -> None:
        """Other content under a right hash: as by somebody who can write the store."""
        self.lines = [
            (replace(one, stream=self.put(data)) if one.name == name else one).line() for one in self.entries()
        ]

    def change(self, **facts: Any) -> None:
        """Other facts in the manifest."""
        self.record = replace(self.record, facts={**self.record.facts, **facts})


def taken(part: Part, shelf: Shelf | None = None) -> Shelf:
    """The part, captured. Raises what it raises."""
    found = shelf or Shelf()
    try:
        captured = part.capture(found)
    except ModelkeepError as error:
        found.record = replace(found.record, name=part.name, kind=part.kind, state=FAILED, error=str(error))
        raise
    index = found.put("".join(f"{line}\n" for line in found.lines).encode())
    found.captured = captured
    found.record = replace(
        found.record, name=part.name, kind=part.kind, index=index, entries=len(found.lines), facts=captured.facts,
        snapshot=captured.snapshot, warnings=tuple(found.warnings),
    )  # fmt: skip
    return found
