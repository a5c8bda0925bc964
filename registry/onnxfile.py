"""ONNX files, looked at from outside: the graph is parsed and checked, external data is measured, nothing is run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from registry.errors import RefusedError
from registry.signature import Signature, TensorSpec

if TYPE_CHECKING:
    import onnx

PROTOBUF_LIMIT = (2 << 30) - 1
_DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
    16: "BF16",
}
"""onnx.TensorProto.DataType -> datatype of the Open Inference Protocol."""
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= {17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4}
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})


@dataclass(frozen=True, slots=True)
class OnnxGraph:
    signature: Signature
    external: tuple[Path, ...]
    metadata: dict[str, Any]


def check(path: Path) -> OnnxGraph:
    """Signature, external data and metadata of an ONNX file. Raises RefusedError that says what is wrong with it."""
    model = _parse(path)
    graph = model.graph
    if not graph.node and not graph.initializer:
        raise RefusedError(f"{path} is not an ONNX model, or is truncated: it has no graph; export it again")
    if not graph.output:
        raise RefusedError(f"{path} has a graph without outputs: export it again")
    tensors = list(_tensors(model))
    external = _external(path, tensors)
    signature = _signature(path, graph, model.ir_version)
    _run_checker(path)
    producer = [_text(path, "producer", part) for part in (model.producer_name, model.producer_version)]
    metadata: dict[str, Any] = {
        "ir_version": model.ir_version,
        "opset": {_text(path, "domain", entry.domain) or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": " ".join(part for part in producer if part),
        "graph": _text(path, "name of the graph", graph.name),
        "nodes": len(graph.node),
        "parameters": sum(math.prod(tensor.dims) for tensor in graph.initializer),
        "external_files": [str(file.relative_to(path.parent)) for file in external],
    }
    if model.doc_string:
        metadata["description"] = _text(path, "description", model.doc_string)
    if model.metadata_props:
        metadata["properties"] = {
            _text(path, "property", entry.key): _text(path, "property", entry.value) for entry in model.metadata_props
        }
    return OnnxGraph(signature, external, metadata)


def _text(path: Path, what: str, value: object) -> str:
    """A text of the file. protobuf gives bytes where it is no UTF-8."""
    if not isinstance(value, str):
        raise RefusedError(f"{path} is damaged: a {what} is not text ({value!r}); copy or export it again")
    return value


def refuse_under_other_extension(path: Path) -> NoReturn:
    """Say what lies under the extension of a TorchScript file that is no archive. Always raises RefusedError."""
    try:
        model = _parse(path)
        is_onnx = bool(model.graph.node)
    except RefusedError:
        is_onnx = False
    if is_onnx:
        raise RefusedError(f"{path} is an ONNX file under the extension {path.suffix}: name it .onnx")
    raise RefusedError(f"{path} is not a TorchScript archive, or is damaged: export it again with torch.jit.save")


def _parse(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if path.stat().st_size > PROTOBUF_LIMIT:
        raise RefusedError(
            f"{path} has more than 2 GiB, which no ONNX file can have: "
            "save it with its weights as external data (onnx.save(…, save_as_external_data=True))"
        )
    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise RefusedError(f"{path} is not an ONNX file, or is truncated ({error}): copy or export it again") from error
    except OSError as error:
        raise RefusedError(f"{path} cannot be read: {error.strerror or error}") from error


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor, wherever it is: initialisers, attributes, subgraphs, functions, training information."""
    graphs = [model.graph, *(g for t in model.training_info for g in (t.initialization, t.algorithm))]
    nodes = [node for function in model.functions for node in function.node]
    attributes = [attribute for function in model.functions for attribute in function.attribute_proto]
    while graphs or nodes or attributes:
        for graph in graphs:
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
        attributes.extend(attribute for node in nodes for attribute in node.attribute)
        graphs, nodes = [], []
        for attribute in attributes:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (
                *attribute.sparse_tensors,
                *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
            ):
                yield from (sparse.values, sparse.indices)
            graphs.extend((*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])))
        attributes = []


def _external(path: Path, tensors: list[onnx.TensorProto]) -> tuple[Path, ...]:
    """The external data files, each inside the folder and long enough. Raises RefusedError."""
    found: dict[Path, int] = {}
    for tensor in tensors:
        if tensor.data_location != 1 and not tensor.external_data:
            continue
        where = f"{path}: external data of tensor {tensor.name!r}"
        entries = {
            _text(path, "field of external data", entry.key): _text(path, "place of external data", entry.value)
            for entry in tensor.external_data
        }
        location = entries.get("location", "")
        if unknown := set(entries) - _EXTERNAL_KEYS:
            raise RefusedError(f"{where} has the unknown field {sorted(unknown)[0]!r}: export the model again")
        try:
            file = _contained(path.parent, location)
        except ValueError as error:
            raise RefusedError(
                f"{where} is at {location!r}, which {error}; keep the data beside the model, in its folder"
            ) from error
        size = found.setdefault(file, file.stat().st_size)
        try:
            offset, declared = int(entries.get("offset", "0") or 0), entries.get("length")
            length = int(declared) if declared else None
        except ValueError as error:
            raise RefusedError(
                f"{where}: offset or length is not a number ({error}): export the model again"
            ) from error
        needed = max(length or 0, _bytes(tensor))
        if offset < 0 or (length is not None and length < 0) or offset + needed > size:
            raise RefusedError(
                f"{where} needs {needed} bytes from {offset} on, but {location} has {size}: "
                "it is truncated; copy or export it again"
            )
    return tuple(sorted(found))


