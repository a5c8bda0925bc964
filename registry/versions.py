"""Models and their versions: register, find, list. What a file is, is read from the file (registry.formats)."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry import clock, formats, names
from registry.database import Database, Transaction
from registry.errors import ConflictError, NotFoundError, RefusedError, StorageError
from registry.schema import Model, Placement, Route, Version
from registry.signature import Signature
from registry.store import ArtifactStore, StoredFile, artifact_digest, file_digest


@dataclass(frozen=True, slots=True)
class Registered:
    """What `register` did. `created` is False where the same bytes were there under that version already."""

    model: str
    version: str
    digest: str
    state: str
    created: bool
    format: str
    size_bytes: int
    golden_digest: str | None

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def register(
    database: Database,
    store: ArtifactStore,
    path: Path,
    *,
    name: str,
    version: str | None = None,
    golden: Path | None = None,
    tags: dict[str, str] | None = None,
    max_bytes: int,
    actor: str | None = None,
) -> Registered:
    """Inspect a file, store its bytes, and note it as a version (the next number where none is given).

    Raises RefusedError for a file that is not safe or not whole, ConflictError where the version exists with other
    bytes or other golden cases, UsageError for a name that is not allowed, StorageError. The artifact is stored before the row is written: a kill
    in between leaves bytes that nothing refers to, never a row without its bytes.
    """
    names.check_model_name(name)
    if version is not None:
        names.check_version(version)
    with store.intake() as private:
        cases = _golden_copy(golden, private) if golden is not None else None
        golden_facts = formats_golden(cases, shown=golden) if cases is not None else None
        golden_digest = file_digest(cases)[0] if cases is not None else None
        # What is inspected is what is stored: a private copy that nobody can change in between.
        looked_at = formats.inspect(path, max_bytes=max_bytes)
        found = formats.inspect(_copied(looked_at, private / "model"), max_bytes=max_bytes)
        stated = _stated(found)
        names_inside = [file.relative_to(found.path.parent).as_posix() for file in found.files]
        stored = [
            StoredFile(inside, *file_digest(file)) for inside, file in zip(names_inside, found.files, strict=True)
        ]
        digest = artifact_digest(stored)
        with database.read() as session:
            known = _existing(session, name, version, digest)
            again = None if known is None else _again(known, digest, golden_digest, path)
        # Also where it is registered already: bytes that have rotted in the store are healed by that.
        for file in [*found.files, *([cases] if cases is not None else [])]:
            store.put(file)
        if again is not None:
            return again

    with database.write(actor=actor) as transaction:
        session = transaction.session
        if (existing := _existing(session, name, version, digest)) is not None:  # another process was first
            return _again(existing, digest, golden_digest, path)
        if session.get(Model, name) is None:
            session.add(Model(name=name, created_at=clock.now()))
            transaction.record("model.created", f"model:{name}", after={"name": name})
        ordinal = (session.scalar(select(func.max(Version.ordinal)).where(Version.model == name)) or 0) + 1
        chosen = version or _next_number(session, name)
        signature = found.signature or stated.signature
        row = Version(
            model=name,
            version=chosen,
            ordinal=ordinal,
            state="registered",
            digest=digest,
            format=found.format,
            size_bytes=found.size_bytes,
            files=[file.as_dict() for file in stored],
            signature=signature.as_dict() if signature else None,
            facts={**found.metadata, **stated.metadata},
            tags=dict(tags or {}),
            golden_digest=golden_digest,
            created_at=clock.now(),
            created_by=transaction.actor,
        )
        session.add(row)
        transaction.record(
            "version.registered",
            f"version:{name}/{chosen}",
            after={
                "digest": digest,
                "format": found.format,
                "size_bytes": found.size_bytes,
                "golden": golden_digest,
                "golden_cases": golden_facts["cases"] if golden_facts else None,
                "tags": dict(tags or {}),
            },
        )
        return _registered(row, created=True)


def _copied(found: formats.ModelFile, folder: Path) -> Path:
    """The model's files, and its model.toml, in a folder of our own. Returns the path of the file to load."""
    here = found.path.parent
    described = here / formats.MODEL_TOML
    for file in [*found.files, *([described] if described.is_file() else [])]:
        _copy(file, folder / file.relative_to(here))
    return folder / found.path.name


def _golden_copy(golden: Path, folder: Path) -> Path:
    if not golden.is_file():
        raise RefusedError(f"golden cases {golden}: there is no such file")
    return _copy(golden, folder / "golden.npz")


