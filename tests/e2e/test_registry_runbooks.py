"""The runbooks about the server and the registry, run in the order of the page on a real server, with what they print compared.

`PREPARED` brings what a section is about, `AFTER` what its text asks for between two commands. Commands without a result (a plain
block) are run as well: `CHECKED` says what is asked of each. How a page writes commands and results: tests/printed.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from registry import clock, replicas
from registry.schema import Reach, Replica
from tests import printed
from tests.e2e.harness import ROOT, Box, box, build, wait_for, write_golden
from tests.printed import Call

MODEL = "numbers"
RUNBOOKS = ROOT / "docs/RUNBOOKS.md"
SECTIONS = (
    "The server does not start, or a model is not served",
    "What was live when",
    "The audit trail goes to a log store",
    "The audit chain does not verify",
    "A new release",
    "The registry moves to another database",
)


class Night:
    """A server with a model, and what the page's `TIME` stands for."""

    def __init__(self, one: Box) -> None:
        self.one, self.moment = one, ""
        self.said: list[str] = []
        programs = one.folder / "bin"
        programs.mkdir()
        (programs / "modelkeep").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m modelkeep "$@"\n')
        (programs / "modelkeep").chmod(0o755)
        self.path = f"{programs}:{one.environment['PATH']}"

    @property
    def file(self) -> Path:
        """The artifact of the version that is served."""
        digest = hashlib.sha256(self.one.models["1"].read_bytes()).hexdigest()
        return self.one.home / "artifacts" / digest[:2] / digest

    def make(self) -> None:
        for version in ("1", "2"):
            path = build(self.one.folder / f"v{version}.onnx", seed=int(version))
            self.one.register(version, path, model=MODEL, golden=write_golden(self.one.folder / "golden.npz", path))
        self.one.settle_by_hand("1", model=MODEL)
        (self.one.state_folder).mkdir(parents=True)
        (self.one.state_folder / "replica-id").write_text("box-1")
        self.serve()

    def serve(self) -> None:
        self.one.serve()
        wait_for("the record that the server follows", self.on_record)

    def on_record(self) -> bool:
        """Whether the registry knows that the server is where it should be."""
        with self.one.database.read() as session:
            pulse = replicas.pulse(session, "production")
            assert pulse is not None
            now = pulse.epoch, pulse.generation
            reported = {(row.epoch, row.generation) for row in session.scalars(select(Replica))}
            reached = {(row.epoch, row.generation) for row in session.scalars(select(Reach))}
            return reported == {now} and now in reached

    def put_in(self, command: str) -> str:
        """A command of the page, with what is true here in place of what the page writes."""
        command = command.replace("127.0.0.1:8000", f"127.0.0.1:{self.one.port}").replace("TIME", f"'{self.moment}'")
        command = re.sub(r"~/\.modelkeep/artifacts/../[0-9a-f]{64}", str(self.file), command)
        return command.replace("/etc/modelkeep/", f"{self.one.folder}/")

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", self.put_in(command)], cwd=self.one.folder, env={**self.one.environment, "PATH": self.path},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def run(self, call: Call) -> list[str]:
        done = self.shell(call.command)
        stdout, stderr = (text.replace(str(self.one.folder), "/srv") for text in (done.stdout, done.stderr))
        return printed.lines(stdout, stderr, done.returncode)

    # what happens before a section, or between two commands

    def followed(self) -> None:
        self.moment = clock.text(clock.now())

    def edited(self) -> None:
        """Somebody writes to the database past modelkeep."""
        self.sql("UPDATE audit SET subject = subject || '0' WHERE seq = 3")

    def put_right(self) -> None:
        self.sql("UPDATE audit SET subject = rtrim(subject, '0') WHERE seq = 3")

    def sql(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self.one.home / "registry.db", timeout=30)) as registry:
            assert registry.execute(statement).rowcount == 1
            registry.commit()

    def an_empty_database(self) -> None:
        (self.one.folder / "new-database-url").write_text(f"sqlite:///{self.one.folder}/new.db\n")

    def moved(self) -> None:
        """Steps 3 and 4: the server ends, and one starts on the other database."""
        self.one.stop()
        self.one.extra["MODELKEEP_DATABASE_URL"] = f"sqlite:///{self.one.folder}/new.db"
        self.one._database = None
        self.serve()
        assert self.one.infer(model=MODEL).status_code == 200


