"""Content-Encoding: requests never beyond the limit, answers only where the client asks and it pays."""

from __future__ import annotations

import asyncio
import gzip
import random
import zlib

import pytest

from serving.http.compression import chosen, inflate, packed
from serving.wire.tensors import InputError


def test_bodies_are_unpacked_never_beyond_the_limit() -> None:
    assert inflate(gzip.compress(b"abc"), "gzip", 10) == b"abc"
    assert inflate(zlib.compress(b"abc"), "deflate", 10) == b"abc"
    for body, encoding, status in (
        (gzip.compress(bytes(10_000_000)), "gzip", 413),
        (b"abc", "gzip", 400),
        (gzip.compress(b"abc")[:-4], "gzip", 400),
        (b"abc", "br", 415),
    ):
        with pytest.raises(InputError) as caught:
            inflate(body, encoding, 1000)
        assert caught.value.status == status


def test_a_body_of_several_gzip_members_is_all_of_them() -> None:
    noise = random.Random(2).randbytes(200_000)
    members = [b"abc", b"", noise, b"d"]
    packed_members = b"".join(gzip.compress(member) for member in members)
    plain = b"".join(members)
    assert inflate(packed_members, "gzip", len(plain)) == plain
    assert inflate(gzip.compress(b"abc") * 10_000, "gzip", 30_000) == b"abc" * 10_000


@pytest.mark.parametrize(
    ("body", "encoding", "status", "words"),
    [
        (gzip.compress(b"a" * 600) * 2, "gzip", 413, "longer than 1000 bytes"),
        (gzip.compress(b"abc") + b"def", "gzip", 400, "not valid gzip"),
        (gzip.compress(b"abc") * 2 + gzip.compress(b"abc")[:9], "gzip", 400, "ends too early"),
        (gzip.compress(b"") * 10_001, "gzip", 400, "more than 10000 members"),
        (zlib.compress(b"abc") + b"def", "deflate", 400, "3 bytes after the end"),
        (zlib.compress(b"abc") * 2, "deflate", 400, "11 bytes after the end"),
    ],
    ids=["too long together", "no member", "cut off", "too many", "deflate", "deflate twice"],
)
def test_what_follows_the_end_of_a_packed_body_is_not_dropped(
    body: bytes, encoding: str, status: int, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        inflate(body, encoding, 1000)
    assert caught.value.status == status


def test_the_end_of_a_packed_body_may_fall_anywhere() -> None:
    noise = random.Random(4).randbytes(70_000)
    for size in (*range(65_470, 65_540), 70_000):
        for pack, encoding in ((gzip.compress, "gzip"), (zlib.compress, "deflate")):
            body = pack(noise[:size], 1)
            assert inflate(body, encoding, size) == noise[:size]
            with pytest.raises(InputError):
                inflate(body + b"x", encoding, size)
            with pytest.raises(InputError):
                inflate(body[:-1], encoding, size)


@pytest.mark.parametrize(
    ("accepts", "coding"),
    [
        (b"gzip", b"gzip"),
        (b"deflate", b"deflate"),
        (b"gzip, deflate, br", b"gzip"),
        (b"deflate, GZIP;q=0.5", b"deflate"),
        (b"*", b"gzip"),
        (b"gzip;q=0, *;q=0.1", b"deflate"),
        (b"gzip;q=0", None),
        (b"br", None),
        (b"", None),
        (b"identity", None),
        (b"identity, gzip;q=0.5", None),
        (b"gzip;q=much", None),
    ],
)
def test_the_client_chooses_the_encoding(accepts: bytes, coding: bytes | None) -> None:
    assert chosen(accepts) == coding


@pytest.mark.parametrize("size", [10_000, 1_000_000])
def test_what_packs_well_is_packed_and_noise_is_not(size: int) -> None:
    async def scenario() -> None:
        text = b"0.125," * (size // 6)
        short, coding = await packed(text, b"gzip")
        assert coding == b"gzip" and gzip.decompress(short) == text
        short, coding = await packed(text, b"deflate")
        assert coding == b"deflate" and zlib.decompress(short) == text and len(short) < len(text) / 10
        noise = random.Random(1).randbytes(size)
        assert await packed(noise, b"gzip") == (noise, None)
        # The end promises more than the whole keeps.
        mixed = noise + b"0" * 5000
        assert (await packed(mixed, b"gzip"))[1] == (None if size > 100_000 else b"gzip")
        assert await packed(text, b"br") == (text, None)

    asyncio.run(scenario())
