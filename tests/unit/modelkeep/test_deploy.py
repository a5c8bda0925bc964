"""Writing the deployments: a Prefect that is busy is an error that is tried again."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import httpx
import pytest

from modelkeep import deploy, prefect_env
from registry.errors import UnavailableError
from registry.settings import load_settings
from tasks import prefect_api


def busy(*_: Any, **__: Any) -> httpx.Response:
    return httpx.Response(503, request=httpx.Request("POST", "http://127.0.0.1:4200/api/deployments/filter"))


@pytest.mark.parametrize("at", ["its blocks", "its deployments"])
def test_a_prefect_that_is_busy_is_unavailable_whatever_it_is_asked(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELKEEP_HOME", str(tmp_path))
    monkeypatch.setattr(prefect_env, "environment", lambda *_, **__: {})
    monkeypatch.setattr(deploy, "_prefect", lambda *_: "")
    blocks = types.ModuleType("blocks.connections")
    blocks.save_all = lambda _: busy().raise_for_status() if at == "its blocks" else []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "blocks.connections", blocks)
    monkeypatch.setattr(httpx, "request", busy)
    monkeypatch.setattr(prefect_api.time, "sleep", lambda _: None)
    with pytest.raises(UnavailableError, match="503"):
        deploy.deploy_all(load_settings())


def test_a_prefect_that_is_busy_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [busy(), busy(), httpx.Response(201, json={"id": "one"}, request=busy().request)]
    monkeypatch.setattr(httpx, "request", lambda *_, **__: answers.pop(0))
    monkeypatch.setattr(prefect_api.time, "sleep", lambda _: None)
    assert prefect_api.post("http://127.0.0.1:4200/api", "/deployments/x/create_flow_run", {}) == {"id": "one"}
    assert answers == []
