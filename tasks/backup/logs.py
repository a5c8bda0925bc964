"""Shipped logs as they are kept: pieces like those of a backup, a signed document for each log, and one that says how far they reach."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from registry import clock
from registry.errors import ArtifactError, NotFoundError, StorageError
from tasks.backup import codec, documents
from tasks.backup.manifest import Chunk, ManifestError
from tasks.backup.places import Place, is_name
from tasks.backup.repository import Repository

ROOT = "logs"
BASE = ".base"
"""How the name of a base backup of a PostgreSQL cluster ends."""
_DOCUMENT = re.compile(r"(\d{6})/([^/]+)\.json")
_LOG = re.compile(r"(.+)\.(\d+)")
_SEGMENT = re.compile(r"([0-9A-F]{24})(\.base)?")


@dataclass(frozen=True, slots=True)
class Shipped:
    """A log of a database server, or the part of it that there was. Those of one `series` follow each other without a gap.

    `begins`: of the first of a series, {"why", "lost_from"}: why the one before is not followed, and since when nothing is kept.
    `covers_until`: everything committed before then, by the server's clock, is in it or in those before it.
    """

    database: str
    kind: str
    server: str
    series: int
    log: str
    closed: bool
    size_bytes: int
    sha256: str
    begins_with: str
    ends_with: str
    transactions: int
    first_at: str | None
    last_at: str | None
    covers_until: str
    shipped_at: str
    pieces: tuple[Chunk, ...]
    begins: dict[str, Any] | None = None

    @property
    def number(self) -> int:
        return number(self.log)

    @property
    def name(self) -> str:
        return f"{folder(self.database)}{self.series:06d}/{self.log}.json"

    def piece_name(self, piece: Chunk) -> str:
        return piece_name(self.database, self.series, self.log, piece)

    def as_dict(self) -> dict[str, Any]:
        value = {name: getattr(self, name) for name in self.__slots__}
        value["pieces"] = [one.as_dict() for one in self.pieces]
        return {"format": documents.LOG, "format_version": documents.VERSION, "name": self.name, **value}


@dataclass(frozen=True, slots=True)
class Head:
    """How far the logs of a database reach. `position` is where the server's log stood then."""

    database: str
    kind: str
    server: str
    series: int
    log: str
    covers_until: str
    shipped_at: str
    position: dict[str, Any] = field(default_factory=dict)
    gap: dict[str, Any] | None = None
    """{"why", "since"}: no backup is of these logs yet, so that nothing can be brought back to a point in time since then."""

    def as_dict(self) -> dict[str, Any]:
        value = {name: getattr(self, name) for name in self.__slots__}
        return {
            "format": documents.LOG_HEAD,
            "format_version": documents.VERSION,
            "name": head_name(self.database),
            **value,
        }


def folder(database: str) -> str:
    return f"{ROOT}/{database}/"


def head_name(database: str) -> str:
    return f"{folder(database)}head.json"


def piece_name(database: str, series: int, log: str, piece: Chunk) -> str:
    return f"{folder(database)}{series:06d}/{log}.pieces/{piece.object}"


def number(log: str) -> int:
    """12 of "binlog.000012"; of a segment of PostgreSQL one that sorts, a base backup before the segment that it begins with.

    Raises ArtifactError.
    """
    if (segment := _SEGMENT.fullmatch(log)) is not None:
        return 2 * int(segment[1], 16) + (segment[2] is None)
    found = _LOG.fullmatch(log)
    if found is None or not is_name(log):
        raise ArtifactError(
            f"{log!r} is no name of a log: they end with a number, and have only letters, digits and ._:+=@- else"
        )
    return int(found[2])


