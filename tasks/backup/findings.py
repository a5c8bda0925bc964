"""What a repository answers with: where a manifest is kept, which manifests there are, what is under way."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.backup.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Kept:
    """Where a manifest is now. `missing` names the places that lack the backup, with the reason."""

    at: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scan:
    """All manifests, oldest first, and those that could not be believed: while there is one, no garbage may be collected."""

    manifests: tuple[Manifest, ...]
    broken: Mapping[str, str] = field(default_factory=dict)
    """Backup id -> why."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Place -> why its list could not be read."""
    at: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Backup id -> the places whose copy of the manifest is good."""

    @property
    def unanswered(self) -> str | None:
        """The places whose backups are unknown, and why; None where all answered."""
        return "; ".join(f"{place} does not answer: {why}" for place, why in sorted(self.unread.items())) or None

    @property
    def unbelieved(self) -> str | None:
        """The backups whose needs are unknown, and why; None where each manifest was read."""
        return "; ".join(f"backup {one} cannot be read: {why}" for one, why in sorted(self.broken.items())) or None


@dataclass(frozen=True, slots=True)
class Intent:
    """A backup that is under way somewhere, or was when its process died."""

    backup_id: str
    facts: Mapping[str, Any]
    modified: dt.datetime
    """By the clock of the place, and of the newest copy."""
