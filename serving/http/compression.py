"""Content-Encoding both ways: requests are unpacked within a limit, answers packed where the client asks and it pays."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from functools import lru_cache

from serving.wire.tensors import InputError

WORTH_BYTES = 8192
"""Answers shorter than this are sent as they are."""
_PAYS_BELOW = 0.9
_SAMPLE_BYTES = 4096
_INLINE_BYTES = 65536
"""What is longer is packed by a thread: zlib lets go of the interpreter, and the other requests go on."""
_LEVEL = 1
_PIECE_BYTES = 65536
_MOST_MEMBERS = 10_000
"""Of one gzip body. Each costs a decompressor and a copy of what is left of its piece, even one that holds nothing."""


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo Content-Encoding gzip or deflate, never beyond `limit` bytes. Raises InputError (413, 415 or 400).

    A gzip body may have several members (RFC 1952, 2.2); nothing else may follow the end.
    """
    if encoding not in ("gzip", "deflate"):
        raise InputError(f"Content-Encoding '{encoding}' is not supported; gzip and deflate are", status=415)
    wbits = 31 if encoding == "gzip" else 15  # RFC 9110 calls the zlib format "deflate"
    inflater = zlib.decompressobj(wbits)
    packed_bytes = memoryview(body)
    pieces: list[bytes] = []
    position, size, members = 0, 0, 1
    while position < len(body):
        if inflater.eof:
            if encoding == "deflate":
                raise InputError(f"the body has {len(body) - position} bytes after the end of its deflate data")
            members += 1
            if members > _MOST_MEMBERS:
                raise InputError(f"the gzip body has more than {_MOST_MEMBERS} members; pack it as one")
            inflater = zlib.decompressobj(wbits)
        piece = packed_bytes[position : position + _PIECE_BYTES]
        try:
            plain = inflater.decompress(piece, limit + 1 - size)
        except zlib.error as error:
            raise InputError(f"the body is not valid {encoding}: {error}") from error
        pieces.append(plain)
        size += len(plain)
        if size > limit:
            raise InputError(f"the body is longer than {limit} bytes once it is unpacked", status=413)
        position += len(piece) - len(inflater.unused_data)
    if not inflater.eof:
        raise InputError(f"the {encoding} body ends too early")
    return b"".join(pieces)


async def packed(body: bytes, accepts: bytes) -> tuple[bytes, bytes | None]:
    """The body as a client with this Accept-Encoding is best sent it, and its Content-Encoding (None: as it is)."""
    coding = chosen(accepts)
    if coding is None or not _pays(body):
        return body, None
    if len(body) <= _INLINE_BYTES:
        short = _pack(body, coding)
    else:
        short = await asyncio.to_thread(_pack, body, coding)
    return (short, coding) if len(short) < len(body) * _PAYS_BELOW else (body, None)


@lru_cache(maxsize=64)
def chosen(accepts: bytes) -> bytes | None:
    """gzip or deflate, whichever the client likes better (RFC 9110, 12.5.3); None for neither."""
    weights: dict[bytes, float] = {}
    for part in accepts.lower().split(b","):
        name, *parameters = (piece.strip() for piece in part.split(b";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith(b"q="):
                try:
                    weight = float(parameter[2:])
                except ValueError:
                    weight = 0.0
        weights[name] = weight
    others = weights.get(b"*", 0.0)
    best, coding = max((weights.get(b"gzip", others), b"gzip"), (weights.get(b"deflate", others), b"deflate"))
    return coding if best > 0 and best >= weights.get(b"identity", 0.0) else None


def _pays(body: bytes) -> bool:
    """Whether the end of the body, where tensors are, packs well: noise in binary does not, and is not tried in full."""
    sample = body[-_SAMPLE_BYTES:]
    return len(zlib.compress(sample, _LEVEL)) < len(sample) * _PAYS_BELOW


def _pack(body: bytes, coding: bytes) -> bytes:
    return gzip.compress(body, _LEVEL, mtime=0) if coding == b"gzip" else zlib.compress(body, _LEVEL)
