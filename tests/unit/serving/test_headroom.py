"""Python's heap of a serving process has room that it touched at its start."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

GROWTH = """
import sys
from serving.process import headroom
def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon:"))
if sys.argv[1] == "with":
    headroom.take()
room = [None] * 30_000
before = resident()
for number in range(30_000):  # 1.4 MB of 48 bytes each
    room[number] = float(number), number
    room[number] = None if number % 2 else (number,)
print(resident() - before)
"""


def growth(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", GROWTH, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.system() != "Linux", reason="NOT TESTED: what Python's heap touches: no /proc here")
def test_what_python_needs_within_its_headroom_touches_no_new_memory() -> None:
    assert growth("without") > 500_000
    assert growth("with") < 100_000
