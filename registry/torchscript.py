"""TorchScript archives, looked at from outside, without torch: members, pickles by opcode, code by its words."""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from registry.archives import check_members, open_archive, read_member
from registry.errors import RefusedError

GLOBALS = frozenset(
    {
        ("builtins", "complex"),
        ("collections", "OrderedDict"),
        ("torch", "device"),
        ("torch", "per_channel_affine"),
        ("torch", "per_channel_affine_float_qparams"),
        ("torch", "per_channel_symmetric"),
        ("torch", "per_tensor_affine"),
        ("torch", "per_tensor_symmetric"),
        ("torch._utils", "_rebuild_qtensor"),
        ("torch._utils", "_rebuild_sparse_csr_tensor"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.jit._pickle", "build_boollist"),
        ("torch.jit._pickle", "build_doublelist"),
        ("torch.jit._pickle", "build_intlist"),
        ("torch.jit._pickle", "build_tensor_from_id"),
        ("torch.jit._pickle", "build_tensorlist"),
        ("torch.jit._pickle", "restore_type_tag"),
    }
)
"""What torch 2.13 writes, found by exporting scripted, traced, frozen, quantised and sparse modules."""
STORAGES = frozenset(
    f"{kind}Storage"
    for kind in (
        *("BFloat16", "Bool", "Byte", "Char", "ComplexDouble", "ComplexFloat", "Double", "Float", "Half", "Int"),
        *("Long", "QInt32", "QInt8", "QUInt2x4", "QUInt4x2", "QUInt8", "Short"),
    )
)
_OWN_CLASS = re.compile(r"__torch__(\.[A-Za-z0-9_]+)*")
_NATIVE_CLASSES = re.compile(r"__torch__\.torch\.classes\.(?!quantized\.)")

_WORDS = re.compile(r"\b(from_file|save|setattr|rpc_async|rpc_sync|rpc_remote)\b")
"""Operators that write or map files when the model runs (torch.save, torch.from_file), or call other machines."""
_ESCAPES = re.compile(r"\\(?:([0-7]{1,3})|([xuUN])|.)", re.DOTALL)
# In a string of the code. The exporter writes \ooo for what cannot be printed and never for a letter, which would only
# hide one of the words above: getattr(torch, "\163ave") is torch.save.
_NAMESPACES = re.compile(r"(?<![\w.])ops\s*\.\s*([A-Za-z0-9_]+)")
_KNOWN_NAMESPACES = frozenset(
    (
        *("_quantized", "aten", "mkl", "mkldnn", "mkldnn_prepacked", "onednn", "onnx", "prim", "prims", "profiler"),
        *("quantization", "quantized", "sparse", "torchvision"),
    )
)

Kind = Literal["torchscript", "torch.save", "torch.export", "other"]


def kind_of(path: Path) -> Kind:
    """What is in a zip archive, by the names of its members. Raises RefusedError where it cannot be opened."""
    with open_archive(path) as archive:
        inside = {name.partition("/")[2] for name in archive.namelist()}
    if "data.pkl" in inside and "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        return "torchscript"
    if "archive_format" in inside or any(name.startswith("models/") and name.endswith(".json") for name in inside):
        return "torch.export"
    return "torch.save" if "data.pkl" in inside else "other"


def check(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Metadata of a TorchScript archive that is safe to load. Raises RefusedError that names the member at fault."""
    with open_archive(path) as archive:
        infos = archive.infolist()
        check_members(path, infos, max_bytes, writer="torch.jit.save")
        weights = 0
        for info in infos:
            inside = info.filename.partition("/")[2]
            if inside.startswith(("data/", "constants/", "traced_inputs/")) and not inside.endswith("pkl"):
                weights += info.file_size
                continue
            content = read_member(path, archive, info)
            if inside.endswith(("pkl", ".pickle")) or content[:1] == b"\x80":
                check_pickle(path, info.filename, content)
            elif inside.startswith("code/"):
                _check_code(path, info.filename, content)
        version = next((read_member(path, archive, i).strip() for i in infos if i.filename.endswith("/version")), b"")
    return {"archive_version": version.decode("ascii", "replace"), "weights_bytes": weights}


def allowed(module: str, name: str) -> bool:
    """True for a global that torch.jit.save writes into its pickles."""
    if (module, name) in GLOBALS or (module == "torch" and name in STORAGES):
        return True
    return bool(_OWN_CLASS.fullmatch(module)) and not _NATIVE_CLASSES.match(f"{module}.{name}")


def check_pickle(
    path: Path,
    member: str,
    content: bytes,
    *,
    writer: str = "TorchScript",
    permitted: Callable[[str, str], bool] = allowed,
) -> None:
    """Read a pickle by its opcodes, without loading it. Raises RefusedError for what `writer` never writes."""
    ended = 0
    try:
        for opcode, argument, position in pickletools.genops(content):
            if opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                if not permitted(module, name):
                    raise RefusedError(
                        f"{path}: {member} asks for {module}.{name}, which {writer} never writes: "
                        "a plain pickle can run code; export the model again from its source"
                    )
            elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"):
                raise RefusedError(
                    f"{path}: {member} uses the pickle opcode {opcode.name}, which {writer} never writes: "
                    "export the model again from its source"
                )
            if opcode.name == "STOP" and position is not None:
                ended = position + 1
    except RefusedError:
        raise
    except Exception as error:  # genops raises ValueError, UnicodeDecodeError, OverflowError …
        raise RefusedError(f"{path}: {member} is not a readable pickle ({error}): export the model again") from error
    if ended != len(content):
        raise RefusedError(f"{path}: {member} goes on after the end of its pickle: export the model again")


def _check_code(path: Path, member: str, content: bytes) -> None:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path}: {member} is not text: {error}") from error
    if word := _WORDS.search(text):
        raise RefusedError(
            f"{path}: {member} uses {word[1]!r}: torch.save, torch.from_file and their like write or map files "
            "whenever the model runs; leave it out and export again"
        )
    for octal, hexadecimal in _ESCAPES.findall(text):
        if hexadecimal or (octal and 0x20 <= int(octal, 8) < 0x7F):
            raise RefusedError(f"{path}: {member} spells letters by escapes, which hides what it calls")
    for namespace in _NAMESPACES.findall(text):
        if namespace not in _KNOWN_NAMESPACES:
            raise RefusedError(f"{path}: {member} calls operators of {namespace!r}, which a model has no use for")
