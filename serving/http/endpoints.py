"""The names that paths go by in metrics and in the log: templates, of which there are few, never what a client wrote."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

OTHER = "other"
"""What no route answers."""
_LONGEST = 256
_NAMES = 1024
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_V2_TAILS = frozenset({"", "infer", "ready", "config", "stats", "trace/setting"})
_V2_PLAIN = frozenset({"/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/stats", "/v2/repository/index"})


def method_label(method: str) -> str:
    """Methods are few, but a client may send any word."""
    return method if method in _METHODS else "OTHER"


def v2_template(path: str) -> str:
    """The template of a path under /v2."""
    plain = path.rstrip("/")
    if plain in _V2_PLAIN:
        return plain
    parts = plain.split("/")
    if parts[2:3] == ["models"] and len(parts) >= 4:
        middle, rest = "/v2/models/{model}", parts[4:]
        if rest[:1] == ["versions"] and len(rest) >= 2:
            middle, rest = middle + "/versions/{version}", rest[2:]
        tail = "/".join(rest)
        if tail in _V2_TAILS:
            return f"{middle}/{tail}" if tail else middle
    if len(parts) == 6 and parts[2:4] == ["repository", "models"] and parts[5] in ("load", "unload"):
        return "/v2/repository/models/{model}/" + parts[5]
    return "/v2/" + OTHER


def templates(routes: Iterable[Any], fixed_paths: Iterable[str] = ()) -> Callable[[str], str]:
    """A function from a path to its template, by the routes of the pages (what FastAPI calls `path_regex` and `path_format`).

    `fixed_paths` are those of applications.
    """
    fixed: dict[str, str] = {path: path for path in fixed_paths}
    patterns: list[tuple[re.Pattern[str], str]] = []
    for route in _flat(routes):
        text = str(route.path_format)
        if "{" in text:
            patterns.append((route.path_regex, text))
        else:
            fixed[text] = text

    def found(path: str) -> str:
        if path == "/v2" or path.startswith("/v2/"):
            return v2_template(path)
        plain = fixed.get(path)
        if plain is not None:
            return plain
        return next((text for pattern, text in patterns if pattern.match(path)), OTHER)

    remembered = functools.lru_cache(maxsize=_NAMES)(found)
    return lambda path: remembered(path) if len(path) <= _LONGEST else found(path)


def _flat(routes: Iterable[Any]) -> Iterable[Any]:
    for route in routes:
        if hasattr(route, "path_format"):
            yield route
        elif hasattr(route, "original_router"):
            yield from _flat(route.original_router.routes)
