"""The Open Inference Protocol V2 over REST: requests to arrays, arrays to answers, in JSON and with binary tensors.

Protocol: https://github.com/kserve/open-inference-protocol and Triton's "binary tensor data extension".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from registry.signature import Signature, TensorSpec
from serving.wire.classification import UNFIT, classify
from serving.wire.tensors import (
    DATATYPE_OF,
    DTYPES,
    Array,
    InputError,
    OutputError,
    brief,
    from_binary,
    from_json,
    json_type,
    pack_bytes,
    quoted,
    texts,
    to_bf16,
)


class InferRequest:
    """A decoded request. `outputs` is None where the client wants them all.

    `classes` says of which outputs the client wants the largest numbers, and how many; None: every output travels as it
    was computed. `timeout_seconds` is the client's own deadline, 0 where it has none.
    """

    __slots__ = ("binary_default", "binary_outputs", "classes", "id", "inputs", "outputs", "timeout_seconds")

    def __init__(
        self,
        id: str | None,
        inputs: dict[str, Array],
        outputs: tuple[str, ...] | None,
        binary_default: bool,
        binary_outputs: dict[str, bool],
        classes: dict[str, int] | None = None,
    ) -> None:
        self.id = id
        self.inputs = inputs
        self.outputs = outputs
        self.binary_default = binary_default
        self.binary_outputs = binary_outputs
        self.classes = classes
        self.timeout_seconds = 0.0


_JSON_NUMPY = orjson.OPT_SERIALIZE_NUMPY
_NO_PARAMETERS: dict[str, Any] = {}
_MOST_ELEMENTS = 2**26
"""Of a shape with its zeros left out: it costs its sender nothing, and a model may make a tensor of a dimension that it is told."""
_MOST_SHOWN = 20


class Codec:
    """Decodes and encodes for one signature. Has no state of its own: any thread may use it."""

    def __init__(self, signature: Signature, labels: Mapping[str, Sequence[str]] | None = None) -> None:
        """`labels`: the names of an output's classes, in their order."""
        self.signature = signature
        self.labels: Mapping[str, Sequence[str]] = labels or {}
        self._inputs = {spec.name: spec for spec in signature.inputs}
        self._required = tuple(spec.name for spec in signature.required)
        self._outputs = {spec.name: spec for spec in signature.outputs}
        self._bf16_outputs = frozenset(spec.name for spec in signature.outputs if spec.datatype == "BF16")
        self.batched = all(spec.shape[:1] == (-1,) for spec in (*signature.required, *signature.outputs))

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
            raise InputError(f"the request must be a JSON object, it is {json_type(document)}")
        id = document.get("id")
        if id is not None and type(id) is not str:
            raise InputError(f"'id' must be a string, it is {json_type(id)}")
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
                raise InputError(f"the model has no input '{name}'; its inputs are {quoted(self._inputs)}")
            if name in arrays:
                raise InputError(f"input '{name}' was sent twice")
            shape = _shape(item, spec)
            own = item.get("parameters")
            if own is not None and type(own) is not dict:
                own = _parameters(item, f"input '{name}'")
            size = own.get("binary_data_size") if own else None
            if size is None:
                if "data" not in item:
                    _no_shared_memory(own or _NO_PARAMETERS, f"input '{name}'")
                    raise InputError(f"input '{name}' has neither 'data' nor the parameter 'binary_data_size'")
                arrays[name] = from_json(name, spec.datatype, shape, item["data"])
                continue
            if "data" in item:
                raise InputError(
                    f"input '{name}' has both 'data' and the parameter 'binary_data_size'; send one of them"
                )
            if type(size) is not int or size < 0:
                raise InputError(f"input '{name}': 'binary_data_size' must be a number of bytes, it is {brief(size)}")
            if offset + size > len(body):
                left = len(body) - offset
                raise InputError(
                    f"input '{name}' says {size} bytes of binary data, but only {left} are left in the body"
                )
            arrays[name] = from_binary(name, spec.datatype, shape, body, offset, size)
            offset += size
        if len(arrays) != len(self._inputs) and (missing := [name for name in self._required if name not in arrays]):
            raise InputError(f"input {quoted(missing)} is missing; the model's inputs are {quoted(self._inputs)}")
        if offset != len(body):
            raise InputError(f"{len(body) - offset} bytes of the body belong to no tensor")
        request = InferRequest(id, arrays, None, False, {})
        if parameters:
            if len(parameters) == 1 and parameters.get("binary_data_output") is True:
                request.binary_default = True
            else:
                request.binary_default = _flag(parameters, "binary_data_output", "the request", default=False)
                request.timeout_seconds = _timeout_seconds(parameters)
        items = document.get("outputs")
        if items:
            self._want(items, request)
        elif items is not None and type(items) is not list:
            raise InputError(f"'outputs' must be a list, it is {json_type(items)}")
        if self._bf16_outputs:
            self._want_bf16(request)
        return request

    def _want(self, items: Any, request: InferRequest) -> None:
        """Put the outputs that the client names into the request."""
        if type(items) is not list:
            raise InputError(f"'outputs' must be a list, it is {json_type(items)}")
        names: list[str] = []
        for item in items:
            name = _name(item, "output")
            spec = self._outputs.get(name)
            if spec is None:
                raise InputError(f"the model has no output '{name}'; its outputs are {quoted(self._outputs)}")
            if name in names:
                raise InputError(f"output '{name}' was asked for twice")
            names.append(name)
            parameters = _parameters(item, f"output '{name}'")
            if parameters:
                if "binary_data" in parameters:
                    binary = _flag(parameters, "binary_data", f"output '{name}'", default=False)
                    request.binary_outputs[name] = binary
                    if len(parameters) == 1:
                        continue
                _no_shared_memory(parameters, f"output '{name}'")
                if count := _unsigned(parameters, "classification", f"output '{name}'"):
                    if spec.datatype in UNFIT:
                        raise InputError(
                            f"output '{name}' is {spec.datatype}, which has no largest numbers; ask for it without "
                            f"the parameter 'classification'"
                        )
                    request.classes = {**(request.classes or {}), name: count}
        request.outputs = tuple(names)

    def _want_bf16(self, request: InferRequest) -> None:
        """Raises InputError where BF16 would have to travel in JSON."""
        request.classes = request.classes or {}
        wanted = self._outputs if request.outputs is None else request.outputs
        for name in self._bf16_outputs.intersection(wanted).difference(request.classes):
            if not request.binary_outputs.get(name, request.binary_default):
                raise InputError(
                    f"output '{name}' is BF16, which JSON cannot carry; ask for it in binary (output parameter "
                    f"binary_data, or request parameter binary_data_output)"
                )

    def _decode_raw(self, body: bytes | memoryview) -> InferRequest:
        """A header length of 0: the whole body is the one input's data, and outputs come back in binary."""
        if len(self._required) != 1:
            count = len(self._required)
            raise InputError(
                f"Inference-Header-Content-Length 0 (a raw tensor) needs a model of one input; this has {count}"
            )
        spec = self._inputs[self._required[0]]
        if spec.datatype == "BYTES":
            if any(n not in (-1, 1) for n in spec.shape):
                raise InputError(f"input '{spec.name}' cannot be sent as a raw tensor: BYTES must be one element")
            element = np.empty(1, dtype=object)
            element[0] = bytes(body)
            return self._raw(spec, element.reshape((1,) * len(spec.shape)))
        free = spec.shape.count(-1)
        fixed = math.prod(n for n in spec.shape if n >= 0)
        if free > 1:
            raise InputError(
                f"input '{spec.name}' cannot be sent as a raw tensor: its shape does not follow from its size"
            )
        item_size = DTYPES[spec.datatype].itemsize * fixed
        if len(body) % item_size if item_size and free else len(body) != item_size:
            unit = "a multiple of " if free else ""
            raise InputError(
                f"input '{spec.name}' as a raw tensor needs {unit}{item_size} bytes, the body has {len(body)}"
            )
        shape = tuple((len(body) // item_size if item_size else 0) if n < 0 else n for n in spec.shape)
        return self._raw(spec, from_binary(spec.name, spec.datatype, shape, body, 0, len(body)))

    def _raw(self, spec: TensorSpec, array: Array) -> InferRequest:
        return InferRequest(None, {spec.name: array}, None, True, {}, {} if self._bf16_outputs else None)

    def encode(
        self,
        model: str,
        version: str,
        request: InferRequest,
        outputs: Mapping[str, Array],
        parameters: Mapping[str, Any],
    ) -> tuple[bytes, int | None]:
        """The body and, where it has binary tensors, the length of its JSON header. Raises OutputError."""
        if request.classes is not None:
            outputs = {name: self._dressed(name, array, request.classes) for name, array in outputs.items()}
        items: list[dict[str, Any]] = []
        chunks: list[bytes] = []
        floats: list[tuple[str, Array]] = []
        named, default = request.binary_outputs, request.binary_default
        for name, array in outputs.items():
            dtype, shape = array.dtype, array.shape
            datatype = DATATYPE_OF.get(dtype)
            if datatype is None and dtype.kind not in "OSU":
                raise OutputError(f"output '{name}' has the type {array.dtype}, which the V2 protocol cannot carry")
            if named.get(name, default) if named else default:
                chunk = pack_bytes(array) if datatype is None else array.tobytes()
                chunks.append(chunk)
                size = {"binary_data_size": len(chunk)}
                items.append({"name": name, "datatype": datatype or "BYTES", "shape": shape, "parameters": size})
                continue
            if datatype is None:
                data: Any = texts(name, array)
                datatype = "BYTES"
            else:
                data = array.ravel()
                if dtype.kind == "f":
                    floats.append((name, array))
                elif dtype.kind == "V":
                    raise OutputError(f"output '{name}' is BF16, which JSON cannot carry; ask for binary")
            items.append({"name": name, "datatype": datatype, "shape": shape, "data": data})
        document: dict[str, Any] = {"model_name": model, "model_version": version, "parameters": parameters}
        if request.id:
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

    def _dressed(self, name: str, array: Array, classes: dict[str, int]) -> Array:
        """An output as it travels where that is not as it was computed: its largest numbers, or BF16."""
        count = classes.get(name)
        if count is not None:
            if array.dtype.kind not in "fiu":
                raise OutputError(f"output '{name}' has the type {array.dtype}, which has no largest numbers")
            return classify(array, count, batched=self.batched, labels=self.labels.get(name, ()))
        return to_bf16(array) if name in self._bf16_outputs and array.dtype.kind == "f" else array


def _loads(text: bytes | memoryview) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raw = bytes(text)
        if not raw:
            raise InputError("the body is empty; an inference request is a JSON object") from error
        if any(words in str(error) for words in ("depth limit", "allocate memory")):  # both are orjson's for the same
            raise InputError("the request is not valid JSON, or is nested too deeply") from error
        hint = ""
        if b"NaN" in raw or b"Infinity" in raw:
            hint = "; JSON has no NaN or Infinity: send such tensors as binary data"
        raise InputError(f"the request is not valid JSON: {error}{hint}") from error


def _name(item: Any, what: str) -> str:
    if type(item) is not dict:
        raise InputError(f"every {what} must be a JSON object, one is {json_type(item)}")
    name = item.get("name")
    if type(name) is not str:
        raise InputError(f"an {what} has no 'name' (a string)")
    return name


def _parameters(holder: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:
        return _NO_PARAMETERS
    if type(parameters) is not dict:
        raise InputError(f"'parameters' of {where} must be a JSON object, it is {json_type(parameters)}")
    return parameters


def _flag(parameters: dict[str, Any], name: str, where: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise InputError(f"the parameter '{name}' of {where} must be true or false, it is {brief(value)}")
    return value


def _unsigned(parameters: dict[str, Any], name: str, where: str) -> int:
    value = parameters.get(name, 0)
    if type(value) is not int or value < 0:
        raise InputError(f"the parameter '{name}' of {where} must be a whole number, it is {brief(value)}")
    return value


def _timeout_seconds(parameters: dict[str, Any]) -> float:
    """The parameter `timeout` of the request, in microseconds as Triton has it; 0 where there is none.

    The others of Triton's parameters change nothing here and are only looked at: one queue knows no `priority`, and no
    model keeps anything from one request of a sequence to the next.
    """
    for name, value in parameters.items():
        if not isinstance(value, (str, int, float)):
            raise InputError(
                f"the parameter '{name}' of the request must be a string, a number or true or false, it is {brief(value)}"
            )
    _unsigned(parameters, "priority", "the request")
    _no_shared_memory(parameters, "the request")
    return _unsigned(parameters, "timeout", "the request") / 1e6


def _no_shared_memory(parameters: dict[str, Any], where: str) -> None:
    if "shared_memory_region" in parameters:
        raise InputError(f"{where} names a shared memory region, which is not supported; send tensors in the body")


def _shape(item: dict[str, Any], spec: TensorSpec) -> tuple[int, ...]:
    datatype = item.get("datatype")
    if datatype != spec.datatype:
        if datatype is None:
            raise InputError(f"input '{spec.name}' has no 'datatype'; the model takes {spec.datatype}")
        raise InputError(f"input '{spec.name}' has the datatype {brief(datatype)}, the model takes {spec.datatype}")
    shape = item.get("shape")
    if type(shape) is not list:
        raise InputError(f"input '{spec.name}' has no 'shape' (a list of numbers)")
    if len(shape) != len(spec.shape):  # before anything is done with each of them: there may be a million
        have = brief(shape) if len(shape) <= _MOST_SHOWN else f"[… {len(shape)} dimensions]"
        raise InputError(f"input '{spec.name}' has the shape {have}, the model takes {list(spec.shape)} (-1: any)")
    for n in shape:
        if type(n) is not int or not 0 <= n <= 2**31:
            raise InputError(f"input '{spec.name}': {brief(n)} in 'shape' is not a dimension")
    dimensions = tuple(shape)
    if 0 in dimensions and math.prod(n for n in dimensions if n) > _MOST_ELEMENTS:
        raise InputError(f"input '{spec.name}' has the shape {brief(shape)}, which is too large even without elements")
    if not spec.accepts(dimensions):
        want = list(spec.shape)
        raise InputError(f"input '{spec.name}' has the shape {brief(shape)}, the model takes {want} (-1: any)")
    return dimensions
