"""Writing a backup: streams cut into chunks, each stored once, at every place that takes it. Memory is a few chunks at most."""

from __future__ import annotations

import datetime as dt
import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import IO, TYPE_CHECKING

from registry.errors import ArtifactError, NotFoundError, StorageError
from tasks.backup import codec, garbage
from tasks.backup.codec import CHUNK_BYTES
from tasks.backup.known import Known
from tasks.backup.manifest import Chunk, Entry, Stream

if TYPE_CHECKING:
    from tasks.backup.repository import Repository

THREADS = 3
IN_FLIGHT_BYTES = 3 * CHUNK_BYTES
SMALL_BYTES = 1 << 20
"""A stream of at most this size is encoded on the spot; only its upload is left to the pool."""
_LOCKS = 64
_PIECE = 1 << 20
_SMALL_PIECE = 4 << 10
"""Smaller pieces are put together as they come: a hundred thousand of them are much to hold."""

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Finished:
    """What a component's sink has taken in. `new_bytes` are those of the objects that were not there before."""

    index: Stream
    entries: int
    size_bytes: int
    stored_bytes: int
    new_bytes: int
    warnings: tuple[str, ...]


class Writer:
    """A backup while it is written. One for a backup; its sinks may be used one after another or by several threads.

    A place that fails after its own retries is left out from then on (`down`); when none is left, what comes goes into the
    spool of the repository, and without one StorageError is raised.
    """

    def __init__(
        self,
        repository: Repository,
        backup_id: str,
        *,
        progress: Progress | None = None,
        keep_until: dt.datetime | None = None,
        threads: int = THREADS,
    ) -> None:
        self.repository = repository
        self.backup_id = backup_id
        self.keep_until = keep_until
        self._progress = progress
        self._known = Known(repository.scratch)
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._budget = _Budget(IN_FLIGHT_BYTES)
        self._broken: Exception | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="backup-write")
        self._learned: set[str] = set()
        self._sinks: list[ComponentSink] = []
        for number, place in enumerate(repository.all_places()):
            try:
                garbage.wait_for_deletion(repository.only(place))
                self._known.listed(
                    number, ((one.name.rpartition("/")[2], one.size_bytes) for one in place.list(codec.PREFIX))
                )
                self._known.marked(number, repository.marked_objects(place))
            except StorageError as error:
                repository.is_down(number, error)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for sink in self._sinks:
            sink.drop()
        self._known.close()

    def component(self, name: str) -> ComponentSink:
        """The sink of a component. What the newest backups say of one with this name is reused."""
        if name not in self._learned:
            self._learned.add(name)
            for chunks in self.repository.recent_chunks(name):
                self._known.learn(chunks)
        sink = ComponentSink(self, name)
        self._sinks.append(sink)
        return sink

    def store(self, pieces: Iterable[bytes], *, compress: bool, new: Callable[[int], None]) -> Stream:
        """See `Sink.store`. `new` is told the size of every object that was not there."""
        digest, size = hashlib.sha256(), 0
        waiting: list[tuple[Future[Chunk], int]] = []
        chunks: list[Chunk] = []
        try:
            for plain in cut(pieces):
                digest.update(plain)
                size += len(plain)
                self._check()
                if not waiting and len(plain) <= SMALL_BYTES:
                    chunks.append(self._small(plain, compress, new))
                    continue
                self._budget.take(len(plain))
                waiting.append((self._pool.submit(self._chunk, plain, compress, new), len(plain)))
                del plain
            chunks += [one.result() for one, _ in waiting]
        except BaseException:
            for one, taken in waiting:
                if one.cancel():
                    self._budget.give(taken)
            wait([one for one, _ in waiting])
            raise
        return Stream(size, digest.hexdigest(), tuple(chunks))

    def settle(self) -> None:
        """Wait for every upload, and bring all to the disks. Raises StorageError."""
        self._budget.wait_until_empty()
        self._check()
        self.repository.flush()

    def _check(self) -> None:
        if self._broken is not None:
            raise StorageError(str(self._broken)) from self._broken

    def _chunk(self, plain: bytes, compress: bool, new: Callable[[int], None]) -> Chunk:
        size = len(plain)
        try:
            digest = hashlib.sha256(plain).digest()
            object_id = codec.address(digest, self.repository.keyring)
            with self._locks[int(object_id[:2], 16) % _LOCKS]:
                chunk, data, targets = self._decide(object_id, plain, digest, compress, new)
                del plain
                if data is not None:
                    self._put(chunk, data, targets)
            return chunk
        except Exception as error:
            self._broken = self._broken or error
            raise
        finally:
            self._budget.give(size)

    def _small(self, plain: bytes, compress: bool, new: Callable[[int], None]) -> Chunk:
        digest = hashlib.sha256(plain).digest()
        object_id = codec.address(digest, self.repository.keyring)
        with self._locks[int(object_id[:2], 16) % _LOCKS]:
            chunk, data, targets = self._decide(object_id, plain, digest, compress, new)
        if data is not None:
            # Counted with what an upload costs besides its bytes, so that small ones do not queue up by the thousand.
            cost = max(len(data), 64 << 10)
            self._budget.take(cost)
            self._pool.submit(self._put_later, chunk, data, targets, cost)
        return chunk

    def _put_later(self, chunk: Chunk, data: bytes, targets: list[int], cost: int) -> None:
        try:
            if self._broken is None:
                self._put(chunk, data, targets)
        except Exception as error:
            self._broken = self._broken or error
        finally:
            self._budget.give(cost)

    def _decide(
        self, object_id: str, plain: bytes, digest: bytes, compress: bool, new: Callable[[int], None]
    ) -> tuple[Chunk, bytes | None, list[int]]:
        """The chunk, and where something is to be written: its bytes and the places that lack them."""
        known, repository = self._known, self.repository
        chunk, at, marked = known.chunk(object_id), known.at(object_id), known.marked_at(object_id)
        if chunk is not None and (chunk.sha256 != digest.hex() or chunk.size_bytes != len(plain)):
            chunk = None
        data: bytes | None = None
        good: set[int] = set()
        if chunk is not None:
            good = {place for place, size in at.items() if size == chunk.stored_bytes} - marked
        elif at:
            chunk, data, good = self._recognised(object_id, digest, at)
        wanted = repository.up()
        if good and wanted == [repository.spool_number]:
            wanted = []  # the spool is for what nobody has; this is where a place has it that is only away
        targets = [place for place in wanted if place not in good]
        if chunk is not None and not targets:
            self._lock_longer(chunk)
            return chunk, None, []
        if chunk is not None and data is None and good:
            data = self._stored_bytes(chunk, good)
        if chunk is None or data is None:
            encoded = codec.encode(plain, digest, repository.keyring, compress=compress)
            chunk, data = encoded.chunk, encoded.data
        if not at:
            new(len(data))
        known.stored(chunk, targets)
        return chunk, data, targets

    def _recognised(
        self, object_id: str, digest: bytes, at: dict[int, int]
    ) -> tuple[Chunk | None, bytes | None, set[int]]:
        """An object that no manifest knows was left by a backup that was killed: it is read, and believed if it is right.

        The last are the places that hold just these bytes.
        """
        chunk: Chunk | None = None
        data: bytes | None = None
        good: set[int] = set()
        for number in at:
            try:
                found = self.repository.all_places()[number].get(codec.object_name(object_id))
                if data is None:
                    recognised = codec.recognise(found, object_id, self.repository.keyring)
                    if recognised.sha256 == digest.hex():
                        chunk, data = recognised, found
            except (ArtifactError, NotFoundError):
                continue  # damaged or gone: it is written anew
            except StorageError as error:
                self.repository.is_down(number, error)
                continue
            if found == data:
                good.add(number)
        return chunk, data, good - self._known.marked_at(object_id)

    def _stored_bytes(self, chunk: Chunk, places: set[int]) -> bytes | None:
        """The object as it is at a place, so that all places hold the same bytes. None where it is not what it should be."""
        for number in sorted(places):
            try:
                data = self.repository.all_places()[number].get(codec.object_name(chunk.object))
            except NotFoundError:
                continue
            except StorageError as error:
                self.repository.is_down(number, error)
                continue
            if hashlib.sha256(data).hexdigest() == chunk.stored_sha256:
                return data
        return None

    def _put(self, chunk: Chunk, data: bytes, targets: list[int]) -> None:
        self.repository.put_at(targets, codec.object_name(chunk.object), data, keep_until=self.keep_until)

    def _lock_longer(self, chunk: Chunk) -> None:
        if self.keep_until is not None:
            self.repository.keep_at(codec.object_name(chunk.object), self.keep_until)


