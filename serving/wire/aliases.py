"""Aliases: an application's own request as a V2 request, and the model's tensors as the application's answer.

Between the two stands the same code as for V2 (`serving.api.V2`), so that routes, keys, limits, canaries, captured requests, the cache
and the statuses are the same. The settings are registry.aliases'.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from registry.aliases import Alias, AliasInput, AliasOutput
from registry.errors import ModelkeepError, UnavailableError
from registry.signature import Signature, TensorSpec
from serving.statuses import DeadlineError
from serving.wire import forms, images
from serving.wire.classification import MOST_TEXTS, UNFIT, largest
from serving.wire.tensors import Array, InputError, OutputError, from_json, pack_bytes, quoted, texts, to_bf16
from serving.wire.v2 import Codec

if TYPE_CHECKING:
    from serving.state import Serving

log = logging.getLogger("modelkeep.serve")

_INLINE_ELEMENTS = 16_384
"""An answer of more numbers is written by a thread."""
_INLINE_FORM_BYTES = 1 << 20
"""A longer form is read by a thread."""
_JSON_NUMPY = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


class AliasError(ModelkeepError):
    """The settings of an alias do not fit the version that is to answer: the operator's to change, not the client's. Answered 500."""

    status = 500


class Translated(NamedTuple):
    """A V2 request in binary. `one_row`: the client sent a row, not a batch, and is answered one."""

    body: bytes
    header_length: int
    one_row: bool


class Translator:
    """One alias. Any number of requests may use it at a time."""

    def __init__(self, alias: Alias) -> None:
        self.alias = alias
        self.path = alias.path
        self.model = alias.model
        self._has_images = any(one.image is not None for one in alias.inputs)
        self._told: str | None = None
        self._wanted = list(dict.fromkeys(one.output for one in alias.outputs))

    # What comes in

    async def request(
        self, codec: Codec, body: bytes, headers: Mapping[bytes, bytes], timeout_seconds: float
    ) -> Translated:
        """Raises InputError for what the client got wrong, AliasError where the settings do not fit the version, DeadlineError."""
        signature = codec.signature
        if (wrong := misfit(self.alias, signature, codec.labels)) is not None:
            if wrong != self._told:
                log.error("alias %s of model %s does not fit: %s", self.path, self.model, wrong)
                self._told = wrong
            raise AliasError(f"{self.path}: {wrong}; correct its [[aliases]] in the settings of this server")
        content_type = headers.get(b"content-type")
        files: list[tuple[str, bytes]] = []
        texts_sent: Mapping[str, str] = {}
        document: Any = {}
        if forms.is_form(content_type):
            read = partial(forms.form_of, body, content_type or b"")
            form = read() if len(body) <= _INLINE_FORM_BYTES else await asyncio.to_thread(read)
            files, document, texts_sent = form.files, form.values, form.texts
        elif self._has_images:
            files = [("", body)]
        else:
            document = forms.document_of(body)
        arrays: dict[str, tuple[TensorSpec, Array]] = {}
        one_row = True
        try:
            async with asyncio.timeout(timeout_seconds):
                for source, spec in _sources(self.alias, signature):
                    if source.image is None:
                        found = _value(document, texts_sent, source, spec)
                        if found is None:
                            continue
                        array, is_row = found
                        one_row = one_row and is_row
                    else:
                        pictures = _pictures(files, source)
                        array = await images.tensor_of(pictures, source.image, spec.datatype)
                        one_row = one_row and len(pictures) == 1 and "N" in source.image.layout
                    arrays[spec.name] = (spec, array)
        except TimeoutError:
            raise DeadlineError(f"the image was not read within {timeout_seconds:g} seconds") from None
        return _as_v2(arrays.values(), self._wanted, one_row and bool(arrays))

    # What goes out

    async def answer(self, codec: Codec, outputs: Mapping[str, Array], *, one_row: bool) -> bytes:
        """The application's JSON. Raises OutputError where it cannot carry what the model answered."""
        if sum(array.size for array in outputs.values()) > _INLINE_ELEMENTS:
            return await asyncio.to_thread(self._written, codec, outputs, one_row)
        return self._written(codec, outputs, one_row)

    def _written(self, codec: Codec, outputs: Mapping[str, Array], one_row: bool) -> bytes:
        document: dict[str, Any] = {}
        # A batch stays a list, be it of one.
        rows = codec.batched and not one_row
        for wanted in self.alias.outputs or [AliasOutput(output=name) for name in outputs]:
            array = outputs[wanted.output]
            if one_row and array.ndim and array.shape[0] == 1:
                array = array.reshape(array.shape[1:])  # not array[0], which of one text is no array
            labels = wanted.labels or codec.labels.get(wanted.output, ())
            document[wanted.called] = shown(wanted, array, labels, rows=rows)
        return orjson.dumps(document, option=_JSON_NUMPY)


