"""The registry on a real database server that is killed, or that stands still, in the middle of a promotion under traffic."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import POLICY, Box, box, go, wait_for
from tests.registry_servers import Server, starter
from tests.unit.registry import kit

SLOW = POLICY | {"stages": [0.5, 1.0], "dwell_seconds": 3.0, "soak_seconds": 4.0}


@pytest.fixture(scope="module")
def mariadb(program: Callable[[str], Path]) -> Iterator[Server]:
    server = starter("mariadb", program)
    yield server
    server.close()


def away(found: Box, seconds: float, runner: subprocess.Popen[bytes]) -> None:
    """Meanwhile the server answers, and the promotion waits. The time is what the test is about, so it is slept."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert found.infer().status_code == 200
        assert runner.poll() is None, found.log("promote-2").read_text()
        time.sleep(0.2)


def state(found: Box, version: str) -> str:
    row = found.promotion(version)
    assert row is not None
    return str(row["state"])


def promoted_through(folder: Path, server: Server, canary: Callable[[Box, subprocess.Popen[bytes]], None],
                     soak: Callable[[Box, subprocess.Popen[bytes]], None]) -> Box:  # fmt: skip
    """A promotion under traffic with something done to the database in its canary and in its soak: it ends promoted, all is whole."""
    with box(folder, policy=dict(SLOW), extra={"MODELKEEP_DATABASE_URL": server.create()}) as found:
        found.first("1")
        found.add("2")
        found.serve()
        traffic = found.start_traffic(rate=60)
        runner = found.promote("2", "--unvalidated")
        go(runner)
        wait_for("a canary", lambda: (found.weighs("2") and found.follows()) or runner.poll() is not None)
        canary(found, runner)
        wait_for("the soak", lambda: runner.poll() is not None or state(found, "2") == "soaking")
        assert runner.poll() is None, found.log("promote-2").read_text()
        soak(found, runner)
        assert runner.wait(timeout=90) == 0, found.log("promote-2").read_text()
        said = found.log("promote-2").read_text()
        assert state(found, "2") == "promoted", said
        assert 1 <= said.count("it is waited for") == said.count("answers again") <= 2, said
        requests = traffic.stop()
        assert [request.error for request in requests if request.error] == []
        assert found.check(requests).wrong == 0
        wait_for("the server to follow", found.follows)
        route = found.route()
        assert route is not None
        assert (route.stable, route.candidate, route.promotion) == ("2", None, None)
        assert (found.held_leases(), found.audit_faults()) == ([], [])
        assert "promotion.withdrawn" not in kit.actions(found.database)
        changes = [step["title"] for step in found.story("2") if not step["title"].endswith(" passed")]
        assert len(changes) == len(set(changes)), "each change is on record once"
    return found


def test_a_database_that_is_killed_or_stands_still_for_ten_seconds_holds_up_the_promotion_and_nobody_else(
    tmp_path: Path, mariadb: Server
) -> None:
    """Five times the time to live of the lease: who watches it counts only time in which it could look."""

    def killed(found: Box, runner: subprocess.Popen[bytes]) -> None:
        mariadb.kill()
        away(found, 10, runner)
        mariadb.start()

    def stopped(found: Box, runner: subprocess.Popen[bytes]) -> None:
        assert mariadb.process is not None
        os.kill(mariadb.process.pid, signal.SIGSTOP)
        away(found, 10, runner)
        os.kill(mariadb.process.pid, signal.SIGCONT)

    promoted_through(tmp_path, mariadb, killed, stopped)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_database_that_is_gone_for_five_minutes_holds_up_the_promotion_and_nobody_else(
    tmp_path: Path, mariadb: Server
) -> None:
    def gone(found: Box, runner: subprocess.Popen[bytes]) -> None:
        mariadb.kill()
        away(found, 300, runner)
        mariadb.start()

    promoted_through(tmp_path, mariadb, gone, gone)
