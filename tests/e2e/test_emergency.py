"""An emergency rollback where little is left: no Prefect, no database, no artifact store. It holds, and goes home when they return."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from registry import keys
from registry.actor import Who
from registry.schema import AuditEvent
from tests.e2e.harness import MODEL, Box, box, free_port, images, wait_for
from tests.registry_servers import Server, starter


@pytest.fixture
def mariadb(program: Callable[[str], Path]) -> Iterator[Server]:
    server = starter("mariadb", program)
    yield server
    server.close()


def info(url: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer = httpx.get(f"{url}/api/v2/model-info", headers=headers, timeout=10)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def version(url: str, headers: dict[str, str] | None = None) -> str | None:
    """The version that a server answers by, None where it does not answer."""
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": images()[0].ravel().tolist()}
    try:
        answer = httpx.post(f"{url}/v2/models/{MODEL}/infer", json={"inputs": [tensor]}, headers=headers, timeout=10)
    except httpx.HTTPError:
        return None
    return str(answer.json()["model_version"]) if answer.status_code == 200 else None


def events(one: Box, *actions: str) -> list[AuditEvent]:
    with one.database.read() as session:
        return list(session.scalars(select(AuditEvent).where(AuditEvent.action.in_(actions)).order_by(AuditEvent.seq)))


def test_with_prefect_the_database_and_the_store_gone_every_server_goes_back_and_the_record_is_made_up_once(
    tmp_path: Path, mariadb: Server
) -> None:
    with box(tmp_path, extra={"MODELKEEP_DATABASE_URL": mariadb.create()}) as one:
        one.first("1")
        one.add("2")
        one.settle_by_hand("2")
        one.serve()
        port = free_port()
        second = f"http://127.0.0.1:{port}"
        one.start("second", "modelkeep", "serve", MODELKEEP_SERVER__PORT=str(port))
        urls = [one.url, second]
        wait_for("both servers to serve version 2", lambda: [version(url) for url in urls] == ["2", "2"])
        for url in urls:
            wait_for("the earlier version on the disk", lambda u=url: f"{MODEL}/1" in info(u)["kept"])
        one.database.dispose()
        mariadb.kill()
        (one.home / "artifacts").rename(one.home / "away")

        began = time.monotonic()
        done = one.modelkeep("rollback", MODEL, "--strategy", "emergency", "--reason", "answers are off", "--json")
        took = time.monotonic() - began
        assert mariadb.process is not None and mariadb.process.poll() is not None, "the database was down all the time"
        assert done.returncode == 0, done.stderr + done.stdout
        said = json.loads(done.stdout)
        assert (said["to"], said["behind"], said["notes"]) == ("1", {}, {})
        assert sorted(said["followed"]) == sorted(said["held"]) == sorted(urls)
        assert "does not answer" in said["registry"]
        print(
            f"seconds to the first answer by the old version: {said['seconds']}; the whole command, its start included: {took:.2f}"
        )
        assert [version(url) for url in urls] == ["1", "1"]

        before = one.child_pid()
        os.kill(before, signal.SIGKILL)
        wait_for("the next child", lambda: one.child_pid() != before and version(one.url) is not None)
        assert version(one.url) == "1"
        (hold,) = info(one.url)["holds"]
        assert (hold["model"], hold["to"], hold["before"], hold["reason"].split(" (")[0]) == (
            MODEL,
            "1",
            "2",
            "answers are off",
        )

        (one.home / "away").rename(one.home / "artifacts")
        mariadb.start()
        for url in urls:
            wait_for("the hold to go home", lambda u=url: info(u)["registry"] == "ok" and not info(u)["holds"])
        assert one.stable() == "1"
        wait_for("the servers to follow", one.follows)
        assert [version(url) for url in urls] == ["1", "1"]
        assert len(events(one, "model.rolled-back")) == 1
        assert sorted(event.action for event in events(one, "hold.written-back", "hold.met", "hold.superseded")) == [
            "hold.met", "hold.written-back",
        ]  # fmt: skip
        assert one.audit_faults() == []


def test_a_route_that_has_changed_meanwhile_wins_over_the_hold_and_both_are_on_record(
    tmp_path: Path, mariadb: Server
) -> None:
    with box(tmp_path, extra={"MODELKEEP_DATABASE_URL": mariadb.create()}) as one:
        one.first("1")
        for name in ("2", "3"):
            one.add(name)
            one.settle_by_hand(name)
        one.serve()
        wait_for("the earlier versions on the disk", lambda: {f"{MODEL}/1", f"{MODEL}/2"} <= set(info(one.url)["kept"]))
        # The server is stopped while the registry is changed, so that it sees only the end of it.
        one.database.dispose()
        mariadb.kill()
        done = one.modelkeep("rollback", MODEL, "--to", "1", "--strategy", "emergency")
        assert done.returncode == 0, done.stderr
        assert version(one.url) == "1"
        child = one.child_pid()
        os.kill(child, signal.SIGSTOP)
        mariadb.start()
        from registry import rollbacks

        rollbacks.roll_back(
            one.database, environment="production", model=MODEL, to="2", reason="by somebody else", ttl_seconds=5,
            emergency=True,
        )  # fmt: skip
        os.kill(child, signal.SIGCONT)
        wait_for("the registry to win", lambda: version(one.url) == "2")
        wait_for("the end of the hold", lambda: not info(one.url)["holds"])
        (event,) = events(one, "hold.superseded")
        recorded = json.loads(event.text)
        assert (recorded["before"]["to"], recorded["after"]["stable"]) == ("1", "2")
        assert one.stable() == "2" and one.audit_faults() == []


def test_with_keys_a_server_knows_who_asks_by_its_own_disk_and_a_hold_is_released_by_hand(
    tmp_path: Path, mariadb: Server
) -> None:
    extra = {"MODELKEEP_DATABASE_URL": mariadb.create(), "MODELKEEP_SECURITY__REQUIRE_KEYS": "true"}
    with box(tmp_path, extra=extra) as one:
        one.first("1")
        one.add("2")
        one.settle_by_hand("2")
        one.add("3")
        _, operator = keys.create(one.database, name="ops", role="operate", who=Who("test"))
        shown = {"Authorization": f"Bearer {operator}"}
        one.serve()
        wait_for("the earlier version on the disk", lambda: f"{MODEL}/1" in info(one.url, shown)["kept"])
        one.database.dispose()
        mariadb.kill()
        anonymous = one.modelkeep("rollback", MODEL, "--strategy", "emergency")
        assert anonymous.returncode == 1 and "refused (401)" in anonymous.stdout
        emergency = ("rollback", MODEL, "--strategy", "emergency")
        refused = one.modelkeep(*emergency, "--to", "3", MODELKEEP_API_KEY=operator)
        assert refused.returncode == 1 and "keeps no digits 3" in refused.stdout
        assert version(one.url, shown) == "2"
        done = one.modelkeep(*emergency, MODELKEEP_API_KEY=operator)
        assert done.returncode == 0, done.stdout + done.stderr
        assert version(one.url, shown) == "1"
        assert info(one.url, shown)["holds"][0]["actor"] == "key:ops"
        released = one.modelkeep("rollback", MODEL, "--release", "--json", MODELKEEP_API_KEY=operator)
        assert released.returncode == 0 and json.loads(released.stdout)["servers"] == {one.url: "released"}
        wait_for("the route to be followed again", lambda: version(one.url, shown) == "2")
        assert one.modelkeep("rollback", MODEL, "--release", MODELKEEP_API_KEY=operator).returncode == 1
