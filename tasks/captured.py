"""Fetches the requests that the servers of an environment have captured, for a replay."""

from __future__ import annotations

import logging
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from registry.database import Database
from registry.errors import StorageError
from tasks import servers

log = logging.getLogger("modelkeep.captured")

MOST_BYTES = 1 << 30
"""Of the requests of one server, and of all that are kept for the replay."""
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Gathered:
    """How many captured requests are in the folder, from which servers, and what went wrong with the others."""

    requests: int
    servers: tuple[str, ...]
    problems: tuple[str, ...]


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder that is gone afterwards, with what was put into it. Raises StorageError."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix="modelkeep-replay-", ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError(
            f"no folder for captured requests can be made in {tempfile.gettempdir()}: {error}"
        ) from error
    with scratch as name:
        place = Path(name) / "captured"
        place.mkdir()
        yield place


def gather(database: Database, environment: str, model: str, folder: Path, *, newest: int) -> Gathered:
    """Put the newest captured requests of a model, over all living servers, into `folder`: a file each, as serving.capture names them.

    A server that has none, or does not answer, is named in `problems`. Raises StorageError where the folder cannot take them.
    """
    shown = servers.access(database)
    found: dict[str, int] = {}
    problems = []
    try:
        for replica, address in sorted(servers.alive(database, environment).items()):
            with tempfile.TemporaryFile(dir=folder.parent) as archive:
                problem = _fetch(address, model, newest, shown, archive)
                if problem is None:
                    found[replica] = _unpack(archive, folder)
                else:
                    problems.append(f"{replica}: {problem}")
        kept, size = 0, 0
        for path in sorted(folder.iterdir(), key=lambda path: path.name, reverse=True):
            size += path.stat().st_size
            if kept < newest and size <= MOST_BYTES:
                kept += 1
            else:
                path.unlink()
    except OSError as error:
        raise StorageError(f"the captured requests of {model} cannot be put into {folder.parent}: {error}") from error
    return Gathered(kept, tuple(found), tuple(problems))


def _fetch(address: str, model: str, newest: int, shown: servers.Access, into: IO[bytes]) -> str | None:
    """Fetch the zip of one server. Returns what went wrong, None where nothing did."""
    url = f"{address}/api/v2/captured/{model}"
    try:
        with httpx.stream(
            "GET", url, params={"newest": newest}, headers=shown.headers(address), timeout=_SECONDS
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


def _unpack(archive: IO[bytes], folder: Path) -> int:
    """Write each entry as a file of its name; two servers with one name (the same nanosecond) keep one of the two."""
    count = 0
    try:
        with zipfile.ZipFile(archive) as packed:
            for entry in packed.infolist():
                if "/" in entry.filename or entry.filename.startswith(".") or entry.file_size != entry.compress_size:
                    continue  # none of serving.capture's
                (folder / entry.filename).write_bytes(packed.read(entry))
                count += 1
    except zipfile.BadZipFile as error:
        log.warning("captured requests that cannot be read: %s", error)
    return count
