"""`models discover --watch` as a process: it takes what is whole, ends when it is told to, and can be killed at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

from sqlalchemy import select

from registry.schema import Version
from registry.store import file_digest
from tests.e2e.harness import Box, box, build, wait_for


def watching(one: Box, folder: Path) -> subprocess.Popen[bytes]:
    one.log("discover").write_bytes(b"")
    arguments = ("modelkeep", "models", "discover", str(folder), "--watch", "--interval", "0.1", "--json")
    return one.start("discover", *arguments)


def told(one: Box, what: str) -> list[dict[str, Any]]:
    """The rows of one kind that it has printed so far."""
    lines = [line for line in one.log("discover").read_text().splitlines() if line.startswith("{")]
    return [row for line in lines for row in json.loads(line)[what]]


def registered(one: Box) -> dict[str, str]:
    with one.database.read() as session:
        return {row.version: row.digest for row in session.scalars(select(Version).where(Version.model == "seen"))}


def test_a_watch_takes_a_file_when_it_is_whole_and_ends_cleanly(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "seen").mkdir(parents=True)
    whole = build(tmp_path / "whole.onnx", seed=1).read_bytes()
    with box(tmp_path / "box") as one:
        one.database.prepare()
        process = watching(one, folder)
        build(folder / "seen" / "first.onnx", seed=2)
        wait_for("the first", lambda: told(one, "registered"))
        with (folder / "seen" / "slow.onnx").open("wb") as slow:
            for start in range(0, len(whole), len(whole) // 4):
                slow.write(whole[start : start + len(whole) // 4])
                slow.flush()
                build(folder / "seen" / f"at{start}.onnx", seed=start + 3)
                wait_for("the next look", lambda name=f"at{start}": name in registered(one))  # type: ignore[misc]
            assert "slow" not in registered(one), "it is open for writing, whatever its size says"
        wait_for("the slow one", lambda: "slow" in registered(one))
        assert told(one, "wrong") == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0, one.log("discover").read_text()
        process = watching(one, folder)
        wait_for("what it knows", lambda: len(told(one, "known")) == len(registered(one)))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0, one.log("discover").read_text()
        assert "Traceback" not in one.log("discover").read_text()


def test_a_kill_at_any_moment_leaves_whole_registrations_only(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "seen").mkdir(parents=True)
    files = {str(number): build(folder / "seen" / f"{number}.onnx", seed=number) for number in range(40)}
    choose = random.Random(4)
    with box(tmp_path / "box") as one:
        one.database.prepare()
        for _ in range(3):
            process, before = watching(one, folder), len(registered(one))
            more = before + choose.randint(1, 8)
            wait_for("some more", lambda least=more: len(registered(one)) >= least)  # type: ignore[misc]
            os.kill(process.pid, signal.SIGKILL)
            process.wait(timeout=20)
            for version, digest in registered(one).items():
                assert digest == file_digest(files[version])[0]
                assert one.store.path(digest), "a row without its bytes"
        process = watching(one, folder)
        wait_for("the rest", lambda: len(registered(one)) == len(files))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert one.audit_faults() == []
