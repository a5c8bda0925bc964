"""Keep a lease alive while an operation runs, from a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from registry import leases
from registry.database import Database
from registry.errors import FencedError, ModelkeepError

log = logging.getLogger("modelkeep.lease")


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
