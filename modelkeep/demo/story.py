"""The demo's story, told in the order in which it happens: real models, real traffic, real kills; then the report.

What it starts it also ends: a Prefect server, an inference server and a client, each in its own process, on free ports of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select

from modelkeep import prefect_env
from modelkeep.demo import data
from registry import audit, promotions, routes, versions
from registry.connect import open_database
from registry.database import Database
from registry.errors import ModelkeepError, RefusedError
from registry.policy import PromotionPolicy
from registry.schema import PromotionStep, Route, RouteChange
from registry.settings import Settings, load_settings
from registry.store import open_store

RATE = 400.0
POLICY = PromotionPolicy(
    minimum_requests=100,
    dwell_seconds=1.0,
    baseline_seconds=2.0,
    shadow_seconds=1.5,
    shadow_requests=100,
    shadow_gate=False,
    soak_seconds=2.0,
    deadline_seconds=45.0,
    latency_ratio=2000.0,
    memory_ratio=50.0,
)
"""Short, so that the story fits in two minutes. The shadow only reports: with its gate on, v4 would never reach the canary that
this story is about, and validation's limit on cost is wide for the same reason (v5)."""

WHY = {
    "minimum_requests": "the demo sends 400 requests a second, not 400 an hour",
    "dwell_seconds": "seconds, not minutes",
    "baseline_seconds": "seconds, not minutes",
    "shadow_seconds": "seconds, not minutes",
    "shadow_requests": "the shadow is short",
    "shadow_gate": "off, so that the canary is seen at work: the gate would withdraw v4 before it answered anyone",
    "soak_seconds": "seconds, not minutes",
    "deadline_seconds": "nobody waits an hour for a demo",
    "latency_ratio": "wide, so that v5 gets as far as its canary",
    "memory_ratio": "wide, for the same reason",
}
LEASE_SECONDS = 2.0
POLL_SECONDS = 0.1
MODEL = "digits"
_WAIT_SECONDS = 30.0


@dataclass(slots=True)
class Told:
    """What has happened so far, for the terminal and the report."""

    began: float = field(default_factory=time.monotonic)
    events: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self,
        kind: str,
        title: str,
        detail: str = "",
        *,
        version: str | None = None,
        figures: dict[str, Any] | None = None,
    ) -> None:
        now = time.monotonic()
        with self.lock:
            self.events.append(
                {"t": now, "kind": kind, "version": version, "title": title, "detail": detail, "figures": figures or {}}
            )
            mark = {"step": "\n==", "refused": " x ", "withdrawn": " x ", "promoted": " ok", "kill": " ! "}.get(
                kind, "   "
            )
            print(f"{now - self.began:6.1f} s {mark} {title}" + (f": {detail}" if detail else ""), flush=True)


class Followed:
    """Reads the registry's record of every promotion as it grows, and tells it."""

    _KINDS = {"promoted": "promoted", "withdrawn": "withdrawn", "rejected": "refused", "promote": "promoted"}  # noqa: RUF012

    def __init__(self, database: Database, told: Told) -> None:
        self._database, self._told = database, told
        self._seen: set[tuple[str, int]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="followed", daemon=True)
        with database.read() as session:
            self._seen.update((row.promotion, row.number) for row in session.scalars(select(PromotionStep)))
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self.look()

    def look(self) -> None:
        with self._database.read() as session:
            for step in session.scalars(select(PromotionStep).order_by(PromotionStep.at, PromotionStep.number)):
                if (step.promotion, step.number) in self._seen:
                    continue
                self._seen.add((step.promotion, step.number))
                version = promotions.get(session, step.promotion).version
                kind = self._KINDS.get(step.step, "stage")
                figures = {k: v for k, v in step.figures.items() if k in ("copies", "disagreements", "generation")}
                for item in step.figures.get("evidence", []):
                    figures[f"e-value, {item['stream']}"] = f"{item['e_value']:.3g} of {item['threshold']:g}"
                self._told.add(kind, step.title, step.detail, version=version, figures=figures)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self.look()


