"""Who was computing when the process died: a memory-mapped mark that outlives any kill, and the crashes that it told of.

A segfault, the kernel's out-of-memory killer and SIGKILL leave no time to write anything; what was stored into the mapped
page before stays. The mark costs a byte before and after each computation.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger("modelkeep.crash")

SLOTS = 64
SLOT_BYTES = 2048
_FREE, _IDLE, _COMPUTING = 0, 1, 2
_FORMAT = 1
_KEPT = 100
_COUNTED_SECONDS = 3600.0

Mark = Callable[[bool], None]


@dataclass(frozen=True, slots=True)
class Crash:
    """A version that was computing (or being loaded) when a process died. `at_unix` is that process's successor's start."""

    model: str
    version: str
    digest: str
    at_unix: float


class CrashMarks:
    """The mark file of one server process. `open` first says who was computing when the process before died."""

    def __init__(self, path: Path) -> None:
        """Map the file, new or what the process before left. Raises OSError."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(descriptor).st_size != SLOTS * SLOT_BYTES:
                os.ftruncate(descriptor, 0)
                os.ftruncate(descriptor, SLOTS * SLOT_BYTES)
            self._map = mmap.mmap(descriptor, SLOTS * SLOT_BYTES)
        finally:
            os.close(descriptor)
        self.computing_at_death = [found for slot in range(SLOTS) if (found := self._left(slot)) is not None]
        self._map[:] = bytes(len(self._map))
        self._taking = threading.Lock()
        """Versions are loaded on several threads: no two of them shall have one slot."""

    def take(self, model: str, version: str, digest: str) -> Slot:
        """A slot for a version. Where all are taken it has none, and a crash of it is nobody's: logged."""
        name = json.dumps([model, version, digest]).encode()
        with self._taking:
            for slot in range(SLOTS):
                start = slot * SLOT_BYTES
                if self._map[start] == _FREE and len(name) < SLOT_BYTES - 1:
                    self._map[start + 1 : start + SLOT_BYTES] = name.ljust(SLOT_BYTES - 1, b"\0")
                    self._map[start] = _IDLE
                    return Slot(self._map, start)
        log.warning("no mark is left for %s %s: a crash of it cannot be told from another's", model, version)
        return Slot(None, 0)

    def end(self) -> None:
        """The process ends in good order: who is computing now (a shadow copy, a load that is cut short) did not crash it. Raises OSError."""
        self.path.unlink(missing_ok=True)

    def _left(self, slot: int) -> Crash | None:
        start = slot * SLOT_BYTES
        if self._map[start] != _COMPUTING:
            return None
        text = self._map[start + 1 : start + SLOT_BYTES].rstrip(b"\0")
        try:
            model, version, digest = json.loads(text)
        except ValueError:
            log.error("the crash mark %s holds %r: not ours", self.path, text[:80])
            return None
        return Crash(str(model), str(version), str(digest), time.time())


class Slot:
    """`mark(True)` before a computation, `mark(False)` after; `free()` when the version is gone."""

    __slots__ = ("_map", "_start")

    def __init__(self, mapped: mmap.mmap | None, start: int) -> None:
        self._map, self._start = mapped, start

    def mark(self, computing: bool) -> None:
        if self._map is not None:
            self._map[self._start] = _COMPUTING if computing else _IDLE

    def free(self) -> None:
        if self._map is not None:
            self._map[self._start] = _FREE
            self._map = None


class Crashes:
    """Crashes of record on this replica's disk, by version; forgotten when the version is no longer wanted here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: list[Crash] = self._read()

    def note(self, fresh: list[Crash]) -> None:
        """Add what the mark told. A disk that is full loses the note, not the server: logged."""
        if not fresh:
            return
        for crash in fresh:
            log.error("the server died while %s %s was computing", crash.model, crash.version)
        self.known = [*self.known, *fresh][-_KEPT:]
        self._write()

    def count(self, model: str, version: str, digest: str) -> int:
        """Of the last hour, by the wall clock: a jump of it can only forget one."""
        now = time.time()
        return sum(
            (c.model, c.version, c.digest) == (model, version, digest) and abs(now - c.at_unix) <= _COUNTED_SECONDS
            for c in self.known
        )

    def forget_all_but(self, wanted: set[tuple[str, str]]) -> None:
        """Drop the crashes of versions that no route names: should one come back, it begins anew."""
        kept = [crash for crash in self.known if (crash.model, crash.version) in wanted]
        if len(kept) != len(self.known):
            self.known = kept
            self._write()

    def as_list(self) -> list[dict[str, object]]:
        return [asdict(crash) for crash in self.known]

    def _read(self) -> list[Crash]:
        try:
            document = json.loads(self.path.read_text())
            if document["format"] != _FORMAT:
                raise ValueError(f"format {document['format']!r}")
            return [Crash(**entry) for entry in document["crashes"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("the crashes of record in %s cannot be read, going on without them: %s", self.path, error)
            return []

    def _write(self) -> None:
        fresh = self.path.with_suffix(".new")
        try:
            fresh.write_text(json.dumps({"format": _FORMAT, "crashes": self.as_list()}))
            fresh.replace(self.path)
        except OSError as error:
            log.error("the crashes of record could not be kept in %s: %s", self.path, error)
