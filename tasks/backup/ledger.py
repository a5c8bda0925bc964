"""What is put into backups.json after each backup, check and prune; drill and recover add theirs. Reading is registry.ledger's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from registry import clock, ledger
from tasks.backup import states
from tasks.backup.manifest import COMPLETE, Manifest


def note_backup(home: Path, manifest: Manifest, *, places: Mapping[str, str]) -> None:
    """A backup has ended. `places`: where it is, and where it could not be stored, with why. Raises StorageError."""

    def alter(document: dict[str, Any]) -> None:
        document["installation"] = manifest.installation
        document["last"] = {
            "backup_id": manifest.backup_id,
            "state": manifest.state,
            "began_at": manifest.began_at,
            "ended_at": manifest.ended_at,
            "requested": list(manifest.requested),
            "size_bytes": sum(one.size_bytes for one in manifest.components),
            "stored_bytes": sum(one.stored_bytes for one in manifest.components),
            "new_bytes": sum(one.new_bytes for one in manifest.components),
            "components": {one.name: one.state for one in manifest.components},
            "errors": {one.name: one.error for one in manifest.components if one.error},
            "places": dict(places),
        }
        for one in manifest.components:
            row = _component(document, one.name)
            row["kind"] = one.kind
            row["last_state"] = one.state
            row["last_error"] = one.error
            if one.state == COMPLETE:
                row.update(
                    backup_id=manifest.backup_id,
                    backed_up_at=one.began_at,
                    size_bytes=one.size_bytes,
                    stored_bytes=one.stored_bytes,
                    new_bytes=one.new_bytes,
                )

    _change(home, alter)


def note_failed(home: Path, backup_id: str, *, began_at: str | None, requested: Iterable[str], why: str) -> None:
    """A backup came to nothing, or was killed. Raises StorageError."""

    def alter(document: dict[str, Any]) -> None:
        last = document.get("last", {})
        if str(last.get("backup_id", "")) > backup_id:
            return  # the one that was found to be killed is older than what is known
        document["last"] = {
            "backup_id": backup_id,
            "state": "failed",
            "began_at": began_at,
            "ended_at": clock.text(clock.now()),
            "requested": list(requested),
            "errors": {"": why},
        }

    _change(home, alter)


def note_check(home: Path, manifest: Manifest, outcomes: Mapping[str, Mapping[str, Any]], *, whole: bool) -> None:
    """A backup was verified, or a sample of it was read back. Raises StorageError."""

    def alter(document: dict[str, Any]) -> None:
        now = clock.text(clock.now())
        bad = {name: one.get("why") for name, one in outcomes.items() if one["outcome"] == states.FAILED_VERIFICATION}
        document["last_check"] = {
            "backup_id": manifest.backup_id,
            "at": now,
            "whole": whole,
            "outcomes": {name: one["outcome"] for name, one in outcomes.items()},
            "damaged": bad,
        }
        for name, one in outcomes.items():
            row = _component(document, name)
            if one["outcome"] == states.VERIFIED and whole:
                record = manifest.component(name)
                as_of = manifest.began_at if record is None else record.began_at
                if str(row.get("verified_as_of", "")) <= as_of:
                    row.update(verified_backup_id=manifest.backup_id, verified_as_of=as_of, verified_at=now)
            if one["outcome"] == states.FAILED_VERIFICATION and row.get("verified_backup_id") == manifest.backup_id:
                for key in ("verified_backup_id", "verified_as_of", "verified_at"):
                    row.pop(key)

    _change(home, alter)


def note_removed(home: Path, backup_ids: Iterable[str]) -> None:
    """Backups were pruned: nothing of them is the last verified one any more. Raises StorageError."""
    gone = set(backup_ids)

    def alter(document: dict[str, Any]) -> None:
        for row in document.get("components", {}).values():
            if row.get("verified_backup_id") in gone:
                for key in ("verified_backup_id", "verified_as_of", "verified_at"):
                    row.pop(key)

    _change(home, alter)


SHIP_SECONDS = 300.0
"""Between two runs of the deployment ship-logs."""
LATE_RUNS = 3
"""Logs that are older than so many runs are late."""


def note_shipped(home: Path, shipment: Mapping[str, Any], configured: Collection[str]) -> None:
    """What came of a database's logs, as `Shipment.as_dict`. Databases that are not `configured` any more go. Raises StorageError."""

    def alter(document: dict[str, Any]) -> None:
        rows = document.setdefault("logs", {})
        for name in set(rows) - set(configured):
            del rows[name]
        row = rows.setdefault(shipment["database"], {})
        row["failed"] = shipment["failed"]
        if shipment["failed"] is None:
            row.update(covers_until=shipment["covers_until"], gap=shipment["gap"], shipped_at=clock.text(clock.now()))
            row["lost"] = shipment["lost"] or row.get("lost")

    _change(home, alter)


