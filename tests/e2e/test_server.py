"""`modelkeep serve` as a process: stops, kills, a registry or a disk that fails it, and what it says of each."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from modelkeep.demo.traffic import content_end, json_request, parse
from registry.promotions import ACTIVE
from tests.e2e.harness import MODEL, Box, box, build, free_port, go, images, kill, lives, lost_in, stand_still, wait_for


@pytest.fixture
def found(tmp_path: Path) -> Iterator[Box]:
    """A box whose version 1 is stable; nothing serves yet."""
    with box(tmp_path) as made:
        made.first("1")
        yield made


def test_nothing_is_kept_or_sent_for_the_makers_of_libraries(found: Box, tmp_path: Path) -> None:
    home, temporary = tmp_path / "person", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    found.serve(HOME=str(home), TMPDIR=str(temporary))
    answers_by(found, "1")
    assert [*home.rglob("*")] == []
    assert [*temporary.rglob("*")] == []


def answers_by(one: Box, version: str) -> None:
    answer = one.infer()
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-model-version"] == version


def ask(address: tuple[str, int], request: bytes) -> int:
    """The status of one request on a connection of its own."""
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(request)
        return read_status(connection)


def read_status(connection: socket.socket) -> int:
    received = bytearray()
    while (end := content_end(received)) is None or len(received) < end:
        chunk = connection.recv(65536)
        assert chunk, f"closed after {bytes(received)!r}"
        received += chunk
    return parse(received[:end]).status or 0


# stops


def test_a_rolling_stop_and_start_under_the_supervisor_fails_no_request(found: Box) -> None:
    found.serve()
    traffic = found.start_traffic(rate=150)
    for _ in range(3):
        before = found.child_pid()
        os.kill(before, signal.SIGTERM)
        wait_for("the next server", lambda before=before: found.child_pid() != before and found.is_ready())  # type: ignore[misc]
        assert not lives(before)
    requests = traffic.stop()
    assert [request.error for request in requests if request.error] == []
    assert found.check(requests).wrong == 0
    assert "ended (exit code 0)" in found.log("server").read_text()


def test_a_request_that_is_being_sent_when_the_server_stops_is_answered(found: Box) -> None:
    server = found.serve()
    request = json_request(f"127.0.0.1:{found.port}", MODEL, images()[0])
    with socket.create_connection(("127.0.0.1", found.port), timeout=20) as connection:
        connection.sendall(request[:40])
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.6)
        connection.sendall(request[40:])
        assert read_status(connection) == 200
    assert server.wait(timeout=20) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", found.port), timeout=5)


def test_an_idle_connection_does_not_hold_up_a_stop(found: Box) -> None:
    server = found.serve()
    with httpx.Client() as client, socket.create_connection(("127.0.0.1", found.port), timeout=20):
        assert client.get(f"{found.url}/v2/health/ready").status_code == 200  # kept alive, and idle
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0


def test_all_who_connected_while_the_server_was_away_are_answered(found: Box) -> None:
    """Many more of them than may be computed at a time: "try again later" would be a request lost to a restart."""
    found.extra["MODELKEEP_PERFORMANCE__MAX_CONCURRENT_REQUESTS"] = "5"
    found.add("2", work=12)
    found.settle_by_hand("2")
    found.serve()
    request = json_request(f"127.0.0.1:{found.port}", MODEL, images()[0])
    kill(found.child_pid())
    with ThreadPoolExecutor(600) as pool:
        statuses = list(pool.map(lambda _: ask(("127.0.0.1", found.port), request), range(600)))
    assert set(statuses) == {200}, {status: statuses.count(status) for status in set(statuses)}


# kills


def test_a_killed_child_is_replaced_and_only_requests_in_flight_are_lost(found: Box) -> None:
    found.serve()
    traffic = found.start_traffic(rate=200)
    windows = []
    for _ in range(3):
        before = found.child_pid()
        windows.append(kill(before))
        wait_for("the next server", lambda before=before: found.child_pid() != before and found.is_ready())  # type: ignore[misc]
        # Those who came meanwhile are in flight all at once: the next kill would cost them all, and rightly.
        wait_for("the end of their queue", lambda: found.in_flight() <= 2)
    requests = traffic.stop()
    lost, unexplained = lost_in(requests, windows)
    assert not unexplained, unexplained[:3]
    assert len(lost) < len(requests) / 20
    assert found.check(requests).wrong == 0


def test_the_child_of_a_killed_supervisor_ends_and_the_next_start_binds(found: Box) -> None:
    server = found.serve()
    child = found.child_pid()
    server.kill()
    server.wait(timeout=5)
    found.serve(ready=False)
    wait_for("the next server", lambda: found.child_pid() != child and found.is_ready())
    assert not lives(child)
    answers_by(found, "1")


def test_a_child_whose_supervisor_is_gone_before_it_looks_does_not_serve(found: Box) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        command = [sys.executable, "-P", "-m", "serving.child", "--fd", str(listener.fileno()), "--parent", "999999999"]
        done = subprocess.run(
            [*command, "--address", "http://127.0.0.1:1", "--folder", str(found.folder / "state")],
            pass_fds=[listener.fileno()], env=found.environment, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "the parent, process 999999999, is gone already" in done.stderr


def test_a_server_that_cannot_start_is_tried_again_with_growing_pauses(found: Box) -> None:
    found.serve()
    settings = found.home / "modelkeep.toml"
    settings.write_text("[server]\nprot = 1\n")
    kill(found.child_pid())
    said = re.compile(r"the server ended \((.*)\) after [\d.]+ s; starting it again in ([\d.]+) s")
    pauses = wait_for(
        "three ends", lambda: len(lines := said.findall(found.log("server").read_text())) > 3 and lines, seconds=60
    )
    assert pauses[0][0] == "by SIGKILL"
    assert {how for how, _ in pauses[1:]} == {"exit code 2"}
    waited = [float(pause) for _, pause in pauses]
    assert waited == sorted(waited) and waited[-1] >= 0.5
    assert "did you mean 'server.port'" in found.log("server").read_text()
    with socket.create_connection(("127.0.0.1", found.port), timeout=30) as waiting:  # not refused: it waits
        waiting.sendall(json_request("127.0.0.1", MODEL, images()[0]))
        settings.unlink()
        assert read_status(waiting) == 200


# where it listens


def test_a_port_in_use_says_by_whom(found: Box) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = found.modelkeep("serve", "--port", str(port))
    assert done.returncode == 1
    assert done.stdout == ""
    name = Path("/proc/self/comm").read_text().strip()
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use ({name}" in done.stderr
    assert f"process {os.getpid()} has it)" in done.stderr
    assert "choose another with --port" in done.stderr


def test_an_open_address_answers_nobody_without_a_key_and_says_how_to_make_one(found: Box) -> None:
    found.start("server", "modelkeep", "serve", "--host", "0.0.0.0")
    wait_for("the start of the server", found.is_ready)
    answer = found.infer()
    assert answer.status_code == 401
    assert "no key exists yet: make one with: modelkeep keys create NAME --role infer" in answer.json()["error"]
    assert httpx.get(f"{found.url}/").json().keys() == {"name", "version", "documentation"}
    assert "reachable from other machines" in found.log("server").read_text()


def test_a_home_that_cannot_be_written_is_a_clear_error(found: Box) -> None:
    (found.folder / "file").write_text("")
    done = found.modelkeep("serve", "--port", str(free_port()), MODELKEEP_HOME=str(found.folder / "file" / "home"))
    assert done.returncode == 1
    assert "set MODELKEEP_HOME to a folder that can be written" in done.stderr
    assert "Traceback" not in done.stderr


# a registry that fails it


def stopped(one: Box) -> None:
    """Serve once, so that there is a last state, and stop."""
    server = one.serve()
    answers_by(one, "1")
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=20) == 0
    one.database.dispose()


def test_a_registry_that_is_gone_at_the_start_leaves_the_last_good_state_in_service(found: Box) -> None:
    stopped(found)
    kept = found.folder / "kept"
    kept.mkdir()
    for path in found.home.glob("registry.db*"):
        path.rename(kept / path.name)
    found.serve()
    answers_by(found, "1")
    info = found.info()
    assert info["models"][MODEL]["stable"] == "1"
    assert "is gone, and this server has served from it" in info["registry"]
    assert not list(found.home.glob("registry.db*")), "an empty registry was put in the place of the lost one"
    for path in kept.iterdir():
        path.rename(found.home / path.name)
    wait_for("the registry to be followed again", lambda: found.info()["registry"] == "ok")
    answers_by(found, "1")
    found.add("2")
    found.settle_by_hand("2")
    wait_for("version 2", lambda: found.infer().headers["x-model-version"] == "2")


def test_an_emptied_registry_does_not_take_the_last_good_state_out_of_service(found: Box) -> None:
    stopped(found)
    for path in found.home.glob("registry.db*"):
        path.unlink()
    assert found.modelkeep("db", "upgrade").returncode == 0
    found.serve()
    answers_by(found, "1")
    assert "knows nothing of environment production" in found.info()["registry"]


@pytest.mark.parametrize("readers", [True, False], ids=["for writing", "for reading too"])
def test_a_registry_that_is_locked_at_the_start_does_not_keep_the_server_from_serving(
    found: Box, readers: bool
) -> None:
    stopped(found)
    with sqlite3.connect(found.home / "registry.db", isolation_level=None) as other:
        if not readers:
            other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE environments SET generation = generation")
        found.serve()
        answers_by(found, "1")
        assert found.info()["registry"] != "ok"
        other.execute("ROLLBACK")
    other.close()
    wait_for("the registry to be followed again", lambda: found.info()["registry"] == "ok")
    answers_by(found, "1")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"], ids=["cut", "no text"])
def test_a_last_state_that_is_damaged_is_said_and_the_server_goes_on(tmp_path: Path, content: bytes) -> None:
    with box(tmp_path) as one:
        one.first("1")
        one.state_folder.mkdir(parents=True)
        (one.state_folder / "last-state.json").write_bytes(content)
        one.serve()
        answers_by(one, "1")
        assert "the last state cannot be used, going on without it" in one.log("server").read_text()
        assert json.loads((one.state_folder / "last-state.json").read_text())["generation"] == one.info()["generation"]


def test_without_registry_and_last_state_it_answers_that_it_has_no_models_until_they_come(found: Box) -> None:
    stopped(found)
    (found.state_folder / "last-state.json").write_text("{")
    registry = found.home / "registry.db"
    content = registry.read_bytes()
    registry.write_bytes(b"no database at all" * 100)
    found.serve()
    answer = found.infer()
    assert (answer.status_code, "no models yet" in answer.json()["error"]) == (404, True)
    assert found.info()["registry"] != "ok"
    registry.write_bytes(content)
    wait_for("the registry to be followed again", lambda: found.info()["registry"] == "ok")
    answers_by(found, "1")


# artifacts that fail it


def corrupt(one: Box, version: str) -> Callable[[], None]:
    """Change a byte of a version's stored artifact. Returns what puts it right again."""
    with one.database.read() as session:
        from registry import versions

        digest = versions.get(session, MODEL, version).digest
    path = one.home / "artifacts" / digest[:2] / digest
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    return lambda: path.write_bytes(good) and None


