"""What a model file is, found without running it: its kind, its signature, what belongs to it, or why it is refused."""

from __future__ import annotations

import pickletools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from registry import (
    coreml,
    exported,
    folders,
    labels,
    mlflow_models,
    modeltoml,
    onnxfile,
    packages,
    textmodels,
    torchscript,
)
from registry.errors import RefusedError
from registry.modeltoml import MODEL_TOML as MODEL_TOML
from registry.modeltoml import ModelToml as ModelToml
from registry.modeltoml import parse_model_toml as parse_model_toml
from registry.signature import Signature

Format = Literal["onnx", "torchscript", "pt2", "coreml"]

EXTENSIONS: dict[str, Format] = {
    ".onnx": "onnx",
    ".pt": "torchscript",
    ".pth": "torchscript",
    ".torchscript": "torchscript",
    ".pt2": "pt2",
    ".mlmodel": "coreml",
}
NAMES: dict[Format, str] = {
    "onnx": "ONNX",
    "torchscript": "TorchScript",
    "pt2": "a torch.export archive",
    "coreml": "CoreML",
}
KNOWN = ".onnx, .pt2, .pt, .pth, .torchscript, .mlmodel or .mlpackage"
EXPORT_HINT = (
    "export the model to ONNX (torch.onnx.export), torch.export (torch.export.save) "
    "or TorchScript (torch.jit.script or trace, then save)"
)
PACKAGE = ".mlpackage"
_MANIFEST = "Manifest.json"

_HEAD_BYTES = 4096
_COMPANION_BYTES = 1 << 20
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
    """A model that may be stored. `files` holds `path`, the one to load, first; their names count from `root`."""

    format: Format
    path: Path
    files: tuple[Path, ...]
    signature: Signature | None
    metadata: dict[str, Any] = field(default_factory=dict)
    size_bytes: int = 0
    root: Path = Path()
    entry: str = ""
    """What to inspect where the files lie in another root: the file to load, a package, or "." for the whole folder."""
    toml: ModelToml = field(default_factory=ModelToml)
    """What model.toml says."""
    generated: str | None = None
    """A model.toml that belongs to the artifact and is not there: what MLflow says goes in and out of a TorchScript file."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Facts from around the files: an MLflow model's run, what an export of ours says."""
    golden: Path | None = None
    """Golden cases that came along with an export of ours."""
    kind: str | None = None
    """classifier, predictor, extractor or router, where model.toml or an export says so."""

    @property
    def names(self) -> list[str]:
        """The names of `files` in the artifact."""
        return [file.relative_to(self.root).as_posix() for file in self.files]


@dataclass(frozen=True, slots=True)
class _Found:
    """What is inside the file to load: the rest of it, and what it says."""

    format: Format
    signature: Signature | None
    metadata: dict[str, Any]
    rest: tuple[Path, ...] = ()


def inspect(path: Path, *, max_bytes: int) -> ModelFile:
    """Look at a model file, or at a directory that is one model. Nothing in it is executed or unpickled.

    A directory may be a CoreML package, an MLflow model, an export of ours, or a folder with one file to load and others beside it.
    Raises RefusedError that says what was found and what to do, UsageError for a model.toml that is wrong.
    """
    try:
        if not path.exists():
            if path.is_symlink():
                raise RefusedError(f"{path} is a symbolic link to {path.readlink()}, which does not exist")
            raise RefusedError(f"{path} does not exist: give the path of a model ({KNOWN})")
        if not path.is_dir():
            return _alone(folders.regular(path), max_bytes)
        if path.suffix.lower() == PACKAGE:
            return _package(path, path.parent, max_bytes)
        if (path / packages.MANIFEST).is_file():
            return _exported_by_us(path, max_bytes)
        if (path / mlflow_models.MLMODEL).is_file():
            return _of_mlflow(path, max_bytes)
        return _folder(path, max_bytes)
    except OSError as error:
        raise RefusedError(f"{path} cannot be read: {error.strerror or error}") from error


def _alone(main: Path, max_bytes: int, **more: Any) -> ModelFile:
    """A file by itself, with its external data. The model.toml beside it belongs to it where it decides the signature."""
    found = _look(main, max_bytes)
    toml = modeltoml.read_beside(main.parent)
    if toml.text is not None:
        raise RefusedError(
            f"{main} is a part of a text model ([text] in its {MODEL_TOML}): give the folder, {main.parent}"
        )
    return _built(main, main.parent, main.name, found, toml, (), max_bytes, **more)