def forget_logs(home: Path) -> None:
    """No logs are shipped any more. Raises StorageError."""
    if document(home).get("logs"):
        _change(home, lambda found: found.pop("logs", None))


def note_logs_begin(home: Path, database: str, series: int) -> None:
    """Its logs of before this series were deleted: what is lost between two older ones is no news any more. Raises StorageError."""

    def alter(document: dict[str, Any]) -> None:
        row = document.get("logs", {}).get(database, {})
        if row.get("lost") and row["lost"]["series"] <= series:
            row["lost"] = None

    _change(home, alter)


def document(home: Path) -> dict[str, Any]:
    """What is known; empty where there was no backup."""
    return ledger.read(home) or {}


def installation(home: Path) -> str | None:
    """Whose backups are those of this home. None where there was none, or one that did not know it."""
    found = document(home).get("installation")
    return None if found in (None, "unknown") else str(found)


def of_installation(manifests: Iterable[Manifest], installation: str | None) -> list[Manifest]:
    """Those of this installation, where a location is shared by several. All of them where none is of it, or it is not known."""
    known = list(manifests)
    return [one for one in known if one.installation == installation] or known


def summary(home: Path, shipped: Sequence[str] = ()) -> dict[str, Any] | None:
    """For `status`: how old the last backup and the last verified one are, by component, and how far the logs of the databases reach that
    are `shipped`; None where there never was any of it. `last` is None where only logs are known.
    """
    known = document(home)
    if "last" not in known and not shipped:
        return None
    last = known.get("last")
    return {
        "last": last
        and {
            key: last.get(key)
            for key in ("backup_id", "state", "began_at", "size_bytes", "new_bytes", "errors", "places")
        },
        "logs": {name: _logs(known.get("logs", {}).get(name, {})) for name in sorted(shipped)},
        "components": {
            name: {
                "age_seconds": _age(row.get("backed_up_at")),
                "verified_age_seconds": _age(row.get("verified_as_of")),
                "size_bytes": row.get("size_bytes"),
                "last_state": row.get("last_state"),
            }
            for name, row in sorted(known.get("components", {}).items())
        },
        "damaged": known.get("last_check", {}).get("damaged", {}),
        "drill": known.get("drill"),
    }


def _logs(row: Mapping[str, Any]) -> dict[str, Any]:
    age = ledger.logs_age(row, clock.now())
    age = None if age is None else round(age, 1)
    return {
        "covers_until": row.get("covers_until"),
        "age_seconds": age,
        "late": age is None or age > LATE_RUNS * SHIP_SECONDS,
        "gap": row.get("gap"),
        "lost": row.get("lost"),
        "failed": row.get("failed"),
    }


def _age(text: str | None) -> float | None:
    age = ledger.age(text, clock.now())
    return None if age is None else round(age, 1)


def expected(home: Path) -> dict[str, int]:
    """How large each component was when it was last backed up, in bytes: for the time that remains."""
    document = ledger.read(home) or {}
    return {name: int(row["size_bytes"]) for name, row in document.get("components", {}).items() if "size_bytes" in row}


def _component(document: dict[str, Any], name: str) -> dict[str, Any]:
    row: dict[str, Any] = document.setdefault("components", {}).setdefault(name, {})
    return row


def _change(home: Path, alter: Callable[[dict[str, Any]], None]) -> None:
    def dated(document: dict[str, Any]) -> None:
        alter(document)
        document["updated_at"] = clock.text(clock.now())

    ledger.change(home, dated)
