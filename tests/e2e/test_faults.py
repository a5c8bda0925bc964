"""Faults that a promotion must survive: paused processes, clocks that jump, rotten artifacts, a registry from yesterday."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import update

from registry import routes
from registry.schema import Environment
from tests.e2e.harness import POLICY, Box, box, go, stand_still, wait_for
from tests.unit.registry import kit

LONG = POLICY | {"stages": [0.25, 1.0], "dwell_seconds": 300.0, "deadline_seconds": 600.0}
"""The promotion waits in its first stage for as long as the test goes on."""

FENCED = 4


def in_canary(found: Box, version: str) -> subprocess.Popen[bytes]:
    runner = found.promote(version, "--unvalidated")
    go(runner)
    wait_for("a canary", lambda: (found.weighs(version) and found.follows()) or runner.poll() is not None)
    assert runner.poll() is None, found.log(f"promote-{version}").read_text()
    return runner


def state(found: Box, version: str) -> str:
    row = found.promotion(version)
    assert row is not None
    return str(row["state"])


def left_alone(found: Box, stable: str) -> None:
    """One stable version and nothing else, and a chain that holds."""
    route = found.route()
    assert route is not None
    assert (route.stable, route.candidate, route.promotion) == (stable, None, None)
    assert found.held_leases() == []
    assert found.audit_faults() == []


# --- processes that stand still


def test_a_flow_that_was_stopped_longer_than_its_lease_writes_nothing_when_it_wakes(tmp_path: Path) -> None:
    with box(tmp_path, policy=dict(LONG)) as found:
        found.first("1")
        found.add("2")
        found.serve()
        sleeper = in_canary(found, "2")
        stand_still(sleeper.pid, found.database)
        wait_for("the withdrawal", lambda: state(found, "2") == "withdrawn")
        events = kit.last_event(found.database)
        os.kill(sleeper.pid, signal.SIGCONT)
        assert sleeper.wait(timeout=30) == 1
        assert "ended withdrawn" in found.log("promote-2").read_text()
        assert kit.actions(found.database, events) == []
        left_alone(found, "1")


def test_of_two_flows_that_both_believe_to_hold_the_lease_one_writes(tmp_path: Path) -> None:
    with box(tmp_path, policy=dict(LONG)) as found:
        found.first("1")
        found.add("2")
        found.add("3")
        found.serve()
        sleeper = in_canary(found, "2")
        stand_still(sleeper.pid, found.database)
        wait_for("the withdrawal", lambda: state(found, "2") == "withdrawn")
        other = in_canary(found, "3")
        os.kill(sleeper.pid, signal.SIGCONT)
        assert sleeper.wait(timeout=30) == 1
        assert "ended withdrawn" in found.log("promote-2").read_text()
        assert found.weighs("3")
        assert state(found, "3") == "running"
        assert other.poll() is None
        assert len(found.held_leases()) == 1


def test_a_server_that_was_stopped_comes_back_to_what_is_wanted_now(tmp_path: Path) -> None:
    """The child is stopped in the canary, the candidate is withdrawn meanwhile; nobody gets it when the child wakes."""
    with box(tmp_path, policy=dict(LONG)) as found:
        found.first("1")
        found.add("2")
        found.serve()
        runner = in_canary(found, "2")
        child = found.child_pid()
        stand_still(child, found.database)
        runner.kill()
        runner.wait(timeout=10)
        # No server observes the lease now: the next run for the model does.
        third = found.promote("2", "--unvalidated")
        go(third)
        wait_for("the end of the first promotion", lambda: len(all_states(found, "2")) == 2)
        os.kill(child, signal.SIGCONT)
        assert "withdrawn" in all_states(found, "2")
        third.kill()
        third.wait(timeout=10)
        wait_for(
            "the withdrawal of the second",
            lambda: all_states(found, "2") in (["withdrawn"] * 2, ["promoted", "withdrawn"]),
        )
        wait_for("the server to follow", found.follows)
        assert found.info()["models"]["digits"]["candidate"] is None


def all_states(found: Box, version: str) -> list[str]:
    from registry import promotions

    with found.database.read() as session:
        rows = promotions.listed(session, model="digits", limit=1000)
    return sorted(row["state"] for row in rows if row["version"] == version)


# --- clocks

JUMPING_CLOCK = """
import datetime, os, pathlib
path = os.environ.get("MODELKEEP_TEST_CLOCK")
if path:
    import registry.clock as clock
    real = clock.now
    def jumping():
        try:
            seconds = float(pathlib.Path(path).read_text() or 0)
        except (OSError, ValueError):
            seconds = 0.0
        return real() + datetime.timedelta(seconds=seconds)
    clock.now = jumping
