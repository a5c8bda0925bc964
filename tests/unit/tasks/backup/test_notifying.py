"""Somebody is told that a drill failed, or the log says that nobody was."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import httpx
import pytest

from registry.errors import NotFoundError, SettingsError
from registry.settings import Settings, build_settings
from tasks.backup import drill, notifying


def settings(folder: Path, url: str | None = "https://chat.example.com/hooks/secret-part") -> Settings:
    environ = {"MODELKEEP_HOME": str(folder), "MODELKEEP_PROFILE": "cpu"}
    if url is not None:
        environ["MODELKEEP_BACKUP__NOTIFY_URL"] = url
    return build_settings(None, None, environ=environ, cwd=folder)


def test_the_url_is_sent_what_failed_where_and_when(tmp_path: Path) -> None:
    seen: list[httpx.Request] = []

    def take(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(204)

    assert notifying.notify(settings(tmp_path), "the drill failed", "models", transport=httpx.MockTransport(take))
    document = json.loads(seen[0].content)
    assert len(seen) == 1 and document["severity"] == "critical" and document["environment"] == "production"
    assert document["text"].startswith("the drill failed on ") and document["text"].endswith(": models")


def test_a_url_that_does_not_answer_is_tried_again_and_then_the_log_says_so_without_the_url(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        if len(pauses) < 1:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(500)

    with caplog.at_level(logging.ERROR):
        told = notifying.notify(
            settings(tmp_path), "the drill failed", "models", sleep=pauses.append, transport=httpx.MockTransport(refuse)
        )
    assert not told and len(pauses) == notifying.TRIES - 1
    assert "status 500" in caplog.text and "secret-part" not in caplog.text


def test_without_a_url_the_log_says_that_nobody_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert not notifying.notify(settings(tmp_path, None), "the drill failed", "models")
    assert "backup.notify_url is not set" in caplog.text


def test_a_url_that_is_none_is_an_error_of_the_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="notify_url"):
        settings(tmp_path, "chat.example.com")


def test_a_drill_that_cannot_begin_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(notifying, "notify", lambda settings, what, text: told.append((what, text)))
    with pytest.raises(NotFoundError):
        drill.held(settings(tmp_path))
    assert told and "no backup to hold a drill with" in told[0][1]
