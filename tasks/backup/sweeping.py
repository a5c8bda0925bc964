"""What a killed backup left: its intent, its state "running", its temporary folders. The next run notes and removes them."""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import clock
from registry.database import Database
from registry.errors import ModelkeepError, StorageError
from tasks.backup import ledger, states, whose
from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import Intent, Repository

WORK = "backup-work"
"""Below home: temporary files of backups and checks, a folder each, locked by whoever works in it."""
_OF_REGISTRY = ".backup-registry-*"
SILENT_SECONDS = 3600.0
"""An intent of another home on this machine, whose process is gone, counts as dead when it has not been written for so long."""
UNSEEN_SECONDS = 600.0
"""One of a home like ours, of another boot or container: this machine before it was started anew, or one with its name."""
LOST_SECONDS = 24 * 3600.0
"""One of another machine, of which nothing else can be known."""


def identity(home: Path) -> dict[str, Any]:
    """Which process it is, so that others can tell whether it lives: a number alone is used again."""
    return {"home": str(home), **whose.identity()}


@dataclass(frozen=True, slots=True)
class Swept:
    """`said`: a line for people for each thing that was found. `sequence`: the highest that any backup has; None where that
    could not be seen."""

    said: list[str]
    sequence: int | None


def sweep_folders(home: Path) -> list[str]:
    """Remove the temporary folders of runs that are dead; whoever works in one holds its lock."""
    said = []
    for folder in dead_folders(home / WORK):
        shutil.rmtree(folder, ignore_errors=True)
        said.append(f"removed {folder}, which a killed run left")
    return said


def sweep(repository: Repository, home: Path, database: Database | None) -> Swept:
    """Note every killed backup as failed, and take away what it left here. Call it with the lock of this home in hand.

    What cannot be looked at now is left to the next run.
    """
    said = sweep_folders(home)
    for folder in home.glob(_OF_REGISTRY):
        shutil.rmtree(folder, ignore_errors=True)
        said.append(f"removed {folder}, which a killed run left")
    for place in repository.all_places():
        with contextlib.suppress(StorageError):  # what follows says that it cannot be used
            if isinstance(place, DirectoryPlace) and (count := place.sweep()):
                said.append(f"removed {count} temporary files in {place.shown}, which killed runs left")
    try:
        # In this order: whoever is "running" without an intent has ended, and then the manifest or "failed" is there.
        notes = repository.all_states()
        intents = {one.backup_id: one for one in repository.intents()}
        manifests = repository.manifests()
    except ModelkeepError as error:
        return Swept([*said, f"what earlier runs left could not be looked at: {error}"], None)
    known = {one.backup_id for one in manifests}
    numbers = [one.sequence for one in manifests]
    for of_one in notes.values():
        numbers += [int(note.facts.get("sequence", 0)) for note in of_one if note.state == states.RUNNING]
    for backup_id in sorted({*intents, *notes} - known):
        noted = {note.state for note in notes.get(backup_id, ())}
        intent = intents.get(backup_id)
        if noted & {states.FAILED, states.PRUNED} or (intent is None and states.RUNNING not in noted):
            continue
        if intent is None or _dead(intent, home):
            begun = next((note.facts for note in notes.get(backup_id, ()) if note.state == states.RUNNING), {})
            said.append(_note_killed(repository, home, database, backup_id, begun))
    for backup_id, intent in intents.items():
        if _dead(intent, home):
            repository.end_intent(backup_id)
    return Swept(said, max(numbers, default=0))


@contextlib.contextmanager
def work_folder(home: Path, name: str) -> Iterator[Path]:
    """A folder below home that is gone afterwards, and that nobody sweeps meanwhile. Raises StorageError."""
    with private_folder(home / WORK / name) as path:
        yield path


@contextlib.contextmanager
def private_folder(path: Path) -> Iterator[Path]:
    """A folder that nobody else may read, gone afterwards, locked meanwhile (see `dead_folders`). Raises StorageError."""
    try:
        path, descriptor = _locked_folder(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror or error}") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """The folder, which may be another than was asked for, and what holds its lock."""
    while True:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                os.fchmod(descriptor, 0o700)  # what is restored in it is nobody else's to read
                return path, descriptor
        except BlockingIOError:
            # Another check of the same backup works there, or a sweep takes it for dead: a folder beside it is as good.
            path = path.with_name(f"{path.name}-{os.getpid()}")
        except FileNotFoundError:
            pass
        os.close(descriptor)


def dead_folders(top: Path) -> Iterator[Path]:
    """The folders below `top` in which nobody works any more."""
    for path in top.glob("*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


def _dead(intent: Intent, home: Path) -> bool:
    """Ours are dead for certain: their process would hold the lock of this home, and that is in our hand. By name and path alone
    one could be that of another machine, so that one beats no more must be seen as well."""
    facts = intent.facts
    silent = (clock.now() - intent.modified) / dt.timedelta(seconds=1)
    if facts.get("host") != platform.node():
        return silent > LOST_SECONDS
    if facts.get("home") == str(home):
        return whose.in_sight(facts) or silent > UNSEEN_SECONDS
    return (whose.is_dead(facts) or not whose.in_sight(facts)) and silent > SILENT_SECONDS


def _note_killed(
    repository: Repository, home: Path, database: Database | None, backup_id: str, begun: Mapping[str, Any]
) -> str:
    why = "its process was killed before the manifest was written"
    problems = []
    try:
        repository.note_state(backup_id, states.FAILED, {**begun, "why": why})
    except ModelkeepError as error:
        problems.append(str(error))
    if database is not None:
        try:
            with database.write() as transaction:
                transaction.record("backup.failed", f"backup:{backup_id}", after={"why": why})
        except ModelkeepError as error:
            problems.append(str(error))
    try:
        ledger.note_failed(
            home, backup_id, began_at=begun.get("began_at"), requested=begun.get("requested", ()), why=why
        )
    except ModelkeepError as error:
        problems.append(str(error))
    return f"backup {backup_id} failed: {why}" + (f"; not noted everywhere: {'; '.join(problems)}" if problems else "")