def _package(folder: Path, root: Path, max_bytes: int, **more: Any) -> ModelFile:
    """A CoreML package: every file in it."""
    if not (folder / _MANIFEST).is_file():
        raise RefusedError(f"{folder} has no {_MANIFEST}: it is not a CoreML package, or not whole; export it again")
    others = [file for file in folders.files_in(folder) if file != (folder / _MANIFEST).resolve()]
    main = folders.regular(folder / _MANIFEST)
    root = root.resolve()
    _check_size(folder, main.stat().st_size + sum(file.stat().st_size for file in others), max_bytes)
    looked = coreml.check_package(main.parent)
    found = _Found("coreml", looked.signature, looked.metadata)
    entry = main.parent.relative_to(root).as_posix()
    return _built(main, root, entry, found, modeltoml.read_beside(root), tuple(others), max_bytes, **more)


def _folder(folder: Path, max_bytes: int, **more: Any) -> ModelFile:
    """One file to load, and others that are kept with it."""
    toml = modeltoml.read_beside(folder)
    main = _to_load(folder, toml)
    root = folder.resolve()
    described = root / MODEL_TOML
    others = [file for file in folders.files_in(root) if file != described]
    if main.is_dir():
        package = _package(main, root, max_bytes, **more)
        beside = tuple(file for file in others if file not in package.files)
        found = _Found("coreml", package.signature, package.metadata, package.files[1:])
        main = package.path
    else:
        _check_size(main, main.stat().st_size, max_bytes)
        found = _look(main, max_bytes)
        beside = tuple(file for file in others if file != main and file not in found.rest)
    for file in beside:
        _check_companion(file)
    entry = "." if beside or toml.file is not None else main.relative_to(root).as_posix()
    built = _built(main, root, entry, found, toml, beside, max_bytes, **more)
    text = textmodels.find(root, toml, found.signature or toml.signature)
    return built if text is None else replace(built, metadata={**built.metadata, "text": text.as_dict()})


def _of_mlflow(folder: Path, max_bytes: int) -> ModelFile:
    """An MLflow model: the file that its flavour loads. What MLmodel says of inputs and outputs is held against the file."""
    told = mlflow_models.read(folder)
    found = _alone(told.file, max_bytes, origin=told.facts)
    signature = mlflow_models.checked(told, found.signature or found.toml.signature)
    if found.signature is None and found.toml.signature is None and signature is not None:
        return replace(found, generated=modeltoml.written(signature))
    return found


def _exported_by_us(folder: Path, max_bytes: int) -> ModelFile:
    """A directory that `modelkeep models export` wrote: its files, as their checksums say they were."""
    told = packages.read(folder, max_bytes=max_bytes)
    if told.format == "coreml" and told.files[0].name == _MANIFEST:
        found = _package(told.files[0].parent, told.root, max_bytes)
    elif len(told.files) == 1:
        found = _alone(told.files[0], max_bytes)
    else:
        found = _folder(told.root, max_bytes)
    return replace(found, origin=told.facts, golden=told.golden, kind=told.kind or found.kind)


def _built(
    main: Path,
    root: Path,
    entry: str,
    found: _Found,
    toml: ModelToml,
    beside: tuple[Path, ...],
    max_bytes: int,
    *,
    origin: dict[str, Any] | None = None,
) -> ModelFile:
    decides = toml.file is not None or toml.text is not None or (found.signature is None and toml.signature is not None)
    described = (root / MODEL_TOML,) if decides else ()
    files = (main, *found.rest, *beside, *described)
    size = sum(file.stat().st_size for file in files)
    _check_size(main, size, max_bytes)
    names = {file.relative_to(root).as_posix() for file in files} if toml.labels else set()
    labels.check(toml.labels, root, names, found.signature or toml.signature)
    return ModelFile(
        found.format, main, files, found.signature, found.metadata, size, root, entry, toml,
        origin=origin or {}, kind=toml.kind,
    )  # fmt: skip


