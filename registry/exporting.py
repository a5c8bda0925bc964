"""A version out of the registry, as a directory that stands by itself; one that MLflow can load too, where asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import clock, mlflow_models, packages, versions
from registry.database import Database
from registry.errors import ConflictError, RefusedError
from registry.schema import Model, Placement, Promotion, Version
from registry.store import ArtifactStore, StoredFile


def export(
    database: Database, store: ArtifactStore, model: str, version: str, target: Path, *, mlflow: bool = False
) -> dict[str, Any]:
    """Write a version to a new directory: its files verified, what is known of it, and SHA256SUMS for `sha256sum -c`.

    With `mlflow` there is an MLmodel beside, which mlflow.pyfunc.load_model reads. Registering the directory gives the same digest.
    Raises NotFoundError, ConflictError for a directory that is not empty or a version whose bytes were deleted, RefusedError for a format
    that MLflow does not load, ArtifactError, StorageError.
    """
    with database.read() as session:
        row = versions.get(session, model, version)
        if row.deleted_at is not None:
            raise ConflictError(f"{model} {version} was deleted: its record is left, and its bytes are gone")
        manifest = _manifest(session, row)
        files, signature = versions.stored_files(row), versions.signature_of(row)
        golden_digest, format, created = row.golden_digest, row.format, clock.text(row.created_at)
    paths = [(file, store.path(file.digest)) for file in files]
    golden = store.path(golden_digest) if golden_digest is not None else None
    manifest["golden"] = None
    if golden is not None and golden_digest is not None:
        manifest["golden"] = StoredFile(packages.GOLDEN, golden_digest, golden.stat().st_size).as_dict()
    texts: dict[str, str] = {}
    links: dict[str, str] = {}
    if mlflow:
        main, links = _names_for_mlflow(format, files[0].name, manifest["facts"].get("external_files", []))
        document, texts = mlflow_models.description(
            format,
            main,
            signature,
            metadata={"modelkeep_model": model, "modelkeep_version": version, "modelkeep_digest": manifest["digest"]},
            versions=mlflow_models.installed(["onnx", "onnxruntime"] if format == "onnx" else ["torch"]),
            identity=manifest["digest"][:32],
            created=created,
        )
        import yaml

        texts[mlflow_models.MLMODEL] = yaml.safe_dump(document, sort_keys=True)
    sums = packages.write(
        target, paths, manifest, golden=golden, texts=texts, links=links, folders_too=_empty_folders(manifest)
    )
    return {
        "model": model,
        "version": version,
        "digest": manifest["digest"],
        "directory": str(target.absolute()),
        "files": sorted([*sums, packages.SUMS]),
        "size_bytes": sum(file.size_bytes for file in files),
        "mlflow": mlflow,
    }


def _names_for_mlflow(format: str, main: str, external: list[str]) -> tuple[str, dict[str, str]]:
    """Where MLflow's flavours look for a file: under which more names files of the artifact are to be had."""
    if format == "onnx":  # beside MLmodel, and its external data where the graph says they are
        folder, _, name = main.rpartition("/")
        before = f"{folder}/" if folder else ""
        links = {name: main, **{one: f"{before}{one}" for one in external}}
        taken = {packages.MANIFEST, packages.SUMS, packages.GOLDEN, packages.MODEL, mlflow_models.MLMODEL}
        if clash := sorted(one for one in links if one.split("/")[0] in taken):
            raise RefusedError(f"{clash[0]} has a name that an export needs for itself: export it without --mlflow")
        return name, links
    name = "data/model.pth" if format == "torchscript" else "data/model.pt2"
    return name, {name: main}


def _manifest(session: Session, row: Version) -> dict[str, Any]:
    model = session.get(Model, row.model)
    return {
        "layout": packages.LAYOUT,
        "model": row.model,
        "version": row.version,
        "kind": model.kind if model is not None else None,
        "digest": row.digest,
        "format": row.format,
        "files": row.files,
        "signature": row.signature,
        "facts": row.facts,
        "tags": row.tags,
        "state": row.state,
        "rows_independent": row.rows_independent,
        "created_at": clock.text(row.created_at),
        "created_by": row.created_by,
        "lineage": _lineage(session, row),
    }


def _lineage(session: Session, row: Version) -> dict[str, Any]:
    """Where it came from and where it stands: the promotions that brought it up, and the environments."""
    promotions = session.scalars(
        select(Promotion)
        .where(Promotion.model == row.model, Promotion.version == row.version)
        .order_by(Promotion.created_at)
    )
    placements = session.scalars(
        select(Placement).where(Placement.model == row.model, Placement.version == row.version)
    )
    return {
        "registered": {"at": clock.text(row.created_at), "by": row.created_by},
        "promotions": [
            {
                "id": one.id,
                "environment": one.environment,
                "from_version": one.from_version,
                "strategy": one.strategy,
                "state": one.state,
                "reason": one.reason,
                "by": one.actor,
                "flow_run_id": one.flow_run_id,
                "at": clock.text(one.created_at),
            }
            for one in promotions
        ],
        "environments": {one.environment: one.status for one in placements},
    }


def _empty_folders(manifest: dict[str, Any]) -> list[str]:
    """The folders of a CoreML package that its manifest names: they may be empty, and the store keeps files only."""
    first = str(manifest["files"][0]["name"])
    if manifest["format"] != "coreml" or not first.endswith("Manifest.json"):
        return []
    package = first.removesuffix("Manifest.json")
    files = {str(file["name"]) for file in manifest["files"]}
    wanted = (f"{package}Data/{item}" for item in manifest["facts"].get("items", []))
    return [name for name in wanted if name not in files]
