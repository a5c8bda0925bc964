"""Somebody is told: a JSON document to the URL of the settings, when what nobody looks at every day has failed."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable

import httpx

from registry import clock
from registry.settings import Settings

log = logging.getLogger("modelkeep.backup")

TRIES = 3
PAUSE_SECONDS = 5.0
ANSWER_SECONDS = 10.0


def notify(
    settings: Settings,
    what: str,
    text: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
    transport: httpx.BaseTransport | None = None,
) -> bool:
    """Send {"source", "what", "severity", "text", "host", "environment", "at"}; True where it was taken.

    Nothing is raised: what is told of has failed already. Without a URL in the settings it is only logged.
    """
    url = settings.backup.notify_url
    if url is None:
        log.error("%s: %s (nobody is told: backup.notify_url is not set)", what, text)
        return False
    document = {
        "source": "modelkeep", "what": what, "severity": "critical", "text": f"{what} on {platform.node()}: {text}",
        "host": platform.node(), "environment": settings.environment, "at": clock.text(clock.now()),
    }  # fmt: skip
    why = ""
    with httpx.Client(timeout=ANSWER_SECONDS, transport=transport, follow_redirects=False) as client:
        for number in range(TRIES):
            if number:
                sleep(PAUSE_SECONDS)
            try:
                answer = client.post(url, json=document)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                why = type(error).__name__
                continue
            if answer.is_success:
                return True
            why = f"status {answer.status_code}"
    log.error("%s: %s (backup.notify_url could not be told: %s)", what, text, why)
    return False
