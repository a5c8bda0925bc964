"""The watch that outlives its flow, and a person's word on the command line: a real server, its watchman, promotions that are killed."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from registry.schema import Lease
from tests.e2e.harness import HEAVY, IMAGES, POLICY, Box, box, go, kill, wait_for

LIGHT, DARK = 0, IMAGES - HEAVY
"""Images that every version answers, and that a broken version fails on."""


class Asking:
    """One client, one request after the other, for the image that `image` names."""

    def __init__(self, found: Box) -> None:
        self.found, self.image = found, LIGHT
        self.statuses: list[int] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(15)

    def _run(self) -> None:
        while not self._stopping.wait(0.02):
            with contextlib.suppress(httpx.HTTPError):
                self.statuses.append(self.found.infer(image=self.image).status_code)


@contextlib.contextmanager
def asked(found: Box) -> Iterator[Asking]:
    asking = Asking(found)
    try:
        yield asking
    finally:
        asking.stop()


def holder(found: Box) -> str:
    with found.database.read() as session:
        rows = session.query(Lease).all()
    return next((row.holder for row in rows if row.state != "released"), "")


def test_a_version_that_turns_bad_after_its_flow_was_killed_is_rolled_back_by_the_watchman(tmp_path: Path) -> None:
    with box(tmp_path, policy={**POLICY, "soak_seconds": 600.0, "dwell_seconds": 0.3}) as found:
        found.first("1")
        found.add("2", broken=True)
        found.serve()
        runner = found.promote("2", "--unvalidated")
        with asked(found) as asking:
            go(runner)
            wait_for("the soak", lambda: (found.promotion("2") or {}).get("state") == "soaking")
            kill(runner.pid)
            wait_for("the watchman to carry it on", lambda: holder(found).startswith("watchman:"))
            assert found.stable() == "2"
            asking.image = DARK
            row = wait_for("its end", lambda: (r := found.promotion("2")) and r["state"] == "withdrawn" and r)
            wait_for("the server to follow", found.follows)
        assert (found.stable(), found.held_leases()) == ("1", [])
        assert found.infer(image=DARK).json()["model_version"] == "1"
        steps = [step["step"] for step in found.story("2")]
        assert steps[-2:] == ["orphaned", "withdrawn"]
        assert row["watch_seconds"] > 0 and row["swap_seconds"] > 0
        assert found.audit_faults() == []


def test_a_person_pauses_resumes_speeds_up_and_stops_a_promotion_on_the_command_line(tmp_path: Path) -> None:
    # So many requests that no stage is passed by its figures.
    with box(tmp_path, policy={**POLICY, "minimum_requests": 1_000_000, "soak_seconds": 600.0}) as found:
        found.first("1")
        found.add("2")
        found.serve()
        runner = found.promote("2", "--unvalidated")

        def tell(command: str, *options: str) -> dict[str, Any]:
            done = found.modelkeep("promotions", command, identity, *options, "--json")
            assert done.returncode == 0, done.stderr
            return dict(json.loads(done.stdout))

        def weight() -> float:
            route = found.route()
            assert route is not None
            return route.weight

        with asked(found):
            go(runner)
            wait_for("the first stage", lambda: found.weighs("2"))
            identity = (found.promotion("2") or {})["id"]
            assert tell("pause", "--reason", "an incident elsewhere")["paused"] is True
            refused = found.modelkeep("promotions", "advance", identity)
            assert refused.returncode == 1 and "resume it first" in refused.stderr
            shown = tell("show")
            assert shown["paused"]["reason"] == "an incident elsewhere" and "promotions resume" in shown["waits_for"]
            assert tell("resume")["paused"] is False
            for share in (0.25, 0.5, 1.0):
                wait_for(f"{share:.0%}", lambda share=share: weight() == share)
                tell("advance")
            wait_for("the soak", lambda: (found.promotion("2") or {}).get("state") == "soaking")
            told = tell("stop", "--reason", "seen enough")
            assert told["state"] == "promoted" and "modelkeep rollback digits" in told["message"]
            assert runner.wait(timeout=30) == 0, found.log("promote-2").read_text()
        assert found.stable() == "2"
        again = found.modelkeep("promotions", "stop", identity)
        assert again.returncode == 1 and "has ended (promoted)" in again.stderr
        listed = json.loads(found.modelkeep("promotions", "list", "--state", "active", "--json").stdout)
        assert listed == []
        taken = [row for row in tell("show")["commands"] if row["taken_at"]]
        assert [row["command"] for row in taken] == ["pause", "resume", "advance", "advance", "advance", "stop"]
        assert found.audit_faults() == []
