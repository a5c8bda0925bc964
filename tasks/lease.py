"""Keep a lease alive while an operation runs, from a thread of its own; and end one whose operation has died."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from registry import actor, leases, promotions
from registry.database import Database
from registry.errors import FencedError, LockedError, ModelkeepError

log = logging.getLogger("modelkeep.lease")
T = TypeVar("T")

_LOOK_SECONDS = 0.2
_TRIES_AT_A_FREE_LEASE = 5


class Keeper:
    """Whether the lease is still ours, as far as this process knows. Every write asks the database as well."""

    def __init__(self, held: leases.Held) -> None:
        self.held = held
        self.lost: str | None = None

    def check(self) -> None:
        """Raises FencedError once the lease is known to be lost."""
        if self.lost is not None:
            raise FencedError(self.lost)


@contextlib.contextmanager
def kept(database: Database, held: leases.Held) -> Iterator[Keeper]:
    """Beat four times in each time to live, until the block ends. The thread ends with the process, so a kill stops the beat."""
    keeper, stop = Keeper(held), threading.Event()

    def beat() -> None:
        while not stop.wait(held.ttl_seconds / 4):
            try:
                leases.beat(database, held)
            except FencedError as error:
                keeper.lost = str(error)
                return
            except ModelkeepError as error:
                # Nobody can take the lease while nobody reaches the database; try again with the next beat.
                log.warning("the lease on %s could not be renewed: %s", held.subject, error)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield keeper
    finally:
        stop.set()
        thread.join(timeout=held.ttl_seconds)


def taken(
    database: Database,
    environment: str,
    model: str,
    begin: Callable[[], T],
    *,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> T:
    """As `taken_of` does, for the lease of a model."""
    return taken_of(
        database, environment, leases.subject_of(environment, model), begin, sleep=sleep, monotonic=monotonic
    )


def taken_of(
    database: Database,
    environment: str,
    subject: str,
    begin: Callable[[], T],
    *,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> T:
    """Begin an operation that takes the lease of a subject; where another holds it, see first whether that one lives.

    Servers end what a dead process left, but there may be none: a lease that stands still for its time to live is ended here, in the
    same way. Raises LockedError as soon as it moves, or where it waits for an approval.
    """
    observer, first = leases.Observer(monotonic), None
    freed = 0
    while True:
        try:
            return begin()
        except LockedError:
            with database.read() as session:
                seen = next((beat for beat in leases.beats(session, environment) if beat.subject == subject), None)
                free = seen is None and leases.is_free(session, subject)
            if free and freed < _TRIES_AT_A_FREE_LEASE:
                # Somebody else (a server, the watchman) ended it between our try and our look.
                freed += 1
                continue
            first = first or seen
            if seen is None or first is None or (seen.token, seen.heartbeat) != (first.token, first.heartbeat):
                raise
            if not (stale := observer.stale([seen])):
                sleep(min(_LOOK_SECONDS, seen.ttl_seconds / 4))
            for beat in stale:
                ended = promotions.expire(database, environment, beat, observer=actor.current())
                log.warning(
                    "ended promotion %s: its lease on %s stood still for %g s", ended, subject, beat.ttl_seconds
                )