class Aliases:
    """All of them, by path."""

    def __init__(self, aliases: Iterable[Alias] = ()) -> None:
        self.by_path = {alias.path: Translator(alias) for alias in aliases}

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self.by_path)

    def as_list(self, serving: Serving) -> list[dict[str, Any]]:
        """For people: which path goes to which model, and what does not fit the version that is there."""
        found = []
        for path, translator in self.by_path.items():
            alias = translator.alias
            try:
                loaded = serving.default_version(alias.model)
                problem = misfit(alias, loaded.codec.signature, loaded.codec.labels)
            except UnavailableError:  # it comes, or its next request loads it
                problem = None
            except ModelkeepError as error:
                problem = str(error)
            found.append({"path": path, "model": alias.model, **({} if problem is None else {"problem": problem})})
        return found

    def openapi(self) -> dict[str, Any]:
        """Their part of the schema of the API."""
        return {path: {"post": _operation(translator.alias)} for path, translator in self.by_path.items()}


def misfit(alias: Alias, signature: Signature, labels: Mapping[str, Sequence[str]]) -> str | None:
    """What in an alias does not fit a version, in words; None where it fits."""
    inputs = {spec.name: spec for spec in signature.inputs}
    outputs = {spec.name: spec for spec in signature.outputs}
    for source in alias.inputs:
        spec = inputs.get(source.input)
        if spec is None:
            return f"the model has no input '{source.input}', its inputs are {quoted(inputs)}"
        if source.datatype is not None and source.datatype != spec.datatype:
            return f"input '{spec.name}' is {spec.datatype} in the model, not {source.datatype}"
        if source.image is not None:
            if spec.datatype in UNFIT:
                return f"input '{spec.name}' is {spec.datatype}, which no image becomes"
            if not _may_be(source.image.shape, spec.shape):
                return (
                    f"the image has the shape {list(source.image.shape)}, input '{spec.name}' takes {list(spec.shape)}"
                )
        elif source.shape is not None and not _may_be(tuple(source.shape), spec.shape):
            return f"the shape {source.shape} does not fit input '{spec.name}', which takes {list(spec.shape)}"
    if alias.inputs:
        named = {source.input for source in alias.inputs}
        if left := [spec.name for spec in signature.required if spec.name not in named]:
            return f"nothing says where the input {quoted(left)} comes from"
    for wanted in alias.outputs:
        spec = outputs.get(wanted.output)
        if spec is None:
            return f"the model has no output '{wanted.output}', its outputs are {quoted(outputs)}"
        if spec.datatype in UNFIT and (wanted.form != "values" or wanted.softmax):
            return f"output '{spec.name}' is {spec.datatype}, which has no largest numbers"
        if wanted.form == "label" and not wanted.labels and not labels.get(wanted.output):
            return f"output '{spec.name}' has no labels: give labels, or register the version with [labels]"
    return None