class ComponentSink:
    """A component while it is captured: `components.Sink`, and `finish` at its end."""

    def __init__(self, writer: Writer, name: str) -> None:
        self.name = name
        self._writer = writer
        scratch = None if writer.repository.scratch is None else str(writer.repository.scratch)
        self._index: IO[bytes] = tempfile.SpooledTemporaryFile(1 << 20, dir=scratch)  # noqa: SIM115
        self._lock = threading.Lock()
        self._entries = 0
        self._size_bytes = 0
        self._new_bytes = 0
        self._warnings: list[str] = []

    def store(self, pieces: Iterable[bytes], *, compress: bool = True) -> Stream:
        """Raises StorageError; an exception of `pieces` passes through, and the stream then does not exist."""
        return self._writer.store(pieces, compress=compress, new=self._new)

    def add(self, entry: Entry) -> None:
        """Raises StorageError where the temporary file of the index cannot be written."""
        with self._lock:
            try:
                self._index.write(entry.line().encode() + b"\n")
            except OSError as error:
                raise StorageError(
                    f"the index of {self.name} cannot be written to a temporary file: {error.strerror or error}; free some space"
                ) from error
            self._entries += 1
            if entry.stream is not None:
                self._size_bytes += entry.stream.size_bytes
        if entry.stream is not None:
            self._writer._known.use(self.name, entry.stream.chunks)

    def progress(self, done_bytes: int, total_bytes: int | None = None) -> None:
        if self._writer._progress is not None:
            self._writer._progress(self.name, done_bytes, total_bytes)

    def warn(self, text: str) -> None:
        self._warnings.append(text)

    def drop(self) -> None:
        """The component failed: its index is not wanted."""
        self._index.close()

    def finish(self) -> Finished:
        """Store the index and wait until all is written. Raises StorageError. The sink is used up then."""
        with self._index as index:
            index.seek(0)
            stream = self.store(iter(lambda: index.read(_PIECE), b""))
        self._writer.settle()
        self._writer._known.use(self.name, stream.chunks)
        stored = self._writer._known.used_bytes(self.name)
        return Finished(stream, self._entries, self._size_bytes, stored, self._new_bytes, tuple(self._warnings))

    def _new(self, size_bytes: int) -> None:
        with self._lock:
            self._new_bytes += size_bytes


