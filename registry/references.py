"""Who refers to which bytes of the artifact store, and the lock under which references are made and ended."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database import Transaction
from registry.errors import ConflictError
from registry.schema import AuditHead, RollbackPoint, Version
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


def lock_artifacts(transaction: Transaction) -> None:
    """Nobody else makes or ends a reference to an artifact until this transaction ends: the head of the audit chain, which
    every change locks last, is taken now. Take no other lock after it."""
    transaction.session.flush()
    transaction.session.execute(select(AuditHead.id).where(AuditHead.id == 1).with_for_update()).all()


def still_stored(transaction: Transaction, store: ArtifactStore, digests: Iterable[str]) -> None:
    """For who has stored files and is about to refer to them. Raises ConflictError where a delete was faster."""
    lock_artifacts(transaction)
    gone = [digest for digest in digests if not store.has(digest)]
    if gone:
        raise ConflictError(
            f"a version with the same bytes ({gone[0][:12]}…) was deleted at this moment, and they went with it; repeat the command"
        )
