"""What a backup is: its states' names, and how they follow from its manifest and from what was noted of it since."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.backup.manifest import COMPLETE, PARTIAL, Manifest
from tasks.backup.manifest import FAILED as FAILED

RUNNING, VERIFIED, SAMPLED, UNVERIFIABLE = "running", "verified", "sampled", "unverifiable"
FAILED_VERIFICATION, NOT_VERIFIED = "failed-verification", "not-verified"
"""The second: the check itself could not be made (no space, killed …), which says nothing of the backup."""
PINNED, UNPINNED, KEEP_UNTIL, PRUNED, COPIED = "pinned", "unpinned", "keep-until", "pruned", "copied"
DAMAGED = "damaged"
"""The state of a note that is torn, edited or not signed by the key: it is shown, and counts for nothing but a hold."""
LONG_AGO = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_HOLDING = (f"-{PINNED}.json", f"-{KEEP_UNTIL}.json")

NOTES = (
    *(RUNNING, FAILED, VERIFIED, SAMPLED, UNVERIFIABLE, FAILED_VERIFICATION, NOT_VERIFIED),
    *(PINNED, UNPINNED, KEEP_UNTIL, PRUNED, COPIED),
)


@dataclass(frozen=True, slots=True)
class Note:
    """One line of a backup's record. `at` is text in UTC, as registry.clock writes it."""

    state: str
    at: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a backup now. `state` is running, complete, partial, verified or failed."""

    state: str
    verified_at: str | None = None
    verified: frozenset[str] = frozenset()
    """The components that were restored and compared, and nothing was found."""
    damaged: Mapping[str, str] | None = None
    """Components whose check found differences, with the first of them."""
    sampled_at: str | None = None
    pinned: bool = False
    keep_until: str | None = None
    pruned: bool = False
    why: str | None = None
    """Why it failed, or was not verified."""


def derive(manifest: Manifest | None, notes: Iterable[Note]) -> Standing:
    """The standing of a backup. The newest check decides; one that was partial stays so, whatever of it is verified."""
    state = RUNNING if manifest is None else manifest.state
    verified_at: str | None = None
    verified: set[str] = set()
    damaged: dict[str, str] = {}
    sampled_at: str | None = None
    pinned, pruned, keep_until, why = False, False, None, None
    for note in sorted(notes, key=lambda one: one.at):
        facts = note.facts
        if note.state == FAILED and manifest is None:
            state, why = FAILED, _text(facts.get("why"))
        elif note.state in (VERIFIED, UNVERIFIABLE, FAILED_VERIFICATION, NOT_VERIFIED):
            found = facts.get("components", {})
            for name, one in found.items():
                if one.get("outcome") == VERIFIED:
                    verified.add(name)
                    damaged.pop(name, None)
                elif one.get("outcome") == FAILED_VERIFICATION:
                    verified.discard(name)
                    damaged[name] = _text(one.get("why")) or "it differs"
            verified_at = note.at if note.state == VERIFIED else verified_at
            why = _text(facts.get("why")) or why if note.state != VERIFIED else None
        elif note.state == SAMPLED:
            sampled_at = note.at
            for name, one in facts.get("components", {}).items():
                if one.get("outcome") == FAILED_VERIFICATION:
                    verified.discard(name)
                    damaged[name] = _text(one.get("why")) or "it differs"
        elif note.state in (PINNED, UNPINNED):
            pinned = note.state == PINNED
        elif note.state == KEEP_UNTIL:
            # Only ever later: a promise to keep is not shortened.
            keep_until = max(filter(None, (keep_until, _text(facts.get("until")))), default=None)
        elif note.state == PRUNED:
            pruned = True
        elif note.state == DAMAGED and _text(facts.get("name", "")).endswith(_HOLDING):  # type: ignore[union-attr]
            pinned = True  # it may be the only word that it must stay; `unpin` outweighs it
    if manifest is not None and state in (COMPLETE, PARTIAL):
        if damaged:
            state, why = FAILED, "; ".join(f"{name}: {text}" for name, text in sorted(damaged.items()))
        elif state == COMPLETE and verified >= {one.name for one in manifest.components}:
            state = VERIFIED
    return Standing(
        state, verified_at, frozenset(verified), damaged or None, sampled_at, pinned, keep_until, pruned, why
    )


def noted_at(name: str) -> dt.datetime:
    """When a note was made, by its name; long ago for one that is named otherwise."""
    try:
        found = dt.datetime.strptime(name.rpartition("/")[2].partition("-")[0], "%Y%m%dT%H%M%S.%fZ")
    except ValueError:
        return LONG_AGO
    return found.replace(tzinfo=dt.UTC)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
