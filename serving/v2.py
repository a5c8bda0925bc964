"""The Open Inference Protocol V2 over REST: requests to arrays, arrays to answers, in JSON and with binary tensors.

Protocol: https://github.com/kserve/open-inference-protocol and Triton's "binary tensor data extension".
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from registry.errors import ModelkeepError, UsageError
from registry.signature import DATATYPES, Signature, TensorSpec

Array = NDArray[Any]


class InputError(UsageError):
    """A request that the protocol or the model's signature does not allow: the client's error, answered 4xx."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class OutputError(ModelkeepError):
    """The model answered something that the answer's encoding cannot carry.

    Answered 422: the request was understood and computed, and the same request with binary outputs would have
    succeeded, so it is the client's to change (5xx would invite proxies to try again, with the same end). It still
    counts as the version's error: a candidate that begins to answer NaN must not pass its canary thanks to a status.
    """

    status = 422


class InferRequest:
    """A decoded request. `outputs` is None where the client wants them all."""

    __slots__ = ("binary_default", "binary_outputs", "id", "inputs", "outputs")

    def __init__(
        self,
        id: str | None,
        inputs: dict[str, Array],
        outputs: tuple[str, ...] | None,
        binary_default: bool,
        binary_outputs: dict[str, bool],
    ) -> None:
        self.id = id
        self.inputs = inputs
        self.outputs = outputs
        self.binary_default = binary_default
        self.binary_outputs = binary_outputs


_DTYPES = {name: np.dtype(numpy).newbyteorder("<") for name, numpy in DATATYPES.items()}
_DATATYPES = {dtype: name for name, dtype in _DTYPES.items() if name != "BYTES"}
_JSON_NUMPY = orjson.OPT_SERIALIZE_NUMPY
_NO_PARAMETERS: dict[str, Any] = {}