class Story:
    """The demo under way: its folders, its processes and what has been told."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "demo"
        self.told = Told()
        self.kills: list[tuple[float, float]] = []
        self.versions: dict[str, dict[str, Any]] = {}
        self.files: dict[str, Path] = {}
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        for name in ("work", "logs"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", "report.html"):
            (self.folder / name).unlink(missing_ok=True)
        self.port, self.prefect_port = _free_port(), _free_port()
        os.environ.update(self._environment())
        self.settings: Settings = load_settings()
        self.url = f"http://127.0.0.1:{self.port}"
        self.database = open_database(self.settings)
        self.database.prepare()
        self.artifacts = open_store(self.settings.artifacts)
        self.model = self._free_name()

    def _environment(self) -> dict[str, str]:
        values = {
            "MODELKEEP_HOME": str(self.home),
            "MODELKEEP_LEASE_SECONDS": str(LEASE_SECONDS),
            "MODELKEEP_POLL_SECONDS": str(POLL_SECONDS),
            "MODELKEEP_SERVER__PORT": str(self.port),
            "MODELKEEP_PREFECT__PORT": str(self.prefect_port),
            "MODELKEEP_PREFECT__API_URL": f"http://127.0.0.1:{self.prefect_port}/api",
            "PREFECT_API_URL": f"http://127.0.0.1:{self.prefect_port}/api",
            # The terminal tells the story; Prefect's own lines are in its interface.
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        }
        for name, value in POLICY.model_dump(exclude_defaults=True).items():
            text = value if isinstance(value, str) else json.dumps(value)
            values[f"MODELKEEP_PROMOTION__{name.upper()}"] = text
        return values

    def _free_name(self) -> str:
        """`digits`, or where an earlier run of the demo left that, digits-2 …: versions never change and nothing is thrown away."""
        with self.database.read() as session:
            taken = {row["model"] for row in versions.listed(session, limit=10_000)}
        number = 1
        while (name := MODEL if number == 1 else f"{MODEL}-{number}") in taken:
            number += 1
        return name

    # processes

    def start(self, name: str, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        log = (self.folder / "logs" / f"{name}.log").open("ab")
        with log:
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append((name, process))
        return process

    def wait_for(
        self, what: str, test: Callable[[], bool], *, seconds: float = _WAIT_SECONDS, every: float = 0.05
    ) -> None:
        """Raises ModelkeepError, which names the logs, where it does not come true in time or a process of ours has died."""
        deadline = time.monotonic() + seconds
        while not test():
            if time.monotonic() > deadline:
                raise ModelkeepError(
                    f"{what} did not happen within {seconds:g} s; see the logs in {self.folder / 'logs'}"
                )
            time.sleep(every)

    def end_processes(self) -> None:
        for name, process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    print(f"{name} did not end by itself: killed", flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    # what a person would do

    def register(self, name: str, path: Path, golden: Path) -> versions.Registered:
        number = name.removeprefix("v")
        found = versions.register(
            self.database,
            self.artifacts,
            path,
            name=self.model,
            version=number,
            golden=golden,
            max_bytes=self.settings.models.max_file_bytes,
        )
        self.told.add(
            "register", f"{name} is registered", f"{found.size_bytes:,} bytes, {found.digest[:12]}…", version=number
        )
        return found

    def promote(self, name: str) -> str:
        """Run the flow as `modelkeep promote` does, in this process. Returns the name of the state that it ended in."""
        from flows.promote import PromoteModel, promote_model

        state = promote_model(PromoteModel(model=self.model, version=name.removeprefix("v")), return_state=True)
        return str(state.name)

    def roll_back(self, to: str | None, reason: str) -> None:
        from flows.rollback import RollbackModel, rollback_model

        state = rollback_model(RollbackModel(model=self.model, to=to, reason=reason), return_state=True)
        if state.name != "RolledBack":
            raise ModelkeepError(f"the rollback ended {state.name}: {state.message}")
        self.told.add("rollback", str(state.message), reason, version=self.stable())

    def route(self) -> Route | None:
        with self.database.read() as session:
            return routes.read(session, self.settings.environment, self.model)

    def stable(self) -> str | None:
        route = self.route()
        return route.stable if route else None

    def weighing(self, version: str) -> bool:
        route = self.route()
        return route is not None and route.candidate == version and route.weight > 0

    def outcome_of(self, version: str) -> dict[str, Any]:
        with self.database.read() as session:
            found = promotions.listed(session, model=self.model)
            return next(p for p in found if p["version"] == version)

    def child_pid(self) -> int:
        folder = self.home / "serving" / f"{self.settings.environment}-{self.port}"
        return int((folder / "child.pid").read_text())

    def canary_windows(self) -> list[tuple[str, float, float]]:
        """When each candidate had a share of the traffic, in monotonic seconds, from the record of the routes."""
        offset = time.time() - time.monotonic()
        windows: list[tuple[str, float, float]] = []
        with self.database.read() as session:
            query = (
                select(RouteChange)
                .where(RouteChange.model == self.model)
                .order_by(RouteChange.at, RouteChange.generation)
            )
            changes = list(session.scalars(query))
        opened: tuple[str, float] | None = None
        for change in changes:
            at = change.at.timestamp() - offset
            weighed = change.candidate if change.weight > 0 else None
            if opened is not None and opened[0] != weighed:
                # A server follows within a poll or two; what it weighed until then belongs to the canary.
                windows.append((opened[0], opened[1], at + 1.0))
                opened = None
            if weighed is not None and opened is None:
                opened = (weighed, at)
        if opened is not None:
            windows.append((*opened, time.monotonic()))
        return windows


def run(home: Path) -> int:
    """Tell the story in `home`. Returns 0 where all came out as told, 1 where something did not (it says what)."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / "demo").mkdir(exist_ok=True)
    except OSError as error:
        raise ModelkeepError(
            f"the demo needs a folder to write to, and {home} is none: {error.strerror}; set MODELKEEP_HOME"
        ) from error
    story = Story(home)
    followed = None
    try:
        _begin(story)
        followed = Followed(story.database, story.told)
        broken = None
        try:
            _tell(story, followed)
        except ModelkeepError as error:
            broken = str(error)
            story.told.add("step", "The story broke off", broken)
        return _conclude(story, followed, broken)
    finally:
        if followed is not None:
            followed.close()
        story.end_processes()