class _Budget:
    """Bytes that may be on their way at once. Whoever wants more waits; one that is larger than all goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._free = threading.Condition()

    def take(self, size: int) -> None:
        with self._free:
            self._free.wait_for(lambda: self._taken == 0 or self._taken + size <= self._limit)
            self._taken += size

    def give(self, size: int) -> None:
        with self._free:
            self._taken -= size
            self._free.notify_all()

    def wait_until_empty(self) -> None:
        with self._free:
            self._free.wait_for(lambda: self._taken == 0)


def cut(pieces: Iterable[bytes], size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The same bytes in pieces of `size`, the last one shorter; none where there are none. A piece is not changed by its giver later."""
    held: list[bytes | memoryview] = []
    small, length = bytearray(), 0
    for piece in pieces:
        if len(piece) < _SMALL_PIECE and length + len(piece) < size:
            small += piece
            length += len(piece)
            continue
        if small:
            held.append(bytes(small))
            small.clear()
        view = memoryview(piece)
        while length + len(view) >= size:
            held.append(view[: size - length])
            view = view[size - length :]
            held, length = [b"".join(held)], 0
            yield bytes(held.pop())  # no copy, and nothing here holds it, or its pieces, while it is stored
        if len(view):
            held.append(view)
            length += len(view)
    held.append(bytes(small))
    if length:
        yield b"".join(held)
