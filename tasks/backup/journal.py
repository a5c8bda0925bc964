"""How far a recovery has come, in a file under home: a killed one goes on where it was. No database is needed for it."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from registry import clock
from registry.errors import StorageError

FOLDER = "recoveries"
OURS = dt.timedelta(hours=24)
"""What a killed recovery left counts as its own for so long after it was last at work; later somebody else may have written there."""


class Journal:
    """The record of one recovery: what it brings back and where, which steps have begun, which are done."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        self.document = document

    @property
    def resumed(self) -> bool:
        return bool(self.document["steps"])

    def ours(self, component: str, standing: str | None) -> bool:
        """Whether what stands at its target, in words, is what we left there: just that after a failure; after a kill, which left
        no words, whatever stands there within a day."""
        step = self.document["steps"].get(component)
        if step is None or ("left" in step and step["left"] != standing):
            return False
        return abs(clock.now() - dt.datetime.fromisoformat(step["touched_at"])) < OURS

    def done(self, component: str) -> dict[str, Any] | None:
        """What was found when it was done; None where it is not."""
        step = self.document["steps"].get(component)
        return None if step is None or step.get("done_at") is None else dict(step["facts"])

    def begin(self, component: str) -> None:
        """Raises StorageError: nothing is restored that is not on record as begun."""
        self.document["steps"][component] = {"begun_at": _now(), "touched_at": _now(), "done_at": None, "facts": {}}
        self._write()

    def touch(self, component: str) -> None:
        """It is at work on it."""
        self.document["steps"][component]["touched_at"] = _now()
        self._write()

    def fail(self, component: str, left: str | None) -> None:
        """It failed, and this stands there now; None: nothing of ours, so that the next one finds it as if it had not begun."""
        if left is None:
            del self.document["steps"][component]
        else:
            self.document["steps"][component]["left"] = left
        self._write()

    def finish(self, component: str, facts: dict[str, Any]) -> None:
        self.document["steps"][component].update(done_at=_now(), facts=facts)
        self._write()

    @property
    def safety_copies(self) -> list[str]:
        """Backups of what runs of this recovery have replaced, oldest first."""
        return list(self.document.get("safety_copies", ()))

    def saved(self, backup_id: str) -> None:
        self.document["safety_copies"] = [*self.safety_copies, backup_id]
        self._write()

    def end(self, state: str) -> None:
        """The recovery has come to its end; the next one like it begins anew."""
        self.document.update(state=state, ended_at=_now())
        self._write()
        self.path.replace(self.path.with_name(f"{self.path.stem}-{self.document['began_at'].replace(':', '')}.json"))

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_suffix(".new")
            with fresh.open("w", encoding="utf-8") as file:
                json.dump(self.document, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror or error}") from error


def open_journal(home: Path, backup_id: str, steps: Sequence[tuple[str, str]]) -> Journal:
    """The journal of the recovery of these (component, target) from this backup: the one that was cut off, or a new one.

    Raises StorageError where there is one that cannot be read.
    """
    key = hashlib.sha256(json.dumps([backup_id, sorted(steps)]).encode()).hexdigest()[:16]
    path = home / FOLDER / f"{key}.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        found = {"backup_id": backup_id, "began_at": _now(), "ended_at": None, "state": "running", "steps": {}}
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path}, the record of a recovery that was cut off, cannot be read ({error}): look at what it restored, then remove it"
        ) from error
    return Journal(path, found)


def _now() -> str:
    return clock.text(clock.now())
