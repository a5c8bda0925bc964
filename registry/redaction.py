"""Texts without the secrets in them: for what is printed, logged or put on record."""

from __future__ import annotations

import re

HIDDEN = "***"


def redact(text: str) -> str:
    """The text without the passwords of the URLs in it, and without the secrets of API keys."""
    text = re.sub(r"\b(mk_[0-9a-f]{12})_[0-9A-Za-z]+", rf"\1_{HIDDEN}", text)
    text = re.sub(r"://([^:/?#@\s]*):[^\s]*@", rf"://\1:{HIDDEN}@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd|secret|token|api_?key|signature)=)[^&\s]*", rf"\1{HIDDEN}", text)