def digest(pieces: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def base(log: str) -> str:
    return log.rpartition(".")[0]


class Shelf:
    """The logs of one database in a repository."""

    def __init__(self, repository: Repository, database: str, *, keep_until: dt.datetime | None = None) -> None:
        """`keep_until`: what is put stays until then, where a bucket has object lock."""
        self.repository, self.database, self.keep_until = repository, database, keep_until
        self.damaged: dict[str, str] = {}
        """Logs that `copy_missing` could not read anywhere, and why."""

    # reading

    def names(self) -> list[tuple[int, str]]:
        """[(series, log)] in order. Raises StorageError where no place answers."""
        found: set[tuple[int, str]] = set()
        failed: list[str] = []
        places = self.repository.reading()
        for place in places:
            try:
                for one in place.list(folder(self.database)):
                    if match := _DOCUMENT.fullmatch(one.name.removeprefix(folder(self.database))):
                        found.add((int(match[1]), match[2]))
            except StorageError as error:
                failed.append(str(error))
        if len(failed) == len(places):
            raise StorageError(f"which logs of {self.database} are shipped is unknown: {'; '.join(failed)}")
        return sorted(found, key=lambda one: (one[0], number(one[1])))

    def read(self, series: int, log: str) -> Shipped:
        """The longest copy that there is of it. Raises NotFoundError, ManifestError, StorageError."""
        name = f"{folder(self.database)}{series:06d}/{log}.json"
        found = [_shipped(value) for value in self._documents(name, documents.LOG)]
        return max(found, key=lambda one: (one.size_bytes, one.closed))

    def begins(self, series: int) -> dict[str, Any]:
        """{"why", "lost_from"}: why a series follows none, as its first log says; empty where that is not there."""
        for one, log in self.names():
            if one == series:
                return dict(self.read(series, log).begins or {})
        return {}

    def last(self) -> Shipped | None:
        names = self.names()
        return self.read(*names[-1]) if names else None

    def head(self) -> Head | None:
        """The newest copy. Raises ManifestError, StorageError."""
        try:
            found = [_head(value) for value in self._documents(head_name(self.database), documents.LOG_HEAD)]
        except NotFoundError:
            return None
        return max(found, key=lambda one: one.shipped_at)

    def open(self, one: Shipped) -> Iterator[bytes]:
        """Its bytes, each piece from a place that has it right. Raises ArtifactError, StorageError."""
        digest, size = hashlib.sha256(), 0
        for piece in one.pieces:
            plain = self._piece(one, piece)
            digest.update(plain)
            size += len(plain)
            yield plain
        if size != one.size_bytes or digest.hexdigest() != one.sha256:
            raise ArtifactError(
                f"{one.name} names pieces that are not that log: it has {size} bytes of {one.size_bytes}"
            )

    def _piece(self, one: Shipped, piece: Chunk) -> bytes:
        name, problems, unasked = one.piece_name(piece), [], False
        for place in self.repository.reading():
            try:
                return codec.decode(place.get(name), piece, self.repository.keyring)
            except (ArtifactError, NotFoundError) as error:
                problems.append(f"{place.shown}: {error}")
            except StorageError as error:
                unasked = True
                problems.append(str(error))
        if unasked:
            raise StorageError(f"{name} could not be read: {'; '.join(problems)}")
        raise ArtifactError(
            f"the shipped log {one.log} of {self.database} is damaged or incomplete: {'; '.join(problems)}"
        )

    def _documents(self, name: str, format: str) -> list[dict[str, Any]]:
        """The copies that can be believed, at least one."""
        found, problems, unasked = [], [], []
        for place in self.repository.reading():
            try:
                shown = f"{name} in {place.shown}"
                found.append(
                    documents.read(place.get(name), format, shown, self.repository.keyring, name, field="name")
                )
            except NotFoundError:
                continue
            except ManifestError as error:
                problems.append(str(error))
            except StorageError as error:
                unasked.append(str(error))
        if found:
            return found
        if unasked:
            raise StorageError("; ".join([*unasked, *problems]))
        if problems:
            raise ManifestError("; ".join(problems))
        raise NotFoundError(f"{name} is not in {', '.join(self.repository.shown)}")

    # writing

    def store(self, pieces: Iterable[bytes]) -> Iterator[codec.Encoded]:
        """The pieces as they are stored, 16 MiB at most of plain bytes in each."""
        held = b""
        for piece in pieces:
            held += piece
            while len(held) >= codec.CHUNK_BYTES:
                yield self._encoded(held[: codec.CHUNK_BYTES])
                held = held[codec.CHUNK_BYTES :]
        if held:
            yield self._encoded(held)

    def _encoded(self, plain: bytes) -> codec.Encoded:
        return codec.encode(plain, hashlib.sha256(plain).digest(), self.repository.keyring)

    def put_pieces(self, series: int, log: str, pieces: Iterable[bytes]) -> tuple[Chunk, ...]:
        """Raises StorageError; what `pieces` raises passes through."""
        found = []
        for piece in self.store(pieces):
            self._put(piece_name(self.database, series, log, piece.chunk), piece.data)
            found.append(piece.chunk)
        return tuple(found)

    def put(self, one: Shipped) -> None:
        """The document of a log whose pieces are there: from now on it counts."""
        self._put(one.name, documents.text(one.as_dict(), self.repository.keyring))

    def put_head(self, head: Head) -> None:
        self._put(head_name(self.database), documents.text(head.as_dict(), self.repository.keyring))

    def forget(self, one: Shipped, pieces: Iterable[Chunk]) -> None:
        """Pieces of what a longer copy has replaced. One that a place does not let go (an object lock) lies there and harms nothing: it
        goes with its log.
        """
        for place in self._places(self.repository.up()):
            for piece in pieces:
                with contextlib.suppress(StorageError):
                    place.delete(one.piece_name(piece))

    def copy_missing(self) -> int:
        """Bring logs to the places that were away when they were shipped. Returns how many copies. One that is damaged keeps none that come
        after it from being shipped. Raises StorageError.
        """
        repository, copied = self.repository, 0
        there: dict[int, set[str]] = {}
        for one in repository.up():
            try:
                listed = repository.all_places()[one].list(folder(self.database))
                there[one] = {found.name for found in listed if found.name.endswith(".json")}
            except StorageError as error:
                repository.is_down(one, error)
        for series, log in self.names():
            name = f"{folder(self.database)}{series:06d}/{log}.json"
            for one in [
                number for number, names in there.items() if name not in names and number not in repository.down
            ]:
                place = repository.all_places()[one]
                try:
                    found = self.read(series, log)
                    for piece in found.pieces:
                        encoded = self._encoded(self._piece(found, piece))
                        place.put(found.piece_name(piece), encoded.data, keep_until=self.keep_until)
                    text = documents.text(found.as_dict(), repository.keyring)
                    place.put(name, text, keep_until=self.keep_until)
                except (ArtifactError, ManifestError) as error:
                    self.damaged[name] = str(error)
                except NotFoundError:
                    continue  # another installation has just deleted it: no backup needs it
                except StorageError as error:
                    repository.is_down(one, error)
                else:
                    copied += 1
        self._empty_spool()
        return copied

    def _empty_spool(self) -> None:
        """Take out of the spool the logs of which every place has the very same document."""
        repository = self.repository
        if repository.spool is None or repository.down:
            return
        names = {one.name for one in repository.spool.list(folder(self.database))}
        for name in sorted(names):
            if _DOCUMENT.fullmatch(name.removeprefix(folder(self.database))) is None:
                continue
            text = repository.spool.get(name)
            if all(place.stat(name) is not None and place.get(name) == text for place in repository.places):
                repository.spool.delete(name)
                pieces = f"{name.removesuffix('.json')}.pieces/"
                for piece in sorted(one for one in names if one.startswith(pieces)):
                    repository.spool.delete(piece)

    def _put(self, name: str, data: bytes) -> None:
        """Put, and read back. Raises StorageError."""
        where = self.repository.put_at(self.repository.up(), name, data, keep_until=self.keep_until)
        for place in self._places(where):
            place.flush()
            try:
                same = place.get(name) == data
            except NotFoundError:
                same = False
            if not same:
                raise StorageError(
                    f"{name} reads back from {place.shown} with other bytes: the log does not count as shipped"
                )

    def _places(self, numbers: Iterable[int]) -> list[Place]:
        places = self.repository.all_places()
        return [places[one] for one in numbers]


def _shipped(value: dict[str, Any]) -> Shipped:
    try:
        known = {name: value[name] for name in Shipped.__slots__}
        known["pieces"] = tuple(Chunk.from_dict(one) for one in known["pieces"])
        found = Shipped(**known)
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{value.get('name')} cannot be read as the document of a log ({error!r})") from error
    if found.name != value["name"]:
        raise ManifestError(f"{value['name']} is the document of {found.name}")
    return found


def _head(value: dict[str, Any]) -> Head:
    try:
        return Head(**{name: value[name] for name in Head.__slots__})
    except (KeyError, TypeError) as error:
        raise ManifestError(f"{value.get('name')} cannot be read as the head of shipped logs ({error!r})") from error


def text(moment: dt.datetime | None) -> str | None:
    return None if moment is None else clock.text(moment)
