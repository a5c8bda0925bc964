"""Servers that ask for keys: ours are never taken for gone because of one, and no key goes to an address that it is not for."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry import keys, replicas
from registry.database import Database
from registry.replicas import Report
from tasks import servers
from tests.unit.registry import kit

HERE, THERE = "http://127.0.0.1:8000", "http://127.0.0.1:8001"


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = kit.prepared(tmp_path)
    for number, address in enumerate((HERE, THERE)):
        replicas.report(
            made,
            Report(
                id=f"r{number}", environment="production", address=address, boot_id=f"b{number}", epoch="e",
                generation=1, serving={}, started_at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
            ),
        )  # fmt: skip
    return made


Answers = Callable[[str, str | None], tuple[int, Any]]


def answering(monkeypatch: pytest.MonkeyPatch, answers: Answers) -> list[tuple[str, str | None]]:
    """What was asked: (url, key). `answers` gives status and document."""
    asked: list[tuple[str, str | None]] = []

    def get(url: str, *, headers: dict[str, str] | None = None, timeout: float, verify: object) -> httpx.Response:
        key = (headers or {}).get("Authorization", "").removeprefix("Bearer ") or None
        asked.append((url, key))
        status, document = answers(url, key)
        return httpx.Response(status, json=document, request=httpx.Request("GET", url))

    monkeypatch.setattr(servers.httpx, "get", get)
    monkeypatch.setattr(servers.httpx, "post", get)
    return asked


def info(number: int, **more: Any) -> dict[str, Any]:
    return {"replica": f"r{number}", "epoch": "e", "generation": 1, "errors": {}, **more}


def test_each_address_is_shown_a_key_of_its_own(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.ensure_internal(database, actor="replica:r0")
    with database.read() as session:
        secret = keys.internal_secret(session)
    assert secret is not None
    asked = answering(monkeypatch, lambda url, _: (200, info(int(url.startswith(THERE)))))
    assert servers.alive(database, "production") == {"r0": HERE, "r1": THERE}
    shown = {url.rpartition("/api")[0]: key for url, key in asked}
    assert shown == {address: keys.internal_text(secret, address) for address in (HERE, THERE)}
    assert secret not in repr(servers.access(database))


def test_where_nobody_asks_for_keys_none_is_shown(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, lambda url, _: (200, info(int(url.startswith(THERE)))))
    assert servers.alive(database, "production") == {"r0": HERE, "r1": THERE}
    assert {key for _, key in asked} == {None}


def test_a_server_that_does_not_know_the_key_yet_and_needs_none_is_asked_without(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.ensure_internal(database, actor="replica:r0")
    answering(monkeypatch, lambda url, key: (401, {"error": "?"}) if key else (200, info(int(url.startswith(THERE)))))
    assert servers.alive(database, "production") == {"r0": HERE, "r1": THERE}


def test_a_server_that_refuses_us_lives_and_has_not_followed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(url: str, _key: str | None) -> tuple[int, Any]:
        if url.startswith(THERE):
            return 200, info(1)
        return (200, {"boot_id": "b0"}) if url.endswith("/health") else (401, {"error": "a key is needed"})

    answering(monkeypatch, answers)
    assert servers.alive(database, "production") == {"r0": HERE, "r1": THERE}
    found = servers.follow(database, "production", epoch="e", generation=1, timeout_seconds=0)
    assert (found.reached, found.behind) == (("r1",), ("r0",))


def test_whoever_else_answers_there_is_none_of_ours(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(
        monkeypatch,
        lambda url, _: (
            (200, {"boot_id": "another"}) if url.endswith("/health") else (401, {"error": "a key is needed"})
        ),
    )
    assert servers.alive(database, "production") == {}
