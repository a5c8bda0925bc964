"""Chunks that come and go leave no hole behind in the process's memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tasks.backup import heap

# The second of two chunks: after the first was freed, glibc takes it from its heap, which only shrinks at its end.
WORK = """
import ctypes, sys
from pathlib import Path
from tasks.backup import heap
if sys.argv[1] == "with":
    assert heap.return_large_blocks()
first = bytearray(16 << 20)
del first
second = bytearray(16 << 20)
address = ctypes.addressof(ctypes.c_char.from_buffer(second))
for line in Path("/proc/self/maps").read_text().splitlines():
    low, _, high = line.split()[0].partition("-")
    if int(low, 16) <= address < int(high, 16):
        print("heap" if line.endswith("[heap]") else "alone")
"""


def test_large_blocks_lie_apart_and_go_back_to_the_system() -> None:
    if not heap.return_large_blocks():
        pytest.skip("for want of: glibc")
    found = {
        how: subprocess.run(
            [sys.executable, "-c", WORK, how], capture_output=True, text=True, check=True, timeout=120
        ).stdout.strip()
        for how in ("with", "without")
    }
    assert found == {"with": "alone", "without": "heap"}
