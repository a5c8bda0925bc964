"""Prefect's API by plain HTTP, so that the command line and the watch loop need not import Prefect."""

from __future__ import annotations

import time
from typing import Any

import httpx

from registry.errors import UnavailableError

TIMEOUT_SECONDS = 10.0
_BUSY_SECONDS = (0.2, 0.5, 1.0, 2.0)


def post(api_url: str, path: str, body: dict[str, Any]) -> Any:
    """The document that a POST is answered with, None for an empty one. Raises UnavailableError, also for what it knows nothing of."""
    answer = ask(api_url, "POST", path, body)
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise UnavailableError(f"Prefect at {api_url} knows nothing of {path}")
    return answer.json() if answer.content else None


def ask(api_url: str, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    """An answer of Prefect's API; 404 is one too. Raises UnavailableError.

    A busy server says 503 (its SQLite is locked) and is asked again, as Prefect's own client does.
    """
    try:
        for pause_seconds in (*_BUSY_SECONDS, None):
            answer = httpx.request(method, f"{api_url}{path}", json=body, timeout=TIMEOUT_SECONDS)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or pause_seconds is None:
                break
            time.sleep(pause_seconds)
        return answer if answer.status_code == httpx.codes.NOT_FOUND else answer.raise_for_status()
    except httpx.HTTPError as error:
        raise UnavailableError(f"Prefect at {api_url} does not answer: {error}") from error
