"""CoreML models, read from outside: the specification's head (version, kind, inputs, outputs, what it says of itself). Nothing is run.

A protocol buffer without its schema: only the fields named here are looked at, by the numbers of Apple's Model.proto and FeatureTypes.proto
(https://github.com/apple/coremltools/tree/main/mlmodel/format).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from registry.errors import RefusedError
from registry.signature import Signature, TensorSpec

WHERE_IT_RUNS = (
    "CoreML runs on macOS and iOS only, and this server runs on neither: it is kept, and can be exported to a Mac (modelkeep models export). "
    "To serve the model here, register it as ONNX"
)
MAX_SPECIFICATION_BYTES = (2 << 30) - 1
MAX_MANIFEST_BYTES = 1 << 20
_MAX_FEATURES = 4096
_MAX_DESCRIPTION_BYTES = 4 << 20

# Model: 1 specificationVersion, 2 description, 200 and up the kind of model (oneof Type).
_KINDS = {
    200: "pipelineClassifier", 201: "pipelineRegressor", 202: "pipeline",
    300: "glmRegressor", 301: "supportVectorRegressor", 302: "treeEnsembleRegressor", 303: "neuralNetworkRegressor",
    304: "bayesianProbitRegressor",
    400: "glmClassifier", 401: "supportVectorClassifier", 402: "treeEnsembleClassifier", 403: "neuralNetworkClassifier",
    404: "kNearestNeighborsClassifier",
    500: "neuralNetwork", 501: "itemSimilarityRecommender", 502: "mlProgram",
    555: "customModel", 556: "linkedModel", 560: "classConfidenceThresholding",
    600: "oneHotEncoder", 601: "imputer", 602: "featureVectorizer", 603: "dictVectorizer", 604: "scaler",
    606: "categoricalMapping", 607: "normalizer", 609: "arrayFeatureExtractor", 610: "nonMaximumSuppression",
    900: "identity", 2000: "textClassifier", 2001: "wordTagger", 2002: "visionFeaturePrint", 2003: "soundAnalysisPreprocessing",
    2004: "gazetteer", 2005: "wordEmbedding", 2006: "audioFeaturePrint", 3000: "serializedModel",
}  # fmt: skip
_ARRAYS = {65552: "FP16", 65568: "FP32", 65600: "FP64", 131080: "INT8", 131104: "INT32"}
"""ArrayFeatureType.ArrayDataType: 0x10000 float or 0x20000 integer, and the bits."""
_CHANNELS = {10: 1, 20: 3, 30: 3, 40: 1}
"""ImageFeatureType.ColorSpace -> channels: grayscale, RGB, BGR, grayscale of 16 bits."""

_WEIGHTS = re.compile(rb"@model_path/([A-Za-z0-9_./-]+?\.bin)")
"""How a program names the files of its weights, beside its specification."""

Value = int | memoryview


class Malformed(ValueError):
    """Not a protocol buffer, or not this one."""


@dataclass(frozen=True, slots=True)
class CoreMLModel:
    signature: Signature | None
    metadata: dict[str, Any] = field(default_factory=dict)


def check_file(path: Path) -> CoreMLModel:
    """Look at an .mlmodel. Raises RefusedError that says what is wrong with it."""
    size = path.stat().st_size
    if size > MAX_SPECIFICATION_BYTES:
        raise RefusedError(f"{path} has {size} bytes, more than a CoreML specification can have (2 GiB)")
    try:
        return _model(memoryview(path.read_bytes()))
    except Malformed as error:
        raise RefusedError(
            f"{path} is not a CoreML model, or is damaged ({error}): export it again with coremltools"
        ) from error
    except OSError as error:
        raise RefusedError(f"{path} cannot be read: {error.strerror or error}") from error


def check_package(folder: Path) -> CoreMLModel:
    """Look at an .mlpackage: its manifest names the specification, which names its weights. Raises RefusedError."""
    manifest = folder / "Manifest.json"
    try:
        if manifest.stat().st_size > MAX_MANIFEST_BYTES:
            raise RefusedError(
                f"{manifest} has more than {MAX_MANIFEST_BYTES} bytes: not the manifest of a CoreML package"
            )
        listed = json.loads(manifest.read_text(encoding="utf-8"))
        items, root = listed["itemInfoEntries"], str(listed["rootModelIdentifier"])
        places = {identity: str(entry["path"]) for identity, entry in items.items()}
        version = str(listed["fileFormatVersion"])
    except OSError as error:
        raise RefusedError(f"{manifest} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(
            f"{manifest} is not the manifest of a CoreML package ({type(error).__name__}: {error}): export it again with coremltools"
        ) from error
    if root not in places:
        raise RefusedError(
            f"{manifest} names the model {root!r}, which it does not list: export it again with coremltools"
        )
    for place in places.values():
        inside = PurePosixPath(place)
        if inside.is_absolute() or ".." in inside.parts or "\\" in place or "\0" in place:
            raise RefusedError(f"{manifest} names {place!r}, which leads out of the package")
    specification = folder / "Data" / places[root]
    if specification.is_symlink() or not specification.is_file():
        raise RefusedError(f"{folder} lacks Data/{places[root]}, which its manifest names: copy or export it again")
    found = check_file(specification)
    for told in _WEIGHTS.findall(specification.read_bytes()):
        inside = PurePosixPath(told.decode())
        if ".." in inside.parts:
            raise RefusedError(f"{specification} names the weights {told.decode()!r}, which lie outside the package")
        if not (specification.parent / inside).is_file():
            raise RefusedError(f"{folder} lacks the weights {inside}, which its model names: copy or export it again")
    return CoreMLModel(
        found.signature, {**found.metadata, "package_version": version, "items": sorted(places.values())}
    )


def _model(content: memoryview) -> CoreMLModel:
    version, kind, description = 0, None, memoryview(b"")
    for number, value in _fields(content):
        if number == 1 and isinstance(value, int):
            version = value
        elif number == 2 and isinstance(value, memoryview):
            description = value
        elif number >= 200 and isinstance(value, memoryview):
            if number not in _KINDS:
                raise Malformed(f"a model of the unknown kind {number}")
            kind = _KINDS[number]
    if not 1 <= version <= 100:
        raise Malformed(f"specification version {version}")
    if kind is None:
        raise Malformed("it holds no model")
    if len(description) > _MAX_DESCRIPTION_BYTES:  # all of it becomes objects, a hundred times its size
        raise Malformed(f"a description of {len(description)} bytes")
    inputs: list[dict[str, Any]] = []
    outputs: list[dict[str, Any]] = []
    metadata: dict[str, Any] = {"specification_version": version, "model_type": kind}
    for number, value in _fields(description):
        if number in (1, 10) and isinstance(value, memoryview):
            (inputs if number == 1 else outputs).append(_feature(value))
            if len(inputs) + len(outputs) > _MAX_FEATURES:
                raise Malformed(f"more than {_MAX_FEATURES} inputs and outputs")
        elif number in (11, 12) and isinstance(value, memoryview):
            metadata["predicted_feature" if number == 11 else "predicted_probabilities"] = _text(value)
        elif number == 100 and isinstance(value, memoryview):
            metadata.update(_said(value))
    if not inputs or not outputs:
        raise Malformed("it has no inputs or no outputs")
    specs = [[feature.pop("spec") for feature in side] for side in (inputs, outputs)]
    metadata["features"] = {"inputs": inputs, "outputs": outputs}
    tensors = [[spec for spec in side if spec is not None] for side in specs]
    whole = all(len(some) == len(side) for some, side in zip(tensors, specs, strict=True))
    # A dictionary of class probabilities is no tensor: then the features say more than a signature could.
    return CoreMLModel(Signature(tuple(tensors[0]), tuple(tensors[1])) if whole else None, metadata)


def _said(content: memoryview) -> dict[str, Any]:
    names = {1: "description", 2: "model_version", 3: "author", 4: "license"}
    said: dict[str, Any] = {}
    properties: dict[str, str] = {}
    for number, value in _fields(content):
        if number in names and isinstance(value, memoryview) and value:
            said[names[number]] = _text(value)
        elif number == 100 and isinstance(value, memoryview):
            pair = {key: item for key, item in _fields(value) if isinstance(item, memoryview)}
            properties[_text(pair.get(1, memoryview(b"")))] = _text(pair.get(2, memoryview(b"")))
    return {**said, **({"properties": properties} if properties else {})}


def _feature(content: memoryview) -> dict[str, Any]:
    name, told, kind = "", "", memoryview(b"")
    for number, value in _fields(content):
        if number == 1 and isinstance(value, memoryview):
            name = _text(value)
        elif number == 2 and isinstance(value, memoryview):
            told = _text(value)
        elif number == 3 and isinstance(value, memoryview):
            kind = value
    if not name:
        raise Malformed("a feature without a name")
    words, datatype, shape = _type(name, kind)
    spec = None if datatype is None else TensorSpec(name, datatype, shape)
    return {"name": name, "type": words, "spec": spec, **({"description": told} if told else {})}


def _type(name: str, content: memoryview) -> tuple[str, str | None, tuple[int, ...]]:
    """A FeatureType in words, and as datatype and shape where it is a tensor."""
    plain: dict[int, tuple[str, str | None]] = {1: ("int64", "INT64"), 2: ("double", "FP64"), 3: ("string", "BYTES")}
    plain |= {6: ("dictionary", None), 7: ("sequence", None), 8: ("state", None)}
    words, optional = "", False
    datatype: str | None = None
    shape: tuple[int, ...] = ()
    for number, value in _fields(content):
        if number in plain:
            words, datatype = plain[number]
        elif number == 4 and isinstance(value, memoryview):
            words, datatype, shape = _image(value)
        elif number == 5 and isinstance(value, memoryview):
            words, datatype, shape = _array(name, value)
        elif number == 1000:
            optional = bool(value)
    if not words:
        raise Malformed(f"feature {name!r} has no type that is known here")
    return f"optional {words}" if optional else words, datatype, shape


def _image(content: memoryview) -> tuple[str, str, tuple[int, ...]]:
    numbers = {number: value for number, value in _fields(content) if isinstance(value, int)}
    width, height, space = numbers.get(1, 0), numbers.get(2, 0), numbers.get(3, 0)
    varies = any(number in (21, 31) for number, _ in _fields(content))  # enumerated sizes, or a range
    shape = (_CHANNELS.get(space, -1), *((-1, -1) if varies else (height or -1, width or -1)))
    return f"image {width}×{height}", "FP16" if space == 40 else "UINT8", shape


def _array(name: str, content: memoryview) -> tuple[str, str, tuple[int, ...]]:
    shape: list[int] = []
    kind = 0
    choices: list[list[int]] = []
    for number, value in _fields(content):
        if number == 1:
            shape += _packed(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 21 and isinstance(value, memoryview):  # enumerated shapes
            choices = [_packed_shape(item) for n, item in _fields(value) if n == 1 and isinstance(item, memoryview)]
        elif number == 31 and isinstance(value, memoryview):  # a range for every dimension
            bounds = [_bounds(item) for n, item in _fields(value) if n == 1 and isinstance(item, memoryview)]
            shape = [low if low == high else -1 for low, high in bounds]
    if choices:
        shape = [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*choices, strict=False)]
    if kind not in _ARRAYS:
        raise Malformed(f"feature {name!r} is an array of the unknown kind {kind}")
    if len(shape) > 64 or any(size < -1 or size >= 1 << 40 for size in shape):
        raise Malformed(f"feature {name!r} has the shape {shape[:8]}")
    return f"array of {_ARRAYS[kind]}", _ARRAYS[kind], tuple(shape)


def _packed_shape(content: memoryview) -> list[int]:
    return [size for number, value in _fields(content) if number == 1 for size in _packed(value)]


def _bounds(content: memoryview) -> tuple[int, int]:
    numbers = {number: value for number, value in _fields(content) if isinstance(value, int)}
    return _signed(numbers.get(1, 0)), _signed(numbers.get(2, 0))


def _packed(value: Value) -> list[int]:
    """A repeated int64, packed or one by one."""
    if isinstance(value, int):
        return [_signed(value)]
    found, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(_signed(number))
    return found


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _text(value: Value) -> str:
    if isinstance(value, int) or len(value) > 1 << 20:
        raise Malformed("a text is none, or is too long")
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"a text is not UTF-8 ({error.reason})") from error


def _fields(content: memoryview) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message: integers, or bytes. Raises Malformed."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise Malformed(f"field {number}")
        match wire:
            case 0:
                value, at = _varint(content, at)
                yield number, value
            case 1 | 5:
                width = 8 if wire == 1 else 4
                if at + width > len(content):
                    raise Malformed("it ends in the middle of a field")
                (bits,) = struct.unpack_from("<Q" if wire == 1 else "<L", content, at)
                at += width
                yield number, int(bits)
            case 2:
                length, at = _varint(content, at)
                if at + length > len(content):
                    raise Malformed(f"field {number} says it has {length} bytes, {len(content) - at} are there")
                yield number, content[at : at + length]
                at += length
            case _:
                raise Malformed(f"wire type {wire}")


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(content) and shift < 70:
        byte = content[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & ((1 << 64) - 1), at
        shift += 7
    raise Malformed("it ends in the middle of a number")
