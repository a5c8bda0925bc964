"""A version whose computation never ends, in a real server: it is found, others serve, and it gives way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.e2e.harness import HEAVY, IMAGES, LIMIT_INK, POLICY, Box, box, go, wait_for
from tests.unit.registry import kit
from tests.unit.serving.stuck import endless_script

HEAVY_IMAGE, LIGHT_IMAGE = IMAGES - HEAVY, 0
SLOW = POLICY | {"stages": [0.5, 1.0], "dwell_seconds": 300.0, "deadline_seconds": 600.0, "soak_seconds": 300.0}
LIMITS = {"MODELKEEP_SERVER__REQUEST_TIMEOUT_SECONDS": "4", "MODELKEEP_HEALTH__HANG_SECONDS": "4"}
OTHER = "other"


def status(found: Box, image: int = LIGHT_IMAGE) -> int | None:
    """None where the connection broke."""
    try:
        return found.infer(image=image).status_code
    except httpx.HTTPError:
        return None


@contextmanager
def asking(found: Box, model: str) -> Iterator[list[int | str]]:
    """Somebody who asks for another model all the while; what came of it."""
    came: list[int | str] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.02):
            try:
                came.append(found.infer(model=model, timeout=60).status_code)
            except httpx.HTTPError as error:
                came.append(repr(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield came
    finally:
        over.set()
        thread.join(90)


def test_a_candidate_that_hangs_is_withdrawn_and_the_stable_version_answers(tmp_path: Path) -> None:
    with box(tmp_path, policy=dict(SLOW)) as found:
        found.first("1")
        found.register("2", endless_script(tmp_path / "v2", limit=LIMIT_INK))
        found.serve(**LIMITS)
        child = found.child_pid()
        go(found.promote("2", "--unvalidated"))
        wait_for("a canary", lambda: found.weighs("2") and found.follows())
        wait_for("its load", lambda: any(row["version"] == "2" for row in found.info()["loaded"]))

        def withdrawn() -> bool:
            status(found, HEAVY_IMAGE)
            row = found.promotion("2")
            return row is not None and row["state"] == "withdrawn"

        wait_for("the withdrawal", withdrawn)
        assert "hangs: one computation has taken" in found.story("2")[-1]["detail"]
        wait_for("the server to follow", found.follows)
        wait_for("answers", lambda: {status(found, image) for image in (LIGHT_IMAGE, HEAVY_IMAGE)} == {200})
        assert found.stable() == "1" and found.held_leases() == []
        assert "version.unfit" in kit.actions(found.database)
        wait_for("the worker to be left behind", lambda: found.info()["watchdog"]["stuck"] == ["digits/2"])
        assert found.child_pid() == child, "one stuck worker is lived with"
        assert found.audit_faults() == []


def test_the_only_version_of_a_model_that_hangs_comes_back_and_other_models_never_notice(tmp_path: Path) -> None:
    with box(tmp_path) as found:
        found.register("1", endless_script(tmp_path / "v1", limit=LIMIT_INK))
        found.settle_by_hand("1")
        found.register("7", found.folder.joinpath("v1", "model.pt"), model=OTHER)
        found.settle_by_hand("7", model=OTHER)
        found.serve(**LIMITS)
        child = found.child_pid()
        with asking(found, OTHER) as came:
            assert status(found, HEAVY_IMAGE) == 504
            wait_for("its second copy", lambda: found.info()["watchdog"]["hangs"] == 1 and status(found) == 200)
            assert found.child_pid() == child
            assert found.log("server").read_text().count("digits 1 is loaded again, for it is unhealthy: hangs") == 1
            # There is nothing else that could answer for this model. With a second stuck worker the process is replaced.
            status(found, HEAVY_IMAGE)
            wait_for("another process", lambda: found.child_pid() != child)
            wait_for("its first answer", lambda: status(found) == 200)
            assert found.info()["watchdog"] == {"hangs": 0, "stuck": []}
            seen = len(came)
            wait_for("answers by the new process", lambda: len(came) > seen + 3)
        assert set(came) == {200}
        log = found.log("server").read_text()
        assert "to be started again: 2 workers hang that cannot be ended" in log
        assert found.info()["crashes"] == [], "it ended in good order"
        assert found.audit_faults() == []
