"""Content-Encoding: requests never beyond the limit, answers only where the client asks and it pays."""

from __future__ import annotations

import asyncio
import gzip
import random
import zlib

import pytest

from serving.compression import chosen, inflate, packed
from serving.tensors import InputError


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