class Codec:
    """Decodes and encodes for one signature. Has no state of its own: any thread may use it."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self._inputs = {spec.name: spec for spec in signature.inputs}
        self._required = tuple(spec.name for spec in signature.required)
        self._outputs = {spec.name for spec in signature.outputs}

    def decode(self, body: bytes | memoryview, header_length: int | None) -> InferRequest:
        """Raises InputError, which names what is wrong. `header_length`: Inference-Header-Content-Length, if sent."""
        if header_length == 0:
            return self._decode_raw(body)
        if header_length is None:
            header_length = len(body)
            document = _loads(body)
        elif header_length > len(body):
            raise InputError(f"Inference-Header-Content-Length is {header_length}, but the body has {len(body)} bytes")
        else:
            document = _loads(memoryview(body)[:header_length])
        if type(document) is not dict:
            raise InputError(f"the request must be a JSON object, it is {_json_type(document)}")
        id = document.get("id")
        if id is not None and type(id) is not str:
            raise InputError(f"'id' must be a string, it is {_json_type(id)}")
        parameters = _parameters(document, "the request")
        items = document.get("inputs")
        if type(items) is not list:
            raise InputError("the request has no 'inputs' (a list of tensors)")
        offset = header_length
        arrays: dict[str, Array] = {}
        for item in items:
            name = _name(item, "input")
            spec = self._inputs.get(name)
            if spec is None:
                raise InputError(f"the model has no input '{name}'; its inputs are {_quoted(self._inputs)}")
            if name in arrays:
                raise InputError(f"input '{name}' was sent twice")
            shape = _shape(item, spec)
            size = _parameters(item, f"input '{name}'").get("binary_data_size")
            if size is None:
                if "data" not in item:
                    raise InputError(f"input '{name}' has neither 'data' nor the parameter 'binary_data_size'")
                arrays[name] = _from_json(name, spec.datatype, shape, item["data"])
                continue
            if "data" in item:
                raise InputError(
                    f"input '{name}' has both 'data' and the parameter 'binary_data_size'; send one of them"
                )
            if type(size) is not int or size < 0:
                raise InputError(f"input '{name}': 'binary_data_size' must be a number of bytes, it is {_brief(size)}")
            if offset + size > len(body):
                left = len(body) - offset
                raise InputError(
                    f"input '{name}' says {size} bytes of binary data, but only {left} are left in the body"
                )
            arrays[name] = _from_binary(name, spec.datatype, shape, body, offset, size)
            offset += size
        if len(arrays) != len(self._inputs) and (missing := [name for name in self._required if name not in arrays]):
            raise InputError(f"input {_quoted(missing)} is missing; the model's inputs are {_quoted(self._inputs)}")
        if offset != len(body):
            raise InputError(f"{len(body) - offset} bytes of the body belong to no tensor")
        outputs, binary_outputs = self._wanted(document.get("outputs"))
        return InferRequest(
            id, arrays, outputs, _flag(parameters, "binary_data_output", "the request", default=False), binary_outputs
        )

    def _wanted(self, items: Any) -> tuple[tuple[str, ...] | None, dict[str, bool]]:
        binary: dict[str, bool] = {}
        if not items and (items is None or type(items) is list):
            return None, binary
        if type(items) is not list:
            raise InputError(f"'outputs' must be a list, it is {_json_type(items)}")
        names: list[str] = []
        for item in items:
            name = _name(item, "output")
            if name not in self._outputs:
                known = _quoted(spec.name for spec in self.signature.outputs)
                raise InputError(f"the model has no output '{name}'; its outputs are {known}")
            if name in names:
                raise InputError(f"output '{name}' was asked for twice")
            names.append(name)
            parameters = _parameters(item, f"output '{name}'")
            if parameters:
                if parameters.get("classification"):
                    raise InputError(f"output '{name}': the parameter 'classification' is not supported")
                if "binary_data" in parameters:
                    binary[name] = _flag(parameters, "binary_data", f"output '{name}'", default=False)
        return tuple(names), binary

    def _decode_raw(self, body: bytes | memoryview) -> InferRequest:
        """A header length of 0: the whole body is the one input's data, and outputs come back in binary."""
        if len(self._required) != 1:
            count = len(self._required)
            raise InputError(
                f"Inference-Header-Content-Length 0 (a raw tensor) needs a model of one input; this has {count}"
            )
        spec = self._inputs[self._required[0]]
        fixed = math.prod(n for n in spec.shape if n >= 0)
        free = sum(n < 0 for n in spec.shape)
        if spec.datatype == "BYTES" or free > 1:
            raise InputError(
                f"input '{spec.name}' cannot be sent as a raw tensor: its shape does not follow from its size"
            )
        item_size = _DTYPES[spec.datatype].itemsize * fixed
        if item_size == 0 or len(body) % item_size or (not free and len(body) != item_size):
            unit = "a multiple of " if free else ""
            raise InputError(
                f"input '{spec.name}' as a raw tensor needs {unit}{item_size} bytes, the body has {len(body)}"
            )
        shape = tuple(len(body) // item_size if n < 0 else n for n in spec.shape)
        array = _from_binary(spec.name, spec.datatype, shape, body, 0, len(body))
        return InferRequest(None, {spec.name: array}, None, True, {})

    def encode(
        self,
        model: str,
        version: str,
        request: InferRequest,
        outputs: Mapping[str, Array],
        parameters: Mapping[str, Any],
    ) -> tuple[bytes, int | None]:
        """The body and, where it has binary tensors, the length of its JSON header. Raises OutputError."""
        items: list[dict[str, Any]] = []
        chunks: list[bytes] = []
        floats: list[tuple[str, Array]] = []
        for name, array in outputs.items():
            binary = request.binary_outputs.get(name, request.binary_default)
            datatype = _DATATYPES.get(array.dtype)
            shape = list(array.shape)
            if datatype is None and array.dtype.kind not in "OSU":
                raise OutputError(f"output '{name}' has the type {array.dtype}, which the V2 protocol cannot carry")
            if binary:
                chunk = _pack_bytes(array) if datatype is None else array.tobytes()
                chunks.append(chunk)
                size = {"binary_data_size": len(chunk)}
                items.append({"name": name, "datatype": datatype or "BYTES", "shape": shape, "parameters": size})
                continue
            if datatype is None:
                data: Any = _texts(name, array)
                datatype = "BYTES"
            else:
                data = np.ascontiguousarray(array).reshape(-1)
                if array.dtype.kind == "f":
                    floats.append((name, array))
            items.append({"name": name, "datatype": datatype, "shape": shape, "data": data})
        document: dict[str, Any] = {"model_name": model, "model_version": version, "parameters": parameters}
        if request.id is not None:
            document["id"] = request.id
        document["outputs"] = items
        header = orjson.dumps(document, option=_JSON_NUMPY)
        # orjson writes NaN and infinities as null: looking for that is cheaper than looking at every number.
        if floats and b"null" in header:
            for name, array in floats:
                if not np.isfinite(array).all():
                    raise OutputError(
                        f"output '{name}' of model '{model}' version '{version}' has NaN or Infinity, which JSON "
                        f"cannot carry; ask for it in binary (output parameter binary_data, or request parameter "
                        f"binary_data_output)"
                    )
        if not chunks:
            return header, None
        return b"".join((header, *chunks)), len(header)


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo Content-Encoding gzip or deflate, never beyond `limit` bytes. Raises InputError (413, 415 or 400)."""
    if encoding not in ("gzip", "deflate"):
        raise InputError(f"Content-Encoding '{encoding}' is not supported; gzip and deflate are", status=415)
    # RFC 9110 calls the zlib format "deflate".
    inflater = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15)
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise InputError(f"the body is not valid {encoding}: {error}") from error
    if len(plain) > limit:
        raise InputError(f"the body is longer than {limit} bytes once it is unpacked", status=413)
    if not inflater.eof:
        raise InputError(f"the {encoding} body ends too early")
    return plain


def _loads(text: bytes | memoryview) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raw = bytes(text)
        if not raw:
            raise InputError("the body is empty; an inference request is a JSON object") from error
        hint = ""
        if b"NaN" in raw or b"Infinity" in raw:
            hint = "; JSON has no NaN or Infinity: send such tensors as binary data"
        raise InputError(f"the request is not valid JSON: {error}{hint}") from error


def _name(item: Any, what: str) -> str:
    if type(item) is not dict:
        raise InputError(f"every {what} must be a JSON object, one is {_json_type(item)}")
    name = item.get("name")
    if type(name) is not str:
        raise InputError(f"an {what} has no 'name' (a string)")
    return name


def _parameters(holder: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:
        return _NO_PARAMETERS
    if type(parameters) is not dict:
        raise InputError(f"'parameters' of {where} must be a JSON object, it is {_json_type(parameters)}")
    return parameters


def _flag(parameters: dict[str, Any], name: str, where: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise InputError(f"the parameter '{name}' of {where} must be true or false, it is {_brief(value)}")
    return value


def _shape(item: dict[str, Any], spec: TensorSpec) -> tuple[int, ...]:
    datatype = item.get("datatype")
    if datatype != spec.datatype:
        if datatype is None:
            raise InputError(f"input '{spec.name}' has no 'datatype'; the model takes {spec.datatype}")
        raise InputError(f"input '{spec.name}' has the datatype {_brief(datatype)}, the model takes {spec.datatype}")
    shape = item.get("shape")
    if type(shape) is not list:
        raise InputError(f"input '{spec.name}' has no 'shape' (a list of numbers)")
    for n in shape:
        if type(n) is not int or not 0 <= n <= 2**31:
            raise InputError(f"input '{spec.name}': {_brief(n)} in 'shape' is not a dimension")
    dimensions = tuple(shape)
    if not spec.accepts(dimensions):
        want = list(spec.shape)
        raise InputError(f"input '{spec.name}' has the shape {_brief(shape)}, the model takes {want} (-1: any)")
    return dimensions


def _from_json(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> Array:
    if type(data) is not list:
        raise InputError(f"input '{name}': 'data' must be a list, it is {_json_type(data)}")
    count = math.prod(shape)
    if datatype == "BYTES":
        array = np.array(data, dtype=object)
        if any(type(value) is not str for value in array.flat):
            raise InputError(f"input '{name}': the elements of BYTES must be strings, in lists of equal lengths")
        texts = np.empty(array.shape, dtype=object)
        texts.reshape(-1)[:] = [value.encode() for value in array.flat]
        array = texts
    else:
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


def _to_datatype(name: str, datatype: str, array: Array, data: Any) -> Array:
    dtype = _DTYPES[datatype]
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
    want = {"f": "numbers", "b": "true or false", "i": "whole numbers", "u": "whole numbers"}[kind]
    raise InputError(f"input '{name}': the elements of {datatype} must be {want}")


def _whole_numbers(name: str, datatype: str, data: Any) -> Array:
    array = np.array(data, dtype=object)
    if any(type(value) is not int for value in array.flat):
        raise InputError(f"input '{name}': the elements of {datatype} must be whole numbers")
    return array


def _from_binary(
    name: str, datatype: str, shape: tuple[int, ...], body: bytes | memoryview, offset: int, size: int
) -> Array:
    count = math.prod(shape)
    if datatype == "BYTES":
        return _unpack_bytes(name, shape, count, memoryview(body)[offset : offset + size])
    dtype = _DTYPES[datatype]
    if size != count * dtype.itemsize:
        need = count * dtype.itemsize
        raise InputError(f"input '{name}' has {size} bytes, its shape {list(shape)} of {datatype} needs {need}")
    if datatype == "BOOL":
        return np.frombuffer(body, np.uint8, count, offset).reshape(shape).astype(np.bool_)
    array = np.frombuffer(body, dtype, count, offset) if count else np.empty(0, dtype)
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape)


def _unpack_bytes(name: str, shape: tuple[int, ...], count: int, data: memoryview) -> Array:
    """Every element is its length in four little-endian bytes, then its bytes."""
    elements: list[bytes] = []
    position = 0
    while position < len(data):
        start = position + 4
        end = start + int.from_bytes(data[position:start], "little")
        if end > len(data) or start > len(data):
            raise InputError(f"input '{name}': element {len(elements)} of BYTES ends beyond its binary data")
        elements.append(bytes(data[start:end]))
        position = end
    if len(elements) != count:
        raise InputError(f"input '{name}' has {len(elements)} elements, its shape {list(shape)} needs {count}")
    array = np.empty(count, dtype=object)
    array[:] = elements
    return array.reshape(shape)


def _pack_bytes(array: Array) -> bytes:
    parts: list[bytes] = []
    for value in array.reshape(-1):
        element = value if isinstance(value, bytes) else str(value).encode()
        parts += (len(element).to_bytes(4, "little"), element)
    return b"".join(parts)


def _texts(name: str, array: Array) -> list[str]:
    try:
        return [value.decode() if isinstance(value, bytes) else str(value) for value in array.reshape(-1)]
    except UnicodeDecodeError as error:
        raise OutputError(
            f"output '{name}' has bytes that are not UTF-8, which JSON cannot carry; ask for binary"
        ) from error


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
