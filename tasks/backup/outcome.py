"""How a backup ended: for a table, for a page, for a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.backup.manifest import COMPLETE, FAILED, PARTIAL, Component, Manifest
from tasks.backup.progress import duration

STORED = "stored"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a backup ended. `manifest` is None where nothing of it could be had: then there is no backup."""

    backup_id: str
    state: str
    components: tuple[Component, ...]
    seconds: float
    manifest: Manifest | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    """Where it is: "stored", or why it is not there yet; the next run copies it."""
    notes: tuple[str, ...] = ()
    """What a person should know beside that: the registry was down, an earlier run was killed …"""

    @property
    def exit_code(self) -> int:
        """0 done, 3 partly done, 1 failed. A copy that is missing in one of several places is partly done too."""
        if self.state == FAILED:
            return 1
        return 3 if self.state == PARTIAL or any(one != STORED for one in self.places.values()) else 0

    @property
    def size_bytes(self) -> int:
        return sum(one.size_bytes for one in self.components)

    @property
    def new_bytes(self) -> int:
        return sum(one.new_bytes for one in self.components)

    def summary(self) -> str:
        done = sum(one.state == COMPLETE for one in self.components)
        text = (
            f"backup {self.backup_id} is {self.state}: {done} of {len(self.components)} components, "
            f"{self.size_bytes} bytes, {self.new_bytes} of them new, in {duration(self.seconds)}"
        )
        bad = [f"{one.name}: {one.error}" for one in self.components if one.error]
        bad += [f"{place}: {why}" for place, why in self.places.items() if why != STORED]
        return text + (f"; {'; '.join(bad)}" if bad else "")

    def as_dict(self) -> dict[str, Any]:
        return {
            "backup_id": self.backup_id,
            "state": self.state,
            "seconds": round(self.seconds, 3),
            "size_bytes": self.size_bytes,
            "stored_bytes": sum(one.stored_bytes for one in self.components),
            "new_bytes": self.new_bytes,
            "components": [row(one) for one in self.components],
            "places": dict(self.places),
            "notes": list(self.notes),
        }

    def as_markdown(self) -> str:
        lines = [
            f"# Backup {self.backup_id}: {self.state}",
            "",
            "| component | state | size | new | |",
            "|---|---|--:|--:|---|",
        ]
        for one in self.components:
            said = one.error or "; ".join(one.warnings)
            lines.append(
                f"| {one.name} | {one.state} | {one.size_bytes:,} | {one.new_bytes:,} | {said.replace('|', '¦')} |"
            )
        lines += ["", f"Sizes in bytes. It took {duration(self.seconds)}.", ""]
        lines += [f"- {place}: {what}" for place, what in self.places.items()]
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines)


def row(one: Component) -> dict[str, Any]:
    """A component for a table or for --json."""
    return {
        "name": one.name,
        "kind": one.kind,
        "state": one.state,
        "entries": one.entries,
        "size_bytes": one.size_bytes,
        "stored_bytes": one.stored_bytes,
        "new_bytes": one.new_bytes,
        "snapshot": one.snapshot,
        "warnings": list(one.warnings),
        "error": one.error,
    }
