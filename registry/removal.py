"""Deleting versions: the bytes of an archived version that nothing refers to go; its record stays.

Two steps, each whole: the row says deleted, then the files go that nobody else needs. A crash in between leaves files that nothing
refers to; the same command again takes them away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from registry import catalogue, clock, references, versions
from registry.database import Database
from registry.errors import RefusedError, UsageError
from registry.schema import Version
from registry.store import ArtifactStore


@dataclass(frozen=True, slots=True)
class Deleted:
    """What `delete` did. `again`: the version had been deleted before, and this finished what was left to do."""

    model: str
    version: str
    deleted_at: str
    again: bool
    files_removed: int
    bytes_removed: int
    files_kept: int
    """Files that another version or a rollback point needs."""

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def delete(
    database: Database, store: ArtifactStore, model: str, version: str, *, reason: str, actor: str | None = None
) -> Deleted:
    """Delete the bytes of an archived version that nothing refers to. The record stays.

    `reason` stands for the verified backup that there is none of. Raises NotFoundError, UsageError without a reason,
    RefusedError that names what keeps the version, StorageError.
    """
    if not reason.strip():
        raise UsageError(
            f"deleting {model} {version} needs a reason: no verified backup of it is known (--reason TEXT)"
        )
    with database.write(actor=actor) as transaction:
        session = transaction.session
        row = versions.get(session, model, version)
        again = row.deleted_at is not None
        if row.deleted_at is None:
            _refuse_if_needed(session, row)
            row.deleted_at = clock.now()
            transaction.record(
                "version.deleted",
                f"version:{model}/{version}",
                before={"state": row.state, "digest": row.digest, "size_bytes": row.size_bytes},
                after={"deleted_at": clock.text(row.deleted_at)},
                reason=reason,
            )
        moment, mine = clock.text(row.deleted_at), digests_of(row)
    with database.write(actor=actor) as transaction:
        needed = references.needed_digests(transaction.session, mine)
        gone = [(digest, store.remove(digest)) for digest in sorted(mine - needed)]
        removed = {digest: size for digest, size in gone if size is not None}
        if removed:
            transaction.record(
                "artifacts.removed", f"version:{model}/{version}", before={"digests": sorted(removed)}, reason=reason
            )
    return Deleted(
        model=model,
        version=version,
        deleted_at=moment,
        again=again,
        files_removed=len(removed),
        bytes_removed=sum(removed.values()),
        files_kept=len(mine & needed),
    )


def _refuse_if_needed(session: Session, row: Version) -> None:
    name = f"{row.model} {row.version}"
    if row.state != "archived":
        raise RefusedError(
            f"{name} is {row.state}: only an archived version can be deleted; "
            f"first: modelkeep models archive {row.model} {row.version} --reason TEXT"
        )
    in_use = catalogue.used_by(session, row)
    points = catalogue.rollback_points(session, row)
    if points:
        in_use.append(f"rollback point {points[0]} needs it" + (f", and {len(points) - 1} more" if points[1:] else ""))
    if in_use:
        raise RefusedError(f"{name} cannot be deleted: {'; '.join(in_use)}")


def digests_of(row: Version) -> set[str]:
    """Every file of a version, and its golden cases."""
    found = {file.digest for file in versions.stored_files(row)}
    return found | ({row.golden_digest} if row.golden_digest else set())
