"""What a model file is, found without running it: its kind, its signature, what belongs to it, or why it is refused."""

from __future__ import annotations

import pickletools
import re
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from registry import onnxfile, torchscript
from registry.errors import RefusedError, UsageError
from registry.signature import DATATYPES, Signature, TensorSpec

Format = Literal["onnx", "torchscript"]

EXTENSIONS: dict[str, Format] = {
    ".onnx": "onnx",
    ".pt": "torchscript",
    ".pth": "torchscript",
    ".torchscript": "torchscript",
}
NAMES: dict[Format, str] = {"onnx": "ONNX", "torchscript": "TorchScript"}
EXPORT_HINT = "export the model to ONNX (torch.onnx.export) or TorchScript (torch.jit.script or trace, then save)"
MODEL_TOML = "model.toml"

_HEAD_BYTES = 4096
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89HDF\r\n", "an HDF5 file (Keras)"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x7fELF", "a program (ELF)"),
    (0, b"MZ", "a Windows program"),
    (0, b"#!", "a script"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ", "an xz archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for"),
    (0, b"<", "an XML or HTML document"),
)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model that may be stored. `files` holds `path` first, then the ONNX external data inside its folder."""

    format: Format
    path: Path
    files: tuple[Path, ...]
    signature: Signature | None
    metadata: dict[str, Any] = field(default_factory=dict)
    size_bytes: int = 0


def inspect(path: Path, *, max_bytes: int) -> ModelFile:
    """Look at a model file, or at a directory that holds exactly one. Nothing in it is executed or unpickled.

    Raises RefusedError that says what was found and what to do.
    """
    main = find_model(path)
    size = main.stat().st_size
    if size == 0:
        raise RefusedError(f"{main} is empty: export the model again")
    _check_size(main, size, max_bytes)
    found, expected = sniff(main), EXTENSIONS.get(main.suffix.lower())
    if found == "pickle":
        raise RefusedError(
            f"{main} is a Python pickle (plain torch.save, joblib or pickle.dump): loading it can run any code, "
            f"so it is never opened; {EXPORT_HINT}"
        )
    if found == "zip":
        kind = torchscript.kind_of(main)
        if expected != "torchscript" or kind != "torchscript":
            raise RefusedError(_wrong_archive(main, kind, expected))
        return ModelFile("torchscript", main, (main,), None, torchscript.check(main, max_bytes=max_bytes), size)
    if expected is None:
        words = "of an unknown kind" if found == "onnx?" else found
        raise RefusedError(f"{main} is {words}: models are .onnx, or .pt, .pth or .torchscript; {EXPORT_HINT}")
    if found != "onnx?":
        raise RefusedError(f"{main} is {found}, not {NAMES[expected]} as its extension says; {EXPORT_HINT}")
    if expected != "onnx":
        onnxfile.refuse_under_other_extension(main)
    graph = onnxfile.check(main)
    files = (main, *graph.external)
    size = sum(file.stat().st_size for file in files)
    _check_size(main, size, max_bytes)
    return ModelFile("onnx", main, files, graph.signature, graph.metadata, size)


def find_model(path: Path) -> Path:
    """The model file that a path means: itself, or the one model of a directory. Raises RefusedError."""
    try:
        if not path.exists():
            if path.is_symlink():
                raise RefusedError(f"{path} is a symbolic link to {path.readlink()}, which does not exist")
            raise RefusedError(f"{path} does not exist: give the path of a model file (.onnx, .pt, .pth, .torchscript)")
        if not path.is_dir():
            return _regular(path)
        models = sorted(item for item in path.iterdir() if item.suffix.lower() in EXTENSIONS and not item.is_dir())
    except OSError as error:
        raise RefusedError(f"{path} cannot be read: {error.strerror or error}") from error
    if not models:
        raise RefusedError(f"{path} is a directory without a model: it holds no .onnx, .pt, .pth or .torchscript file")
    if len(models) > 1:
        listed = ", ".join(item.name for item in models[:5]) + (", …" if len(models) > 5 else "")
        raise RefusedError(f"{path} holds {len(models)} models ({listed}): name one of them")
    return _regular(models[0])


def _regular(path: Path) -> Path:
    """The path without links. Raises RefusedError for a link that leaves its folder and for all but plain files."""
    folder, target = path.parent.resolve(), path.resolve()
    if path.is_symlink() and not target.is_relative_to(folder):
        raise RefusedError(f"{path} is a symbolic link to {target}, outside its folder: copy the file itself (cp -L)")
    mode = target.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise RefusedError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'no plain file')}: give the path of a model file")
    return target


def _check_size(path: Path, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise RefusedError(
            f"{path} has {size_bytes} bytes, more than the {max_bytes} that are allowed; "
            "raise models.max_file_bytes if it is meant to be this big"
        )


def sniff(path: Path) -> str:
    """What the first bytes say: "zip", "pickle", words for another kind, or "onnx?": protocol buffers have no mark."""
    try:
        with path.open("rb") as source:
            head = source.read(_HEAD_BYTES)
    except OSError as error:
        raise RefusedError(f"{path} cannot be read: {error.strerror or error}") from error
    if head.startswith(b"PK"):
        return "zip"
    if is_pickle(head):
        return "pickle"
    for offset, mark, words in _MAGIC:
        if head[offset : offset + len(mark)] == mark:
            return words
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 100_000_000:
        return "a safetensors file (weights without a graph)"
    if head.lstrip()[:1] in (b"{", b"["):
        return "a JSON document"
    return "onnx?"


def is_pickle(head: bytes) -> bool:
    """True for any protocol: 2 and later by their mark, 0 and 1 where opcodes name a global or end with the file."""
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        return True
    try:
        for opcode, argument, position in pickletools.genops(head):
            if opcode.name in ("GLOBAL", "INST"):
                return bool(re.fullmatch(r"[A-Za-z_][\w.]* [A-Za-z_][\w.]*", str(argument)))
            if opcode.name == "STOP":
                return position == len(head) - 1
    except Exception:  # genops raises whatever a wrong argument makes it raise: then it is no pickle
        return False
    return False


def _wrong_archive(path: Path, kind: str, expected: Format | None) -> str:
    if kind == "torchscript":
        return f"{path} is a TorchScript archive under the extension {path.suffix}: name it .pt, or export it to ONNX"
    words = {
        "torch.save": (
            "a torch.save archive (a pickle inside a zip): loading it can run any code, so it is never opened"
        ),
        "torch.export": "a torch.export archive (.pt2), which is not served",
        "other": "a zip archive without a model in it that is known here",
    }[kind]
    under = f" under the extension {path.suffix}" if expected == "onnx" else ""
    return f"{path} is {words}{under}; {EXPORT_HINT}"


class _Toml(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TensorToml(_Toml):
    name: str
    datatype: str
    shape: list[int]


class ModelToml(_Toml):
    """What a person says about a model in the model.toml beside it."""

    description: str | None = None
    author: str | None = None
    architecture: str | None = None
    training_dataset: str | None = None
    training_metrics: dict[str, float | int | str] = {}
    tags: list[str] | dict[str, str] = []
    dependencies: list[str] = []
    inputs: list[TensorToml] = []
    outputs: list[TensorToml] = []

    @property
    def signature(self) -> Signature | None:
        """The signature, where inputs and outputs are given: a TorchScript file has none of its own."""
        if not self.inputs or not self.outputs:
            return None
        inputs, outputs = (
            [TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in side] for side in (self.inputs, self.outputs)
        )
        return Signature(tuple(inputs), tuple(outputs))

    @property
    def metadata(self) -> dict[str, Any]:
        """What was said, without the signature and without what was left out."""
        return self.model_dump(exclude={"inputs", "outputs"}, exclude_defaults=True)


def parse_model_toml(path: Path) -> ModelToml:
    """Read a model.toml. Raises UsageError that names the file, the key and what is wrong."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    try:
        told = ModelToml.model_validate(values)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc']))}: {_why(p['type'], p['msg'])}" for p in error.errors())
        raise UsageError(f"{path}: " + "; ".join(problems)) from None
    for side, tensors in (("inputs", told.inputs), ("outputs", told.outputs)):
        _check_tensors(path, side, tensors)
    if bool(told.inputs) != bool(told.outputs):
        raise UsageError(f"{path}: give both [[inputs]] and [[outputs]], or neither")
    return told


def _why(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "not a key of model.toml, which has " + ", ".join(ModelToml.model_fields)
    return message


def _check_tensors(path: Path, side: str, tensors: list[TensorToml]) -> None:
    for tensor in tensors:
        if not tensor.name or [t.name for t in tensors].count(tensor.name) > 1:
            raise UsageError(f"{path}: {side}: the name {tensor.name!r} is empty or there twice")
        if tensor.datatype not in DATATYPES:
            raise UsageError(f"{path}: {side}.{tensor.name}: {tensor.datatype!r} is not one of {', '.join(DATATYPES)}")
        if any(size < -1 for size in tensor.shape):
            raise UsageError(f"{path}: {side}.{tensor.name}: shape {tensor.shape}: sizes are 0 or more, or -1 for any")
