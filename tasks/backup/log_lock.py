"""The lock of shipped logs: of one home one process at a time ships them or deletes old ones. A dead process cannot hold it."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from registry.errors import LockedError, StorageError

LOCK = "ship-logs.lock"
_LOOK_SECONDS = 0.2


@contextlib.contextmanager
def shipping(
    home: Path,
    *,
    wait_seconds: float = 0.0,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Hold it while the block runs. Raises LockedError where another does, and still does after so long; StorageError."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = (home / LOCK).open("a")
    except OSError as error:
        raise StorageError(
            f"{home / LOCK} cannot be opened: {error.strerror or error}; make {home} writable"
        ) from error
    until = monotonic() + wait_seconds
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if monotonic() >= until:
                    raise LockedError(
                        f"logs are being shipped from {home} already, or old ones deleted: wait for it to end"
                    ) from error
            sleep(_LOOK_SECONDS)
        yield
