"""API keys with a real server: made and revoked while it runs, known without the registry, and our own flows let in."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from registry import keys
from registry.actor import Who
from tasks import servers
from tests.e2e.harness import MODEL, Box, box, build, go, kill, wait_for

REQUIRED = {"MODELKEEP_SECURITY__REQUIRE_KEYS": "true"}


@pytest.fixture
def found(tmp_path: Path) -> Iterator[Box]:
    """A box whose server asks everybody for a key, its version 1 stable."""
    with box(tmp_path, extra=dict(REQUIRED)) as made:
        made.first("1")
        made.serve()
        yield made


def create(one: Box, name: str, role: str, *options: str) -> str:
    done = one.modelkeep("keys", "create", name, "--role", role, "--json", *options)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["key"])


def status(one: Box, key: str, path: str = "/api/v2/model-info", method: str = "GET") -> int:
    return httpx.request(method, f"{one.url}{path}", headers={"Authorization": f"Bearer {key}"}, timeout=10).status_code


def test_a_key_works_and_ends_while_the_server_runs_and_without_the_registry(found: Box) -> None:
    boot = httpx.get(f"{found.url}/health").json()["boot_id"]
    viewer = create(found, "viewer", "view")
    brief = create(found, "brief", "view", "--expires", "1w")
    admin = create(found, "admin", "operate")
    # The command had the server look: no poll is waited for.
    assert [status(found, key) for key in (viewer, brief, admin)] == [200, 200, 200]
    assert status(found, viewer, "/api/v2/update-models", "POST") == 403
    assert httpx.get(f"{found.url}/metrics", auth=("prometheus", viewer), timeout=10).status_code == 200
    done = found.modelkeep("keys", "revoke", "brief", "--reason", "it leaked", "--json")
    assert done.returncode == 0, done.stderr
    assert status(found, brief) == 401
    assert len(json.loads(done.stdout)["follow"]) == 1
    assert httpx.get(f"{found.url}/health").json()["boot_id"] == boot, "nothing was started again"

    # A key that another program writes is followed at the next poll.
    keys.revoke(found.database, "viewer", who=Who("test"))
    wait_for("the server to follow", lambda: status(found, viewer) == 401)

    # The registry is gone, and the server begins anew: it knows the keys from its disk.
    kept = found.state_folder / "keys.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    for text in (viewer, brief, admin):
        assert text.rpartition("_")[2] not in kept.read_text()
    found.database.dispose()
    hidden = found.home / "hidden.db"
    for suffix in ("", "-wal", "-shm"):
        path = found.home / f"registry.db{suffix}"
        if path.exists():
            path.rename(f"{hidden}{suffix}")
    kill(found.child_pid())
    wait_for("the next child", lambda: found.is_ready() and httpx.get(f"{found.url}/health").json()["boot_id"] != boot)
    assert [status(found, key) for key in (viewer, brief, admin)] == [401, 401, 200]
    answer = httpx.get(f"{found.url}/api/v2/model-info", headers={"X-API-Key": admin}, timeout=10).json()
    assert "is gone" in answer["registry"]


def test_our_own_flows_are_let_in_without_a_key_of_a_person(found: Box) -> None:
    """A server that refused them would be taken for none, and a candidate would go without a canary."""
    assert found.infer().status_code == 401
    (address,) = servers.alive(found.database, "production").values()
    assert address == found.url
    assert servers.model_info(address) is None, "not without showing anything"
    info = servers.model_info(address, access=servers.access(found.database))
    assert info is not None and info["registry"] == "ok"
    before = servers.access(found.database)
    done = found.modelkeep("keys", "revoke", "internal", "--reason", "a backup was lost")
    assert done.returncode == 0, done.stdout + done.stderr
    assert servers.model_info(address, access=before) is None
    assert list(servers.alive(found.database, "production").values()) == [found.url], "they agreed on another"
    found.add("2")
    promotion = found.promote("2", "--unvalidated")
    go(promotion)
    wait_for("a stage of its own", lambda: found.weighs("2") or promotion.poll() is not None)
    assert promotion.poll() is None, found.log("promote-2").read_text()
    _, key = keys.create(found.database, name="olga", role="operate", who=Who("test"))
    row = found.promotion("2")
    assert row is not None
    wait_for("the server to know the key", lambda: status(found, key) == 200)
    answer = httpx.post(
        f"{found.url}/api/v2/promotions/{row['id']}/stop",
        json={"reason": "enough seen"},
        headers={"X-API-Key": key},
        timeout=15,
    )
    assert answer.status_code == 200, answer.text
    promotion.wait(timeout=45)
    assert found.stable() == "1"
    events = json.loads(found.modelkeep("audit", "list", "--json", "--limit", "200").stdout)
    assert "key:olga" in {event["actor"] for event in events}
    assert key.rpartition("_")[2] not in json.dumps(events)


def test_a_command_acts_in_the_name_of_its_key(tmp_path: Path) -> None:
    with box(tmp_path) as found:
        (_, viewer), (_, admin) = (
            keys.create(found.database, name=role, role=role, who=Who("test")) for role in ("view", "operate")
        )
        path = build(found.folder / "v1.onnx")
        done = found.modelkeep("register", str(path), "--name", MODEL, MODELKEEP_API_KEY=viewer)
        assert done.returncode == 1
        assert "key view has role view" in done.stderr
        done = found.modelkeep("register", str(path), "--name", MODEL, MODELKEEP_API_KEY=admin)
        assert done.returncode == 0, done.stderr
        # Looking is what the first may.
        done = found.modelkeep("audit", "list", "--json", MODELKEEP_API_KEY=viewer)
        events = json.loads(done.stdout)
        assert next(e for e in events if e["action"] == "version.registered")["actor"] == "key:operate"
