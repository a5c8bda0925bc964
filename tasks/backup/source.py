"""Reading a stored component: every byte is compared with the manifest before it is handed out, from any place that has it right."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from registry.errors import ArtifactError, NotFoundError, StorageError
from tasks.backup import codec
from tasks.backup.manifest import Chunk, Component, Entry, Stream
from tasks.backup.places import DirectoryPlace

if TYPE_CHECKING:
    from tasks.backup.repository import Repository

AHEAD = 2
"""Chunks that are fetched while one is worked on."""


class ComponentSource:
    """`components.Source` over a repository."""

    def __init__(self, repository: Repository, record: Component) -> None:
        self.record = record
        self._repository = repository

    def entries(self) -> Iterator[Entry]:
        """The lines of the index, one at a time. Raises ArtifactError where there are not as many as the manifest says."""
        if self.record.index is None:
            raise ArtifactError(
                f"component {self.record.name} has no content in this backup: it {self.record.state} "
                f"({self.record.error or 'without a reason'})"
            )
        count, rest = 0, b""
        for piece in self.open(self.record.index):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                count += 1
                yield Entry.from_line(line)
        if rest or count != self.record.entries:
            raise ArtifactError(
                f"the index of {self.record.name} has {count} entries, the manifest says {self.record.entries}"
            )

    def open(self, stream: Stream) -> Iterator[bytes]:
        """The bytes of a stream, chunk by chunk. Raises ArtifactError, StorageError where no place could be asked."""
        return read_stream(self._repository, stream)


def read_stream(repository: Repository, stream: Stream) -> Iterator[bytes]:
    digest, size = hashlib.sha256(), 0
    for plain in _plain(repository, stream.chunks):
        digest.update(plain)
        size += len(plain)
        if size > stream.size_bytes:
            break
        yield plain
    if size != stream.size_bytes or digest.hexdigest() != stream.sha256:
        raise ArtifactError(
            f"a stream of {stream.size_bytes} bytes with SHA-256 {stream.sha256} came out with {size} bytes and "
            f"{digest.hexdigest()}: its list of chunks is wrong"
        )


def fetch(repository: Repository, chunk: Chunk) -> bytes:
    """The plain bytes of a chunk from the first place that has them right.

    Raises ArtifactError where no place has; StorageError where that cannot be said, because one could not be asked.
    """
    problems: list[str] = []
    unasked = False
    places = repository.reading()
    # A store over a network is asked twice: what it garbled on the way once, it may not a second time.
    for place in [*places, *(one for one in places if not isinstance(one, DirectoryPlace))]:
        try:
            return codec.decode(place.get(codec.object_name(chunk.object)), chunk, repository.keyring)
        except (ArtifactError, NotFoundError) as error:
            problems.append(f"{place.shown}: {error}")
        except StorageError as error:
            unasked = True
            problems.append(str(error))
    said = "; ".join(dict.fromkeys(problems)) or "there is no place to read from"
    if unasked:
        raise StorageError(f"object {chunk.object} could not be read: {said}")
    raise ArtifactError(f"object {chunk.object} is nowhere as it should be: {said}")


def _plain(repository: Repository, chunks: tuple[Chunk, ...]) -> Iterator[bytes]:
    if len(chunks) <= 1:
        for chunk in chunks:
            yield fetch(repository, chunk)
        return
    pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="backup-read")
    try:
        waiting: deque[Future[bytes]] = deque()
        rest = iter(chunks)
        for chunk in rest:
            waiting.append(pool.submit(fetch, repository, chunk))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
