"""How the process's memory is managed while backups are read and written: chunks of 16 MB come and go by the thousand."""

from __future__ import annotations

import ctypes
import functools

M_MMAP_THRESHOLD = -3
LARGE_BYTES = 1 << 20


@functools.cache
def return_large_blocks() -> bool:
    """Let every freed block of 1 MB and more go back to the system at once. Left alone, glibc raises that limit to 32 MB when the first
    chunk is freed, and each thread's heap keeps holes of its chunks: 110 MB more at the peak. False where there is no glibc.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES))
    except (AttributeError, OSError):
        return False
