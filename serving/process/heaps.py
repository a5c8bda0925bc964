"""How the C library keeps the heaps of a serving process. It reads this where the process begins, so its parent has to say it."""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
SETTINGS = {"glibc.malloc.arena_max": "1", "glibc.malloc.tcache_max": "256"}
"""One heap, and of what a thread freed only pieces of up to so many bytes kept for that thread.

Otherwise every thread has a heap, and keeps 7 freed pieces of each size up to 1 kB. Fifteen threads, of which any may do a piece of work,
touch all of that in the course of hours: a server with nothing more in use grew by 0.5 MB an hour, and by less than 0.1 so. Small pieces are what ONNX Runtime
asks for most, Python has a heap of its own for them: neither setting shows in the rates of docs/PERFORMANCE.md.
"""
_OTHER_NAMES = {"MALLOC_ARENA_MAX": "glibc.malloc.arena_max"}


def environment(of: Mapping[str, str]) -> dict[str, str]:
    """`of` with the settings, except those that are in it already: an operator's own stay. Other C libraries than glibc ignore them."""
    said = of.get(VARIABLE, "")
    theirs = {one.partition("=")[0] for one in said.split(":")} | {
        name for alias, name in _OTHER_NAMES.items() if alias in of
    }
    ours = [f"{name}={value}" for name, value in SETTINGS.items() if name not in theirs]
    return {**of, VARIABLE: ":".join([*([said] if said else []), *ours])}
