"""Tensors of the V2 protocol, one at a time: from JSON or bytes to arrays and back. Requests and answers are serving.wire.v2's.

BF16, which numpy lacks, is float32 inside this server: every BF16 number is one. It travels in binary only.
"""

from __future__ import annotations

import array as arrays
import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import ModelkeepError, UsageError
from registry.signature import DATATYPES

Array = NDArray[Any]


class InputError(UsageError):
    """A request that the protocol or the model's signature does not allow: the client's error, answered 4xx.

    `unread`: the client may still be sending.
    """

    def __init__(self, message: str, status: int = 400, *, unread: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.unread = unread


class OutputError(ModelkeepError):
    """The model answered something that the answer's encoding cannot carry.

    Answered 422: the request was understood and computed, and the same request with binary outputs would have
    succeeded, so it is the client's to change (5xx would invite proxies to try again, with the same end). It still
    counts as the version's error: a candidate that begins to answer NaN must not pass its canary thanks to a status.
    """

    status = 422
    kind = "output"


BF16 = np.dtype("V2")
"""What BF16 is on its way out (`to_bf16`): two bytes that are no number to numpy."""
DTYPES = {name: np.dtype(numpy).newbyteorder("<") for name, numpy in DATATYPES.items()} | {"BF16": np.dtype("<u2")}
"""Datatype -> dtype on the wire."""
DATATYPE_OF = {dtype: name for name, dtype in DTYPES.items() if name not in ("BYTES", "BF16")} | {BF16: "BF16"}
_NOT_IN_JSON_AS_NUMBERS = frozenset({"BYTES", "BF16"})
_NOT_IN_MEMORY_AS_SENT = frozenset({"BOOL", "BF16"})
_ELEMENTS = {"f": "numbers", "b": "true or false", "i": "whole numbers", "u": "whole numbers"}


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> Array:
    if type(data) is not list:
        raise InputError(f"input '{name}': 'data' must be a list, it is {json_type(data)}")
    count = math.prod(shape)
    if datatype in _NOT_IN_JSON_AS_NUMBERS:
        if datatype == "BF16":
            raise InputError(f"input '{name}' is BF16, which JSON cannot carry: send it as binary data")
        array = np.array(data, dtype=object)
        flat = array.reshape(-1)  # `flat` is for 32 dimensions at most
        if any(type(value) is not str for value in flat):
            raise InputError(f"input '{name}': the elements of BYTES must be strings, in lists of equal lengths")
        texts = np.empty(array.shape, dtype=object)
        texts.reshape(-1)[:] = [value.encode() for value in flat]
        array = texts
    elif (floats := _flat_floats(data)) is not None:
        array = _to_datatype(name, datatype, floats, data)
    else:
        if _has_text(data):  # numpy would make every element as long as the longest text
            raise _unfit_elements(name, datatype)
        try:
            array = np.array(data)
        except (ValueError, OverflowError) as error:
            raise InputError(f"input '{name}': 'data' has rows of different lengths") from error
        array = _to_datatype(name, datatype, array, data)
    if array.shape == shape:
        return array
    if array.ndim != 1 and array.size == count:
        raise InputError(f"input '{name}': 'data' is nested as {list(array.shape)}, but its shape is {list(shape)}")
    if array.size != count:
        raise InputError(f"input '{name}' has {array.size} elements, its shape {list(shape)} needs {count}")
    return array.reshape(shape)


def _flat_floats(data: list[Any]) -> Array | None:
    """What numpy makes of a flat list of numbers that begins with a fraction, in half the time: it need not look for their type. Else None."""
    if not data or type(data[0]) is not float:
        return None
    try:
        return np.frombuffer(arrays.array("d", data))
    except (TypeError, OverflowError):
        return None


def _has_text(data: list[Any]) -> bool:
    lists = [data]
    while lists:
        deeper: list[list[Any]] = []
        for one in lists:
            if one and type(one[0]) is not list:
                # The quickest look at many: fails on all but numbers, and on whole ones beyond all fractions, which no JSON has.
                with suppress(TypeError, OverflowError):
                    sum(one)
                    continue
            kinds = set(map(type, one))
            if str in kinds:
                return True
            if list in kinds:
                deeper += [inner for inner in one if type(inner) is list] if len(kinds) > 1 else one
        lists = deeper
    return False


def _unfit_elements(name: str, datatype: str) -> InputError:
    return InputError(f"input '{name}': the elements of {datatype} must be {_ELEMENTS[DTYPES[datatype].kind]}")


def _to_datatype(name: str, datatype: str, array: Array, data: Any) -> Array:
    dtype = DTYPES[datatype]
    kind, found = dtype.kind, array.dtype.kind
    if array.size == 0:
        return array.astype(dtype)
    if kind == "f" and found in "fiu":
        if array.dtype == dtype:
            return array
        try:
            with np.errstate(over="raise"):
                return array.astype(dtype)
        except FloatingPointError as error:
            raise InputError(f"input '{name}' has a number that is too large for {datatype}") from error
    if kind == "b" and found == "b":
        return array
    if kind in "iu":
        if found in "fO":
            # Whole numbers beyond INT64 become floats or objects on the way; fractions and null do as well.
            array = _whole_numbers(name, datatype, data)
            found = "i"
        if found in "iu":
            limits = np.iinfo(dtype)
            if array.dtype != dtype and (int(array.min()) < limits.min or int(array.max()) > limits.max):
                raise InputError(
                    f"input '{name}' has a number that does not fit {datatype} ({limits.min} to {limits.max})"
                )
            return array.astype(dtype, copy=False)
    raise _unfit_elements(name, datatype)


def _whole_numbers(name: str, datatype: str, data: Any) -> Array:
    array = np.array(data, dtype=object)
    if any(type(value) is not int for value in array.reshape(-1)):
        raise _unfit_elements(name, datatype)
    return array


def from_binary(
    name: str, datatype: str, shape: tuple[int, ...], body: bytes | memoryview, offset: int, size: int
) -> Array:
    count = math.prod(shape)
    if datatype == "BYTES":
        return _unpack_bytes(name, shape, count, memoryview(body)[offset : offset + size])
    dtype = DTYPES[datatype]
    if size != count * dtype.itemsize:
        need = count * dtype.itemsize
        raise InputError(f"input '{name}' has {size} bytes, its shape {list(shape)} of {datatype} needs {need}")
    if datatype in _NOT_IN_MEMORY_AS_SENT:
        bits = np.frombuffer(body, np.uint8, size, offset)
        return (bits.astype(np.bool_) if datatype == "BOOL" else from_bf16(bits.tobytes())).reshape(shape)
    array = np.frombuffer(body, dtype, count, offset) if count else np.empty(0, dtype)
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape)


