"""Requests kept for a replay: a share of those that a stable version answered, on this server's disk, as their clients sent them.

Off unless `capture.share` is set: the files hold what clients sent. A file is the body of one V2 request; its name is the time (Unix
nanoseconds) and, for binary tensors, the length of the JSON header: `1763726400000000000-412.v2`. `serving.replay` decodes them with the
codec that decoded them live. A text that was asked for is a file of its own form (serving.text.asked.keep): `1763726400000000000-.text`.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from random import random as uniform
from typing import IO, NamedTuple, Protocol

from registry.errors import NotFoundError, UnavailableError
from registry.names import check_model_name

log = logging.getLogger("modelkeep.capture")

SUFFIX, TEXT_SUFFIX = ".v2", ".text"
QUEUE_BYTES = 32 << 20
"""Of bodies that wait for the disk. What comes on top is not kept."""
REMOVE_SECONDS = 10.0
"""How long who has a model's requests removed waits for that."""
_LOOK_SECONDS = 60.0
"""How often what has grown old is looked for."""
_BACK_NS = 1_000_000_000
"""A clock that went back by more was set; by less, it is being corrected."""
_AHEAD_NS = 300 * 1_000_000_000
"""What is so far ahead of the clock is from a time when the clock was wrong: nobody can say how old it is."""
_LOG_EVERY_SECONDS = 60.0
_SECONDS_A_DAY = 86400.0


class Limits(Protocol):
    """What this needs of the settings (registry.sections.CaptureSection)."""

    @property
    def share(self) -> float: ...
    @property
    def requests(self) -> int: ...
    @property
    def max_mb(self) -> int: ...
    @property
    def days(self) -> float: ...


class _Offered(NamedTuple):
    model: str
    at: int
    header_length: int | None
    body: bytes
    text: bool


class _Removal(NamedTuple):
    model: str
    removed: Future[int]


class _File(NamedTuple):
    name: str
    at: int
    size: int


@dataclass(frozen=True, slots=True)
class Held:
    """What is kept of one model. Times are Unix seconds."""

    requests: int
    bytes: int
    oldest: float
    newest: float


def name_of(at: int, header_length: int | None, *, text: bool = False) -> str:
    return f"{at:019d}-{'' if header_length is None else header_length}{TEXT_SUFFIX if text else SUFFIX}"


def parse_name(name: str) -> tuple[int, int | None] | None:
    """(Unix nanoseconds, length of the JSON header or None), or None where it is not the name of a captured request."""
    stem, dot, kind = name.rpartition(".")
    suffix = dot + kind
    at, mark, header = stem.partition("-")
    plain = at.isascii() and at.isdigit() and (not header or (header.isascii() and header.isdigit()))
    if suffix not in (SUFFIX, TEXT_SUFFIX) or not mark or not plain or len(stem) > 60:
        return None
    return int(at), int(header) if header else None


