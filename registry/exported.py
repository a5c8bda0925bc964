"""torch.export archives (.pt2), looked at without torch: members, weights, and the graph, which says what goes in and out.

Nothing in them is unpickled, here or at load: `rewritten` writes what was checked to a new archive, which holds no pickle at all, and only
that is given to torch.
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.archives import check_members, open_archive, read_member
from registry.errors import RefusedError, StorageError
from registry.exportgraph import IDENTIFIER, QUALIFIED, Foreign, cleaned, leaves, parsed
from registry.signature import Signature, TensorSpec
from registry.torchscript import STORAGES, check_pickle

_DATATYPES = {
    1: "UINT8", 2: "INT8", 3: "INT16", 4: "INT32", 5: "INT64", 6: "FP16", 7: "FP32", 8: "FP64", 12: "BOOL",
    13: "BF16", 28: "UINT16", 34: "UINT32", 35: "UINT64",
}  # fmt: skip
"""torch's ScalarType -> datatype of the Open Inference Protocol."""
_BYTES = {**dict.fromkeys((1, 2, 12, 29, 30, 31, 32, 33), 1), **dict.fromkeys((3, 6, 13, 28), 2)}
_BYTES |= {**dict.fromkeys((4, 7, 9, 34), 4), **dict.fromkeys((5, 8, 10, 35), 8), 11: 16}
_STRIDED = 7

_MODEL = "models/model.json"
_WEIGHTS, _CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
_EXAMPLE = "data/sample_inputs/model.pt"
_PLAIN = {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"}
_PAYLOAD = re.compile(r"data/(weights/weight|constants/tensor)_[0-9]{1,9}")
_EXAMPLE_GLOBALS = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch", "device"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor_v2"),
    }
)
_REMEDY = "export it again, with torch.export.export and torch.export.save of torch 2.13"
_REMEMBERS = "it changes its own weights or buffers when it runs, so that an answer depends on the requests before: call .eval() on the model"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class ExportedProgram:
    """What an archive says of itself. Inputs after the first `positional` are given by name; `answers` is how the answer is built."""

    signature: Signature
    positional: int
    answers: str
    """one | many | named"""
    metadata: dict[str, Any] = field(default_factory=dict)


def check(path: Path, *, max_bytes: int) -> ExportedProgram:
    """Look at a .pt2 file. Raises RefusedError that says what in it is not what torch.export.save writes."""
    with open_archive(path) as archive:
        return _Reading(path, archive, max_bytes).program


def rewritten(path: Path, target: Path, *, max_bytes: int) -> ExportedProgram:
    """Check a .pt2 file and write what was checked to `target`, without its pickles: that may be given to torch.export.load.

    Raises RefusedError as `check` does, StorageError where `target` cannot be written.
    """
    with open_archive(path) as archive:
        reading = _Reading(path, archive, max_bytes)
        try:
            with zipfile.ZipFile(target, "w") as fresh:
                for name, content in reading.texts.items():
                    fresh.writestr(f"model/{name}", content)
                for name in sorted(reading.payloads):
                    with (
                        archive.open(reading.members[name]) as source,
                        fresh.open(f"model/{name}", "w", force_zip64=True) as to,
                    ):
                        shutil.copyfileobj(source, to, _CHUNK)
        except zipfile.BadZipFile as error:
            raise RefusedError(f"{path} is damaged ({error}): copy or export it again") from error
        except OSError as error:
            raise StorageError(f"{path} could not be copied to {target}: {error.strerror or error}") from error
        return reading.program


