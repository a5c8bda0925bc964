"""Shipped logs as they are kept: pieces like those of a backup, a signed document for each log, and one that says how far they reach."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from registry import clock
from registry.errors import ArtifactError, NotFoundError, StorageError
from tasks.backup import codec, documents
from tasks.backup.manifest import Chunk, ManifestError
from tasks.backup.places import Place, is_name
from tasks.backup.repository import Repository
from tasks.backup.writer import cut

ROOT = "logs"
BASE = ".base"
"""How the name of a base backup of a PostgreSQL cluster ends."""
SILENT = 3
"""After so many logs, one after another, that could not be read since a place did not answer, the rest is left to the next run."""
_DOCUMENT = re.compile(r"(\d{6})/([^/]+)\.json")
_PART = re.compile(r"(\d{6}/[^/]+?)(\.json|\.pieces/[^/]+)")
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
        return document_name(self.database, self.series, self.log)

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


def document_name(database: str, series: int, log: str) -> str:
    return f"{folder(database)}{series:06d}/{log}.json"


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
        """Documents of logs that `copy_missing` could not read, and why: they are not in every place."""

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
        name = document_name(self.database, series, log)
        return max((_shipped(value) for value in self._documents(name, documents.LOG)), key=_rank)

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
                found.append(self._document(place, name, format))
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

    def _document(self, place: Place, name: str, format: str) -> dict[str, Any]:
        """Raises NotFoundError, ManifestError, StorageError."""
        shown = f"{name} in {place.shown}"
        return documents.read(place.get(name), format, shown, self.repository.keyring, name, field="name")

    # writing

    def _encoded(self, plain: bytes) -> codec.Encoded:
        return codec.encode(plain, hashlib.sha256(plain).digest(), self.repository.keyring)

    def put_pieces(self, series: int, log: str, pieces: Iterable[bytes]) -> tuple[Chunk, ...]:
        """Raises StorageError; what `pieces` raises passes through."""
        found = []
        for plain in cut(pieces):
            piece = self._encoded(plain)
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
        leaving = list(pieces)
        for place in self._places(self.repository.up()):
            _let_go(place, one, leaving)

    def copy_missing(self) -> int:
        """Bring logs to the places that were away when they were shipped, or that hold a shorter copy, since they were away when it grew.
        Returns how many copies. One that cannot be read keeps none that come after it from being shipped. Raises StorageError.
        """
        repository, copied, silent = self.repository, 0, 0
        there: dict[int, dict[str, dict[str, int]]] = {}
        for one in repository.up():
            if one == repository.spool_number:
                continue
            try:
                there[one] = self._lying(repository.all_places()[one])
            except StorageError as error:
                repository.is_down(one, error)
        spooled = {} if repository.spool is None else self._lying(repository.spool)
        for series, log in self.names():
            name = document_name(self.database, series, log)
            listed = [of_place.get(name, {}) for of_place in there.values()]
            # Pieces are named by their content: who lists the same as the others has the same, and is not asked for its document.
            if name not in spooled and all(name in one and one == listed[0] for one in listed):
                continue
            try:
                found = self.read(series, log)
                for one, lying in zip(there, listed, strict=True):
                    copied += one not in repository.down and self._bring(found, one, lying)
            except NotFoundError:
                continue  # another installation has just deleted it: no backup needs it
            except (ArtifactError, ManifestError) as error:
                self.damaged[name] = str(error)
            except StorageError as error:
                if not repository.up():
                    raise
                self.damaged[name] = str(error)
                silent += 1
                if silent == SILENT:
                    break
            else:
                silent = 0
        self._empty_spool()
        return copied

    def _lying(self, place: Place) -> dict[str, dict[str, int]]:
        """What a place lists of each log, by the name of its document: that with its size, since it changes, and the names of its pieces.

        Raises StorageError.
        """
        found: dict[str, dict[str, int]] = {}
        for one in place.list(folder(self.database)):
            if match := _PART.fullmatch(one.name.removeprefix(folder(self.database))):
                document = f"{folder(self.database)}{match[1]}.json"
                found.setdefault(document, {})[one.name] = one.size_bytes if one.name == document else 0
        return found

    def _bring(self, found: Shipped, number: int, lying: Container[str]) -> bool:
        """Put a log at a place that lacks something of it; whether that was so. Its document comes last, in place of a shorter one's, whose
        pieces then go. Raises ArtifactError, StorageError where its bytes cannot be read.
        """
        place, have = self.repository.all_places()[number], None
        if found.name in lying:
            try:
                have = _shipped(self._document(place, found.name, documents.LOG))
            except NotFoundError:
                pass
            except (ManifestError, StorageError) as error:
                if not found.closed:  # what is there may be longer; than a log that is closed, nothing is
                    self.damaged[found.name] = str(error)
                    return False
        if have is not None and _rank(have) > _rank(found):
            return False  # it did not answer when the longest copy was looked for
        if have == found and all(found.piece_name(piece) in lying for piece in found.pieces):
            return False
        for piece in found.pieces:
            encoded = self._encoded(self._piece(found, piece))
            if not self._put_at(number, found.piece_name(piece), encoded.data):
                return False
        if not self._put_at(number, found.name, documents.text(found.as_dict(), self.repository.keyring)):
            return False
        if have is not None:
            kept = {piece.object for piece in found.pieces}
            _let_go(place, found, [piece for piece in have.pieces if piece.object not in kept])
        return True

    def _put_at(self, number: int, name: str, data: bytes) -> bool:
        """False where the place does not take it: it is left out from now on. Raises StorageError where it was the last."""
        try:
            self.repository.all_places()[number].put(name, data, keep_until=self.keep_until)
        except StorageError as error:
            self.repository.is_down(number, error)
            return False
        return True

    def _empty_spool(self) -> None:
        """Take out of the spool the logs of which every place has a copy that is as long, by what the documents say."""
        spool = self.repository.spool
        if spool is None or self.repository.down:
            return
        for name, lying in self._lying(spool).items():
            if name not in lying or name in self.damaged:
                continue
            try:
                needed = _rank(_shipped(self._document(spool, name, documents.LOG)))
                as_long = all(
                    _rank(_shipped(self._document(place, name, documents.LOG))) >= needed
                    for place in self.repository.places
                )
            except NotFoundError:
                continue
            except (ManifestError, StorageError) as error:
                self.damaged[name] = str(error)
                continue
            if as_long:
                spool.delete(name)
                for piece in lying.keys() - {name}:
                    spool.delete(piece)

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


def _rank(one: Shipped) -> tuple[int, bool, str]:
    """Of two copies the greater one has what the other has."""
    return one.size_bytes, one.closed, one.covers_until


def _let_go(place: Place, one: Shipped, pieces: Iterable[Chunk]) -> None:
    for piece in pieces:
        with contextlib.suppress(StorageError):
            place.delete(one.piece_name(piece))


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
