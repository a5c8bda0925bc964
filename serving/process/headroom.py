"""Room in the heaps that is there from the start, as the threads are: what fills page by page for hours would look like a leak for hours.

Python takes memory from the system by the MiB (an arena) and gives it out by 16 KiB of one size of object each (a pool). How many pools are in
use at once is a matter of what coincides, and ever rarer coincidences need one more: with nothing more in use, a server under traffic touched a pool
for the first time each quarter of an hour, and later each hour. Whether what is in use grows, `sys.getallocatedblocks()` says
(`modelkeep_python_blocks` in /metrics); that the memory of the process does not grow says less than that.

The C library's heap, which has all that is larger and what is not Python's, grows likewise: by a page that holds a little of what stays. What is in use of
it is `modelkeep_memory_bytes{what="allocated"}`, with what else it has in use.
"""

from __future__ import annotations

HEADROOM_BYTES = 2 << 20
C_HEADROOM_BYTES = 4 << 20
_PIECE = 64 << 10
"""Less than the C library would map by itself (128 KiB)."""
_BLOCK = 512
"""The largest that Python's own heap has; a `bytes` of so many less its head is one block."""
_APART = 1000
"""Of so many blocks, which are half an arena, one stays: an arena without any is given back to the system."""
_kept: list[bytes] = []


def take(size: int = HEADROOM_BYTES, c_size: int = C_HEADROOM_BYTES) -> None:
    """Touch `size` bytes of what Python's heap would take next, and `c_size` of what the C library's would, once.

    Python's stays for as long as the process lives, the C library's until so much lies free that it is given back
    (serving.device.devices). Python's arenas that are in use already come first, as they will when the memory is needed. Where it
    allocates otherwise (`PYTHONMALLOC=malloc`), this does no harm.
    """
    head = b"".__sizeof__()
    _kept.extend([bytes(_BLOCK - head) for _ in range(size // _BLOCK)][::_APART])
    # The C library gives back what is free at the upper end of its heap, so the last piece stays.
    _kept.extend([b"\1" * _PIECE for _ in range(c_size // _PIECE)][-1:])
