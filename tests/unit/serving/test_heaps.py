"""The serving process has one heap of the C library's, whatever number of threads allocates, unless an operator wants another."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from serving.process import heaps

THREADS = """
import ctypes, threading
library = ctypes.CDLL(None)
library.malloc.restype, library.fopen.restype = ctypes.c_void_p, ctypes.c_void_p
meeting = threading.Barrier(8)
def work():
    meeting.wait()
    for _ in range(200):
        library.malloc(5000)
    meeting.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
library.malloc_info(0, ctypes.c_void_p(library.fopen(b"/dev/stdout", b"w")))
library.fflush(None)
"""


def heaps_of(environment: dict[str, str]) -> int:
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.count("<heap ")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT TESTED: heaps of the C library: it is not glibc")
def test_many_threads_share_one_heap() -> None:
    without = {name: value for name, value in os.environ.items() if not name.startswith(("GLIBC_", "MALLOC_"))}
    assert heaps_of(without) > 1
    assert heaps_of(heaps.environment(without)) == 1


def test_what_an_operator_set_stays() -> None:
    ours = "glibc.malloc.arena_max=1:glibc.malloc.tcache_max=256"
    assert heaps.environment({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": ours}
    assert heaps.environment({"GLIBC_TUNABLES": ""})["GLIBC_TUNABLES"] == ours
    theirs = "glibc.malloc.arena_max=4:glibc.cpu.x86_ibt=off"
    assert heaps.environment({"GLIBC_TUNABLES": theirs})["GLIBC_TUNABLES"] == theirs + ":glibc.malloc.tcache_max=256"
    found = heaps.environment({"MALLOC_ARENA_MAX": "2"})
    assert found == {"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.malloc.tcache_max=256"}


def test_it_says_the_same_twice() -> None:
    once = heaps.environment({})
    assert heaps.environment(once) == {"GLIBC_TUNABLES": once["GLIBC_TUNABLES"]}
