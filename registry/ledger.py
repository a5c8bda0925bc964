"""backups.json under home: what is known of the backups without asking where they are. `status` and /metrics read it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable
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
