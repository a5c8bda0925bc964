"""The commands of docs/PROMOTION.md and of the runbook for promotions, run in the order of the pages on a real server, with what they print compared.

The pages suppose states ("somebody has paused it"). `PREPARED` makes them, before the first command of the section of that name;
everything else happens by the commands of the page. How a page writes commands and results: tests/printed.py.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from registry import approvals, commands, promotions
from registry.actor import Who
from registry.policy import PromotionPolicy
from registry.schema import Replica
from tests import printed
from tests.e2e.harness import (
    LEASE_SECONDS,
    POLICY,
    ROOT,
    Box,
    Traffic,
    box,
    build,
    free_port,
    go,
    mark_validated,
    wait_for,
    write_golden,
)
from tests.prefect_server import environment, prefect_server
from tests.printed import Call

MODEL = "numbers"
PROMOTION = ROOT / "docs/PROMOTION.md"
RUNBOOKS = ROOT / "docs/RUNBOOKS.md"
SECTION = "A promotion is stuck, bad, or must be undone now"

QUICK = {
    **POLICY,
    "stages": [0.05, 0.25, 0.5, 1.0],
    "baseline_seconds": 2.0,
    "shadow_seconds": 1.0,
    "soak_seconds": 1.0,
}
"""A promotion that is over soon."""
LASTING = {
    **QUICK,
    "dwell_seconds": 60.0,
    "minimum_requests": 300,
    "deadline_seconds": 3600.0,
    "shadow_requests": 300,
    "soak_seconds": 300.0,
}
"""The stages of the default policy: without traffic nothing passes them."""
SLOW_TO_STOP = {**LASTING, "sudden_requests": 1_000_000, "shadow_seconds": 3.0, "shadow_requests": 10}
"""A bad version is found by the test, not by the fuse, so that the page can say what it prints."""

BY_HAND = ["modelkeep promotions resume ID", 'modelkeep rollback numbers --release --reason "it was the client"']
"""What the pages show without a result, and this test does not run: going on with an approved promotion (tests/e2e/test_approvals.py), and
letting go of a hold, which a server with a registry on SQLite has written back before anybody can (tests/e2e/test_emergency.py)."""

IN_PASSING = {"keys create", "models archive", "promotions pause", "reject", "serve", "up"}
"""The commands that the text between the blocks names and that no block runs; tests of their own do."""


class Night:
    """The box of the person who was woken, and what the page's `ID` and `TIME` stand for now."""

    def __init__(self, one: Box) -> None:
        self.one = one
        self.identity, self.moment = "", ""
        self.said: list[str] = []
        self._traffic: Traffic | None = None

    def run(self, call: Call) -> list[str]:
        """Run a command of the page, and what it printed."""
        arguments = [{"ID": self.identity, "TIME": self.moment}.get(word, word) for word in call.words]
        assert arguments[0] == "modelkeep"
        done = self.one.modelkeep(*arguments[1:], timeout=120)
        return printed.lines(done.stdout, done.stderr, done.returncode)

    def add(self, version: str, **how: Any) -> None:
        """Register a version that answers as version 1 does, and is another file."""
        work = 0 if how else int(version) - 1
        path = build(self.one.folder / f"v{version}.onnx", seed=1, work=work, **how)
        self.one.register(version, path, model=MODEL)

    def force(self, version: str) -> None:
        """All of the traffic for a version, as `modelkeep promote --force` gives it; without Prefect and without the probe."""
        one, reason = self.one, "ticket 4711"
        operation = promotions.begin(
            one.database, environment="production", model=MODEL, version=version, policy=PromotionPolicy(**QUICK),
            strategy="forced", ttl_seconds=LEASE_SECONDS, flow_run_id=None, force_reason=reason,
        )  # fmt: skip
        mark_validated(one.database, operation)
        title, detail = f"{MODEL} {version} takes all of the traffic", f"it is forced: {reason}"
        window = {"stage": "soak", "weight": 1.0}
        promotions.promote(one.database, operation, title=title, detail=detail, watch=False, window=window)
        promotions.end(one.database, operation, "promoted", title=title, detail=detail)

    def follow(self) -> None:
        wait_for("the server to follow", self.one.follows)

    def traffic(self, on: bool) -> None:
        if self._traffic is not None:
            self._traffic.stop()
        self._traffic = self.one.start_traffic(rate=150, model=MODEL) if on else None

    def row(self, version: str) -> dict[str, Any]:
        return self.one.promotion(version, model=MODEL) or {}

    def canary(self, version: str, policy: dict[str, Any], *, until: float | None = None, **how: Any) -> None:
        """Begin to promote a version in a process of its own; return in the first stage (or with the promotion's end)."""
        self.one.policy = policy
        self.add(version, **how)
        runner = self.one.promote(version, model=MODEL)
        go(runner)
        if until is None:
            wait_for("the end", lambda: self.row(version).get("state") not in (None, *promotions.ACTIVE), seconds=120)
        else:
            self.share(until)
        self.identity = self.row(version)["id"]

    def share(self, weight: float) -> None:
        """Wait until the candidate has this share, at the server too."""
        wait_for(
            f"a share of {weight:g}", lambda: (route := self.one.route(MODEL)) is not None and route.weight == weight
        )
        self.follow()

    def tell(self, command: str, who: str, reason: str) -> None:
        commands.give(self.one.database, self.identity, command=command, who=Who(who), reason=reason)
        wait_for("the command to be taken", self.nothing_waits)

    def nothing_waits(self) -> bool:
        with self.one.database.read() as session:
            return not commands.standing(session, self.identity).waiting

    # What the sections of the pages suppose, in their order.

    def a_server_with_traffic(self) -> None:
        self.one.policy = QUICK
        path = build(self.one.folder / "v1.onnx", seed=1)
        golden = write_golden(self.one.folder / "golden.npz", path)
        self.one.register("1", path, model=MODEL, golden=golden)
        self.force("1")
        build(self.one.folder / "v2.onnx", seed=1, work=1)  # as good, and another file
        self.named(self.one.port, "box-1")
        self.one.serve()
        self.moment = dt.datetime.now(dt.UTC).isoformat()
        self.traffic(True)

    def promoted(self) -> None:
        self.identity = self.row("2")["id"]

    def a_canary_without_traffic(self) -> None:
        self.traffic(False)
        self.canary("3", LASTING, until=0.05)

    def paused_by_somebody(self) -> None:
        self.share(0.25)
        self.tell("pause", "key:night-shift", "an incident elsewhere")

    def waits_for_approval(self) -> None:
        one = self.one
        self.tell("stop", "key:night-shift", "")
        self.follow()
        policy = PromotionPolicy(**{**LASTING, "approval": True})
        self.add("4")
        operation = promotions.begin(
            one.database, environment="production", model=MODEL, version="4", policy=policy, strategy="canary",
            ttl_seconds=LEASE_SECONDS, flow_run_id=None,
        )  # fmt: skip
        promotions.note_validation(
            one.database, operation, passed=True, report={}, signature=None, rows_independent=True,
            title=f"{MODEL} 4 passed the validation", detail="no check failed",
        )  # fmt: skip
        approvals.ask(one.database, operation, deadline_seconds=policy.approval_deadline_seconds)
        self.identity = operation.id

    def a_server_that_was_killed(self) -> None:
        port = free_port()
        self.named(port, "box-2")
        second = self.one.start("second", "modelkeep", "serve", MODELKEEP_SERVER__PORT=str(port))
        wait_for("the second server", lambda: len(self.servers()) == 2)
        import psutil

        for process in [*psutil.Process(second.pid).children(recursive=True), psutil.Process(second.pid)]:
            process.send_signal(signal.SIGKILL)
        second.wait(timeout=10)

    def named(self, port: int, name: str) -> None:
        """Give the server that will come up at this port a name, so that they are listed in the order of the page."""
        folder = self.one.home / "serving" / f"production-{port}"
        folder.mkdir(parents=True)
        (folder / "replica-id").write_text(name)

    def servers(self) -> list[str]:
        with self.one.database.read() as session:
            return list(session.scalars(select(Replica.id)))

    def withdrawn_by_the_judge(self) -> None:
        self.traffic(True)
        self.canary("5", SLOW_TO_STOP, broken=True)

    def a_canary_with_traffic(self) -> None:
        self.canary("6", LASTING, until=0.05)

    def a_bad_stable_version(self) -> None:
        self.add("7")
        self.force("7")
        self.follow()

    def and_again(self) -> None:
        self.add("8")
        self.force("8")
        self.follow()

    def no_registry(self) -> None:
        self.add("9")
        self.force("9")
        self.follow()
        wait_for("the earlier version on the disk", lambda: f"{MODEL}/1" in self.one.info()["kept"])
        self.traffic(False)
        self.one.database.dispose()
        for path in self.one.home.glob("registry.db*"):
            path.rename(path.with_name("away-" + path.name))

    def the_registry_again(self) -> None:
        for path in self.one.home.glob("away-registry.db*"):
            path.rename(path.with_name(path.name.removeprefix("away-")))
        wait_for("the hold to go home", lambda: not self.one.info()["holds"])
        self.follow()