PREPARED: dict[str, Callable[[Night], None]] = {
    "What was live when": Night.followed,
    "The audit chain does not verify": Night.edited,
    "A new release": Night.put_right,
    "The registry moves to another database": Night.an_empty_database,
}
AFTER: dict[str, Callable[[Night], None]] = {
    "modelkeep db copy-to - < /etc/modelkeep/new-database-url": Night.moved,
}
PLAIN = (
    "modelkeep doctor",
    "curl -s http://127.0.0.1:8000/api/v2/model-info",
    "sha256sum v1.onnx                       # must be the digest of the message",
    "install -m 444 v1.onnx ~/.modelkeep/artifacts/e5/e5e53a6496938ead57ef911a4d6c98360f1e4fb4d5bbe9c7af4556ca27ed6575",
)
"""What the page shows without a result, in its order: the results are of the machine, or none."""


def page() -> str:
    """The sections of this test, each with the numbers of its lines as in the whole page."""
    lines, inside = [], False
    for line in RUNBOOKS.read_text(encoding="utf-8").splitlines():
        inside = line.removeprefix("## ") in SECTIONS if line.startswith("## ") else inside
        lines.append(line if inside else "")
    return "\n".join(lines) + "\n"


@pytest.fixture
def night(tmp_path: Path) -> Iterator[Night]:
    with box(tmp_path) as one:
        made = Night(one)
        made.make()
        yield made


def by_hand(night: Night) -> None:
    """The blocks without a result: what the machine is like, and a damaged file that is put back."""
    doctor, info, digest, back = PLAIN
    found = night.shell(doctor)
    assert found.returncode == 0 and "registry" in found.stdout, found
    assert json.loads(night.shell(info).stdout)["models"][MODEL]["stable"] == "1"
    good = night.file.read_bytes()
    night.file.chmod(0o644)
    night.file.write_bytes(good[:-1])
    assert night.shell(digest).stdout.split()[0] == night.file.name
    assert night.shell(back).returncode == 0
    assert night.file.read_bytes() == good and night.file.stat().st_mode & 0o777 == 0o444


@pytest.mark.timeout(300)
def test_every_command_of_the_runbooks_about_the_registry_prints_what_the_page_says(night: Night) -> None:
    by_hand(night)
    section, faults = "", list[str]()
    for call in printed.calls(page()):
        if call.section != section and call.section in PREPARED:
            PREPARED[call.section](night)
        section = call.section
        said = night.run(call)
        faults += printed.differences(call, said, earlier=night.said)
        night.said += said
        if call.command in AFTER:
            AFTER[call.command](night)
    assert not faults, "\n".join(faults)
    exported = [json.loads(line) for line in (night.one.folder / "audit.jsonl").read_text().splitlines()]
    assert [event["seq"] for event in exported] == list(range(13, exported[-1]["seq"] + 1)), "all after the 12th"
    assert all(event["hash"] for event in exported)
    with night.one.database.read() as session:
        assert session.get_bind().engine.url.database == os.fspath(night.one.folder / "new.db")


def test_every_section_about_the_registry_is_run_and_shows_what_it_prints() -> None:
    calls = printed.calls(page())
    assert list(dict.fromkeys(call.section for call in calls)) == list(SECTIONS)
    assert set(PREPARED) <= set(SECTIONS) and set(AFTER) <= {call.command for call in calls}
    assert all(call.printed or ">>" in call.command for call in calls)
    assert printed.others(page()) == list(PLAIN), "a block that nothing runs"
