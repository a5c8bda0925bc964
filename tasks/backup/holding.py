"""Backups that a person holds: pinned, or to be kept until a date. Both are notes in the places, and on record."""

from __future__ import annotations

import datetime as dt
from typing import Any

from registry import actor, clock
from registry.errors import ModelkeepError, UsageError
from registry.settings import Settings
from tasks.backup import states
from tasks.backup.registry_now import registry_of
from tasks.backup.repository import open_repository


def pin(settings: Settings, reference: str, *, reason: str = "") -> dict[str, Any]:
    """Never pruned, until it is unpinned. Raises NotFoundError, ManifestError, StorageError."""
    return _note(settings, reference, states.PINNED, "backup.pinned", {}, reason)


def unpin(settings: Settings, reference: str, *, reason: str = "") -> dict[str, Any]:
    return _note(settings, reference, states.UNPINNED, "backup.unpinned", {}, reason)


def keep(settings: Settings, reference: str, until: dt.datetime, *, reason: str = "") -> dict[str, Any]:
    """Not pruned before that moment, whatever is pinned or not; it can be moved on and never back. Raises UsageError."""
    if until <= clock.now():
        raise UsageError(f"--until {clock.text(until)}: that is past")
    return _note(settings, reference, states.KEEP_UNTIL, "backup.kept", {"until": clock.text(until)}, reason)


def _note(
    settings: Settings, reference: str, state: str, action: str, facts: dict[str, Any], reason: str
) -> dict[str, Any]:
    by = actor.current()
    repository = open_repository(settings)
    manifest = repository.manifest(reference)
    repository.note_state(manifest.backup_id, state, {**facts, "by": by, "reason": reason})
    said = None
    with registry_of(settings) as registry:
        if registry.database is None:
            said = f"not in the audit chain: {registry.why}"
        else:
            try:
                with registry.database.write() as transaction:
                    transaction.record(action, f"backup:{manifest.backup_id}", after=facts, reason=reason)
            except ModelkeepError as error:
                said = f"not in the audit chain: {error}"
    standing = states.derive(manifest, repository.states(manifest.backup_id))
    return {
        "backup_id": manifest.backup_id,
        "state": standing.state,
        "pinned": standing.pinned,
        "keep_until": standing.keep_until,
        "note": said,
    }
