"""How far a backup is, by bytes, with the time that remains: counted here, shown by whoever wants to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_TELL_SECONDS = 10.0
_SHOW_SECONDS = 0.5
_RATE_AFTER_SECONDS = 2.0
"""A rate of less than that is noise."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One look at it. `remaining_seconds` and `share` are None where nothing says how much there is to come."""

    component: str
    component_done_bytes: int
    component_total_bytes: int | None
    done_bytes: int
    total_bytes: int | None
    elapsed_seconds: float
    remaining_seconds: float | None

    @property
    def share(self) -> float | None:
        return None if not self.total_bytes else min(1.0, self.done_bytes / self.total_bytes)

    def text(self) -> str:
        done = f"{self.component}: {size(self.component_done_bytes)}"
        if self.component_total_bytes:
            done += f" of {size(self.component_total_bytes)}"
        if self.share is not None:
            done += f"; in all {self.share:.0%}"
        if self.remaining_seconds is not None:
            done += f", about {duration(self.remaining_seconds)} to go"
        return done


class Progress:
    """Counts the bytes of the sources. `expected`: what each component had last time, for those that have not begun.

    `tell` gets a line every ten seconds, `show` a Moment twice a second; neither is called more often, and both from the
    thread that reports.
    """

    def __init__(
        self,
        components: Sequence[str],
        *,
        expected: Mapping[str, int] | None = None,
        tell: Callable[[str], None] = lambda _: None,
        show: Callable[[Moment], None] = lambda _: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expected = dict(expected or {})
        self._waiting = list(components)
        self._tell, self._show, self._monotonic = tell, show, monotonic
        self._began = self._told = self._shown = monotonic()
        self._ended_bytes = 0
        self._current = ""
        self._done = 0
        self._total: int | None = None
        self._lock = threading.Lock()

    def begin(self, component: str) -> None:
        with self._lock:
            if component in self._waiting:
                self._waiting.remove(component)
            self._current, self._done, self._total = component, 0, self._expected.get(component)
        self._report(force=True)

    def update(self, done_bytes: int, total_bytes: int | None = None) -> None:
        with self._lock:
            self._done = max(self._done, done_bytes)
            self._total = total_bytes if total_bytes is not None else self._total
        self._report()

    def end(self) -> None:
        with self._lock:
            self._ended_bytes += self._done
            self._done, self._total = 0, 0
        self._report(force=True)

    def moment(self) -> Moment:
        with self._lock:
            elapsed = self._monotonic() - self._began
            done = self._ended_bytes + self._done
            ahead = [self._expected.get(name) for name in self._waiting]
            total: int | None = None
            if self._total is not None and None not in ahead:
                total = self._ended_bytes + max(self._total, self._done) + sum(one or 0 for one in ahead)
            remaining = None
            if total is not None and done and elapsed >= _RATE_AFTER_SECONDS:
                remaining = (total - done) * elapsed / done
            return Moment(self._current, self._done, self._total, done, total, elapsed, remaining)

    def _report(self, *, force: bool = False) -> None:
        now = self._monotonic()
        if force or now - self._shown >= _SHOW_SECONDS:
            self._shown = now
            self._show(self.moment())
        if now - self._told >= _TELL_SECONDS:
            self._told = now
            self._tell(self.moment().text())


_viewers: list[Callable[[Moment], None]] = []


def show(moment: Moment) -> None:
    """To whoever watches in this process: the command line, and the page of the flow."""
    for viewer in list(_viewers):
        viewer(moment)


@contextlib.contextmanager
def viewed(viewer: Callable[[Moment], None]) -> Iterator[None]:
    _viewers.append(viewer)
    try:
        yield
    finally:
        _viewers.remove(viewer)


def duration(seconds: float) -> str:
    """ "45 s", "3 min", "2 h 5 min", "3 days"."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    if minutes >= 48 * 60:
        return f"{minutes // (24 * 60)} days"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size(size_bytes: float) -> str:
    """ "640.0 MB", in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"
