"""Files on their way into the store: copied where nobody can change them, and what they are called there."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from registry import formats, modeltoml
from registry.errors import RefusedError, StorageError
from registry.policy import METRICS
from registry.store import StoredFile, artifact_digest, file_digest


def copied(found: formats.ModelFile, folder: Path) -> Path:
    """The model's files, and its model.toml, in a folder of our own. Returns what to inspect there."""
    described = found.root / modeltoml.MODEL_TOML
    for file, name in zip(found.files, found.names, strict=True):
        copy(file, folder / name)
    if described.is_file() and described not in found.files:
        copy(described, folder / modeltoml.MODEL_TOML)
    if found.generated is not None and not described.is_file():
        (folder / modeltoml.MODEL_TOML).write_text(found.generated, encoding="utf-8")
    return folder if found.entry == "." else folder / found.entry


def copy(source: Path, target: Path) -> Path:
    """Raises StorageError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise StorageError(
            f"{source} could not be copied to {target.parent}: {error.strerror or error}. Nothing was left behind."
        ) from error
    return target


def golden_copy(golden: Path, folder: Path) -> Path:
    if not golden.is_file():
        raise RefusedError(f"golden cases {golden}: there is no such file")
    return copy(golden, folder / "golden.npz")


def without(found: formats.ModelFile, file: Path) -> formats.ModelFile:
    """The model without one of the files beside it."""
    left = tuple(one for one in found.files[1:] if one != file.resolve())
    return replace(found, files=(found.files[0], *left))


def stored_files(found: formats.ModelFile) -> list[StoredFile]:
    """Every file of the artifact under its name, the one to load first."""
    files = [StoredFile(name, *file_digest(file)) for name, file in zip(found.names, found.files, strict=True)]
    if found.generated is not None:
        content = found.generated.encode()
        files.append(StoredFile(modeltoml.MODEL_TOML, hashlib.sha256(content).hexdigest(), len(content)))
    return files


def digest_of(found: formats.ModelFile) -> str:
    """The digest that the artifact has in the store."""
    return artifact_digest(stored_files(found))


def check_signature(found: formats.ModelFile) -> None:
    """Raises RefusedError where neither the file nor its model.toml says what goes in and out."""
    if found.signature is not None or found.toml.signature is not None or found.format == "coreml":
        return
    raise RefusedError(
        f"{found.path.name}: a {found.format} file does not say what its inputs and outputs are; put a {modeltoml.MODEL_TOML} beside it "
        "with [[inputs]] and [[outputs]] (name, datatype, shape)"
    )


def look_into_golden(path: Path, *, shown: Path | None = None) -> dict[str, Any]:
    """Look into a golden file (.npz): how many cases it has. Raises RefusedError, which calls the file `shown`."""
    import numpy as np

    what = f"golden cases {shown or path}"
    if not path.is_file():
        raise RefusedError(f"{what}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise RefusedError(f"{what}: not an .npz file (numpy.savez makes one)")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            rows = {
                name: arrays[name].shape[0] if arrays[name].ndim else 0 for name in arrays.files if name != "metric"
            }
            metric = arrays["metric"] if "metric" in arrays.files else None
    except Exception as error:  # a broken archive makes zipfile, zlib and numpy raise whatever comes
        raise RefusedError(f"{what}: not a readable .npz of plain arrays ({error})") from error
    inputs = [name for name in rows if name.startswith("input.")]
    if not inputs:
        raise RefusedError(f"{what}: no array is named input.<tensor>; it has {sorted(rows) or 'nothing'}")
    if len(set(rows.values())) != 1 or not next(iter(rows.values())):
        raise RefusedError(f"{what}: every array needs the same number of rows, at least one; it has {rows}")
    if metric is not None and (metric.size != 1 or str(metric.ravel()[0]) not in METRICS):
        raise RefusedError(f"{what}: 'metric' is {metric.tolist()!r}; it must name one of {', '.join(METRICS)}")
    return {"cases": next(iter(rows.values())), "arrays": sorted(rows)}