def from_bf16(data: bytes) -> Array:
    """The upper halves of float32."""
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def to_bf16(array: Array) -> Array:
    """The nearest BF16 (ties to even), as `BF16`. What was BF16 before comes back bit by bit; NaN stays NaN."""
    bits = np.asarray(array, dtype=np.float32, order="C").view(np.uint32)
    with np.errstate(over="ignore"):  # of NaN, which is replaced; numpy tells of it where there is one number
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    quiet = (bits >> 16) | 0x40
    halves = np.where(np.isnan(array), quiet, rounded).astype("<u2")
    return halves.view(BF16)


def _unpack_bytes(name: str, shape: tuple[int, ...], count: int, data: memoryview) -> Array:
    """Every element is its length in four little-endian bytes, then its bytes."""
    elements: list[bytes] = []
    position = 0
    while position < len(data):
        start = position + 4
        end = start + int.from_bytes(data[position:start], "little")
        if end > len(data) or start > len(data):
            raise InputError(f"input '{name}': element {len(elements)} of BYTES ends beyond its binary data")
        if len(elements) == count:
            raise InputError(f"input '{name}' has more elements than the {count} that its shape {list(shape)} needs")
        elements.append(bytes(data[start:end]))
        position = end
    if len(elements) != count:
        raise InputError(f"input '{name}' has {len(elements)} elements, its shape {list(shape)} needs {count}")
    array = np.empty(count, dtype=object)
    array[:] = elements
    return array.reshape(shape)


def pack_bytes(array: Array) -> bytes:
    parts: list[bytes] = []
    for value in array.reshape(-1):
        element = value if isinstance(value, bytes) else str(value).encode()
        parts += (len(element).to_bytes(4, "little"), element)
    return b"".join(parts)


def texts(name: str, array: Array) -> list[str]:
    try:
        return [value.decode() if isinstance(value, bytes) else str(value) for value in array.reshape(-1)]
    except UnicodeDecodeError as error:
        raise OutputError(
            f"output '{name}' has bytes that are not UTF-8, which JSON cannot carry; ask for binary"
        ) from error


def json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