"""


@pytest.mark.parametrize("side", ["server", "flow"])
def test_a_clock_that_jumps_an_hour_either_way_on_one_side_changes_no_outcome(tmp_path: Path, side: str) -> None:
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(JUMPING_CLOCK)
    clock = tmp_path / "clock"
    clock.write_text("0")
    jumping = {"PYTHONPATH": os.pathsep.join([str(patch), str(Path.cwd())]), "MODELKEEP_TEST_CLOCK": str(clock)}
    policy = POLICY | {"stages": [0.5, 1.0], "dwell_seconds": 2.5, "soak_seconds": 2.5}
    with box(tmp_path, policy=policy) as found:
        found.first("1")
        found.add("2")
        found.serve(**(jumping if side == "server" else {}))
        traffic = found.start_traffic(rate=60)
        runner = found.start(
            "promote-2", "tests.e2e.runner", "digits", "2", "--unvalidated", **(jumping if side == "flow" else {})
        )
        go(runner)
        wait_for("a canary", lambda: found.weighs("2"))
        clock.write_text("3600")
        wait_for("all of the traffic", lambda: found.stable() == "2" or runner.poll() is not None)
        clock.write_text("-3600")
        assert runner.wait(timeout=60) == 0, found.log("promote-2").read_text()
        assert state(found, "2") == "promoted"
        requests = traffic.stop()
        assert [request.error for request in requests if request.error] == []
        assert found.check(requests).wrong == 0
        left_alone(found, "2")


# --- artifacts


def flip_a_byte(found: Box, version: str) -> None:
    from registry import versions

    with found.database.read() as session:
        digest = versions.get(session, "digits", version).files[0]["digest"]
    path = next(path for path in found.store.folder.rglob(digest))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def test_a_corrupted_artifact_is_found_at_load_and_the_stable_version_keeps_serving(tmp_path: Path) -> None:
    with box(tmp_path, policy=dict(LONG)) as found:
        found.first("1")
        found.add("2")
        found.serve()
        flip_a_byte(found, "2")
        runner = found.promote("2", "--unvalidated")
        go(runner)
        assert runner.wait(timeout=60) == 1, found.log("promote-2").read_text()
        assert state(found, "2") == "withdrawn"
        assert "register the file again" in found.story("2")[-1]["detail"]
        wait_for("the server to follow", found.follows)
        assert found.infer().json()["model_version"] == "1"
        assert "version.unloadable" in kit.actions(found.database)
        left_alone(found, "1")


def test_an_artifact_store_that_cannot_be_reached_fails_the_promotion_and_nothing_else(tmp_path: Path) -> None:
    with box(tmp_path, policy=dict(LONG)) as found:
        found.first("1")
        found.add("2")
        found.serve()
        away = found.home / "artifacts-away"
        found.store.folder.rename(away)
        runner = found.promote("2")
        go(runner)
        assert runner.wait(timeout=60) == 1, found.log("promote-2").read_text()
        assert state(found, "2") == "failed"
        assert "artifact" in found.story("2")[-1]["detail"]
        assert found.infer().json()["model_version"] == "1"
        left_alone(found, "1")
        shutil.move(away, found.store.folder)


# --- the registry


def test_a_registry_restored_from_yesterday_is_followed_and_old_tokens_stay_dead(tmp_path: Path) -> None:
    """Restored by SQLite's backup API into the live file, with a new epoch, as a recovery does it."""
    with box(tmp_path, policy=dict(LONG)) as found:
        found.first("1")
        found.add("2")
        found.add("3")
        found.serve()
        yesterday = tmp_path / "yesterday.db"
        copy(found.home / "registry.db", yesterday)
        found.settle_by_hand("2")
        wait_for("version 2", lambda: found.follows() and found.infer().json()["model_version"] == "2")
        runner = in_canary(found, "3")
        copy(yesterday, found.home / "registry.db")
        with found.database.write(actor="test") as transaction:
            epoch = routes.new_epoch()
            transaction.session.execute(update(Environment).values(epoch=epoch))
            transaction.record("registry.restored", "registry", after={"epoch": epoch})
        assert runner.wait(timeout=60) == FENCED, found.log("promote-3").read_text()
        wait_for("the server to follow", found.follows)
        assert found.infer().json()["model_version"] == "1"
        assert found.info()["models"]["digits"]["candidate"] is None
        assert found.stable() == "1"
        assert found.promotion("3") is None


def copy(source: Path, target: Path) -> None:
    with sqlite3.connect(source) as one, sqlite3.connect(target) as two:
        one.backup(two)


# --- a server that does not follow


def test_a_server_that_never_reaches_the_generation_holds_the_promotion_and_is_named(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """A replica that answers and says for ever that it is at an older generation."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from registry import clock, leases, replicas
    from registry.policy import PromotionPolicy
    from registry.promotions import begin
    from tasks import lease, promotion
    from tasks.promotion import Ended, Promoting

    class Stuck(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"replica": "stuck", "epoch": "", "generation": 0, "errors": {}, "models": {}}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", free_port()), Stuck)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with box(tmp_path, policy=dict(POLICY)) as found:
        found.first("1")
        found.add("2")
        address = f"http://127.0.0.1:{server.server_port}"
        replicas.report(
            found.database,
            replicas.Report(
                id="stuck", environment="production", address=address, boot_id="b", epoch="", generation=0,
                serving={}, started_at=clock.now(),
            ),
        )  # fmt: skip
        operation = begin(
            found.database, environment="production", model="digits", version="2",
            policy=PromotionPolicy(**found.policy), strategy="canary", ttl_seconds=30, flow_run_id=None,
        )  # fmt: skip
        seconds = iter(range(0, 100_000, 20))  # a clock on which the patience is soon over
        work = Promoting(
            found.database, found.store, found.home / "cache", operation, lease.Keeper(operation.held),
            sleep=lambda _: None, monotonic=lambda: float(next(seconds)),
        )  # fmt: skip
        with pytest.raises(Ended) as ended:
            promotion.baseline(work)
        server.shutdown()
        server.server_close()
        assert ended.value.outcome == "held"
        assert "stuck" in ended.value.reason
        with found.database.read() as session:
            assert leases.beats(session, "production") == []
        left_alone(found, "1")
