"""Keys of the response cache, and answers as bytes for Redis. Nothing here is ever unpickled: what is no answer is a miss."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from registry.signature import DATATYPES

Arrays = Mapping[str, NDArray[Any]]

FORMAT = 1
"""First byte of every value in Redis. A new layout takes a new number, and servers that do not know it compute."""
KEY_BYTES = 16
_CHECK_BYTES = 16
_AHEAD = 1 + _CHECK_BYTES + KEY_BYTES + 4
_ENTRY_BYTES = 600
"""What an entry takes beside its arrays: the object itself, its key, its places in lists. Measured with tracemalloc."""
_ARRAY_BYTES = 200
_DTYPES = {np.dtype(name).newbyteorder("<").str for name in DATATYPES.values() if name != "object"}


class Answer(NamedTuple):
    """What a version answered, and the seconds of its model that this took.

    One from Redis is an answer for `left_seconds` more, None for as long as a new one. One that this process holds has a
    `serial` that no other has.
    """

    arrays: dict[str, NDArray[Any]]
    model_seconds: float
    left_seconds: float | None = None
    serial: int = 0


def computing(runtime: Any) -> tuple[str, str, str]:
    """(platform, device, precision) of a runtime, for its keys."""
    return runtime.platform, getattr(runtime, "device", "cpu"), getattr(runtime, "precision", "fp32")


class KeyMaker:
    """The keys of one loaded version: 128 bits of BLAKE2b over all that its answer depends on.

    That is the model, the version and its digest, the runtime, the kind of device and the precision (another one rounds
    differently), each input's name, type, shape and bytes, and the outputs that are asked for. Parameters of a request change no
    numbers; how the answer is written (JSON, binary, its id) is no part of it.
    Every part has its length in front, so that no two requests read alike.
    """

    def __init__(
        self, model: str, version: str, digest: str, platform: str, device: str = "cpu", precision: str = "fp32"
    ) -> None:
        """`device` may name one of several of its kind ("cuda:1")."""
        self._begun = blake2b(digest_size=KEY_BYTES, person=b"modelkeep-cache%d" % FORMAT)
        for part in (model, version, digest, platform, device.partition(":")[0], precision):
            self._begun.update(_text(part))

    def __call__(self, inputs: Arrays, outputs: tuple[str, ...] | None) -> bytes:
        hasher = self._begun.copy()
        parts = [b"%d;" % len(inputs)]
        for name in sorted(inputs) if len(inputs) > 1 else inputs:
            array = inputs[name]
            parts += (_text(name), array.dtype.str.encode(), b"%d;" % array.ndim)
            parts += [b"%d," % size for size in array.shape]
            if array.dtype.kind == "O":
                for value in array.flat:
                    data = value if isinstance(value, bytes) else str(value).encode()
                    parts += (b"%d:" % len(data), data)
            elif array.size:
                hasher.update(b"".join(parts))
                parts.clear()
                hasher.update(np.ascontiguousarray(array).data.cast("B") if array.ndim else array.tobytes())
            parts.append(b"/")
        parts.append(b"-" if outputs is None else b"%d;" % len(outputs))
        for name in outputs or ():
            parts.append(_text(name))
        hasher.update(b"".join(parts))
        return hasher.digest()


def kept(arrays: Arrays) -> tuple[dict[str, NDArray[Any]], int]:
    """The arrays for keeping, and the bytes that an entry of them takes. A slice of a batch would keep the whole batch alive."""
    own: dict[str, NDArray[Any]] = {}
    size = _ENTRY_BYTES
    for name, array in arrays.items():
        mine = own[name] = array.copy() if array.base is not None else array
        size += _ARRAY_BYTES + len(name) + mine.nbytes
        if mine.dtype.kind == "O":
            size += sum(sys.getsizeof(value) for value in mine.flat)
    return own, size


def is_longer(answer: Answer, limit_bytes: int) -> bool:
    """Whether what `pack` makes of an answer is surely longer. Quick: nothing is copied. Texts count as one byte a character."""
    size = 0
    for array in answer.arrays.values():
        size += 4 * array.size if array.dtype.kind == "O" else array.nbytes
        if size > limit_bytes:
            return True
        if array.dtype.kind == "O":
            size += sum(len(value) for value in array.flat if isinstance(value, bytes | str))
    return size > limit_bytes


def pack(key: bytes, answer: Answer) -> bytes | None:
    """An answer as bytes: format, checksum, key, header length, header, data. None for types that cannot be written."""
    header: list[list[Any]] = []
    chunks: list[bytes] = []
    for name, array in answer.arrays.items():
        if array.dtype.kind == "O":
            values = list(array.flat)
            kind = "bytes" if all(type(v) is bytes for v in values) else "str"
            if kind == "str" and not all(type(v) is str for v in values):
                return None
            raw = [v if kind == "bytes" else v.encode() for v in values]
            chunk = b"".join(len(v).to_bytes(4, "little") + v for v in raw)
        elif array.dtype.str in _DTYPES:
            kind, chunk = array.dtype.str, array.tobytes()
        else:
            return None
        header.append([name, kind, list(array.shape), len(chunk)])
        chunks.append(chunk)
    text = orjson.dumps({"seconds": answer.model_seconds, "arrays": header})
    body = b"".join((key, len(text).to_bytes(4, "little"), text, *chunks))
    return b"".join((bytes((FORMAT,)), _checksum(body), body))


def unpack(key: bytes, value: bytes) -> Answer | None:
    """The answer that `pack` made of this key; None for anything else: cut off, altered, another key's, another format."""
    if len(value) < _AHEAD or value[0] != FORMAT:
        return None
    body = value[1 + _CHECK_BYTES :]
    if value[1 : 1 + _CHECK_BYTES] != _checksum(body) or body[:KEY_BYTES] != key:
        return None
    start = KEY_BYTES + 4
    end = start + int.from_bytes(body[KEY_BYTES:start], "little")
    try:
        header = orjson.loads(body[start:end])
        arrays: dict[str, NDArray[Any]] = {}
        for name, kind, shape, size in header["arrays"]:
            arrays[str(name)] = _array(kind, tuple(shape), body[end : end + size])
            end += size
        seconds = float(header["seconds"])
    except (ValueError, TypeError, KeyError, IndexError):
        return None  # with a right checksum: written by somebody else
    return Answer(arrays, seconds) if end == len(body) else None


def _array(kind: str, shape: tuple[int, ...], data: bytes) -> NDArray[Any]:
    """Raises ValueError where the data do not fit."""
    if kind in _DTYPES:
        return np.frombuffer(data, dtype=kind).reshape(shape)
    if kind not in ("bytes", "str"):
        raise ValueError(f"{kind!r} is no kind of array")
    values: list[bytes | str] = []
    at = 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            raise ValueError("a text is cut off")
        values.append(data[at + 4 : end] if kind == "bytes" else data[at + 4 : end].decode())
        at = end
    if len(values) != math.prod(shape):
        raise ValueError(f"{len(values)} texts for the shape {shape}")
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array.reshape(shape)


def _checksum(body: bytes) -> bytes:
    return blake2b(body, digest_size=_CHECK_BYTES).digest()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"%d:%s" % (len(data), data)
