"""Models and their versions: register, find, list. What a file is, is read from the file (registry.formats)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry import clock, formats, intake, modeltoml, names, references
from registry.database import Database, Transaction
from registry.errors import ConflictError, NotFoundError
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
    kind: str | None = None,
    facts: dict[str, Any] | None = None,
    max_bytes: int,
    actor: str | None = None,
) -> Registered:
    """Inspect a file or folder, store its bytes, and note it as a version (the next number where none is given).

    `facts` are laid over what the file and its model.toml say; `kind` (modeltoml.KINDS) is the model's.

    Raises RefusedError for a file that is not safe or not whole, ConflictError where the version exists with other
    bytes or other golden cases, UsageError for a name that is not allowed, StorageError. The artifact is stored before the row is written: a kill
    in between leaves bytes that nothing refers to, never a row without its bytes.
    """
    names.check_model_name(name)
    if version is not None:
        names.check_version(version)
    if kind is not None:
        modeltoml.check_kind(kind)
    with store.intake() as private:
        # What is inspected is what is stored: a private copy that nobody can change in between.
        looked_at = formats.inspect(path, max_bytes=max_bytes)
        golden = golden or looked_at.golden
        if golden is not None:  # in the folder of the model: they are kept, but not as a part of it
            looked_at = intake.without(looked_at, golden)
        cases = intake.golden_copy(golden, private) if golden is not None else None
        golden_facts = formats_golden(cases, shown=golden) if cases is not None else None
        golden_digest = file_digest(cases)[0] if cases is not None else None
        found = formats.inspect(intake.copied(looked_at, private / "model"), max_bytes=max_bytes)
        intake.check_signature(found)
        stored = intake.stored_files(found)
        digest = artifact_digest(stored)
        said = modeltoml.merged(modeltoml.merged({**found.metadata, **found.toml.facts}, looked_at.origin), facts or {})
        kind = kind or found.kind or looked_at.kind
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
        _note_model(transaction, name, kind)
        ordinal = (session.scalar(select(func.max(Version.ordinal)).where(Version.model == name)) or 0) + 1
        chosen = version or _next_number(session, name)
        signature = found.signature or found.toml.signature
        row = Version(
            model=name,
            version=chosen,
            ordinal=ordinal,
            state="registered",
            digest=digest,
            format=found.format,
            size_bytes=sum(file.size_bytes for file in stored),
            files=[file.as_dict() for file in stored],
            signature=signature.as_dict() if signature else None,
            facts=said,
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
                "size_bytes": row.size_bytes,
                "golden": golden_digest,
                "golden_cases": golden_facts["cases"] if golden_facts else None,
                "tags": dict(tags or {}),
            },
        )
        references.still_stored(store, [*(file.digest for file in stored), *filter(None, [golden_digest])])
        return _registered(row, created=True)


def _note_model(transaction: Transaction, name: str, kind: str | None) -> None:
    """The model's own row, and its kind, which does not change. Raises ConflictError where it is of another."""
    model = transaction.session.get(Model, name)
    if model is None:
        transaction.session.add(Model(name=name, kind=kind, created_at=clock.now()))
        transaction.record("model.created", f"model:{name}", after={"name": name, "kind": kind})
    elif kind is not None and model.kind is None:
        model.kind = kind
        transaction.record("model.changed", f"model:{name}", before={"kind": None}, after={"kind": kind})
    elif kind is not None and model.kind != kind:
        raise ConflictError(
            f"{name} is a {model.kind}, not a {kind}: register it under another name, or without a kind"
        )


def formats_golden(path: Path, *, shown: Path | None = None) -> dict[str, Any]:
    """How many golden cases a file (.npz) has. Raises RefusedError, which calls the file `shown`."""
    return intake.look_into_golden(path, shown=shown)


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
        "deleted_at": clock.text(row.deleted_at) if row.deleted_at else None,
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
    if existing.deleted_at is not None:
        raise ConflictError(
            f"{existing.model} {existing.version} has these bytes and was deleted: register them under another version"
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