def _begin(story: Story) -> None:
    """Everything that takes time to start, at the same time: Prefect, the server, the training."""
    told = story.told
    told.add("step", "Getting ready", "a Prefect server and an inference server start while the versions are trained")
    _print_policy()
    environment = prefect_env.environment(story.settings, api=True)
    host, port = "127.0.0.1", str(story.prefect_port)
    story.start(
        "prefect", [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", port], **environment
    )
    os.environ.update(environment)
    story.start("server", [sys.executable, "-m", "modelkeep", "serve", "--host", host, "--port", str(story.port)])
    training = story.start(
        "training", [sys.executable, "-m", "modelkeep.demo.models", str(story.folder / "work" / "models")]
    )
    golden = data.write_golden(story.folder / "work" / "golden.npz")
    data.write_traffic(story.folder / "work" / "traffic.npz")
    story.wait_for("the training", lambda: training.poll() is not None, seconds=120)
    if training.returncode != 0:
        raise ModelkeepError(f"the training failed; see {story.folder / 'logs' / 'training.log'}")
    story.files = {path.stem: path for path in sorted((story.folder / "work" / "models").glob("v*.onnx"))}
    from modelkeep.demo.models import ABOUT

    for name, path in story.files.items():
        number = name.removeprefix("v")
        story.versions[number] = {
            "name": name,
            "about": ABOUT[name],
            "outcome": "registered",
            "accuracy": _accuracy(path),
        }
    told.add(
        "step",
        "v6: files that must never load",
        "each is refused at register; nothing in it is executed, nothing is stored",
    )
    _refuse_hostile(story, golden)


def _refuse_hostile(story: Story, golden: Path) -> None:
    from modelkeep.demo.models import MARKER

    folder = story.folder / "work" / "hostile"
    made = story.start("hostile", [sys.executable, "-m", "modelkeep.demo.models", "--hostile", str(folder)])
    story.wait_for("the hostile files", lambda: made.poll() is not None)
    refused: dict[str, str] = {}
    before = _stored(story)
    described = json.loads((folder / "files.json").read_text())
    for what, path in described.items():
        try:
            versions.register(
                story.database,
                story.artifacts,
                Path(path),
                name=story.model,
                version="6",
                golden=golden,
                max_bytes=1 << 30,
            )
        except RefusedError as error:
            refused[what] = str(error)
            story.told.add("refused", what, str(error), version="6")
    executed = (folder / MARKER).exists()
    stored = _stored(story) != before
    reason = f"{len(refused)} of {len(described)} files refused; executed: {executed}; stored: {stored}"
    good = len(refused) == len(described) and not executed and not stored
    story.versions["6"] = {
        "name": "v6",
        "about": "files that must never load",
        "outcome": "refused" if good else "NOT refused",
        "reason": reason,
        "files": refused,
    }


def _tell(story: Story, followed: Followed) -> None:
    from modelkeep.deploy import settle_runs

    told, golden = story.told, story.folder / "work" / "golden.npz"
    told.add("step", "v1: the first version")
    story.register("v1", story.files["v1"], golden)
    story.wait_for("the start of Prefect", lambda: prefect_env.prefect_answers(story.settings), seconds=120, every=0.2)
    story.wait_for("the start of the server", lambda: _ready(story.url), seconds=60)
    _expect(story, "v1", "Promoted")
    _start_traffic(story)

    told.add(
        "step",
        "v2: a better version",
        "validated, shown copies, then 5 %, 25 %, 50 % and all of the live traffic, judged at each",
    )
    story.register("v2", story.files["v2"], golden)
    _expect(story, "v2", "Promoted")

    told.add("step", "v3: worse on the golden cases")
    story.register("v3", story.files["v3"], golden)
    _expect(story, "v3", "Rejected")

    told.add("step", "v4: fails on live inputs that the golden cases have nothing like of")
    story.register("v4", story.files["v4"], golden)
    _expect(story, "v4", "RolledBack")

    told.add("step", "v5: the same answers, with much more work in its graph")
    story.register("v5", story.files["v5"], golden)
    _expect(story, "v5", "RolledBack")

    told.add("step", "Rollback under traffic, and forward again")
    if story.stable() == "2":
        story.roll_back(None, "to show that it is quick")
        story.roll_back("2", "and back")
    else:
        told.add("step", "No rollback", f"the stable version is v{story.stable()}, not v2 as the story has it")

    told.add(
        "step",
        "v7: the server is killed in the middle of its canary",
        "the parent holds the socket, the next child serves what the registry says",
    )
    story.register("v7", story.files["v7"], golden)
    with _meanwhile(lambda: _kill_server(story, "7")):
        _expect(story, "v7", "Promoted")

    told.add(
        "step",
        "v8: its flow is killed in the middle of the canary",
        f"traffic does not notice; the lease runs out after {LEASE_SECONDS:g} s",
    )
    story.register("v8", story.files["v8"], golden)
    _kill_flow(story, "8")
    followed.look()
    for line in settle_runs(story.settings, story.database):
        told.add("recovered", "Prefect is told of it", line, version="8")


def _expect(story: Story, name: str, wanted: str) -> None:
    """Promote a version; its outcome goes into the summary, whatever was wanted."""
    number = name.removeprefix("v")
    state = story.promote(name)
    row = story.outcome_of(number)
    outcome = {"rejected": "refused"}.get(row["state"], row["state"])
    story.versions[number].update(
        outcome=outcome, reason=_last_detail(story, row["id"]), state=state, promotion=row["id"]
    )
    if state != wanted:
        story.told.add("step", f"{name} ended {state}, not {wanted} as the story has it", row["reason"])


def _last_detail(story: Story, promotion: str) -> str:
    with story.database.read() as session:
        return str(promotions.story(session, promotion)[-1]["detail"])


@contextlib.contextmanager
def _meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread while the block runs; what goes wrong there is raised here."""
    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=guarded, name="meanwhile")
    thread.start()
    try:
        yield
    finally:
        thread.join(timeout=_WAIT_SECONDS)
    if failure:
        raise failure[0]


def _kill_server(story: Story, version: str) -> None:
    story.wait_for("a canary to kill the server in", lambda: story.weighing(version))
    time.sleep(0.6)
    pid = story.child_pid()
    before = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    story.wait_for("the end of the server", lambda: not _lives(pid), every=0.005)
    story.kills.append((before, time.monotonic()))
    story.told.add(
        "kill", f"SIGKILL to the inference server (process {pid})", "its parent starts the next one", version=version
    )
    story.wait_for("the next server", lambda: story.child_pid() != pid and _ready(story.url))
    away = time.monotonic() - before
    story.told.add(
        "recovered",
        "the next server answers",
        f"{away:.2f} s after the kill; connections made meanwhile waited in the socket",
        version=version,
    )


def _kill_flow(story: Story, version: str) -> None:
    flow = story.start("flow-killed", [sys.executable, "-m", "modelkeep", "promote", story.model, version])
    story.wait_for(
        "a canary to kill the flow in", lambda: story.weighing(version) or flow.poll() is not None, seconds=60
    )
    time.sleep(0.4)
    before = time.monotonic()
    os.killpg(flow.pid, signal.SIGKILL)
    flow.wait()
    story.told.add("kill", f"SIGKILL to the flow (process {flow.pid})", "nobody tells the registry", version=version)
    story.wait_for("the withdrawal of the orphan", lambda: story.outcome_of(version)["state"] not in promotions.ACTIVE)
    row = story.outcome_of(version)
    after = time.monotonic() - before
    story.versions[version].update(outcome=row["state"], reason=_last_detail(story, row["id"]), promotion=row["id"])
    story.told.add(
        "recovered", f"the orphan is {row['state']} {after:.1f} s after the kill", row["reason"], version=version
    )


def _start_traffic(story: Story) -> None:
    log = story.folder / "traffic.jsonl"
    log.unlink(missing_ok=True)
    story.start(
        "traffic",
        [
            *(sys.executable, "-m", "modelkeep.demo.traffic", "--url", story.url, "--model", story.model),
            *("--rate", str(RATE), "--log", str(log), "--data", str(story.folder / "work" / "traffic.npz")),
        ],
    )
    story.told.add(
        "step", "Traffic starts", f"{RATE:g} requests a second, open loop, no retries, each on a connection of its own"
    )
    story.wait_for("the first requests", lambda: log.exists() and log.stat().st_size > 2000)


def _conclude(story: Story, followed: Followed, broken: str | None) -> int:
    """Stop the traffic, check every answer, write the report, and say whether it all came out."""
    from modelkeep.demo import report
    from modelkeep.demo.answers import DirectRuns

    told = story.told
    told.add("step", "Checking", "every answer against what the version that gave it answers when it is run directly")
    time.sleep(0.5)
    traffic = next((process for name, process in story._processes if name == "traffic"), None)
    if traffic is None:
        print(f"NOT AS TOLD: it broke off before there was any traffic: {broken}")
        return 1
    traffic.send_signal(signal.SIGTERM)
    story.wait_for("the end of the client", lambda: traffic.poll() is not None, seconds=30)
    followed.look()
    cases = data.read_traffic(story.folder / "work" / "traffic.npz")
    direct = DirectRuns({name.removeprefix("v"): path for name, path in story.files.items()}, cases.images)
    summary = report.summarise(
        story.folder / "traffic.jsonl",
        events=told.events,
        kills=story.kills,
        canary_windows=story.canary_windows(),
        direct=direct,
        labels=cases.labels,
        versions=dict(sorted(story.versions.items())),
    )
    with story.database.read() as session:
        verdict = audit.verify(session, story.database.anchors)
    report.write_summary(summary, story.folder / "summary.json")
    page = report.render_html(summary, policy=POLICY, default=PromotionPolicy(), why=WHY, model=story.model)
    report.write_text(story.folder / "report.html", page)
    found = [*([f"it broke off: {broken}"] if broken else []), *_judge(summary, verdict)]
    _print_result(story, summary, verdict, found)
    return 1 if found else 0


def _judge(summary: Any, verdict: audit.Verdict) -> list[str]:
    """What did not come out as told."""
    outcome = {number: facts.get("outcome") for number, facts in summary.versions.items()}
    wanted = {
        "1": "promoted",
        "2": "promoted",
        "3": "refused",
        "4": "withdrawn",
        "5": "withdrawn",
        "6": "refused",
        "7": "promoted",
        "8": "withdrawn",
    }
    found = [
        f"v{number} is {outcome.get(number)}, not {state}"
        for number, state in wanted.items()
        if outcome.get(number) != state
    ]
    if summary.requests_total < 2000:
        found.append(f"only {summary.requests_total} requests")
    if summary.requests_failed:
        found.append(f"{summary.requests_failed} requests failed: {summary.failures}")
    if summary.answers_wrong:
        found.append(f"{summary.answers_wrong} answers were wrong")
    if summary.requests_failed_in_canary > 50 or summary.requests_failed_in_canary >= summary.cutover_failed:
        found.append(
            f"{summary.requests_failed_in_canary} requests failed in canaries (a cut-over: {summary.cutover_failed})"
        )
    return found + [f"audit: {fault}" for fault in verdict.faults]


def _print_result(story: Story, summary: Any, verdict: audit.Verdict, found: list[str]) -> None:
    from modelkeep import output

    print()
    output.table(
        ["version", "outcome", "golden", "live", "requests", "why"],
        [
            [
                facts.get("name", number),
                facts.get("outcome"),
                _percent(facts.get("accuracy")),
                _percent(facts.get("accuracy_live")),
                facts.get("requests", 0),
                str(facts.get("reason", ""))[:160],
            ]
            for number, facts in summary.versions.items()
        ],
        empty="",
    )
    took = time.monotonic() - story.told.began
    print(
        f"\n{summary.requests_total} requests: {summary.requests_failed} failed, {summary.requests_failed_in_canary} failed in a canary "
        f"(a cut-over without one: {summary.cutover_failed}), {summary.requests_lost_to_kills} lost to the SIGKILL, "
        f"{summary.answers_wrong} wrong answers."
    )
    print(
        f"The audit chain {'holds' if verdict.holds else 'DOES NOT HOLD'}: {verdict.events} events. The story took {took:.0f} s."
    )
    for line in found:
        print(f"NOT AS TOLD: {line}")
    print(f"\nreport   {story.folder / 'report.html'}\nsummary  {story.folder / 'summary.json'}")
    print(
        f"next     modelkeep up          then: modelkeep status, modelkeep rollback {story.model}, modelkeep audit verify",
        flush=True,
    )


def _print_policy() -> None:
    default = PromotionPolicy()
    print(f"\nThe demo's policy, at {RATE:g} requests a second, where it differs from the default:")
    for name, why in WHY.items():
        print(
            f"    {name.replace('_', ' '):18} {getattr(POLICY, name)!s:>7}  (default {getattr(default, name)}): {why}"
        )
    print(
        f"    stages {', '.join(f'{share:.0%}' for share in POLICY.stages)}, margin {POLICY.margin:g}, evidence {POLICY.evidence:g}: the default"
    )
    print(f"    lease {LEASE_SECONDS:g} s (default 30 s), poll {POLL_SECONDS:g} s (default 1 s)\n", flush=True)


def _accuracy(path: Path) -> float:
    from modelkeep.demo.models import accuracy

    return round(accuracy(path, data.load_digits().golden), 4)


def _stored(story: Story) -> list[str]:
    return sorted(path.name for path in Path(story.settings.artifacts).rglob("*") if path.is_file())


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/ready", timeout=1.0).status_code == 200
    except httpx.HTTPError:
        return False


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _percent(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, float) else ""