def _look(main: Path, max_bytes: int) -> _Found:
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
        if expected == "torchscript" and kind == "torchscript":
            return _Found("torchscript", None, torchscript.check(main, max_bytes=max_bytes))
        if expected == "pt2" and kind == "torch.export":
            program = exported.check(main, max_bytes=max_bytes)
            return _Found("pt2", program.signature, program.metadata)
        raise RefusedError(_wrong_archive(main, kind, expected))
    if expected is None:
        words = "of an unknown kind" if found == "onnx?" else found
        raise RefusedError(f"{main} is {words}: models are {KNOWN}; {EXPORT_HINT}")
    if found != "onnx?":
        raise RefusedError(f"{main} is {found}, not {NAMES[expected]} as its extension says; {EXPORT_HINT}")
    if expected == "coreml":
        looked = coreml.check_file(main)
        return _Found("coreml", looked.signature, looked.metadata)
    if expected != "onnx":
        onnxfile.refuse_under_other_extension(main)
    graph = onnxfile.check(main)
    return _Found("onnx", graph.signature, graph.metadata, graph.external)


def _to_load(folder: Path, toml: ModelToml) -> Path:
    """The file of a folder that is loaded, or the CoreML package: the one there is, or the one that model.toml names."""
    if toml.file is not None:
        named = folders.inside(folder.resolve(), toml.file, f"{folder / MODEL_TOML}: file")
        if named.is_dir() and named.suffix.lower() != PACKAGE:
            raise RefusedError(f"{folder / MODEL_TOML}: file = {toml.file!r} is a folder: name the file to load")
        return named
    models = sorted(item for item in folder.iterdir() if _loadable(item))
    if not models:
        raise RefusedError(f"{folder} is a directory without a model: it holds no {KNOWN}")
    if len(models) > 1:
        listed = ", ".join(item.name for item in models[:5]) + (", …" if len(models) > 5 else "")
        raise RefusedError(
            f"{folder} holds {len(models)} models ({listed}): name one of them, or say which to load in its {MODEL_TOML} (file = …)"
        )
    return models[0] if models[0].is_dir() else folders.regular(models[0])


def _loadable(item: Path) -> bool:
    if item.name.startswith("."):
        return False
    return item.suffix.lower() == PACKAGE if item.is_dir() else item.suffix.lower() in EXTENSIONS


def _check_companion(file: Path) -> None:
    """A file that is kept beside the model is never loaded here, but by whoever exports it: no pickles."""
    if file.stat().st_size == 0:
        return
    with file.open("rb") as source:
        head = source.read(_COMPANION_BYTES)
    if _whole_pickle(head) or (head.startswith(b"PK") and _holds_pickle(file)):
        raise RefusedError(
            f"{file} is a Python pickle: loading it can run any code, so it is not kept beside a model; "
            "leave it out, or write it as JSON or safetensors"
        )


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


def _whole_pickle(content: bytes) -> bool:
    """As `is_pickle`, but for protocols 0 and 1 only what is one up to its end: they look like text, and text like them."""
    if len(content) > 1 and content[0] == 0x80 and 2 <= content[1] <= 5:
        return True
    calls = False
    try:
        for opcode, _, position in pickletools.genops(content):
            calls = calls or opcode.name in ("GLOBAL", "INST")
            if opcode.name == "STOP":
                return calls and position == len(content.rstrip()) - 1
    except Exception:  # as above
        return False
    return False


def _holds_pickle(file: Path) -> bool:
    try:
        return torchscript.kind_of(file) == "torch.save"
    except RefusedError:  # some other archive, which is nobody's model
        return False


def _wrong_archive(path: Path, kind: str, expected: Format | None) -> str:
    if kind == "torchscript":
        return f"{path} is a TorchScript archive under the extension {path.suffix}: name it .pt, or export it to ONNX"
    if kind == "torch.export":
        return f"{path} is a torch.export archive under the extension {path.suffix}: name it .pt2"
    words = {
        "torch.save": (
            "a torch.save archive (a pickle inside a zip): loading it can run any code, so it is never opened"
        ),
        "other": "a zip archive without a model in it that is known here",
    }[kind]
    under = f" under the extension {path.suffix}" if expected in ("onnx", "pt2", "coreml") else ""
    return f"{path} is {words}{under}; {EXPORT_HINT}"
