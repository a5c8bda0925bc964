"""Prefect's settings for a process that is about to import it: its API where that answers, else a temporary server of its own."""

from __future__ import annotations

import os

import httpx

from registry.settings import Settings


def prefect_answers(settings: Settings) -> bool:
    try:
        return httpx.get(f"{settings.prefect.api_url}/health", timeout=1.0).status_code == 200
    except httpx.HTTPError:
        return False


def environment(settings: Settings, *, api: bool) -> dict[str, str]:
    """Variables for a Prefect process. What the person has set already stays."""
    values = {
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_LEVEL": "INFO",
    }
    if api:
        values["PREFECT_API_URL"] = settings.prefect.api_url
    return {name: value for name, value in values.items() if name not in os.environ}


def use(settings: Settings) -> bool:
    """Set up this process, before the first import of prefect. Returns whether a Prefect server answers."""
    answers = "PREFECT_API_URL" in os.environ or prefect_answers(settings)
    os.environ.update(environment(settings, api=answers))
    return answers