def unloadable(path: Path) -> Path:
    """A well-formed ONNX file with an operator that nobody has."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Nowhere", ["image"], ["scores"], domain="example.nowhere")],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 10])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("example.nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return path


@pytest.mark.parametrize("fault", ["corrupt", "does not load"])
def test_a_candidate_that_the_server_cannot_load_is_withdrawn_and_the_stable_version_serves_on(
    found: Box, fault: str
) -> None:
    """The validation is left out: it would find this, and the server must do without it."""
    if fault == "corrupt":
        found.add("2")
        corrupt(found, "2")
    else:
        found.register("2", unloadable(found.folder / "v2.onnx"))
    found.serve()
    traffic = found.start_traffic(rate=50)
    runner = found.promote("2", "--unvalidated")
    go(runner)
    assert runner.wait(timeout=30) == 1
    row = found.promotion("2")
    assert row is not None and row["state"] == "withdrawn"
    detail = found.story("2")[-1]["detail"]
    assert ("is corrupt: its bytes hash to" if fault == "corrupt" else "ONNX Runtime cannot load it") in detail
    wait_for("the server to follow", found.follows)
    assert found.info()["models"][MODEL] == {
        "stable": "1", "candidate": None, "weight": 0.0, "shadow": False, "generation": found.info()["generation"],
    }  # fmt: skip
    requests = traffic.stop()
    assert [request.error for request in requests if request.error] == []
    assert {request.version for request in requests} == {"1"}


def test_a_stable_version_whose_artifact_is_corrupt_goes_on_from_memory_and_a_restart_says_what_is_wrong(
    found: Box,
) -> None:
    other = build(found.folder / "other.onnx", seed=3)
    found.register("1", other, model="other")
    found.settle_by_hand("1", model="other")
    found.serve()
    mend = corrupt(found, "1")
    answers_by(found, "1")
    before = found.child_pid()
    kill(before)
    wait_for("the next server", lambda: found.child_pid() != before and found.is_ready())
    assert found.infer().status_code == 503
    assert found.infer(model="other").status_code == 200
    errors = found.info()["errors"]
    assert list(errors) == [f"{MODEL}/1"] and "is corrupt" in errors[f"{MODEL}/1"]
    status = found.modelkeep("status", "--json")
    assert status.returncode == 0
    (server,) = json.loads(status.stdout)["servers"]
    assert server["errors"] == errors
    assert "is corrupt" in found.modelkeep("status").stdout.replace("\n", "")
    mend()
    wait_for("the version to load", lambda: found.infer().status_code == 200)
    assert found.info()["errors"] == {}


# a run that died while no server was there to see it


def test_the_next_run_ends_what_a_dead_one_left_where_no_server_does(found: Box) -> None:
    found.add("2")
    found.add("3")
    server = found.serve()
    traffic = found.start_traffic(rate=100)
    runner = found.promote("2", "--unvalidated")
    go(runner)
    wait_for("a canary", lambda: found.weighs("2"))
    kill(runner.pid)
    server.send_signal(signal.SIGKILL)
    server.wait()
    traffic.process.send_signal(signal.SIGTERM)
    row = found.promotion("2")
    assert row is not None and row["state"] in ACTIVE and found.held_leases()
    following = found.promote("3", "--unvalidated")
    go(following)
    assert following.wait(timeout=30) == 0, found.log("promote-3").read_text()
    row = found.promotion("2")
    assert row is not None and row["state"] == "withdrawn"
    assert found.stable() == "3"
    assert found.held_leases() == []
    assert found.audit_faults() == []


def test_a_run_that_lives_keeps_its_lease_from_the_next_one(found: Box) -> None:
    found.add("2")
    found.add("3")
    found.serve()
    found.start_traffic(rate=60)
    first = found.promote("2", "--unvalidated")
    go(first)
    wait_for("a canary", lambda: found.weighs("2"))
    second = found.promote("3", "--unvalidated")
    go(second)
    assert second.wait(timeout=30) == 4, found.log("promote-3").read_text()
    assert "is locked by promotion of digits 2" in found.log("promote-3").read_text()
    assert first.wait(timeout=30) == 0
    assert (found.stable(), found.promotion("3")) == ("2", None)


def test_a_run_that_was_stopped_and_comes_back_after_its_lease_ran_out_changes_nothing(found: Box) -> None:
    """A machine that was suspended, a process that was swapped out: to the registry it was dead."""
    found.add("2")
    found.add("3")
    found.serve()
    found.start_traffic(rate=60)
    sleeper = found.promote("2", "--unvalidated")
    go(sleeper)
    wait_for("a canary", lambda: found.weighs("2"))
    stand_still(sleeper.pid, found.database)
    wait_for("the withdrawal", lambda: (row := found.promotion("2")) and row["state"] == "withdrawn")
    following = found.promote("3", "--unvalidated")
    go(following)
    wait_for("the next canary", lambda: found.weighs("3"))
    os.kill(sleeper.pid, signal.SIGCONT)
    # It finds its token dead, writes nothing, and says how the record has it.
    assert sleeper.wait(timeout=20) == 1, found.log("promote-2").read_text()
    assert "ended withdrawn: Lease expired" in found.log("promote-2").read_text()
    assert following.wait(timeout=30) == 0, found.log("promote-3").read_text()
    row = found.promotion("2")
    assert row is not None and (row["state"], row["reason"]) == ("withdrawn", "Lease expired")
    assert (found.stable(), found.held_leases(), found.audit_faults()) == ("3", [], [])


# how long it takes


def test_the_time_to_the_first_answer_is_measured(found: Box, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not asserted: it belongs to the machine. `make bench` has the median."""
    found.add("2")
    started = time.monotonic()
    found.serve(ready=False)

    def answered() -> bool:
        try:
            return found.infer(timeout=20).status_code == 200
        except httpx.HTTPError:
            return False

    wait_for("the first answer", answered, every=0.005)
    with capsys.disabled():
        print(f"\nstart of the server to its first 200: {time.monotonic() - started:.2f} s", flush=True)


def test_answers_are_those_of_the_version(found: Box) -> None:
    found.serve()
    weights = np.random.default_rng(1).normal(size=(64, 10)).astype(np.float32)
    for index in (0, 150, 199):
        scores = found.infer(image=index).json()["outputs"][0]["data"]
        np.testing.assert_allclose(scores, images()[index].ravel() @ weights + 1, rtol=1e-3, atol=1e-4)
