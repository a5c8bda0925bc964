"""The real `modelkeep promote` against a private Prefect server: promoted under traffic, and killed in the middle of its canary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.promotions import ACTIVE
from tests.e2e.harness import MODEL, Box, box, kill, wait_for, write_golden
from tests.prefect_server import ask, environment, prefect_server


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box with a Prefect server, an inference server and version 1."""
    folder = tmp_path_factory.mktemp("prefect")
    with prefect_server(folder) as api:
        extra = {**environment(folder, api), "MODELKEEP_PREFECT__API_URL": api}
        with box(tmp_path_factory.mktemp("box"), extra=extra) as made:
            made.first("1")
            made.serve()
            yield made


def test_a_promotion_from_the_command_line_takes_a_version_to_all_of_the_traffic(found: Box) -> None:
    traffic = found.start_traffic(rate=100)
    path = found.add("2")
    golden = write_golden(found.folder / "golden.npz", path)
    found.register("2b", path, golden=golden)
    done = found.modelkeep("promote", MODEL, "2b", "--json", timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["model"], document["version"], document["state"]) == (MODEL, "2b", "promoted")
    steps = [step["step"] for step in document["story"]]
    assert steps[0] == "validate" and steps[-1] == "promoted"
    assert [step for step in ("baseline", "shadow", "canary", "promote") if step not in steps] == []
    run = ask("GET", f"{found.extra['PREFECT_API_URL']}/flow_runs/{document['flow_run_id']}")
    assert run["state"]["name"] == "Promoted"
    requests = traffic.stop()
    assert [request.error for request in requests if request.error] == []
    assert found.check(requests).wrong == 0
    assert {request.version for request in requests} == {"1", "2b"}
    assert requests[-1].version == "2b"


def test_a_killed_command_leaves_the_stable_version_and_an_end_on_record(found: Box) -> None:
    stable = found.stable()
    traffic = found.start_traffic(rate=100, seed=2)
    found.add("3", seed=2, work=1)  # the answers of version 2, which the golden cases hold it to
    command = found.start("promote", "modelkeep", "promote", MODEL, "3")
    wait_for("a canary to kill in", lambda: found.weighs("3") or command.poll() is not None, seconds=90)
    assert command.poll() is None, found.log("promote").read_text()
    kill(command.pid)
    wait_for("the end of the orphan", lambda: (row := found.promotion("3")) and row["state"] not in ACTIVE)
    row = found.promotion("3")
    assert row is not None and (row["state"], row["reason"]) == ("withdrawn", "Lease expired")
    assert (found.stable(), found.held_leases(), found.audit_faults()) == (stable, [], [])
    requests = traffic.stop()
    assert [request.error for request in requests if request.error] == []
    assert found.check(requests).wrong == 0


def test_a_refused_promotion_says_why_and_exits_with_1(found: Box, tmp_path: Path) -> None:
    stable = found.stable()
    assert stable is not None
    golden = write_golden(tmp_path / "golden.npz", found.models[stable])
    path = found.add("4", golden=golden)
    assert path.is_file()
    done = found.modelkeep("promote", MODEL, "4", "--json", timeout=120)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["state"] == "rejected"
    assert "accuracy" in document["story"][-1]["detail"]
    assert found.stable() == stable