class Capture:
    """`wants` and `offer` are called on the event loop and never wait; one thread writes and clears away; the rest is for any thread."""

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        *,
        random: Callable[[], float] = uniform,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.folder = folder
        self.share = limits.share
        self.counts: Counter[str] = Counter()
        """Requests by what became of them: kept, dropped (the disk was behind), failed (it could not be written)."""
        self._most_requests = limits.requests
        self._most_bytes = limits.max_mb << 20
        self._most_ns = int(limits.days * _SECONDS_A_DAY * 1e9)
        self._random = random
        self._wall_ns = wall_ns
        self._last_ns = 0
        self._queue: SimpleQueue[_Offered | _Removal | None] = SimpleQueue()
        self._lock = threading.Lock()  # of what follows; the event loop takes it: never held while the disk is at work
        self._waiting_bytes = 0
        self._files: dict[str, deque[_File]] = {}
        self._bytes: Counter[str] = Counter()
        self._logged_at = -_LOG_EVERY_SECONDS
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)

    def start(self) -> None:
        """Find what is there already, clear away what is too old, then write what is offered."""
        self._thread.start()

    def end(self, *, seconds: float = 2.0) -> None:
        """Write what waits, for so long at most."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(seconds)

    # On the event loop

    def wants(self) -> bool:
        return self.share > 0 and (self.share >= 1 or self._random() < self.share)

    def offer(self, model: str, body: bytes, header_length: int | None, *, text: bool = False) -> bool:
        """Take a request that was answered. False where too much waits for the disk already, or where it is larger than all may be."""
        if self._waiting_bytes + len(body) > QUEUE_BYTES or len(body) > self._most_bytes:
            self.counts["dropped"] += 1
            return False
        at = self._wall_ns()
        if at >= self._last_ns - _BACK_NS:
            at = max(at, self._last_ns + 1)  # a name each, in the order in which they came
        self._last_ns = at
        with self._lock:
            self._waiting_bytes += len(body)
        self._queue.put(_Offered(model, at, header_length, body, text))
        return True

    # For anybody

    def held(self) -> dict[str, Held]:
        """What is kept, by model."""
        with self._lock:
            return {
                model: Held(len(files), self._bytes[model], files[0].at / 1e9, files[-1].at / 1e9)
                for model, files in sorted(self._files.items())
                if files
            }

    def pack(self, model: str, newest: int, into: IO[bytes]) -> int:
        """Write the newest requests of a model as a zip, oldest first; returns how many. Raises NotFoundError where there are none."""
        import zipfile  # a server that keeps nothing does without

        with self._lock:
            files = list(self._files.get(check_model_name(model), ()))[-newest:]
        packed = 0
        with zipfile.ZipFile(into, "w", zipfile.ZIP_STORED) as archive:
            for file in files:
                try:
                    body = (self.folder / model / file.name).read_bytes()
                except FileNotFoundError:
                    continue  # cleared away meanwhile
                archive.writestr(zipfile.ZipInfo(file.name), body)
                packed += 1
        if not packed:
            hint = (
                ""
                if self.share
                else "; requests are kept where capture.share is above 0 (modelkeep.toml of this server)"
            )
            raise NotFoundError(f"no captured requests of {model} are on this server{hint}")
        return packed

    def remove(self, model: str) -> int:
        """Remove what is kept of a model, and what was offered and waits for the disk; returns how many requests are gone.

        What cannot be removed is in the log. Raises UnavailableError where the disk takes too long.
        """
        check_model_name(model)
        if not self._thread.is_alive():
            return self._shrink(model, requests=0)
        removal = _Removal(model, Future())
        self._queue.put(removal)
        try:
            return removal.removed.result(REMOVE_SECONDS)
        except TimeoutError:
            raise UnavailableError(
                f"the captured requests of {model} are not all removed yet: the disk took longer than {REMOVE_SECONDS:g} s; "
                "they go when it has caught up; look at GET /api/v2/captured, or try again later"
            ) from None

    # On the thread

    def _run(self) -> None:
        try:
            self._find()
        except OSError as error:
            self._complain("the captured requests in %s cannot be read: %s", self.folder, error)
        look_at = time.monotonic()
        while True:
            if time.monotonic() >= look_at:
                self._forget_the_old()
                look_at = time.monotonic() + _LOOK_SECONDS
            try:
                item = self._queue.get(timeout=max(0.0, look_at - time.monotonic()))
            except Empty:
                continue
            if item is None:
                return
            if isinstance(item, _Removal):
                item.removed.set_result(self._shrink(item.model, requests=0))
                continue
            try:
                self._write(item)
                self.counts["kept"] += 1
            except OSError as error:
                self.counts["failed"] += 1
                self._complain("a request could not be kept in %s: %s", self.folder, error)
            finally:
                with self._lock:
                    self._waiting_bytes -= len(item.body)

    def _find(self) -> None:
        """What is there already. An entry that cannot be read is named in the log, and costs the others nothing."""
        if not self.folder.is_dir():
            return
        for place in sorted(self.folder.iterdir()):
            try:
                if not place.is_dir():
                    continue
                entries = sorted(place.iterdir())
            except OSError as error:
                log.error("captured requests cannot be read: %s", error)
                continue
            files, problems = [], []
            for path in entries:
                try:
                    if (file := _found(path)) is not None:
                        files.append(file)
                except OSError as error:
                    problems.append(error)
            if problems:
                log.error("%d files among the captured requests cannot be read: %s", len(problems), problems[0])
            with self._lock:
                self._files[place.name] = deque(files)
                self._bytes[place.name] = sum(file.size for file in files)
            self._shrink(place.name, requests=self._most_requests)

    def _write(self, offered: _Offered) -> None:
        place = self.folder / offered.model
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        at = offered.at
        while (place / (name := name_of(at, offered.header_length, text=offered.text))).exists():
            at += 1  # the clock went back to a time that it had shown before
        fresh = place / f"{name}.new"
        try:
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(offered.body)
            fresh.replace(place / name)
        except OSError:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
        with self._lock:
            self._files.setdefault(offered.model, deque()).append(_File(name, at, len(offered.body)))
            self._bytes[offered.model] += len(offered.body)
        self._shrink(offered.model, requests=self._most_requests)

    def _forget_the_old(self) -> None:
        now = self._wall_ns()
        for model, files in list(self._files.items()):  # only this thread changes it
            old = [file for file in files if not now - self._most_ns <= file.at <= now + _AHEAD_NS]
            if old:
                gone = set(old)
                kept = deque(file for file in files if file not in gone)
                with self._lock:
                    self._files[model] = kept
                    self._bytes[model] -= sum(file.size for file in old)
                    self._tidy(model)
                self._unlink(model, old)

    def _shrink(self, model: str, *, requests: int) -> int:
        """Remove the oldest until no more than so many, and no more than the bytes allowed, are left. Returns how many are gone."""
        removed = []
        with self._lock:
            files = self._files.get(model, deque())
            while files and (len(files) > requests or self._bytes[model] > self._most_bytes):
                removed.append(files.popleft())
                self._bytes[model] -= removed[-1].size
            self._tidy(model)
        return self._unlink(model, removed)

    def _tidy(self, model: str) -> None:
        if not self._files.get(model):
            self._files.pop(model, None)
            self._bytes.pop(model, None)

    def _unlink(self, model: str, files: list[_File]) -> int:
        gone = 0
        for file in files:
            try:
                (self.folder / model / file.name).unlink(missing_ok=True)
                gone += 1
            except OSError as error:
                self._complain("a captured request could not be removed from %s: %s", self.folder / model, error)
        return gone

    def _complain(self, text: str, *values: object) -> None:
        now = time.monotonic()
        if now - self._logged_at >= _LOG_EVERY_SECONDS:
            self._logged_at = now
            log.error(text, *values)


def _found(path: Path) -> _File | None:
    """The captured request at that path, None where it is none; what a process that was killed left half written is removed."""
    if path.suffix == ".new":
        path.unlink(missing_ok=True)
        return None
    parsed = parse_name(path.name)
    if parsed is None:
        return None
    found = path.stat()
    return _File(path.name, parsed[0], found.st_size) if stat.S_ISREG(found.st_mode) else None