class _Reading:
    """One look at an archive: what is in it, and the texts that are carried over into a clean copy."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, max_bytes: int) -> None:
        self.path, self.archive = path, archive
        infos = archive.infolist()
        check_members(path, infos, max_bytes, writer="torch.export.save")
        self.members = {info.filename.partition("/")[2]: info for info in infos}
        self.payloads: set[str] = set()
        self._refuse_strangers()
        if self._read("archive_format") != b"pt2" or self._read("archive_version") != b"0":
            raise RefusedError(f"{path} is of a version of torch.export's archives that is not known here: {_REMEDY}")
        if self._read("byteorder").strip() != b"little":
            raise RefusedError(f"{path} was written on a big-endian machine: {_REMEDY} on another")
        if _EXAMPLE in self.members:
            self._check_example(self._read(_EXAMPLE))
        weights, weights_config = self._payloads(_WEIGHTS, "data/weights")
        constants, constants_config = self._payloads(_CONSTANTS, "data/constants")
        left = [name for name in self.members if _PAYLOAD.fullmatch(name) and name not in self.payloads]
        if left:
            raise RefusedError(f"{path}: nothing refers to the member {left[0]}: {_REMEDY}")
        try:
            graph = cleaned(parsed(self._read(_MODEL), _MODEL))
            self.program = _program(graph, [*weights, *constants])
        except Foreign as error:
            raise RefusedError(f"{path}: {_MODEL}: {error}: {_REMEDY}") from error
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise RefusedError(
                f"{path}: {_MODEL} is not built as torch.export.save builds it ({what}): {_REMEDY}"
            ) from error
        self.program.metadata.update(
            parameters=sum(count for is_parameter, count in (*weights, *constants) if is_parameter),
            weights_bytes=sum(self.members[name].file_size for name in self.payloads),
            extra_files=sorted(name.removeprefix("extra/") for name in self.members if name.startswith("extra/")),
        )
        self.texts = {
            "archive_format": b"pt2",
            "archive_version": b"0",
            "byteorder": b"little",
            ".data/version": b"6\n",
            _MODEL: json.dumps(graph).encode(),
            _WEIGHTS: json.dumps(weights_config).encode(),
            _CONSTANTS: json.dumps(constants_config).encode(),
            _EXAMPLE: b"",  # torch takes that for no example, and unpickles nothing
        }

    def _read(self, name: str) -> bytes:
        if name not in self.members:
            raise RefusedError(f"{self.path} has no member {name}: {_REMEDY}")
        return read_member(self.path, self.archive, self.members[name])

    def _refuse_strangers(self) -> None:
        known = _PLAIN | {_MODEL, _WEIGHTS, _CONSTANTS, _EXAMPLE}
        for name in self.members:
            if name in known or _PAYLOAD.fullmatch(name) or name.startswith("extra/"):
                continue
            why = "is none that torch.export.save writes"
            if name.startswith("data/aotinductor/"):
                why = "is compiled code, which runs with all rights of this process"
            elif name.startswith(("data/constants/custom_obj_", "data/constants/opaque_obj_")):
                why = "is a pickled object: loading it can run code"
            elif name.startswith("models/"):
                why = "is a second program: one a file"
            elif name in ("data/weights/model.pt", "data/constants/model.pt"):
                why = "is the pickle of an older torch"
            raise RefusedError(f"{self.path}: the member {name} {why}; {_REMEDY}")

    def _check_example(self, content: bytes) -> None:
        """The example input is a torch.save archive inside the archive. It is never loaded; that it could be is checked."""
        where = f"{self.path}: {_EXAMPLE}"
        if not content:
            return
        try:
            archive = zipfile.ZipFile(io.BytesIO(content))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
            raise RefusedError(f"{where} is not what torch.export.save writes ({error}): {_REMEDY}") from error
        with archive:
            infos = archive.infolist()
            if not infos:
                raise RefusedError(f"{where} is empty: {_REMEDY}")
            check_members(Path(where), infos, _CHUNK << 12, writer="torch.save")
            for info in infos:
                inside = info.filename.partition("/")[2]
                if inside == "data.pkl":
                    check_pickle(
                        self.path, f"{_EXAMPLE}/data.pkl", read_member(Path(where), archive, info),
                        writer="torch.export.save", permitted=_example_global,
                    )  # fmt: skip
                elif not re.fullmatch(
                    r"data/[0-9]+|byteorder|version|\.data/[a-z_]+|\.(format_version|storage_alignment)", inside
                ):
                    raise RefusedError(f"{where} has the member {inside!r}, which torch.save never writes: {_REMEDY}")

    def _payloads(self, config: str, folder: str) -> tuple[list[tuple[bool, int]], Any]:
        """For every weight whether it is a parameter, and its number of elements; and the table of them."""
        found = []
        try:
            table = parsed(self._read(config), config)
            entries = table["config"]
            if set(table) != {"config"}:
                raise Foreign("it has other parts than 'config'")
            for name, entry in entries.items():
                found.append(self._payload(folder, name, entry))
        except Foreign as error:
            raise RefusedError(f"{self.path}: {config}: {error}: {_REMEDY}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise RefusedError(
                f"{self.path}: {config} is not built as torch.export.save builds it ({what}): {_REMEDY}"
            ) from error
        return found, table

    def _payload(self, folder: str, name: str, entry: dict[str, Any]) -> tuple[bool, int]:
        if not QUALIFIED.fullmatch(name):
            raise Foreign(f"a weight has the name {name[:120]!r}")
        if set(entry) != {"path_name", "is_param", "use_pickle", "tensor_meta"} or not isinstance(
            entry["is_param"], bool
        ):
            raise Foreign(f"{name} is described in a way that is not known here")
        if entry["use_pickle"] is not False:
            raise Foreign(
                f"{name} is a pickle (a tensor of a class of its own): loading it can run code, so it is never opened"
            )
        member = f"{folder}/{entry['path_name']}"
        if not _PAYLOAD.fullmatch(member) or member not in self.members:
            raise Foreign(f"{name} is in {member[:120]!r}, which is not there")
        meta = cleaned(entry["tensor_meta"])
        sizes, strides = ([_plain(n) for n in meta[side]] for side in ("sizes", "strides"))
        offset, width = _plain(meta["storage_offset"]), _BYTES.get(meta["dtype"])
        if width is None or meta["layout"] != _STRIDED or len(sizes) != len(strides):
            raise Foreign(f"{name} is of a kind that cannot be served (dtype {meta['dtype']}, layout {meta['layout']})")
        elements = math.prod(sizes)
        needed = (
            width * (offset + 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)))
            if elements
            else 0
        )
        there = self.members[member].file_size
        if there < needed:
            raise Foreign(
                f"{name} needs {needed} bytes, but {member} has {there}: it is truncated or was exported without weights"
            )
        self.payloads.add(member)
        return entry["is_param"], elements


def _example_global(module: str, name: str) -> bool:
    return (module, name) in _EXAMPLE_GLOBALS or (module == "torch" and name in STORAGES)


def _plain(size: dict[str, Any]) -> int:
    number = size.get("as_int")
    if set(size) != {"as_int"} or type(number) is not int or number < 0:
        raise Foreign(f"a weight has the size {str(size)[:120]}")
    return number


def _program(document: dict[str, Any], weights: list[tuple[bool, int]]) -> ExportedProgram:
    module = document["graph_module"]
    tensors = module["graph"]["tensor_values"]
    called = next(entry["signature"] for entry in module["module_call_graph"] if entry["fqn"] == "")
    inputs = [_named(spec, tensors) for spec in _inputs(module["signature"]["input_specs"])]
    names, positional = _order(
        leaves(parsed(called["in_spec"].encode(), "in_spec")), [tensor.name for tensor in inputs]
    )
    produced = list(_outputs(module["signature"]["output_specs"]))
    _refuse_memory(module["graph"]["nodes"], _kept(module["signature"]["input_specs"]))
    shape_of_answer = leaves(parsed(called["out_spec"].encode(), "out_spec"))
    keys, answers = _answers(shape_of_answer, len(produced))
    outputs = [_named(spec, tensors, key) for key, spec in zip(keys, produced, strict=True)]
    for side in (names, keys):
        if len(set(side)) != len(side):
            raise Foreign(f"two inputs or two outputs have the same name among {', '.join(side)}")
    # By their names in the call: how the graph calls them is torch's own matter.
    given = tuple(TensorSpec(name, spec.datatype, spec.shape) for name, spec in zip(names, inputs, strict=True))
    version = document["schema_version"]
    return ExportedProgram(
        Signature(given, tuple(outputs)),
        positional,
        answers,
        {
            "producer": f"torch {document['torch_version']}",
            "schema_version": f"{version['major']}.{version['minor']}",
            "opset": document["opset_version"],
            "nodes": len(module["graph"]["nodes"]),
        },
    )


def _inputs(specs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for spec in specs:
        ((kind, value),) = spec.items()
        if kind == "user_input":
            yield value["arg"]
        elif kind == "constant_input":
            raise Foreign(
                f"the input {value['name']!r} is a constant of the example: leave it out, or make it a tensor"
            )
        elif kind not in ("parameter", "buffer", "tensor_constant"):
            raise Foreign(f"an input is a {kind}")


def _outputs(specs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for spec in specs:
        ((kind, value),) = spec.items()
        if kind == "user_output":
            yield value["arg"]
        elif kind in ("buffer_mutation", "parameter_mutation"):
            raise Foreign(_REMEMBERS)
        elif kind != "user_input_mutation":
            raise Foreign(f"an output is a {kind}")


def _kept(specs: list[dict[str, Any]]) -> set[str]:
    """What the graph calls its weights and buffers."""
    return {value["arg"]["name"] for spec in specs for kind, value in spec.items() if kind in ("parameter", "buffer")}


def _refuse_memory(nodes: list[dict[str, Any]], kept: set[str]) -> None:
    """Refuse what writes into weights or buffers: operators in place (`add_`), and batch norms in training."""
    for node in nodes:
        operator = node["target"].split(".")[3] if node["target"].startswith("torch.ops.") else ""
        given = {one["name"]: one["arg"] for one in node["inputs"]}
        first = node["inputs"][0]["arg"].get("as_tensor") if node["inputs"] else None
        in_place = operator.endswith("_") and not operator.endswith("__")
        if in_place and first is not None and first["name"] in kept:
            raise Foreign(_REMEMBERS)
        if operator.endswith(("batch_norm", "instance_norm")) and given.get("training", {}).get("as_bool") is True:
            raise Foreign(_REMEMBERS)


def _order(call: Any, graph_names: list[str]) -> tuple[list[str], int]:
    """Names of the inputs in the order of the call, and how many of them are given by position."""
    if not (isinstance(call, list) and len(call) == 2 and isinstance(call[0], list) and isinstance(call[1], dict)):
        raise Foreign("it is not called with arguments")
    positional, keywords = call
    if any(leaf is not None for leaf in (*positional, *keywords.values())):
        raise Foreign("an argument is a list, tuple or dict: wrap the model so that it takes plain tensors")
    if len(positional) + len(keywords) != len(graph_names):
        raise Foreign(
            f"it is called with {len(positional) + len(keywords)} arguments, its graph takes {len(graph_names)}"
        )
    if not all(IDENTIFIER.fullmatch(name) for name in keywords):
        raise Foreign("an argument is given by a name that is none")
    return [*graph_names[: len(positional)], *keywords], len(positional)


def _answers(answer: Any, count: int) -> tuple[list[str], str]:
    """Names of the outputs: the keys of a dict, else "output", or "output_0" and so on. And how the answer is built."""
    if answer is None:
        names, how = ["output"], "one"
    elif isinstance(answer, dict):
        names, how = list(answer), "named"
    else:
        names, how = [f"output_{i}" for i in range(len(answer))], "many"
    inside = [] if answer is None else list(answer.values()) if isinstance(answer, dict) else answer
    if any(part is not None for part in inside):
        raise Foreign("its answer is nested: return a tensor, a tuple of tensors or a dict of tensors")
    if len(names) != count or not names:
        raise Foreign(f"its answer has {len(names)} parts, its graph {count}")
    return names, how


def _named(argument: dict[str, Any], tensors: dict[str, Any], called: str | None = None) -> TensorSpec:
    if set(argument) != {"as_tensor"}:
        raise Foreign(f"an input or output is no tensor ({', '.join(argument)})")
    name = argument["as_tensor"]["name"]
    meta = tensors[name]
    datatype = _DATATYPES.get(meta["dtype"])
    if datatype is None or meta["layout"] != _STRIDED:
        raise Foreign(
            f"{called or name} is of dtype {meta['dtype']} and layout {meta['layout']}, which cannot be served"
        )
    shape = []
    for size in meta["sizes"]:
        number = size.get("as_int", -1)
        if type(number) is not int or (number < 0 and "as_expr" not in size):
            raise Foreign(f"{called or name} has the size {str(size)[:80]}")
        shape.append(number if "as_int" in size else -1)
    return TensorSpec(called or name, datatype, tuple(shape))
