"""One backup at a time: a lock of the file system in home, which a dead process cannot hold, and a lease in the registry."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from registry import actor, clock, leases
from registry.database import Database
from registry.errors import FencedError, LockedError, StorageError
from registry.routes import lock_environment
from tasks import lease

NAME = "backup.lock"
SUBJECT = "backup"


class HomeLock:
    """The lock that is held. `before` is what the last holder wrote into it: where it was killed, what it left."""

    def __init__(self, file: IO[str], before: dict[str, Any]) -> None:
        self._file = file
        self.before = before
        self.facts: dict[str, Any] = {}

    def note(self, **facts: Any) -> None:
        """What those who find it held, or find it left, shall know. Raises StorageError."""
        self.facts.update(facts)
        try:
            self._file.seek(0)
            self._file.truncate()
            json.dump(self.facts, self._file)
            self._file.flush()
        except OSError as error:
            raise StorageError(f"{NAME} in home cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def home_lock(home: Path, what: str) -> Iterator[HomeLock]:
    """Hold the lock of this home while the block runs. Raises LockedError that names the holder, StorageError."""
    path = home / NAME
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror or error}; make {home} writable") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read(file)
            raise LockedError(
                f"a backup is under way: {holder.get('what', 'backup')} by {holder.get('actor', 'somebody')}, process "
                f"{holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('since', '?')}: wait for it to end"
            ) from error
        lock = HomeLock(file, _read(file))
        lock.note(
            what=what,
            actor=actor.user(),
            pid=os.getpid(),
            host=platform.node(),
            since=clock.text(clock.now()),
            lease=None,
        )
        try:
            yield lock
        finally:
            with contextlib.suppress(OSError):
                file.seek(0)
                file.truncate()


def _read(file: IO[str]) -> dict[str, Any]:
    try:
        file.seek(0)
        found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def take_lease(
    database: Database,
    environment: str,
    lock: HomeLock,
    *,
    ttl_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> leases.Held:
    """The registry's lease on backups, so that two homes of one registry do not back up at once.

    One that the last backup of *this* home left is taken away at once: whoever held it is dead, or we would not have its lock;
    so is one of before a restore. Another that stands still for its time to live is ended as that of any operation.
    Raises LockedError where it moves, UnavailableError where the registry does not answer.
    """
    left = lock.before.get("lease")
    holder = f"{actor.current()} (process {os.getpid()} on {platform.node()})"

    def begin() -> leases.Held:
        with database.write() as transaction:
            there = next(
                (one for one in leases.beats(transaction.session, environment) if one.subject == SUBJECT), None
            )
            epoch = lock_environment(transaction, environment).epoch
            if there is not None and (there.token == left or there.token.rpartition(".")[0] != epoch):
                leases.preempt(transaction, SUBJECT, environment, reason="the backup that held it was killed")
            return leases.acquire(
                transaction, SUBJECT, environment, holder=holder, ttl_seconds=ttl_seconds, promotion=None
            )

    held = lease.taken_of(database, environment, SUBJECT, begin, sleep=sleep, monotonic=monotonic)
    lock.note(lease=held.token)
    return held


def release_lease(database: Database, held: leases.Held) -> bool:
    """False where it was lost: somebody took it away, or the registry was restored meanwhile."""
    try:
        with database.write() as transaction:
            leases.release(transaction, held)
    except FencedError:
        return False
    return True
