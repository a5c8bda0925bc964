"""MLflow model directories: the MLmodel file read, its flavour's file found. Written without mlflow, which is not needed to read one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import folders, torchscript
from registry.errors import RefusedError
from registry.signature import DATATYPES, FROM_NUMPY, Signature, TensorSpec

MLMODEL = "MLmodel"
MAX_BYTES = 1 << 20
REMEDY = "log it with mlflow.onnx.log_model, or with mlflow.pytorch.log_model(…, serialization_format='pt2'), or as TorchScript"
_FLAVOURS = ("onnx", "pytorch")
_TORCH_FILES = ("model.pt2", "model.pth")

Tensors = tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class MLflowModel:
    """What an MLmodel file says. `inputs` and `outputs` are None where it gives no tensors; a tensor without a name has ""."""

    folder: Path
    file: Path
    flavour: str
    inputs: Tensors | None
    outputs: Tensors | None
    facts: dict[str, Any]


def read(folder: Path) -> MLflowModel:
    """Read a directory with an MLmodel. Raises RefusedError for a flavour that is not served, and says what to do."""
    document = _document(folder / MLMODEL)
    flavours = document.get("flavors")
    if not isinstance(flavours, dict) or not flavours:
        raise RefusedError(f"{folder / MLMODEL} names no flavours: it is not the description of an MLflow model")
    flavour = next((name for name in _FLAVOURS if isinstance(flavours.get(name), dict)), None)
    if flavour is None:
        listed = ", ".join(sorted(map(str, flavours)))
        raise RefusedError(
            f"{folder} is an MLflow model of the flavours {listed}; served are onnx and pytorch: {REMEDY}"
        )
    file = _file(folder, flavour, flavours[flavour])
    signature = document.get("signature")
    inputs, outputs = (
        _tensors(folder, side, signature.get(side)) if isinstance(signature, dict) else None
        for side in ("inputs", "outputs")
    )
    said: dict[str, Any] = {"flavour": flavour}
    for key in ("run_id", "model_id", "model_uuid", "mlflow_version", "utc_time_created", "artifact_path"):
        if isinstance(document.get(key), str | int | float):
            said[key] = str(document[key])
    more = document.get("metadata")
    if isinstance(more, dict):
        said["metadata"] = {str(k): v for k, v in more.items() if isinstance(v, str | int | float | bool)}
    return MLflowModel(folder, file, flavour, inputs, outputs, {"mlflow": said})


def checked(told: MLflowModel, found: Signature | None) -> Signature | None:
    """The signature, where MLmodel and the file agree; that of MLmodel where the file has none. Raises RefusedError."""
    if found is None:
        if not told.inputs or not told.outputs:
            return None
        return Signature(_with_names(told.inputs, "input"), _with_names(told.outputs, "output"))
    for side, said, there in (("input", told.inputs, found.inputs), ("output", told.outputs, found.outputs)):
        # A PyTorch module is called by position: the names in its signature are those of whoever logged it.
        if said and (why := _differ(said, there, names_count=told.flavour == "onnx")):
            raise RefusedError(
                f"{told.folder / MLMODEL}: the {side}s of its signature are not those of {told.file.name} ({why}): "
                "log the model again, with the signature of the model that is logged"
            )
    return found


def _differ(said: Tensors, there: Tensors, *, names_count: bool) -> str | None:
    if len(said) != len(there):
        return f"{len(said)} there, {len(there)} in the file"
    by_name = {spec.name: spec for spec in there}
    for position, spec in enumerate(said):
        if names_count and spec.name and spec.name not in by_name:
            return f"{spec.name!r} is not in the file, which has {', '.join(map(repr, by_name))}"
        other = by_name.get(spec.name, there[position]) if names_count else there[position]
        if spec.datatype != other.datatype:
            return f"{other.name!r} is {spec.datatype} there and {other.datatype} in the file"
        if len(spec.shape) != len(other.shape) or any(
            a != b for a, b in zip(spec.shape, other.shape, strict=True) if -1 not in (a, b)
        ):
            return f"{other.name!r} is of shape {list(spec.shape)} there and {list(other.shape)} in the file"
    return None


def _with_names(specs: Tensors, word: str) -> Tensors:
    if len(specs) == 1 and not specs[0].name:
        return (TensorSpec(word, specs[0].datatype, specs[0].shape),)
    return tuple(TensorSpec(spec.name or f"{word}_{i}", spec.datatype, spec.shape) for i, spec in enumerate(specs))


def _document(path: Path) -> dict[str, Any]:
    import yaml

    class Plain(yaml.SafeLoader):
        """Without merges ("<<"): merges of merges grow tenfold a line, and MLflow writes none."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.constructor.ConstructorError(None, None, "it merges mappings ('<<')", node.start_mark)

    folders.regular(path, "an MLmodel file")
    if path.stat().st_size > MAX_BYTES:
        raise RefusedError(f"{path} has more than {MAX_BYTES} bytes: it is not the description of an MLflow model")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=Plain)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RefusedError(f"{path} is not YAML that can be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, dict):
        raise RefusedError(f"{path} is not the description of an MLflow model")
    return found


def _file(folder: Path, flavour: str, said: dict[str, Any]) -> Path:
    where = f"{folder / MLMODEL}: {flavour}"
    if flavour == "onnx":
        file = folders.inside(folder, _name(where, said, "data"), where)
        if file.is_dir():
            raise RefusedError(f"{where}: {file} is a folder: name the ONNX file")
        return file
    data = folders.inside(folder, _name(where, said, "model_data"), where)
    if not data.is_dir():
        raise RefusedError(f"{where}: {data} is no folder")
    name = next((name for name in _TORCH_FILES if (data / name).exists()), None)
    if name is None:
        raise RefusedError(f"{where}: {data} holds neither {' nor '.join(_TORCH_FILES)}")
    file = folders.inside(data, name, where)
    if name == "model.pth" and _pickled(file):
        raise RefusedError(
            f"{folder} is an MLflow model whose weights are a Python pickle ({data.name}/{name}): loading it can run any code, "
            f"so it is never opened; {REMEDY}"
        )
    return file


def _pickled(file: Path) -> bool:
    with file.open("rb") as source:
        archive = source.read(2) == b"PK"
    return not archive or torchscript.kind_of(file) == "torch.save"


def _name(where: str, said: dict[str, Any], key: str) -> str:
    name = said.get(key)
    if not isinstance(name, str):
        raise RefusedError(f"{where}: {key} is no name of a file but a {type(name).__name__}")
    return name


def _tensors(folder: Path, side: str, text: Any) -> Tensors | None:
    """The tensors of one side; None for columns of a table, for "any", and where nothing is said."""
    if not isinstance(text, str):
        return None
    where = f"{folder / MLMODEL}: signature: {side}"
    try:
        listed = json.loads(text)
        if not all(isinstance(one, dict) for one in listed):
            raise ValueError("not a list of tensors")
        if not listed or any(one.get("type") != "tensor" for one in listed):
            return None
        return tuple(_tensor(where, one) for one in listed)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(f"{where} cannot be read ({type(error).__name__}: {error}): log the model again") from error


def _tensor(where: str, said: dict[str, Any]) -> TensorSpec:
    inner = said["tensor-spec"]
    kind = "object" if str(inner["dtype"]) in ("str", "string", "object") else str(inner["dtype"])
    if kind not in FROM_NUMPY:
        raise RefusedError(f"{where} is of dtype {kind!r}, which cannot be served")
    return TensorSpec(str(said.get("name") or ""), FROM_NUMPY[kind], tuple(int(n) for n in inner["shape"]))


def description(
    format: str,
    main: str,
    signature: Signature | None,
    *,
    metadata: dict[str, Any],
    versions: dict[str, str],
    identity: str,
    created: str,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The MLmodel of an export, and the small files beside it, by their names. `main` is the path of the model's file.

    Raises RefusedError for a format that no flavour of MLflow loads.
    """
    if format == "coreml":
        raise RefusedError("MLflow has no flavour that loads a CoreML model: export it without --mlflow")
    requirements = ["mlflow", *(f"{name}=={version}" for name, version in versions.items())]
    files = {
        "requirements.txt": "".join(f"{line}\n" for line in requirements),
        "python_env.yaml": f"python: {versions_of_python()}\nbuild_dependencies:\n- pip\ndependencies:\n- -r requirements.txt\n",
    }
    python = {"env": {"virtualenv": "python_env.yaml"}, "python_version": versions_of_python()}
    if format == "onnx":
        flavour = {
            "code": None,
            "data": main,
            "onnx_session_options": None,
            "onnx_version": versions.get("onnx", ""),
            "providers": ["CPUExecutionProvider"],
        }
        flavours = {"onnx": flavour, "python_function": {**python, "data": main, "loader_module": "mlflow.onnx"}}
    else:
        folder = main.rpartition("/")[0]
        flavour = {"code": None, "model_data": folder, "pytorch_version": versions.get("torch", "")}
        loader = {
            "data": folder,
            "loader_module": "mlflow.pytorch",
            "pickle_module_name": "mlflow.pytorch.pickle_module",
        }
        flavours = {"pytorch": flavour, "python_function": {**python, **loader, "config": {"device": None}}}
        if main.endswith(".pth"):
            files[f"{folder}/pickle_module_info.txt"] = "mlflow.pytorch.pickle_module"
    document: dict[str, Any] = {
        "flavors": flavours,
        "metadata": metadata,
        "model_uuid": identity,
        "utc_time_created": created,
    }
    if signature is not None:
        # Its PyTorch flavour takes a bare array, and refuses one where the only input has a name.
        named = format == "onnx" or len(signature.inputs) > 1
        document["signature"] = {
            "inputs": json.dumps([_spec(spec, named) for spec in signature.inputs]),
            "outputs": json.dumps([_spec(spec, True) for spec in signature.outputs]),
            "params": None,
        }
    return document, files


def _spec(spec: TensorSpec, named: bool) -> dict[str, Any]:
    said = {"type": "tensor", "tensor-spec": {"dtype": DATATYPES[spec.datatype], "shape": list(spec.shape)}}
    return {"name": spec.name, **said} if named else said


def versions_of_python() -> str:
    import platform

    return platform.python_version()


def installed(names: Sequence[str]) -> dict[str, str]:
    """The installed versions of packages, without local labels ("+cpu")."""
    from importlib import metadata

    return {name: metadata.version(name).partition("+")[0] for name in names}