def _contained(folder: Path, location: str) -> Path:
    """The file that a location means inside a folder. Raises ValueError where it leaves the folder or is a link."""
    parts = Path(location).parts
    if not location or location.startswith(("/", "\\")) or "\\" in location or location[1:2] == ":" or "\0" in location:
        raise ValueError("is not a path relative to the model's folder")
    if ".." in parts:
        raise ValueError("leads out of the model's folder by '..'")
    here = folder
    for part in parts:
        here = here / part
        if here.is_symlink():
            raise ValueError(f"goes through the symbolic link {here.relative_to(folder)} to {os.readlink(here)}")  # noqa: PTH115
    if not here.exists():
        raise ValueError("does not exist")
    if not here.is_file():
        raise ValueError("is not a plain file")
    return here


def _bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that the tensor's shape and type need; 0 where the type has no fixed size."""
    if any(size < 0 for size in tensor.dims):
        return 0
    elements: int = math.prod(tensor.dims)
    return (elements * _BITS.get(tensor.data_type, 0) + 7) // 8


def _run_checker(path: Path) -> None:
    from onnx import checker

    try:
        checker.check_model(str(path))  # by path: a big model's weights stay on the disk
    except checker.ValidationError as error:
        said = " ".join(str(error).split())
        raise RefusedError(f"{path} is not a valid ONNX model: {said[:400]}; export it again") from error
    except (ValueError, RuntimeError) as error:
        raise RefusedError(
            f"{path} cannot be checked as an ONNX model: {' '.join(str(error).split())[:400]}"
        ) from error


def _signature(path: Path, graph: onnx.GraphProto, ir_version: int) -> Signature:
    initialised = {tensor.name for tensor in graph.initializer} | {s.values.name for s in graph.sparse_initializer}
    inputs = [_spec(path, "input", value) for value in graph.input if value.name not in initialised]
    inputs += [
        replace(_spec(path, "input", value), optional=True) for value in _defaulted(graph, initialised, ir_version)
    ]
    outputs = [_spec(path, "output", value) for value in graph.output]
    return Signature(tuple(inputs), tuple(outputs))


def _defaulted(graph: onnx.GraphProto, initialised: set[str], ir_version: int) -> list[onnx.ValueInfoProto]:
    """The inputs that need not be given, because the file has a default for them.

    Until IR version 3 every initialiser had to be listed as an input, and some exporters list them all to this day: a file that lists all
    of its initialisers lists its weights, and none of them is an input. One that lists some means these.
    """
    listed = [value for value in graph.input if value.name in initialised]
    if ir_version < 4 or len(listed) == len(initialised):
        return []
    tensors = [value for value in listed if value.type.WhichOneof("value") == "tensor_type"]
    return [
        value for value in tensors
        if value.type.tensor_type.elem_type in _DATATYPES and value.type.tensor_type.HasField("shape")
    ]  # fmt: skip


def _spec(path: Path, side: str, value: onnx.ValueInfoProto) -> TensorSpec:
    import onnx

    name, kind = _text(path, f"name of an {side}", value.name), value.type.WhichOneof("value")
    where = f"{path}: {side} {name!r}"
    if kind != "tensor_type":
        words = {"sequence_type": "a sequence", "map_type": "a map", "optional_type": "an optional value"}
        hint = "; for scikit-learn models: zipmap=False" if kind in ("sequence_type", "map_type") else ""
        found = words.get(kind or "", "not a tensor")
        raise RefusedError(f"{where} is {found}; the protocol carries tensors only{hint}")
    tensor = value.type.tensor_type
    datatype = _DATATYPES.get(tensor.elem_type)
    if datatype is None:
        known = tensor.elem_type in onnx.TensorProto.DataType.values()
        called = onnx.TensorProto.DataType.Name(tensor.elem_type) if known else str(tensor.elem_type)
        raise RefusedError(f"{where} has the type {called}, which cannot be served: cast it to FLOAT in the graph")
    if not tensor.HasField("shape"):
        raise RefusedError(
            f"{where} has no shape: export the model with it (onnx.shape_inference.infer_shapes adds it)"
        )
    shape = (d.dim_value if d.WhichOneof("value") == "dim_value" and d.dim_value >= 0 else -1 for d in tensor.shape.dim)
    return TensorSpec(name, datatype, tuple(shape))