def _may_be(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor can be of both shapes; -1 is any."""
    return len(shape) == len(wanted) and all(
        -1 in (mine, theirs) or mine == theirs for mine, theirs in zip(shape, wanted, strict=True)
    )


def _sources(alias: Alias, signature: Signature) -> list[tuple[AliasInput, TensorSpec]]:
    specs = {spec.name: spec for spec in signature.inputs}
    if not alias.inputs:
        return [(AliasInput(input=name), spec) for name, spec in specs.items()]
    return [(source, specs[source.input]) for source in alias.inputs]


def _pictures(files: Sequence[tuple[str, bytes]], source: AliasInput) -> list[bytes]:
    """The files for an input: those of its field; without one the first, and those of the same name."""
    if not files:
        raise InputError("the request has no image; send one as the body, or as a file of multipart/form-data")
    field = files[0][0] if source.field is None else source.field
    if files[0][0] == "" and len(files) == 1:
        return [files[0][1]]  # the whole body
    chosen = [content for name, content in files if name == field]
    if not chosen:
        has = quoted(forms.brief_name(name) for name in dict.fromkeys(name for name, _ in files[:10]))
        raise InputError(f"the form has no file '{field}'; its files are {has}")
    return chosen


def _value(
    document: Any, texts_sent: Mapping[str, str], source: AliasInput, spec: TensorSpec
) -> tuple[Array, bool] | None:
    """The tensor of a field, and whether it is one row; None for what is left out and optional. Raises InputError."""
    paths = source.field if source.field is not None else spec.name
    where = paths if isinstance(paths, str) else ", ".join(paths)
    value = _taken(document, paths)
    if spec.datatype == "BYTES" and where in texts_sent and type(value) is not list:
        value = texts_sent[where]  # a form has no quotation marks: 12345 may be a text
    if value is None or value is forms.MISSING:
        if source.default is not None:
            value = source.default
        elif spec.optional:
            return None
        else:
            raise forms.missing(document, where)
    wanted = spec.shape if source.shape is None else tuple(source.shape)
    sizes = _nested(value)
    placed = place(sizes, wanted, source.batch)
    if placed is None:
        raise InputError(f"'{where}' has the shape {list(sizes)}, which does not fit {list(wanted)} (-1: any)")
    shape, one_row = placed
    # Inside, BF16 is FP32; from_json refuses it, for V2 does.
    datatype = "FP32" if spec.datatype == "BF16" else spec.datatype
    array = from_json(where, datatype, sizes or (1,), value if type(value) is list else [value])
    return array.reshape(shape), one_row


def _taken(document: Any, paths: str | list[str]) -> Any:
    """The value at a path, or a row of the values at several; where they are columns, a row for each place in them."""
    if isinstance(paths, str):
        return forms.find(document, paths)
    values = []
    for path in paths:
        value = forms.find(document, path)
        if value is None or value is forms.MISSING:
            raise forms.missing(document, path)
        values.append(value)
    if not any(type(value) is list for value in values):
        return values
    lengths = [len(value) if type(value) is list else -1 for value in values]
    if len(set(lengths)) != 1:
        raise InputError(f"{', '.join(paths)} must be lists of one length, they have {lengths} (-1: no list)")
    return [list(row) for row in zip(*values, strict=True)]


def _nested(value: Any) -> tuple[int, ...]:
    """The shape of nested lists, by their first elements: whether the others are alike is looked at when they are read."""
    sizes: list[int] = []
    while type(value) is list:
        sizes.append(len(value))
        value = value[0] if value else None
    return tuple(sizes)


def place(sizes: tuple[int, ...], wanted: tuple[int, ...], batch: str) -> tuple[tuple[int, ...], bool] | None:
    """The shape that a value gets in a tensor, and whether it is one row of it; None where it does not fit.

    As it is; else as one row, also where the row is flat or a single number; else a flat list as rows of one number each.
    """
    rest = wanted[1:]
    fixed = math.prod(rest) if -1 not in rest else None
    ways: list[tuple[tuple[int, ...], bool]] = []
    if batch != "row":
        ways.append((sizes, False))
    if batch != "rows" and wanted:
        ways.append(((1, *sizes), True))
        if not sizes:
            ways.append(((1,) * len(wanted), True))
        if len(sizes) == 1 and fixed == sizes[0]:
            ways.append(((1, *rest), True))
    if batch != "row" and len(sizes) == 1 and fixed == 1:
        ways.append(((*sizes, *(1 for _ in rest)), False))
    return next((way for way in ways if _may_be(way[0], wanted)), None)


def _as_v2(tensors: Iterable[tuple[TensorSpec, Array]], wanted: list[str], one_row: bool) -> Translated:
    inputs: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    for spec, array in tensors:
        sent = to_bf16(array) if spec.datatype == "BF16" else array
        chunk = pack_bytes(sent) if spec.datatype == "BYTES" else sent.tobytes()
        chunks.append(chunk)
        size = {"binary_data_size": len(chunk)}
        inputs.append({"name": spec.name, "datatype": spec.datatype, "shape": array.shape, "parameters": size})
    # Binary, for BF16 in JSON would be refused.
    document: dict[str, Any] = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    if wanted:
        document["outputs"] = [{"name": name} for name in wanted]
    header = orjson.dumps(document)
    return Translated(b"".join((header, *chunks)), len(header), one_row)


def shown(wanted: AliasOutput, array: Array, labels: Sequence[str], *, rows: bool) -> Any:
    """An output as JSON shows it; with `rows` the first dimension stays. Raises OutputError for what JSON cannot carry or has no order."""
    if array.dtype.kind in "OSU":
        if wanted.form != "values":
            raise OutputError(f"output '{wanted.output}' is BYTES, which has no largest numbers")
        text = np.array(texts(wanted.output, array), dtype=object).reshape(array.shape)
        return _lists(text, wanted, rows=rows)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise OutputError(
            f"output '{wanted.output}' has NaN or Infinity, which JSON cannot carry; /v2 carries it in binary"
        )
    if wanted.softmax:
        array = softmax(array)
    if wanted.form == "values":
        return _lists(_rounded(array, wanted), wanted, rows=rows)
    if array.dtype.kind not in "fiu":
        raise OutputError(f"output '{wanted.output}' has the type {array.dtype}, which has no largest numbers")
    leading = array.shape[:-1]
    if wanted.squeeze:
        leading = tuple(n for at, n in enumerate(leading) if n != 1 or (rows and not at))
    table = array.reshape(math.prod(leading), array.shape[-1] if array.ndim else 1)
    if not table.shape[1]:
        raise OutputError(f"output '{wanted.output}' has no elements, of which none is the largest")
    count = min(wanted.top if wanted.form == "top" else 1, table.shape[1])
    if len(table) * count > MOST_TEXTS:
        raise OutputError(f"output '{wanted.output}' has {len(table)} rows, of which {count} numbers each are too many")
    said = np.empty(len(table), dtype=object)
    for number, row in enumerate(table):
        order = largest(row, count)
        scores = _rounded(row[order], wanted)
        found = [_class(wanted, int(index), score, labels) for index, score in zip(order, scores, strict=True)]
        said[number] = found if wanted.form == "top" else found[0]
    return said.reshape(leading).tolist() if leading else said[0]


def _class(wanted: AliasOutput, index: int, value: Any, labels: Sequence[str]) -> Any:
    label = (labels[index] if index < len(labels) else None) or None
    if wanted.form == "index":
        return index
    if wanted.form == "label":
        return label if label is not None else str(index)
    return {"index": index, **({} if label is None else {"label": label}), "score": value}


def softmax(array: Array) -> Array:
    """Over the last dimension, in numbers of at least 32 bits."""
    values = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)
    if not values.size:
        return values
    values = np.atleast_1d(values)
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    shares: Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares.reshape(array.shape)


def _rounded(array: Array, wanted: AliasOutput) -> Array:
    return array if wanted.decimals is None or array.dtype.kind != "f" else np.round(array, wanted.decimals)


def _lists(array: Array, wanted: AliasOutput, *, rows: bool) -> Any:
    """What orjson writes; a single number where nothing else is left."""
    if wanted.squeeze:
        array = array.reshape([n for at, n in enumerate(array.shape) if n != 1 or (rows and not at)])
    if array.dtype.kind == "O":
        return array.tolist()
    return np.ascontiguousarray(array) if array.ndim else array[()]


def _operation(alias: Alias) -> dict[str, Any]:
    """What the schema of the API says of an alias."""
    pictures = [one for one in alias.inputs if one.image is not None]
    content: dict[str, Any] = {}
    if pictures:
        binary = {"type": "string", "format": "binary"}
        names = [one.field if isinstance(one.field, str) else "image" for one in pictures]
        content["multipart/form-data"] = {"schema": {"type": "object", "properties": dict.fromkeys(names, binary)}}
        if len(pictures) == 1:
            content["image/*"] = {"schema": binary}
    else:
        content["application/json"] = {"schema": {"type": "object"}}
    return {
        "summary": alias.summary or f"Answered by the model {alias.model}",
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": {"description": "The answer", "content": {"application/json": {"schema": {"type": "object"}}}}
        },
    }
