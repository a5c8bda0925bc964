"""The access log: one JSON line a request, written by a thread of its own. Never a body, a key, or a path as a client wrote it."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import random as uniform
from typing import IO, Any, NamedTuple

import orjson

log = logging.getLogger("modelkeep.access")

WAITING = 10_000
"""Most lines that wait for the disk; those beyond are counted and lost."""
_LINES_AT_A_TIME = 512
_GATHER_SECONDS = 0.02
"""Lines are written together: a thread that woke for each would cost the requests more than the lines do."""
_AGAIN_SECONDS = 1.0
_END_SECONDS = 2.0


class Line(NamedTuple):
    """A request that was answered. `status` 499: its client was gone. Times in seconds; `queue_seconds` and `model_seconds` are None
    where no version was asked.
    """

    time: float
    id: str
    method: str
    path: str
    status: int
    size_bytes: int
    seconds: float
    queue_seconds: float | None
    model_seconds: float | None
    key: str | None
    model: str | None
    version: str | None

    def text(self) -> bytes:
        document: dict[str, Any] = self._asdict()
        document["bytes"] = document.pop("size_bytes")
        document["time"] = datetime.fromtimestamp(self.time, UTC).isoformat(timespec="microseconds")
        for name in ("seconds", "queue_seconds", "model_seconds"):
            if document[name] is not None:
                document[name] = round(document[name], 6)
        return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


class AccessLog:
    """`path` None: standard error. The file is put aside at `max_bytes`, as NAME.1 and so on; `files` are kept, the current one too."""

    def __init__(
        self,
        path: Path | None,
        *,
        max_bytes: int = 64 << 20,
        files: int = 5,
        share: float = 1.0,
        random: Callable[[], float] = uniform,
        stream: IO[bytes] | None = None,
    ) -> None:
        self.path, self.max_bytes, self.files, self.share = path, max_bytes, files, share
        self.written = 0
        self.dropped = 0
        """Lines that were lost: too many waited, or the disk took none."""
        self._random = random
        self._stream = stream
        self._lines: deque[Line] = deque()
        self._wake = threading.Event()
        self._ending = False
        self._logged = False
        self._file: IO[bytes] | None = None
        self._size = 0
        self._thread = threading.Thread(target=self._write_all, name="access-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wants(self, status: int) -> bool:
        """Whether a request with this status is to be written: the share that was asked for, and all that failed here."""
        return status >= 500 or self.share >= 1 or self._random() < self.share

    def add(self, line: Line) -> None:
        """From the event loop; never waits."""
        if len(self._lines) >= WAITING:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()

    def end(self) -> None:
        """Write what waits, for a moment, and stop."""
        self._ending = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS)
        if not self._thread.is_alive():
            self._forget_file()

    def _write_all(self) -> None:
        while True:
            self._wake.wait()
            if not self._ending:
                time.sleep(_GATHER_SECONDS)
            self._wake.clear()
            while self._lines:
                lines = [self._lines.popleft() for _ in range(min(len(self._lines), _LINES_AT_A_TIME))]
                try:
                    self._write(b"".join(line.text() for line in lines))
                    self.written += len(lines)
                    self._logged = False
                except (OSError, ValueError) as error:  # a full disk, a closed stream
                    self.dropped += len(lines)
                    self._forget_file()
                    if not self._logged:
                        self._logged = True
                        log.error("the access log cannot be written (%s); lines are lost", error)
                    if self._ending:
                        return
                    time.sleep(_AGAIN_SECONDS)
            if self._ending:
                return

    def _write(self, text: bytes) -> None:
        if self.path is None:
            stream = self._stream if self._stream is not None else sys.stderr.buffer
            stream.write(text)
            stream.flush()
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
            self._size = self._file.tell()
        if self._size and self._size + len(text) > self.max_bytes:
            self._put_aside()
            self._file = self.path.open("ab", buffering=0)
            self._size = 0
        left, before = memoryview(text), self._size
        try:
            while left:  # a disk that is nearly full takes a part
                taken = self._file.write(left) or 0
                self._size += taken
                left = left[taken:]
        except OSError:
            if self._size > before:  # the next line would go on behind half of one
                self._file.truncate(before)
            raise

    def _put_aside(self) -> None:
        assert self.path is not None
        self._forget_file()
        aside = [self.path, *(self.path.with_name(f"{self.path.name}.{n}") for n in range(1, self.files))]
        if len(aside) == 1:
            self.path.unlink(missing_ok=True)
        for older, newer in zip(reversed(aside), list(reversed(aside))[1:], strict=False):
            if newer.exists():
                newer.replace(older)

    def _forget_file(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                log.error("%s could not be closed: %s", self.path, error)
            self._file = None
