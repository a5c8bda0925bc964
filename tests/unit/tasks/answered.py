"""Servers that are asked over httpx, answered by a function of the test."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import httpx
import pytest


def answered_by(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, answer: Callable[[httpx.Request], httpx.Response]
) -> None:
    """What `module` asks by httpx comes to `answer`. How a server's certificate is checked is no part of a request, and left out."""
    client = httpx.Client(transport=httpx.MockTransport(answer))

    def without_verify(call: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*arguments: Any, verify: object, **more: Any) -> Any:
            return call(*arguments, **more)

        return asked

    for name in ("get", "post", "stream"):
        monkeypatch.setattr(module.httpx, name, without_verify(getattr(client, name)))
