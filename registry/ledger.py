"""backups.json under home: what is known of the backups without asking where they are. `status` and /metrics read it."""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from registry.errors import StorageError

NAME = "backups.json"
FORMAT = 1


def path_of(home: Path) -> Path:
    return home / NAME


def read(home: Path) -> dict[str, Any] | None:
    """None where no backup was ever taken here, or the file is no such document: the backups themselves say what there is."""
    try:
        found = json.loads(path_of(home).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def change(home: Path, alter: Callable[[dict[str, Any]], None]) -> None:
    """Read, alter and replace the file, one process at a time; a reader sees the old one or the new one. Raises StorageError."""
    path = path_of(home)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / f"{NAME}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            document = read(home) or {"format": FORMAT}
            alter(document)
            fresh = path.with_suffix(".new")
            with fresh.open("w", encoding="utf-8") as file:
                json.dump(document, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.with_suffix(".new").unlink()
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def age(text: Any, now: dt.datetime) -> float | None:
    """Seconds since the moment that a row of the document names, 0 for one to come. None where it names none that can be read."""
    if not isinstance(text, str):
        return None
    try:
        return max(0.0, (now - dt.datetime.fromisoformat(text)).total_seconds())
    except (ValueError, TypeError):
        return None


def logs_age(row: Mapping[str, Any], now: dt.datetime) -> float | None:
    """Seconds since the moment up to which the logs of a database are shipped. None where none was shipped.

    That moment is by the clock of the database's server, which may be ahead of ours: the time since the shipment is the least.
    """
    ages = [found for key in ("covers_until", "shipped_at") if (found := age(row.get(key), now)) is not None]
    return max(ages, default=None)
