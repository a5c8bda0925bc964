"""Shipped logs in several places: one that was away gets what it lacks, a longer copy too, and nobody's longer copy gives way to a shorter."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from registry.errors import NotFoundError, StorageError
from tasks.backup import codec, logs
from tasks.backup.logs import Shelf, Shipped
from tasks.backup.places import DirectoryPlace, Place
from tasks.backup.repository import Repository
from tests.backup_content import keyed
from tests.unit.tasks.backup.log_history import BEGIN, Killed, MemoryPlace

ONE, TWO = "binlog.000001", "binlog.000002"
DOCUMENT = f"logs/app/000001/{ONE}.json"


class AskedPlace(MemoryPlace):
    """`asked`: the names that were read. `before_get` and `before_put` may raise."""

    def __init__(self, shown: str) -> None:
        super().__init__(shown)
        self.asked: list[str] = []
        self.before_get: Callable[[str], None] = lambda _: None
        self.before_put: Callable[[str], None] = lambda _: None

    def get(self, name: str) -> bytes:
        self.asked.append(name)
        self.before_get(name)
        return super().get(name)

    def put(self, name: str, data: bytes, **how: object) -> None:  # type: ignore[override]
        self.before_put(name)
        super().put(name, data, **how)  # type: ignore[arg-type]


def content(log: str, size: int) -> bytes:
    return random.Random(log).randbytes(size)


def put(
    place: Place | Repository, size: int, log: str = ONE, *, closed: bool = True, covers: str = "2026-11-01"
) -> Shipped:
    """A log as a shipment puts it: in place of the shorter copy of the open log, where there is one."""
    repository = place if isinstance(place, Repository) else Repository([place])
    shelf, data = Shelf(repository, "app"), content(log, size)
    try:
        before = shelf.read(1, log)
    except NotFoundError:
        before = None
    one = Shipped(
        "app", "mariadb", "7:1", 1, log, closed, size, logs.digest([data]), "", f"0-7-{size}", 1, None, None, covers, covers,
        shelf.put_pieces(1, log, [data]),
    )  # fmt: skip
    shelf.put(one)
    if before is not None:
        shelf.forget(before, before.pieces)
    return one


def whole(place: Place, size: int, log: str = ONE) -> bool:
    """Whether a place alone has this much of a log, and no piece of another copy."""
    shelf = Shelf(Repository([place]), "app")
    one = shelf.read(1, log)
    due = {one.piece_name(piece) for piece in one.pieces}
    listed = {stat.name for stat in place.list(f"logs/app/000001/{log}.pieces/")}
    return b"".join(shelf.open(one)) == content(log, size) and due == listed


def two() -> tuple[AskedPlace, AskedPlace, Callable[[], Shelf]]:
    first, second = AskedPlace("first"), AskedPlace("second")
    return first, second, lambda: Shelf(Repository([first, second]), "app")


@pytest.mark.parametrize("newer_is_there", [False, True], ids=["", "it has what came after"])
@pytest.mark.parametrize("away", [0, 1])
def test_a_place_that_was_away_while_a_log_grew_has_all_of_it_when_it_is_back(away: int, newer_is_there: bool) -> None:
    first, second, shelf = two()
    present, back = (second, first) if away == 0 else (first, second)
    for place in (present, back):
        put(place, 100, closed=False)
    put(present, 500)
    for place in (present, back) if newer_is_there else (present,):
        put(place, 50, TWO)
    assert shelf().copy_missing() == (1 if newer_is_there else 2)
    assert whole(back, 500) and whole(back, 50, TWO) and whole(present, 500)
    for place in (first, second):
        place.asked.clear()
    assert shelf().copy_missing() == 0
    assert first.asked == second.asked == [], "where they list the same, nothing is read"


@pytest.mark.parametrize("closed", [False, True])
def test_the_longer_copy_in_the_spool_comes_to_the_bucket_and_leaves_the_spool(closed: bool, tmp_path: Path) -> None:
    bucket = AskedPlace("bucket")
    put(bucket, 100, closed=False)
    spooled = Repository([bucket], spool=tmp_path)
    spooled.is_down(0, StorageError("the bucket does not answer"))
    put(spooled, 500, closed=closed)
    assert whole(bucket, 100) and whole(DirectoryPlace(tmp_path), 500)
    shelf = Shelf(Repository([bucket], spool=tmp_path), "app")
    assert shelf.copy_missing() == 1 and not shelf.damaged
    assert whole(bucket, 500)
    assert not [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]


def test_a_shorter_copy_in_the_spool_goes_where_every_place_has_a_longer_one(tmp_path: Path) -> None:
    bucket = AskedPlace("bucket")
    put(DirectoryPlace(tmp_path), 100, closed=False)
    put(bucket, 500)
    shelf = Shelf(Repository([bucket], spool=tmp_path), "app")
    assert shelf.copy_missing() == 0 and whole(bucket, 500)
    assert not [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]


def test_a_document_in_the_spool_that_cannot_be_believed_stays_and_is_told(tmp_path: Path) -> None:
    bucket = AskedPlace("bucket")
    put(DirectoryPlace(tmp_path), 500)
    put(bucket, 100)
    (tmp_path / DOCUMENT).write_bytes(b"torn")
    shelf = Shelf(Repository([bucket], spool=tmp_path), "app")
    assert shelf.copy_missing() == 0 and "it is torn" in shelf.damaged[DOCUMENT]
    assert (tmp_path / DOCUMENT).exists() and whole(bucket, 100)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_document_that_says_the_same_in_other_bytes_is_not_copied_again(encrypted: bool, tmp_path: Path) -> None:
    first, second, _ = two()
    keyring = keyed([first, second], tmp_path)[1] if encrypted else None
    spool = tmp_path / "spool"
    one = put(Repository([first, second], keyring), 100)
    put(Repository([DirectoryPlace(spool)], keyring), 100)
    second.names[one.name] = json.dumps(json.loads(second.names[one.name]), indent=7).encode()
    assert second.names[one.name] != first.names[one.name]
    if (
        encrypted
    ):  # the spool's has its own nonces, and so is not of the same pieces: what is there is not replaced by another
        (spool / DOCUMENT).write_bytes(first.names[one.name])
    before = dict(second.names)
    shelf = Shelf(Repository([first, second], keyring, spool=spool), "app")
    assert shelf.copy_missing() == 0 and shelf.copy_missing() == 0
    assert second.names == before and not (spool / DOCUMENT).exists()


@pytest.mark.parametrize("fails", [1, 2, 99])
def test_a_longer_copy_that_is_not_read_just_now_gives_not_way_to_a_shorter_one(fails: int) -> None:
    first, second, shelf = two()
    put(first, 500, closed=False)
    put(second, 100, closed=False)
    failing = iter(range(fails))

    def silent(name: str) -> None:
        if name == DOCUMENT and next(failing, None) is not None:
            raise StorageError(f"{name} could not be read: the store does not answer")

    first.before_get = silent
    found = shelf()
    found.copy_missing()
    assert not found.repository.down
    assert ("does not answer" in found.damaged.get(DOCUMENT, "")) is (fails > 1)
    first.before_get = lambda _: None
    assert whole(first, 500)
    shelf().copy_missing()
    assert whole(second, 500)


@pytest.mark.parametrize("closed", [False, True])
def test_a_document_that_is_torn_is_put_anew_where_no_copy_can_be_longer_and_told_where_one_can(closed: bool) -> None:
    first, second, shelf = two()
    for place in (first, second):
        put(place, 100, closed=closed)
    first.names[DOCUMENT] = b"torn"
    found = shelf()
    assert found.copy_missing() == (1 if closed else 0)
    assert ("it is torn" in found.damaged.get(DOCUMENT, "")) is not closed
    assert (first.names[DOCUMENT] == second.names[DOCUMENT]) is closed


def test_a_piece_that_a_place_lacks_comes_to_it(tmp_path: Path) -> None:
    first, second, shelf = two()
    one = put(Repository([first, second]), 100)
    [piece] = one.pieces
    del second.names[one.piece_name(piece)]
    assert shelf().copy_missing() == 1 and whole(second, 100)


def test_a_longer_copy_whose_bytes_are_damaged_replaces_nothing_and_is_told() -> None:
    first, second, shelf = two()
    put(second, 100, closed=False)
    one = put(first, 500)
    first.names[one.piece_name(one.pieces[0])] = b"other bytes"
    put(first, 50, TWO)
    found = shelf()
    assert found.copy_missing() == 1 and "is damaged" in found.damaged[DOCUMENT]
    assert whole(second, 100) and whole(second, 50, TWO)


def test_what_the_longer_copy_does_not_use_goes_as_far_as_it_is_let_go_and_what_is_put_is_locked() -> None:
    first, second, _ = two()
    short = put(second, 100, closed=False)
    one = put(first, 500)
    second.refuse(".pieces/")
    shelf = Shelf(Repository([first, second]), "app", keep_until=BEGIN)
    assert shelf.copy_missing() == 1 and not shelf.damaged
    assert second.names[one.name] == first.names[one.name]
    due = {one.name, *map(one.piece_name, one.pieces)}
    assert {name for name, until in second.kept.items() if until == BEGIN} == due
    assert second.names.keys() - due == {short.piece_name(piece) for piece in short.pieces}
    assert shelf.copy_missing() == 0, "what was not let go is no reason to copy it again"


def test_killed_at_any_step_the_place_has_one_of_the_two_copies_and_the_next_run_brings_the_longer() -> None:
    for limit in range(9):
        first, second, shelf = two()
        put(second, 100, closed=False)
        put(first, 500)
        steps = iter(range(9))

        def die(name: str, limit: int = limit, steps: object = steps) -> None:
            if next(steps) == limit:  # type: ignore[call-overload]
                raise Killed

        second.before_put = second.before_delete = die
        try:
            shelf().copy_missing()
        except Killed:
            pass
        else:
            assert limit == 3  # a piece, the document, a piece of the shorter copy
            return
        second.before_put = second.before_delete = lambda _: None
        alone = Shelf(Repository([second]), "app")
        one = alone.read(1, ONE)
        assert b"".join(alone.open(one)) == content(ONE, one.size_bytes)
        shelf().copy_missing()
        assert alone.read(1, ONE).size_bytes == 500 and b"".join(alone.open(alone.read(1, ONE))) == content(ONE, 500)
    raise AssertionError("it goes on without an end")


def test_a_place_that_does_not_give_its_bytes_is_not_laid_to_the_one_that_lacks_them() -> None:
    first, second, shelf = two()
    for number in range(1, 9):
        put(first, 100, f"binlog.{number:06d}")

    def silent(name: str) -> None:
        if ".pieces/" in name and "binlog.000001" not in name:
            raise StorageError(f"{name} could not be read: the store does not answer")

    first.before_get = silent
    found = shelf()
    assert found.copy_missing() == 1 and whole(second, 100)
    assert not found.repository.down, "the second place takes what is new"
    assert len(found.damaged) == logs.SILENT, "a thousand logs do not wait for a store that is away"
    first.before_get = lambda _: None
    assert shelf().copy_missing() == 7


def test_logs_here_and_there_that_a_place_does_not_give_stop_none_of_the_others() -> None:
    first, _, shelf = two()
    for number in range(1, 11):
        put(first, 100, f"binlog.{number:06d}")

    def broken(name: str) -> None:
        if ".pieces/" in name and int(name.split("/")[3].split(".")[1]) % 2:
            raise StorageError(f"{name} could not be read: the disk has errors")

    first.before_get = broken
    found = shelf()
    assert found.copy_missing() == 5 and len(found.damaged) == 5


def test_what_the_places_have_in_another_encoding_is_not_read() -> None:
    first, second, shelf = two()
    one = put(Repository([first, second]), 100)
    name = one.piece_name(one.pieces[0])
    second.names[name] = zstandard.ZstdCompressor().compress(second.names[name])
    assert len(second.names[name]) != len(first.names[name])
    first.asked.clear()
    second.asked.clear()
    assert shelf().copy_missing() == 0 and first.asked == second.asked == [] and shelf().read(1, ONE) == one


def test_the_spool_keeps_a_log_whose_bytes_did_not_come_to_the_bucket(tmp_path: Path) -> None:
    bucket = AskedPlace("bucket")
    one = put(bucket, 100)
    put(DirectoryPlace(tmp_path), 100)
    piece = one.piece_name(one.pieces[0])
    del bucket.names[piece]
    whole_piece = (tmp_path / piece).read_bytes()
    (tmp_path / piece).write_bytes(b"other bytes")
    shelf = Shelf(Repository([bucket], spool=tmp_path), "app")
    assert shelf.copy_missing() == 0 and "is damaged" in shelf.damaged[DOCUMENT] and (tmp_path / DOCUMENT).exists()
    (tmp_path / piece).write_bytes(whole_piece)
    assert Shelf(Repository([bucket], spool=tmp_path), "app").copy_missing() == 1
    assert whole(bucket, 100) and not (tmp_path / DOCUMENT).exists()


def test_while_the_bucket_is_away_nothing_of_it_is_copied_to_the_spool(tmp_path: Path) -> None:
    bucket = AskedPlace("bucket")
    put(bucket, 100)
    repository = Repository([bucket], spool=tmp_path)
    repository.is_down(0, StorageError("the bucket did not answer a moment ago"))
    assert Shelf(repository, "app").copy_missing() == 0 and not list(tmp_path.rglob("*.json"))


def test_a_place_that_takes_nothing_is_left_out_and_the_last_one_is_told() -> None:
    first, second, shelf = two()
    put(first, 100)

    def full(name: str) -> None:
        raise StorageError("the disk is full")

    second.before_put = full
    found = shelf()
    assert found.copy_missing() == 0 and list(found.repository.down) == [1] and not found.damaged
    calls = iter(range(1))

    def away_at_first(_: str) -> None:
        if next(calls, None) is not None:
            raise StorageError("the store does not answer")

    first.before_list = away_at_first
    with pytest.raises(StorageError, match="the disk is full"):
        shelf().copy_missing()


def test_of_two_copies_of_one_length_that_which_covers_more_is_read() -> None:
    first, second, shelf = two()
    put(first, 100, closed=False, covers="2026-11-01")
    longer = put(second, 100, closed=False, covers="2026-11-02")
    assert shelf().read(1, ONE) == longer
    put(first, 100, covers="2026-11-01")
    assert shelf().read(1, ONE) == replace(longer, closed=True, covers_until="2026-11-01", shipped_at="2026-11-01")


@pytest.mark.timeout(20)
def test_a_log_that_comes_in_small_pieces_is_put_together_in_one_go() -> None:
    place, size = MemoryPlace(), codec.CHUNK_BYTES + 1000
    data = (content(ONE, 1 << 16) * (size // (1 << 16) + 1))[:size]
    shelf = Shelf(Repository([place]), "app")
    pieces = shelf.put_pieces(1, ONE, (data[at : at + 256] for at in range(0, size, 256)))
    assert [piece.size_bytes for piece in pieces] == [codec.CHUNK_BYTES, 1000]
    names = [logs.piece_name("app", 1, ONE, piece) for piece in pieces]
    stored = zip(names, pieces, strict=True)
    assert b"".join(codec.decode(place.names[name], piece, None) for name, piece in stored) == data
