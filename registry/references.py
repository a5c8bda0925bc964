"""Who refers to which bytes of the artifact store."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.errors import ConflictError
from registry.schema import RollbackPoint, Version
from registry.store import ArtifactStore


def needed_digests(session: Session, among: set[str]) -> set[str]:
    """Those of `among` that a version that is not deleted, or a rollback point that is not gone, refers to."""
    needed: set[str] = set()
    rows = session.execute(
        select(Version.files, Version.golden_digest)
        .where(Version.deleted_at.is_(None))
        .execution_options(yield_per=500)
    )
    for files, golden in rows:
        needed |= among.intersection([golden, *(file["digest"] for file in files)])
    points = session.scalars(select(RollbackPoint.digests).where(RollbackPoint.gone_at.is_(None)))
    for digests in points:
        needed |= among.intersection([digests.get("golden"), *(file["digest"] for file in digests.get("files", ()))])
    return needed


def still_stored(store: ArtifactStore, digests: Iterable[str]) -> None:
    """For who has stored files and refers to them in the transaction under way. Raises ConflictError where a delete was faster.

    Writers go one at a time: a delete looks for references and removes bytes in one transaction, so what is there now stays.
    """
    gone = [digest for digest in digests if not store.has(digest)]
    if gone:
        raise ConflictError(
            f"a version with the same bytes ({gone[0][:12]}…) was deleted at this moment, and they went with it; repeat the command"
        )
