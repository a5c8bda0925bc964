"""The heaps of a serving process have room that it touched at its start."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

HEAD = """
import os, sys
from serving.device import devices
from serving.process import headroom
how = sys.argv[1]
def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon:"))
"""
glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="NOT TESTED: what its heap touches: it is not glibc"
)


def growth(code: str, how: str = "") -> int:
    """What this code, which has HEAD's names and sets `before`, adds to the memory of a process of its own."""
    script = f"{HEAD}{code}\nprint(resident() - before)"
    done = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.system() != "Linux", reason="NOT TESTED: what Python's heap touches: no /proc here")
def test_what_python_needs_within_its_headroom_touches_no_new_memory() -> None:
    code = """
if how == "with":
    headroom.take()
room = [None] * 30_000
before = resident()
for number in range(30_000):  # 1.4 MB of 48 bytes each
    room[number] = float(number), number
    room[number] = None if number % 2 else (number,)
"""
    assert growth(code, "without") > 500_000
    assert growth(code, "with") < 100_000


@glibc
def test_what_stays_of_each_version_within_the_c_librarys_headroom_touches_no_new_memory() -> None:
    code = """
if how != "without":
    headroom.take(0)
if how == "used up":
    used = [os.urandom(1024) for _ in range(headroom.C_HEADROOM_BYTES >> 10)]
before = resident()
stays = []
for _ in range(200):  # each leaves a little that stays behind much that goes
    goes = [b"2" * 10_000 for _ in range(100)]
    stays.append(b"2" * 10_000)
    del goes
    devices.give_back_surplus()
"""
    assert growth(code, "with") < 100_000
    assert growth(code, "without") > 1_500_000
    assert growth(code, "used up") > 1_500_000, "a leak shows once the room is used up"


@glibc
def test_much_that_lies_free_is_given_back() -> None:
    code = """
goes = [os.urandom(10_000) for _ in range(3_000)]
stays = os.urandom(10_000)
del goes
before = resident()
devices.give_back_surplus()
"""
    assert growth(code) < -25_000_000
