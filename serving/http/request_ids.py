"""The ids that a server gives to requests: who answered, under which generation of the route. Any server can read them."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import quote, unquote

BOOT_DIGITS = 6


class RequestId(NamedTuple):
    """`<replica>.<boot>.<generation>.<version>.<number>`; generation 0 and version "-": it never reached a version by a route."""

    replica: str
    boot: str
    generation: int
    version: str
    number: int


def prefix(replica: str, boot_id: str) -> bytes:
    return f"{quote(replica, safe='').replace('.', '%2E')}.{boot_id[:BOOT_DIGITS]}.".encode()


def quoted(version: str) -> bytes:
    """Without dots, which part the fields."""
    return quote(version, safe="").replace(".", "%2E").encode()


def is_plain(request_id: bytes) -> bool:
    """Whether a client's own id can be used as it is."""
    return 0 < len(request_id) <= 128 and request_id.isascii() and request_id.decode("ascii").isprintable()


def parse(text: str) -> RequestId | None:
    """None where it is no id of a server's."""
    parts = text.split(".")
    if len(parts) != 5 or not all(parts):
        return None
    replica, boot, generation, version, number = parts
    if not (_is_number(generation) and _is_number(number) and len(boot) == BOOT_DIGITS):
        return None
    if quoted(unquote(version)).decode() != version:  # one answer has one id: else its verdict would count twice
        return None
    return RequestId(unquote(replica), boot, int(generation), unquote(version), int(number))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18 and text == str(int(text))
