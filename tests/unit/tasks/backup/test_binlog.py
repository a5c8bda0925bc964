"""A binary log is read event by event; no bit of it can be other than it was written, and none can be missing, without a word."""

from __future__ import annotations

import struct
import zlib

import pytest

from registry.errors import ArtifactError
from tasks.backup.binlog import MAGIC, Reader, Transaction, state, state_text

FORMAT, ROTATE, QUERY, XID, GTID, GTID_LIST = 15, 4, 2, 16, 162, 163


def event(kind: int, body: bytes, at: int, start: int, server: int = 7) -> bytes:
    length = 19 + len(body) + 4
    head = struct.pack("<IBIIIH", at, kind, server, length, start + length, 0)
    return head + body + struct.pack("<I", zlib.crc32(head + body))


def log(*groups: tuple[int, int, list[int]], before: tuple[tuple[int, int, int], ...] = ()) -> bytes:
    """Of (domain, sequence, times of its events), which the last of decides."""
    text = MAGIC
    text += event(FORMAT, struct.pack("<H50sIB", 4, b"10.11", 0, 19) + bytes(20) + b"\x01", 100, len(text))
    listed = b"".join(struct.pack("<IIQ", *one) for one in before)
    text += event(GTID_LIST, struct.pack("<I", len(before)) + listed, 100, len(text))
    for domain, sequence, times in groups:
        text += event(GTID, struct.pack("<QIB", sequence, domain, 0) + bytes(6), times[0], len(text))
        for at in times[:-1]:
            text += event(QUERY, b"a statement", at, len(text))
        text += event(XID, bytes(8), times[-1], len(text))
    return text + event(ROTATE, bytes(8) + b"binlog.000002", 900, len(text))


GROUPS: tuple[tuple[int, int, list[int]], ...] = ((0, 5, [100, 110]), (0, 6, [130]), (3, 1, [90, 95, 120]))
WHOLE = log(*GROUPS, before=((0, 9, 4),))


def read(data: bytes, size: int = 7) -> tuple[list[Transaction], Reader]:
    reader = Reader(
        (data[place : place + size] for place in range(0, len(data), size)), "binlog.000001", [30, len(data)]
    )
    return list(reader.transactions()), reader


def test_transactions_come_with_their_places_their_gtids_and_the_times_of_their_commits() -> None:
    found, reader = read(WHOLE)
    assert [(one.gtid, one.at) for one in found] == [("0-7-5", 110), ("0-7-6", 130), ("3-7-1", 120)]
    assert [one.end for one in found[:-1]] == [one.start for one in found[1:]]
    log = reader.log
    assert (log.first_at, log.last_at, log.transactions, log.size_bytes) == (110, 130, 3, len(WHOLE))
    assert state_text(log.begins_with) == "0-9-4" and state_text(log.ends_with) == "0-7-6,3-7-1"
    assert log.prefixes[len(WHOLE)] == log.sha256 and len(log.prefixes) == 2
    assert state("0-7-6,3-7-1") == log.ends_with


@pytest.mark.parametrize("size", [1, 19, 1 << 20])
def test_the_pieces_in_which_it_comes_make_no_difference(size: int) -> None:
    assert read(WHOLE, size)[0] == read(WHOLE)[0] and read(WHOLE, size)[1].log == read(WHOLE)[1].log


def test_one_bit_that_is_another_is_told() -> None:
    in_use = (4 + 17) * 8  # of the format event: set while the server writes the log, and no part of its checksum
    for place in range(len(WHOLE) * 8):
        damaged = bytearray(WHOLE)
        damaged[place // 8] ^= 1 << place % 8
        if place == in_use:
            assert len(read(bytes(damaged))[0]) == 3
            continue
        with pytest.raises(ArtifactError, match=r"binlog\.000001"):
            read(bytes(damaged), len(damaged))


def test_a_log_that_is_cut_inside_of_an_event_is_told() -> None:
    ends = {0}
    place = 4
    while place < len(WHOLE):
        ends.add(place)
        place += struct.unpack_from("<I", WHOLE, place + 9)[0]
    for size in range(1, len(WHOLE)):
        if size in ends:
            continue  # where it is cut between events, its size and its digest tell
        with pytest.raises(ArtifactError, match="cut short"):
            read(WHOLE[:size])


def test_what_is_no_log_is_told() -> None:
    for data in (b"", b"\xfebi", b"SQLite format 3\x00" * 9, MAGIC + event(XID, bytes(8), 1, 4)):
        with pytest.raises(ArtifactError, match=r"binlog\.000001"):
            read(data)
