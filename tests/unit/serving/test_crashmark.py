"""Marks of versions that are loaded at the same time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serving.process.crashmark import CrashMarks

THREADS = 8


class SlowMap:
    """A map whose slots take a while to write: others come meanwhile."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getitem__(self, where: Any) -> Any:
        return self._real[where]

    def __setitem__(self, where: Any, what: Any) -> None:
        time.sleep(0.005)
        self._real[where] = what


def test_two_that_are_loaded_at_the_same_time_have_a_slot_each(tmp_path: Path) -> None:
    marks = CrashMarks(tmp_path / "mark")
    marks._map = SlowMap(marks._map)  # type: ignore[assignment]
    together = threading.Barrier(THREADS)

    def load(number: int) -> None:
        together.wait(60)
        marks.take("m", str(number), "d").mark(True)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(load, range(THREADS)))
    found = CrashMarks(tmp_path / "mark").computing_at_death
    assert sorted(crash.version for crash in found) == [str(number) for number in range(THREADS)]
