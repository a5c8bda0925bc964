"""A model that never comes to the end of its load, in a real server: a promotion to it fails, the others serve, the next start works."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.e2e.harness import box, go, wait_for
from tests.e2e.test_hangs import OTHER, SLOW, asking, status
from tests.unit.serving.stuck import endless_load, endless_script_load

ENDED = ("withdrawn", "failed", "rejected")
LIMITS = {"MODELKEEP_HEALTH__LOAD_HANG_SECONDS": "5"}


def test_a_candidate_that_hangs_while_it_loads_fails_its_promotion_and_a_start_with_one_serves_the_others(
    tmp_path: Path,
) -> None:
    with box(tmp_path, policy=dict(SLOW)) as found:
        found.first("1")
        found.register("2", endless_load(tmp_path / "endless.onnx"))
        found.serve(**LIMITS)
        child = found.child_pid()
        go(found.promote("2", "--unvalidated"))

        def ended() -> bool:
            row = found.promotion("2")
            return row is not None and row["state"] in ENDED

        wait_for("the end of the promotion", ended)
        assert "hangs while it loads: loading has taken" in found.story("2")[-1]["detail"]
        assert found.stable() == "1" and found.held_leases() == []
        wait_for("the server to follow", found.follows)
        assert status(found) == 200 and found.child_pid() == child
        wait_for("what is left behind to be named", lambda: found.info()["watchdog"]["stuck"] == ["digits/2"])
        # A stop does not wait for it, and a start with a model that does not load serves the others.
        found.stop()
        found.register("1", tmp_path / "endless.onnx", model=OTHER)
        found.settle_by_hand("1", model=OTHER)
        found.serve(**LIMITS)
        wait_for("an answer", lambda: status(found) == 200)

        def told() -> bool:
            models = httpx.get(f"{found.url}/api/v2/model-health", timeout=30).json()["models"]
            return any("hangs while it loads" in str(m.get("reasons")) for m in models if m["model"] == OTHER)

        wait_for("the model to be told of", told)
        answer = found.infer(model=OTHER)
        assert answer.status_code == 503 and "hangs while it loads" in answer.json()["error"]
        assert status(found) == 200
        assert found.audit_faults() == []


@pytest.mark.long
def test_a_candidate_whose_load_holds_the_whole_process_is_withdrawn_with_the_second_kill(tmp_path: Path) -> None:
    with box(tmp_path, policy=dict(SLOW)) as found:
        found.first("1")
        found.register("2", endless_script_load(tmp_path / "v2"))
        found.serve(MODELKEEP_HEALTH__LOAD_HANG_SECONDS="6")
        with asking(found, "digits") as came:
            go(found.promote("2", "--unvalidated"))

            def ended() -> bool:
                row = found.promotion("2")
                return row is not None and row["state"] in ENDED

            wait_for("the end of the promotion", ended, seconds=300)
            wait_for("an answer", lambda: status(found) == 200)
        assert "killed, to be started again" in found.log("server").read_text(), found.story("2")
        assert found.stable() == "1" and 200 in came
        assert found.audit_faults() == []
