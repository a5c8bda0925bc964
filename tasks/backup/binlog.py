"""A MariaDB's binary log, read by ourselves: every event's checksum and place, the GTIDs, and when each transaction was committed."""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from registry.errors import ArtifactError

MAGIC = b"\xfebin"
HEADER_BYTES = 19
_KEPT_BYTES = 1 << 16
"""Of an event's body: those that we read are short, but for the list of GTIDs."""
_ROTATE, _STOP, _FORMAT, _HEARTBEAT, _CHECKPOINT, _GTID, _GTID_LIST, _START_ENCRYPTION = (
    4,
    3,
    15,
    27,
    161,
    162,
    163,
    164,
)
_CONTROL = frozenset({_ROTATE, _STOP, _FORMAT, _HEARTBEAT, _CHECKPOINT, _GTID_LIST, _START_ENCRYPTION})
_CRC_BYTES = 4
_IN_USE = 0x1
_GTID_TEXT = re.compile(r"(\d+)-(\d+)-(\d+)")

State = dict[int, str]
"""By domain, the last GTID in it: {0: "0-1-57"}."""


@dataclass(frozen=True, slots=True)
class Transaction:
    """One group of events, whole: a transaction, or a statement that stands alone. `at`: seconds since 1970, by its last event."""

    start: int
    end: int
    gtid: str
    at: int


@dataclass(slots=True)
class Log:
    """What is known of a log once it was read to its end."""

    size_bytes: int = 0
    sha256: str = ""
    begins_with: State = field(default_factory=dict)
    """The GTIDs that were before it: what the log before it must end with."""
    ends_with: State = field(default_factory=dict)
    transactions: int = 0
    first_at: int | None = None
    last_at: int | None = None
    """The latest commit in it. Commits are not always in the order of their times."""
    prefixes: dict[int, str] = field(default_factory=dict)
    """SHA-256 of its first bytes, by how many of them were asked for."""


def state(text: str) -> State:
    """Of `@@gtid_binlog_pos`: "0-1-57,4-2-8"."""
    return {int(found[1]): found[0] for found in _GTID_TEXT.finditer(text)}


def state_text(value: State) -> str:
    return ",".join(value[domain] for domain in sorted(value))


class Reader:
    """Reads a log as it comes. `log` is complete, and the log right, when `transactions` has come to its end."""

    def __init__(self, pieces: Iterable[bytes], name: str, prefixes: Iterable[int] = ()) -> None:
        self.log = Log()
        self.name = name
        self._pieces = iter(pieces)
        self._held = b""
        self._at = 0
        self._offset = 0
        self._digest = hashlib.sha256()
        self._prefixes = sorted(prefixes)
        self._fed = 0

    def transactions(self) -> Iterator[Transaction]:
        """Raises ArtifactError: damaged, cut short, or no log of a MariaDB."""
        if self._take(len(MAGIC)) != MAGIC:
            raise ArtifactError(f"{self.name} is no binary log")
        log, checked, first = self.log, False, True
        open_: tuple[int, str] | None = None
        group: Transaction | None = None
        while (header := self._take(HEADER_BYTES, may_end=True)) is not None:
            start = self._offset - HEADER_BYTES
            when, kind, server, length, next_at, flags = struct.unpack("<IBIIIH", header)
            if length < HEADER_BYTES or (next_at and next_at != (start + length) & 0xFFFFFFFF):
                raise self._damaged(start, "its length does not fit its place")
            if kind == _FORMAT:
                header = header[:17] + struct.pack("<H", flags & ~_IN_USE)
            body, checksum, due = self._body(header, length - HEADER_BYTES)
            if kind == _FORMAT:
                if len(body) < 60:
                    raise self._damaged(start, "it is too short")
                checked = body[-5] == 1
            elif first:
                raise self._damaged(start, "a log begins with its format")
            if (
                checked or kind == _FORMAT
            ) and checksum != due:  # the format has its own, whatever it says of the others
                raise self._damaged(start, "its checksum is wrong")
            if checked and kind != _FORMAT:
                body = body[:-_CRC_BYTES]
            first = False
            if kind in _CONTROL or kind == _GTID:
                if group is not None:
                    yield self._ended(group)
                    group = None
                open_ = None
                if kind == _GTID_LIST:
                    log.begins_with = _listed(body)
                    log.ends_with = dict(log.begins_with)
                elif kind == _GTID:
                    sequence, domain = struct.unpack_from("<QI", body)
                    open_ = (start, f"{domain}-{server}-{sequence}")
            elif open_ is not None:
                group = Transaction(open_[0], self._offset, open_[1], when)
        if group is not None:
            yield self._ended(group)
        log.size_bytes, log.sha256 = self._offset, self._digest.hexdigest()

    def finish(self) -> Log:
        for _ in self.transactions():
            pass
        return self.log

    def _ended(self, group: Transaction) -> Transaction:
        log = self.log
        log.transactions += 1
        log.ends_with[int(group.gtid.partition("-")[0])] = group.gtid
        log.first_at = group.at if log.first_at is None else min(log.first_at, group.at)
        log.last_at = group.at if log.last_at is None else max(log.last_at, group.at)
        return group

    def _body(self, header: bytes, size: int) -> tuple[bytes, int, int]:
        """(the body, or its beginning where it is long, the checksum of all but the last four bytes, those four)."""
        crc, kept, left, tail = zlib.crc32(header), b"", size, b""
        while left:
            piece = self._take(min(left, _KEPT_BYTES))
            assert piece is not None
            left -= len(piece)
            if len(kept) < _KEPT_BYTES * 16:
                kept += piece
            crc = zlib.crc32((tail + piece)[:-_CRC_BYTES], crc)
            tail = (tail + piece)[-_CRC_BYTES:]
        return kept, crc, int.from_bytes(tail, "little")

    def _take(self, size: int, *, may_end: bool = False) -> bytes | None:
        while len(self._held) - self._at < size:
            self._held, self._at = self._held[self._at :], 0
            piece = next(self._pieces, None)
            if piece is None:
                if may_end and not self._held:
                    return None
                raise ArtifactError(f"{self.name} is cut short after {self._offset + len(self._held)} bytes")
            self._feed(piece)
            self._held += piece
        given = self._held[self._at : self._at + size]
        self._at += size
        self._offset += size
        return given

    def _feed(self, piece: bytes) -> None:
        while self._prefixes and self._prefixes[0] <= self._fed + len(piece):
            size = self._prefixes.pop(0)
            part = self._digest.copy()
            part.update(piece[: size - self._fed])
            self.log.prefixes[size] = part.hexdigest()
        self._digest.update(piece)
        self._fed += len(piece)

    def _damaged(self, start: int, how: str) -> ArtifactError:
        return ArtifactError(f"{self.name} is damaged: the event at {start}: {how}")


def _listed(body: bytes) -> State:
    (count,) = struct.unpack_from("<I", body)
    found: State = {}
    for number in range(count & 0x0FFFFFFF):
        domain, server, sequence = struct.unpack_from("<IIQ", body, 4 + 16 * number)
        found[domain] = f"{domain}-{server}-{sequence}"  # the last of a domain is its newest
    return found


def moment(seconds: int | None) -> dt.datetime | None:
    return None if seconds is None else dt.datetime.fromtimestamp(seconds, dt.UTC)
