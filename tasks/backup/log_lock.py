"""The lock of shipped logs: of one home one process at a time ships them or deletes old ones. A dead process cannot hold it.

Who ships waits for a deletion, which lets go of it every few minutes, and not for another shipment, which does the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from registry.errors import LockedError, StorageError

LOCK = "ship-logs.lock"
SHIPPING, DELETING = "shipping", "deleting"
DELETION_SECONDS = 600.0
"""A shipment waits so long for a deletion: longer than that holds it at a time."""
_LOOK_SECONDS = 0.2


@contextlib.contextmanager
def shipping(
    home: Path,
    *,
    doing: str = SHIPPING,
    wait_seconds: float = 0.0,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Hold it while the block runs. Raises LockedError where another does, and still does after so long; StorageError."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = (home / LOCK).open("ab", buffering=0)
    except OSError as error:
        raise StorageError(
            f"{home / LOCK} cannot be opened: {error.strerror or error}; make {home} writable"
        ) from error
    began = monotonic()
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                for_deletion = doing == SHIPPING and _doing(home) == DELETING
                if monotonic() - began >= (DELETION_SECONDS if for_deletion else wait_seconds):
                    raise LockedError(
                        f"logs are being shipped from {home} already, or old ones deleted: wait for it to end"
                    ) from error
            except OSError as error:
                raise StorageError(
                    f"{home / LOCK} cannot be locked: {error.strerror or error}; put {home} on a disk that has locks"
                ) from error
            sleep(_LOOK_SECONDS)
        # On a full disk others do not know what they wait for: a deletion is what helps there.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(doing.encode())
        yield


def _doing(home: Path) -> str:
    """What its holder does, as far as that is known."""
    try:
        return (home / LOCK).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
