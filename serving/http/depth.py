"""How deep a JSON text is nested, told before anybody builds it. orjson stops at 1,024 by itself; other readers recurse."""

from __future__ import annotations

import numpy as np

PAGES = 64
"""Deepest JSON that the pages take: what they are asked is flat."""
_STEP = np.zeros(256, np.int8)
_STEP[[ord("["), ord("{")]] = 1
_STEP[[ord("]"), ord("}")]] = -1


def is_deeper(text: bytes, limit: int) -> bool:
    """Whether brackets are nested deeper than `limit`. Looks at the bytes as a whole, not one by one."""
    if text.count(b"[") + text.count(b"{") <= limit:
        return False
    # Without escapes a quotation mark begins or ends a string: every second part is outside of them.
    outside = b"".join(text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    if not outside:
        return False
    steps = _STEP[np.frombuffer(outside, np.uint8)]
    return int(np.cumsum(steps, dtype=np.int32).max()) > limit
