"""What a model, a version or an environment may be called. The names end up in URLs, file names and metric labels."""

from __future__ import annotations

import re

from registry.errors import UsageError

PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RULE = (
    "it must begin with a letter or a digit, hold only letters, digits, '.', '_' and '-', "
    "have no '..' in it, and be at most 128 characters long"
)


def check_name(value: str, what: str = "name") -> str:
    """The value itself where it follows the rule. Raises UsageError that names the value and the rule."""
    if not PATTERN.fullmatch(value) or ".." in value:
        shown = value if len(value) <= 140 else f"{value[:140]}… ({len(value)} characters)"
        raise UsageError(f"{shown!r} is not a {what}: {RULE}")
    return value


def check_model_name(value: str) -> str:
    return check_name(value, "model name")


def check_version(value: str) -> str:
    return check_name(value, "version")
