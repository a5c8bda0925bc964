"""A candidate that kills the server from inside: a real segmentation fault in live inference, and the kernel's kill for memory."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import httpx

from registry.database import Database
from tests.e2e.harness import HEAVY, IMAGES, LIMIT_INK, POLICY, Box, box, go, wait_for
from tests.unit.registry import kit

HEAVY_IMAGE, LIGHT_IMAGE = IMAGES - HEAVY, 0
SLOW = POLICY | {"stages": [0.5, 1.0], "dwell_seconds": 300.0, "deadline_seconds": 600.0, "soak_seconds": 300.0}
"""The promotion waits in its first stage for as long as the test goes on."""

MODEL_TOML = """
[[inputs]]
name = "image"
datatype = "FP32"
shape = [-1, 1, 8, 8]
[[outputs]]
name = "scores"
datatype = "FP32"
shape = [-1, 10]
"""


def segfaulting(folder: Path) -> Path:
    """A TorchScript model that answers light images and writes far out of its memory on heavy ones."""
    import torch

    class Faulty(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.limit = float(LIMIT_INK)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            flat = image.flatten(1)
            where = torch.zeros([1, 1], dtype=torch.long)
            if bool((flat.sum(dim=[1]) > self.limit).any()):
                where = where + (1 << 42)
            table = torch.ops.aten._sparse_coo_tensor_unsafe(where, torch.ones([1]), [4]).to_dense()
            return flat[:, :10] * table.sum()

    folder.mkdir()
    (folder / "model.toml").write_text(MODEL_TOML)
    torch.jit.script(Faulty()).save(str(folder / "model.pt"))
    return folder / "model.pt"


def answers_by(found: Box, image: int = LIGHT_IMAGE) -> str | None:
    """The version that answers, None where the connection breaks."""
    try:
        answer = found.infer(image=image)
    except httpx.HTTPError:
        return None
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model_version"])


def crash(found: Box) -> None:
    """Send heavy images until one has killed the child and another one has taken its place."""
    before = found.child_pid()
    wait_for("a crash", lambda: answers_by(found, HEAVY_IMAGE) is None or found.child_pid() != before)
    wait_for("the next child", lambda: found.child_pid() != before and found.is_ready())


def served(found: Box, version: str) -> bool:
    return any(row["version"] == version for row in found.info()["loaded"])


def in_canary(found: Box, version: str) -> None:
    go(found.promote(version, "--unvalidated"))
    wait_for("a canary", lambda: found.weighs(version) and found.follows() and served(found, version))


def withdrawn(found: Box, version: str) -> None:
    row = wait_for("the withdrawal", lambda: (row := found.promotion(version)) and row["state"] == "withdrawn" and row)
    assert "died 2 times" in found.story(version)[-1]["detail"], row
    wait_for("the server to follow", found.follows)
    route = found.route()
    assert route is not None
    assert (route.stable, route.candidate, route.promotion) == ("1", None, None)
    assert found.held_leases() == []
    assert "version.unfit" in events(found.database)
    assert found.audit_faults() == []


def events(database: Database) -> list[str]:
    return kit.actions(database)


def test_a_candidate_that_segfaults_in_live_inference_is_withdrawn_with_the_second_crash(tmp_path: Path) -> None:
    with box(tmp_path, policy=dict(SLOW)) as found:
        found.first("1")
        found.register("2", segfaulting(tmp_path / "v2"))
        found.serve()
        in_canary(found, "2")
        crash(found)
        # The stable version is there with the restart; the candidate only after its pause.
        assert {answers_by(found) for _ in range(20)} == {"1"}
        info = found.info()
        assert "digits/2" in info["held_back"]
        assert [entry["version"] for entry in info["crashes"]] == ["2"]
        wait_for("the candidate's return", lambda: served(found, "2"))
        assert found.weighs("2")
        crash(found)
        withdrawn(found, "2")
        assert {answers_by(found) for _ in range(20)} == {"1"}
        assert answers_by(found, HEAVY_IMAGE) == "1"
        assert found.info()["crashes"] == []


def test_a_candidate_that_is_killed_for_its_memory_is_withdrawn_with_the_second_kill(tmp_path: Path) -> None:
    """The kernel's out-of-memory killer is a SIGKILL while the candidate computes; here the test sends it at that moment."""
    with box(tmp_path, policy=dict(SLOW)) as found:
        found.first("1")
        found.add("2", work=2000)  # computes for a second
        found.serve()
        in_canary(found, "2")
        for _ in range(2):
            wait_for("the candidate in traffic", lambda: served(found, "2"))
            kill_while(found, computing(found, "2"))
        withdrawn(found, "2")
        assert {answers_by(found) for _ in range(5)} == {"1"}


def computing(found: Box, version: str) -> Callable[[], bool]:
    """Whether the mark of the child says that this version computes now."""
    mark = found.state_folder / "computing.mark"

    def test() -> bool:
        data = mark.read_bytes()
        slots = [data[start : start + 2048] for start in range(0, len(data), 2048)]
        return any(slot[0] == 2 and f'"{version}"'.encode() in slot for slot in slots)

    return test


def kill_while(found: Box, test: Callable[[], bool]) -> None:
    import threading

    pid = found.child_pid()
    asking = [threading.Thread(target=answers_by, args=(found,), daemon=True) for _ in range(8)]
    for thread in asking:
        thread.start()
    wait_for("the candidate at work", test, every=0.001)
    os.kill(pid, signal.SIGKILL)
    wait_for("the next child", lambda: found.child_pid() != pid and found.is_ready())
    for thread in asking:
        thread.join(timeout=30)


def test_a_promoted_version_that_segfaults_in_its_soak_gives_way_to_the_one_before(tmp_path: Path) -> None:
    policy = SLOW | {"stages": [1.0], "dwell_seconds": 0.3, "minimum_requests": 5}
    with box(tmp_path, policy=policy) as found:
        found.first("1")
        found.register("2", segfaulting(tmp_path / "v2"))
        found.serve()
        go(found.promote("2", "--unvalidated"))

        def promoted() -> bool:
            answers_by(found)
            return found.stable() == "2"

        wait_for("the promotion", promoted)
        wait_for("the server to follow", found.follows)
        crash(found)
        assert found.stable() == "2"  # it is all that there is, until it has done it again
        crash(found)
        withdrawn(found, "2")
        assert answers_by(found, HEAVY_IMAGE) == "1"


def test_an_unhealthy_version_is_loaded_again_once_and_then_gives_way_to_the_one_before(tmp_path: Path) -> None:
    with box(tmp_path) as found:
        found.first("1")
        found.add("2", broken=True)
        found.settle_by_hand("2")
        found.serve(MODELKEEP_HEALTH__WINDOW_SECONDS="3", MODELKEEP_HEALTH__MINIMUM_REQUESTS="5")
        assert answers_by(found) == "2"

        def taken_out() -> bool:
            found.infer(image=HEAVY_IMAGE)
            return found.stable() == "1"

        wait_for("the way back to version 1", taken_out)
        wait_for("the server to follow", found.follows)
        assert answers_by(found, HEAVY_IMAGE) == "1"
        log = found.log("server").read_text()
        assert log.count("digits 2 is loaded again, for it is unhealthy") == 1, log
        assert "digits goes back to 1" in log
        states = {entry["version"]: entry["state"] for entry in found.info()["states"]}
        assert states["1"] == "IN_USE"
        assert found.audit_faults() == []
