"""An export as a directory: the artifact under `model/`, what is known of it in modelkeep.json, and SHA256SUMS over everything."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import folders
from registry.errors import ArtifactError, ConflictError, RefusedError, StorageError
from registry.store import StoredFile, artifact_digest, file_digest

MANIFEST = "modelkeep.json"
SUMS = "SHA256SUMS"
MODEL = "model"
GOLDEN = "golden.npz"
LAYOUT = 1
MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Package:
    """What the manifest of an export says, its files verified."""

    root: Path
    files: tuple[Path, ...]
    format: str
    kind: str | None
    facts: dict[str, Any]
    golden: Path | None


def read(folder: Path, *, max_bytes: int) -> Package:
    """Read an export. Raises RefusedError where it is damaged, or not what was exported."""
    path = folders.regular(folder / MANIFEST)
    if path.stat().st_size > MAX_BYTES:
        raise RefusedError(f"{path} has more than {MAX_BYTES} bytes: it is not the manifest of an export")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if said["layout"] != LAYOUT:
            raise RefusedError(
                f"{path} is of layout {said['layout']!r}, this release knows {LAYOUT}: a newer release wrote it"
            )
        listed = [StoredFile.from_dict(one) for one in said["files"]]
        golden = None if said["golden"] is None else StoredFile.from_dict(said["golden"])
        facts, about = (
            dict(said["facts"]),
            {key: said[key] for key in ("model", "version", "digest", "created_at", "created_by")},
        )
        format, kind = str(said["format"]), said["kind"]
        if not isinstance(kind, str | None):
            raise TypeError(f"kind is a {type(kind).__name__}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(f"{path} is not the manifest of an export ({type(error).__name__}: {error})") from error
    root = (folder / MODEL).resolve()
    if not listed or not root.is_dir():
        raise RefusedError(f"{folder} is an export without a model: export it again")
    if sum(file.size_bytes for file in listed) > max_bytes:
        raise RefusedError(f"{folder} has more than the {max_bytes} bytes that are allowed (models.max_file_bytes)")
    files = tuple(_verified(root, file, path) for file in listed)
    strangers = [file for file in folders.files_in(root) if file not in files]
    if strangers:
        raise RefusedError(f"{strangers[0]} is not in {MANIFEST}: it was not part of what was exported")
    if artifact_digest(listed) != about["digest"]:
        raise RefusedError(f"{path}: its files are not those of the digest {about['digest']}: export it again")
    cases = None if golden is None else _verified(folder, golden, path)
    return Package(root, files, format, kind, {**facts, "exported_from": about}, cases)


def _verified(root: Path, file: StoredFile, manifest: Path) -> Path:
    place = folders.inside(root, file.name, str(manifest))
    if place.is_dir() or place.stat().st_size != file.size_bytes or file_digest(place)[0] != file.digest:
        raise RefusedError(
            f"{place} is not the file that was exported (its SHA-256 is another): copy or export it again"
        )
    return place


def write(
    target: Path,
    artifact: Iterable[tuple[StoredFile, Path]],
    manifest: dict[str, Any],
    *,
    golden: Path | None = None,
    texts: dict[str, str] | None = None,
    links: dict[str, str] | None = None,
    folders_too: Iterable[str] = (),
) -> dict[str, str]:
    """Write an export beside `target` and rename it in one step. Returns the SHA-256 of every file, by its name.

    `texts` are more files by name, `links` more names of files of the artifact (new name -> name under `model/`), `folders_too` are
    folders that may be empty. Raises ConflictError where `target` is not empty, StorageError; then nothing is left behind.
    """
    target = target.absolute()
    try:
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise ConflictError(f"{target} is there and not empty: give a new or an empty directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
        fresh.mkdir()
    except OSError as error:
        raise StorageError(
            f"{target} cannot be written: {error.strerror or error}. Nothing was left behind."
        ) from error
    try:
        sums = _fill(fresh, artifact, manifest, golden, texts or {}, links or {}, folders_too)
        try:
            fresh.rename(target)  # an empty directory is replaced by it
        except OSError as error:
            if target.exists() and any(target.iterdir()):
                raise ConflictError(f"{target} has been written meanwhile: give a new or an empty directory") from error
            raise
    except OSError as error:
        raise StorageError(
            f"{target} cannot be written: {error.strerror or error}. Nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return sums


def _fill(
    fresh: Path,
    artifact: Iterable[tuple[StoredFile, Path]],
    manifest: dict[str, Any],
    golden: Path | None,
    texts: dict[str, str],
    links: dict[str, str],
    folders_too: Iterable[str],
) -> dict[str, str]:
    sums: dict[str, str] = {}
    for file, source in artifact:
        folders.check_inside(file.name, "the record of the artifact")
        place = fresh / MODEL / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
        found = file_digest(place)[0]
        if found != file.digest:
            raise ArtifactError(
                f"{file.name} changed while it was copied (SHA-256 {found[:12]}…, not {file.digest[:12]}…)"
            )
        sums[f"{MODEL}/{file.name}"] = found
    for name in folders_too:
        (fresh / MODEL / folders.check_inside(name, "the record of the artifact")).mkdir(parents=True, exist_ok=True)
    for name, of in links.items():
        place = fresh / name
        place.parent.mkdir(parents=True, exist_ok=True)
        _second_name(fresh / MODEL / of, place, alone=len(links) == 1)
        sums[name] = file_digest(place)[0]
    if golden is not None:
        shutil.copyfile(golden, fresh / GOLDEN)
        sums[GOLDEN] = file_digest(fresh / GOLDEN)[0]
    for name, text in {**texts, MANIFEST: json.dumps(manifest, indent=2, sort_keys=True) + "\n"}.items():
        place = fresh / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
        sums[name] = hashlib.sha256(text.encode()).hexdigest()
    (fresh / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())), encoding="utf-8")
    for place in (*(fresh / name for name in (*sums, SUMS)), fresh):
        _fsync(place)
    return sums


def _second_name(file: Path, place: Path, *, alone: bool) -> None:
    """A hard link where that will do: onnx refuses external data that has a second name, so several files are copied."""
    if alone:
        try:
            place.hardlink_to(file)
            return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
                raise
    shutil.copyfile(file, place)


def _fsync(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