def _copy(source: Path, target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise StorageError(
            f"{source} could not be copied to {target.parent}: {error.strerror or error}. Nothing was left behind."
        ) from error
    return target


def _stated(found: formats.ModelFile) -> formats.ModelToml:
    """What model.toml says of the model. Raises RefusedError where neither it nor the file says what goes in and out."""
    described = found.path.parent / formats.MODEL_TOML
    stated = formats.parse_model_toml(described) if described.is_file() else formats.ModelToml()
    if found.signature is None and stated.signature is None:
        raise RefusedError(
            f"{found.path.name}: a {found.format} file does not say what its inputs and outputs are; put a {formats.MODEL_TOML} beside it "
            "with [[inputs]] and [[outputs]] (name, datatype, shape)"
        )
    return stated


def formats_golden(path: Path, *, shown: Path | None = None) -> dict[str, Any]:
    """Look into a golden file (.npz): how many cases it has. Raises RefusedError, which calls the file `shown`."""
    import numpy as np

    what = f"golden cases {shown or path}"
    if not path.is_file():
        raise RefusedError(f"{what}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise RefusedError(f"{what}: not an .npz file (numpy.savez makes one)")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            rows = {name: arrays[name].shape[0] if arrays[name].ndim else 0 for name in arrays.files}
    except Exception as error:  # a broken archive makes zipfile, zlib and numpy raise whatever comes
        raise RefusedError(f"{what}: not a readable .npz of plain arrays ({error})") from error
    inputs = [name for name in rows if name.startswith("input.")]
    if not inputs:
        raise RefusedError(f"{what}: no array is named input.<tensor>; it has {sorted(rows) or 'nothing'}")
    if len(set(rows.values())) != 1 or not next(iter(rows.values())):
        raise RefusedError(f"{what}: every array needs the same number of rows, at least one; it has {rows}")
    return {"cases": next(iter(rows.values())), "arrays": sorted(rows)}


def get(session: Session, model: str, version: str) -> Version:
    """The row of a version. Raises NotFoundError, which names what is there."""
    row = session.get(Version, (model, version))
    if row is not None:
        return row
    if session.get(Model, model) is None:
        known = session.scalars(select(Model.name).order_by(Model.name).limit(20)).all()
        raise NotFoundError(
            f"there is no model {model!r}; "
            + (
                f"known are {', '.join(known)}"
                if known
                else "none is registered yet: modelkeep register FILE --name NAME"
            )
        )
    known = session.scalars(
        select(Version.version).where(Version.model == model).order_by(Version.ordinal.desc()).limit(20)
    ).all()
    raise NotFoundError(f"{model} has no version {version!r}; its newest are {', '.join(known)}")


def listed(session: Session, model: str | None = None, *, limit: int = 200) -> list[dict[str, Any]]:
    """Versions, the newest of each model first, with where they stand."""
    query = select(Version).order_by(Version.model, Version.ordinal.desc()).limit(limit)
    if model is not None:
        query = query.where(Version.model == model)
    rows = session.scalars(query).all()
    places: dict[tuple[str, str], dict[str, str]] = {}
    placements = select(Placement) if model is None else select(Placement).where(Placement.model == model)
    for row in session.scalars(placements):
        places.setdefault((row.model, row.version), {})[row.environment] = row.status
    return [describe(row, places.get((row.model, row.version), {})) for row in rows]


def describe(row: Version, places: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "model": row.model,
        "version": row.version,
        "state": row.state,
        "environments": places or {},
        "digest": row.digest,
        "format": row.format,
        "size_bytes": row.size_bytes,
        "signature": row.signature,
        "golden_digest": row.golden_digest,
        "rows_independent": row.rows_independent,
        "tags": row.tags,
        "facts": row.facts,
        "created_at": clock.text(row.created_at),
        "created_by": row.created_by,
    }


def signature_of(row: Version) -> Signature | None:
    return None if row.signature is None else Signature.from_dict(row.signature)


def stored_files(row: Version) -> list[StoredFile]:
    return [StoredFile.from_dict(file) for file in row.files]


def note_validation(
    transaction: Transaction,
    row: Version,
    *,
    report: dict[str, Any],
    signature: Signature | None,
    rows_independent: bool | None,
) -> None:
    """Keep what a validation measured (its verdict is moved by registry.states)."""
    row.validation = report
    row.rows_independent = rows_independent
    if row.signature is None and signature is not None:
        row.signature = signature.as_dict()
    transaction.record(
        "version.measured",
        f"version:{row.model}/{row.version}",
        after={"rows_independent": rows_independent, "passed": report.get("passed")},
    )


def golden_for(session: Session, row: Version, environment: str) -> str | None:
    """The digest of the golden cases to hold a version to: the stable version's where it has some (so that a candidate cannot
    bring easier ones), else its own."""
    route = session.get(Route, (environment, row.model))
    if route is not None and route.stable is not None:
        stable = session.get(Version, (row.model, route.stable))
        if stable is not None and stable.golden_digest is not None:
            return stable.golden_digest
    return row.golden_digest


def _existing(session: Session, name: str, version: str | None, digest: str) -> Version | None:
    """The version that is meant: by its name, or else the first with these bytes. Archived ones do not count as that."""
    if version is not None:
        return session.get(Version, (name, version))
    query = select(Version).where(Version.model == name, Version.digest == digest, Version.state != "archived")
    return session.scalars(query.order_by(Version.ordinal).limit(1)).first()


def _again(existing: Version, digest: str, golden_digest: str | None, path: Path) -> Registered:
    if existing.digest != digest:
        raise ConflictError(
            f"{existing.model} {existing.version} exists with other bytes ({existing.digest[:12]}…; {path} has {digest[:12]}…): "
            "versions never change, register it under another version"
        )
    if golden_digest is not None and golden_digest != existing.golden_digest:
        kept = f"other golden cases ({existing.golden_digest[:12]}…)" if existing.golden_digest else "no golden cases"
        raise ConflictError(
            f"{existing.model} {existing.version} has these bytes already, with {kept}: versions never change, "
            "register it under another version to hold it to these cases"
        )
    return _registered(existing, created=False)


def _registered(row: Version, *, created: bool) -> Registered:
    return Registered(
        row.model, row.version, row.digest, row.state, created, row.format, row.size_bytes, row.golden_digest
    )


def _next_number(session: Session, name: str) -> str:
    known = session.scalars(select(Version.version).where(Version.model == name))
    return str(max((int(version) for version in known if version.isdigit()), default=0) + 1)