PREPARED: dict[str, Callable[[Night], None]] = {
    "What it looks like": Night.a_server_with_traffic,
    "First look": Night.a_canary_without_traffic,
    "Stuck: somebody has paused it": Night.paused_by_somebody,
    "Stuck: it waits for an approval": Night.waits_for_approval,
    "Stuck: a server does not follow": Night.a_server_that_was_killed,
    "Bad: what happens by itself": Night.withdrawn_by_the_judge,
    "Bad: stop it": Night.a_canary_with_traffic,
    "Undone now": Night.a_bad_stable_version,
    "Undone, to what was stable at a time": Night.and_again,
    "Undone, without the registry": Night.no_registry,
    "Afterwards": Night.the_registry_again,
}
"""By the titles of the sections. One that is not here goes on with the state that the section before left."""

AFTER: dict[str, Callable[[Night], None]] = {"modelkeep promote numbers 2": Night.promoted}
"""What is done after a command, before the next one of its section."""


def runbook() -> str:
    """The section about promotions of the runbooks."""
    found = re.search(
        rf"^## {SECTION}$.*?(?=^## |\Z)", RUNBOOKS.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"docs/RUNBOOKS.md has no section {SECTION!r}"
    return found[0]


def pages() -> list[tuple[str, str]]:
    return [("docs/PROMOTION.md", PROMOTION.read_text(encoding="utf-8")), ("docs/RUNBOOKS.md", runbook())]


@contextlib.contextmanager
def begun(folder: Path) -> Iterator[Night]:
    """A box with a Prefect server, so that `modelkeep promote` need not start one of its own each time."""
    with prefect_server(folder) as api:
        extra = {**environment(folder, api), "MODELKEEP_PREFECT__API_URL": api}
        with box(folder / "box", extra=extra) as one:
            yield Night(one)


@pytest.fixture
def night(tmp_path: Path) -> Iterator[Night]:
    with begun(tmp_path) as made:
        yield made


@pytest.mark.timeout(600)
def test_every_command_of_the_pages_prints_what_the_page_says(night: Night) -> None:
    section, faults = "", list[str]()
    for name, page in pages():
        for call in printed.calls(page):
            if call.section != section and call.section in PREPARED:
                PREPARED[call.section](night)
            section = call.section
            said = night.run(call)
            faults += [f"{name}: {line}" for line in printed.differences(call, said, earlier=night.said)]
            night.said += said
            if call.command in AFTER:
                AFTER[call.command](night)
    assert not faults, "\n".join(faults)


def test_the_pages_show_nothing_without_a_result_that_is_not_on_the_list() -> None:
    assert [line for _, page in pages() for line in printed.others(page)] == BY_HAND
    assert all(call.printed for _, page in pages() for call in printed.calls(page))


def test_every_section_that_is_prepared_for_is_in_the_pages_once_and_in_this_order() -> None:
    found = list(dict.fromkeys(call.section for _, page in pages() for call in printed.calls(page)))
    assert [section for section in found if section in PREPARED] == list(PREPARED)


def test_the_text_between_the_blocks_names_no_other_commands() -> None:
    """A whole command counts as run when a block runs one of its name, whatever the options."""
    name = re.compile(r"modelkeep ([a-z]+(?: (?:verify|list|show|create|at|archive|pause|resume|advance|stop))?)\b")
    run = {found for _, page in pages() for call in printed.calls(page) for found in name.findall(call.command)}
    named = {found for _, page in pages() for text in re.findall(r"`([^`\n]+)`", page) for found in name.findall(text)}
    assert named - run == IN_PASSING
