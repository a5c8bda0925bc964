"""The backups of the places, as people and programs look at them: a row each, with what is known of it now."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from typing import Any

from registry import clock
from registry.errors import StorageError
from tasks.backup import states
from tasks.backup.manifest import FAILED, Manifest
from tasks.backup.outcome import row
from tasks.backup.repository import Intent, Repository
from tasks.backup.states import Note

BROKEN = "broken"
"""A manifest that cannot be believed: it is no backup, and nothing is thrown away while there is one."""
_KILLED = "its process was killed before the manifest was written"


def listed(repository: Repository) -> list[dict[str, Any]]:
    """Every backup that left a trace, newest first; those that were pruned only while their manifest is still somewhere."""
    scan = repository.scan()
    notes = repository.all_states()
    intents = _intents(repository)
    manifests = {one.backup_id: one for one in scan.manifests}
    rows = [
        _row(backup_id, manifests.get(backup_id), notes.get(backup_id, []), intents.get(backup_id), scan.at)
        for backup_id in {*manifests, *notes} - set(scan.broken)
    ]
    rows = [one for one in rows if one["places"] or not one["pruned"]]
    rows += [{**_row(one, None, [], None, {}), "state": BROKEN, "why": why} for one, why in scan.broken.items()]
    return sorted(rows, key=lambda one: (one["sequence"], one["backup_id"]), reverse=True)


def shown(repository: Repository, reference: str) -> dict[str, Any]:
    """All that is known of one. Raises NotFoundError, ManifestError, UsageError."""
    manifest = repository.manifest(reference)
    notes = repository.states(manifest.backup_id)
    scan = repository.scan()
    summary = _row(manifest.backup_id, manifest, notes, None, scan.at)
    return {
        **summary,
        "notes": [{"state": one.state, "at": one.at, "facts": dict(one.facts)} for one in notes],
        "manifest": manifest.as_dict(),
        "missing_at": [place.shown for place in repository.places if place.shown not in summary["places"]],
    }


def _row(
    backup_id: str,
    manifest: Manifest | None,
    notes: Iterable[Note],
    intent: Intent | None,
    at: Mapping[str, tuple[str, ...]],
) -> dict[str, Any]:
    notes = list(notes)
    standing = states.derive(manifest, notes)
    state, why = standing.state, standing.why
    if state == states.RUNNING and intent is None:
        state, why = FAILED, _KILLED
    begun = next((one.facts for one in notes if one.state == states.RUNNING), {})
    components = () if manifest is None else manifest.components
    began_at = manifest.began_at if manifest is not None else begun.get("began_at")
    return {
        "backup_id": backup_id,
        "sequence": manifest.sequence if manifest is not None else int(begun.get("sequence", 0)),
        "state": state,
        "why": why,
        "began_at": began_at,
        "ended_at": None if manifest is None else manifest.ended_at,
        "age_seconds": _age(began_at),
        "requested": list(manifest.requested if manifest is not None else begun.get("requested", ())),
        "reason": manifest.reason if manifest is not None else "",
        "components": [{**row(one), "verified": one.name in standing.verified} for one in components],
        "size_bytes": sum(one.size_bytes for one in components),
        "stored_bytes": sum(one.stored_bytes for one in components),
        "new_bytes": sum(one.new_bytes for one in components),
        "places": list(at.get(backup_id, ())),
        "verified_at": standing.verified_at,
        "sampled_at": standing.sampled_at,
        "damaged": dict(standing.damaged or {}),
        "pinned": standing.pinned,
        "keep_until": standing.keep_until,
        "pruned": standing.pruned,
    }


def _intents(repository: Repository) -> dict[str, Intent]:
    try:
        return {one.backup_id: one for one in repository.intents()}
    except StorageError:
        # A place is away: what is under way there cannot be seen, and the list of the others is worth having.
        return {}


def _age(began_at: str | None) -> float | None:
    if began_at is None:
        return None
    return round(max(0.0, (clock.now() - dt.datetime.fromisoformat(began_at)).total_seconds()), 1)
