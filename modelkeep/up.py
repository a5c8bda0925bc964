"""`modelkeep up`: Prefect's server, a worker and the inference server as children of one terminal; what dies is started again."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

from modelkeep import output, prefect_env
from registry.connect import open_database
from registry.errors import ModelkeepError, UnavailableError
from registry.settings import Settings
from serving.supervisor import listen

_PAUSES_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_HEALTHY_SECONDS = 20.0
_PREFECT_START_SECONDS = 180.0
_GRACE_SECONDS = 40.0
_WORKER_GRACE_SECONDS = 10.0
_SETTLE_EVERY_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class Child:
    """One process that is kept running. `ready` says whether it may start yet."""

    name: str
    command: list[str]
    environment: dict[str, str]
    ready: Callable[[], bool] = field(default=lambda: True)
    process: subprocess.Popen[str] | None = None
    started: float = 0.0
    short_lives: int = 0
    not_before: float = 0.0

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A session of its own: the terminal's Ctrl-C goes to us alone, and we end the children in order.
            start_new_session=True,
            preexec_fn=_with_parent,
        )
        self.started = time.monotonic()
        threading.Thread(target=self._pass_on, args=(self.process,), daemon=True).start()

    def _pass_on(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            output.say(f"{self.name:>9} | {line.rstrip()}")

    def died(self) -> None:
        """Note a death, and when the next start is due."""
        assert self.process is not None
        now = time.monotonic()
        self.short_lives = self.short_lives + 1 if now - self.started < _HEALTHY_SECONDS else 0
        pause = _PAUSES_SECONDS[min(self.short_lives, len(_PAUSES_SECONDS) - 1)]
        output.say(f"{self.name:>9} | ended ({self.process.returncode}); starting it again in {pause:g} s")
        self.process, self.not_before = None, now + pause

    def stop(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)


def _with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # A parent started in the background ignores SIGINT, and its children inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Up:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._stopping = False
        self._deployed = False
        self._answers = False
        settings.home.mkdir(parents=True, exist_ok=True)
        environment = prefect_env.environment(settings, api=True)
        python = [sys.executable, "-m"]
        host, port = settings.prefect.host, str(settings.prefect.port)
        heartbeat = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
        self.children = [
            Child("server", [*python, "modelkeep", "serve"], {}),
            Child("prefect", [*python, "prefect", "server", "start", "--host", host, "--port", port], environment),
            Child(
                "worker",
                [
                    *python,
                    "prefect",
                    "worker",
                    "start",
                    "--pool",
                    "modelkeep",
                    "--type",
                    "process",
                    "--name",
                    "modelkeep",
                ],
                {**environment, **heartbeat},
                ready=self._worker_may_start,
            ),
        ]

    def check(self) -> None:
        """Refuse before anything starts where a port is taken. Raises UnavailableError, SettingsError."""
        for host, port, option in (
            (self.settings.server.host, self.settings.server.port, "MODELKEEP_SERVER__PORT"),
            (self.settings.prefect.host, self.settings.prefect.port, "MODELKEEP_PREFECT__PORT"),
        ):
            try:
                listen(host, port).close()
            except UnavailableError as error:
                raise UnavailableError(str(error).replace("--port", option)) from error

    def run(self) -> int:
        self.check()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        threading.Thread(target=self._prepare, daemon=True).start()
        while not self._stopping:
            for child in self.children:
                if child.process is None:
                    if time.monotonic() >= child.not_before and child.ready():
                        child.start()
                elif child.process.poll() is not None:
                    child.died()
            time.sleep(0.1)
        return self._end()

    def _worker_may_start(self) -> bool:
        return self._deployed

    def _prepare(self) -> None:
        """Once Prefect answers, write the deployments; then the worker may start. Tried again until it holds."""
        from modelkeep.deploy import deploy_all

        deadline = time.monotonic() + _PREFECT_START_SECONDS
        while not self._stopping and not prefect_env.prefect_answers(self.settings):
            if time.monotonic() > deadline:
                output.say(f"  prefect | does not answer at {self.settings.prefect.api_url} yet")
                deadline = time.monotonic() + _PREFECT_START_SECONDS
            time.sleep(0.3)
        while not self._stopping and not self._deployed:
            try:
                for line in deploy_all(self.settings):
                    output.say(f"   deploy | {line}")
                self._deployed = True
            except (ModelkeepError, OSError, subprocess.SubprocessError, ValueError) as error:
                output.say(f"   deploy | {error}")
                time.sleep(5.0)
        if not self._stopping:
            threading.Thread(target=self._settle, daemon=True).start()
            server = self.settings.server
            scheme = "http" if server.tls_certificate is None else "https"
            address = f"{scheme}://{server.host}:{server.port}"
            output.say(
                f"       up | ready: inference {address}, Prefect {self.settings.prefect.api_url.removesuffix('/api')}; Ctrl-C ends it"
            )

    def _settle(self) -> None:
        """Now and then, go on with what was approved, and tell Prefect of promotions that ended without their flow."""
        from modelkeep.deploy import settle_runs
        from tasks.approval import Carrier

        database = open_database(self.settings)
        carrier = Carrier(database, self.settings.prefect.api_url)
        while not self._stopping:
            try:
                for line in (*carrier.look(), *settle_runs(self.settings, database)):
                    output.say(f"       up | {line}")
            except ModelkeepError as error:
                output.say(f"       up | {error}")
            except Exception as error:  # whatever it is, approvals shall be carried on at the next look
                output.say(f"       up | {type(error).__name__}: {error}")
            time.sleep(_SETTLE_EVERY_SECONDS)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _end(self) -> int:
        output.say("       up | stopping")
        server, prefect, worker = self.children
        server.stop(signal.SIGTERM)  # it drains meanwhile
        # The worker before Prefect: it still has things to tell it.
        for child, patience in ((worker, _WORKER_GRACE_SECONDS), (prefect, _GRACE_SECONDS), (server, _GRACE_SECONDS)):
            child.stop(signal.SIGTERM)
            if child.process is None:
                continue
            try:
                child.process.wait(patience)
            except subprocess.TimeoutExpired:
                output.say(f"{child.name:>9} | did not end in time: killed")
                child.stop(signal.SIGKILL)
        return 0


def run(settings: Settings) -> int:
    """Keep all three running until Ctrl-C or SIGTERM. Returns the exit code."""
    return Up(settings).run()
