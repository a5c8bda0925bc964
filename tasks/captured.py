"""Fetches the requests that the servers of an environment have captured, for a replay."""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from registry.client_tls import verify
from registry.database import Database
from registry.errors import StorageError
from tasks import servers

log = logging.getLogger("modelkeep.captured")

MOST_BYTES = 1 << 30
"""Of the requests of one server, and of all that are kept for the replay."""
_SECONDS = 60.0
_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Gathered:
    """How many captured requests are in the folder, from which servers, and what went wrong with the others."""

    requests: int
    servers: tuple[str, ...]
    problems: tuple[str, ...]


@contextmanager
def folder(below: Path) -> Iterator[Path]:
    """An empty folder in `below` that is gone afterwards, with what was put into it; for this user only.

    Those of processes that were killed go first: they hold what clients sent, and nobody else would remove them. Raises StorageError.
    """
    with ExitStack() as stack:
        try:
            below.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(below / _LOCK):  # nobody clears away a folder between its making and its lock
                _clear(below)
                scratch = Path(tempfile.mkdtemp(dir=below))
                stack.enter_context(_locked(scratch / _LOCK))
                stack.callback(_remove, scratch)
                place = scratch / "captured"
                place.mkdir()
        except OSError as error:
            raise StorageError(f"no folder for captured requests can be made in {below}: {error}") from error
        yield place


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """The lock of that file, which the end of the process frees too. Raises BlockingIOError where it is taken and not to be waited for."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _clear(below: Path) -> None:
    for place in below.iterdir():
        if not place.is_dir():
            continue
        try:
            with _locked(place / _LOCK, wait=False):
                _remove(place)
        except BlockingIOError:
            continue  # of a replay that runs
        except OSError as error:
            log.error("captured requests that a replay left in %s cannot be removed: %s", place, error)


def _remove(place: Path) -> None:
    try:
        shutil.rmtree(place)
    except OSError as error:
        log.error("captured requests are left in %s: %s", place, error)


def gather(database: Database, environment: str, model: str, folder: Path, *, newest: int) -> Gathered:
    """Put the newest captured requests of a model, over all living servers, into `folder`: a file each, as serving.traffic.capture names them.

    A server that has none, or does not answer, is named in `problems`. Raises StorageError where the folder cannot take them.
    """
    shown = servers.access(database)
    found: list[str] = []
    problems: list[str] = []
    kept = 0
    try:
        for replica, address in sorted(servers.alive(database, environment).items()):
            with tempfile.TemporaryFile(dir=folder.parent) as archive:
                problem = _fetch(address, model, newest, shown, archive)
                if problem is None:
                    problem = _unpack(archive, folder)
            if problem is None:
                found.append(replica)
            else:
                problems.append(f"{replica}: {problem}")
            kept = _trim(folder, newest)  # after each server: they do not all lie there at once
    except OSError as error:
        raise StorageError(f"the captured requests of {model} cannot be put into {folder.parent}: {error}") from error
    return Gathered(kept, tuple(found), tuple(problems))


def _trim(folder: Path, newest: int) -> int:
    """Keep the newest, and no more than MOST_BYTES of them. Returns how many those are."""
    kept, size = 0, 0
    for path in sorted(folder.iterdir(), key=lambda path: path.name, reverse=True):
        size += path.stat().st_size
        if kept < newest and size <= MOST_BYTES:
            kept += 1
        else:
            path.unlink()
    return kept


def _fetch(address: str, model: str, newest: int, shown: servers.Access, into: IO[bytes]) -> str | None:
    """Fetch the zip of one server. Returns what went wrong, None where nothing did."""
    url = f"{address}/api/v2/captured/{model}"
    # As it is on the server: what is counted and written below is what came.
    headers = {**shown.headers(address), "Accept-Encoding": "identity"}
    try:
        with httpx.stream(
            "GET", url, params={"newest": newest}, headers=headers, timeout=_SECONDS, verify=verify(address)
        ) as answer:
            if answer.status_code == httpx.codes.NOT_FOUND:
                return "has none"
            if answer.status_code != httpx.codes.OK:
                answer.read()
                return _why(answer)
            size = 0
            for chunk in answer.iter_raw():
                size += len(chunk)
                if size > MOST_BYTES:
                    return (
                        f"it sends more than {MOST_BYTES >> 20} MB: make its capture.max_mb smaller, or replay_requests"
                    )
                into.write(chunk)
    except httpx.HTTPError as error:
        return f"does not answer: {type(error).__name__} {error}".strip()
    return None


def _why(answer: httpx.Response) -> str:
    try:
        document = answer.json()
    except ValueError:
        document = None
    text = document.get("error") if isinstance(document, dict) else None
    return f"{text or answer.text:.300}" if text or answer.text else f"status {answer.status_code}"


def _unpack(archive: IO[bytes], folder: Path) -> str | None:
    """Write each entry as a file of its name; two servers with one name (the same nanosecond) keep one of the two.

    Returns what went wrong, None where nothing did. Of an archive that is damaged nothing stays.
    """
    written = []
    try:
        with zipfile.ZipFile(archive) as packed:
            for entry in packed.infolist():
                if "/" in entry.filename or entry.filename.startswith(".") or entry.compress_type != zipfile.ZIP_STORED:
                    continue  # none of serving.traffic.capture's
                body = packed.read(entry)
                written.append(folder / entry.filename)
                written[-1].write_bytes(body)
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        for path in written:
            path.unlink(missing_ok=True)
        return f"what it sends cannot be read: {type(error).__name__} {error}"
    return None
