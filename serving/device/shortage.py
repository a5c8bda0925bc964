"""Telling a computation that ran out of memory from one that failed, by what the allocators of the runtimes say."""

from __future__ import annotations

import re

from serving.statuses import OutOfMemoryError

_SIGNS = re.compile(
    r"bfc_arena|Failed to allocate memory for requested buffer of size|smaller than requested bytes of|"
    r"CUDA failure 2\b|CUDA out of memory|CUDA error: out of memory|cudaErrorMemoryAllocation|"
    r"CU(?:BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED|DefaultCPUAllocator: (?:can't allocate memory|not enough memory)|"
    r"std::bad_alloc"
)
_REQUESTED = re.compile(
    r"requested (?:bytes of|buffer of size) (\d+)|tried to allocate (\d+) bytes|Tried to allocate ([\d.]+) ([KMGT]?i?B)"
)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """The error that says so, where that is what went wrong; None where it is something else."""
    if isinstance(error, OutOfMemoryError):
        return error
    text = str(error)
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not known and _SIGNS.search(text) is None:
        return None
    asked = requested_bytes(text)
    size = f" ({asked} bytes more could not be had)" if asked is not None else ""
    return OutOfMemoryError(f"out of memory{size}", asked)


def requested_bytes(text: str) -> int | None:
    """What an allocator says it could not give; None where it does not say."""
    found = _REQUESTED.search(text)
    if found is None:
        return None
    plain = found[1] or found[2]
    if plain is not None:
        return int(plain)
    return int(float(found[3]) * 1024 ** _UNITS[found[4][0] if found[4][0] in _UNITS else ""])
