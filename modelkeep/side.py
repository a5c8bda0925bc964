"""Processes beside the server of `modelkeep serve`: started a moment after it, started again when they die, ended with it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time

log = logging.getLogger("modelkeep.side")

_FIRST_SECONDS = 2.0
"""The server comes first: what stands beside it does not compete with its start."""
_HEALTHY_SECONDS = 20.0
_LOOK_SECONDS = 0.5
_PAUSES_SECONDS = (0.5, 1.0, 5.0, 30.0)
_GRACE_SECONDS = 10.0


def watchman() -> list[str]:
    return [sys.executable, "-P", "-m", "tasks.watchman", "--parent", str(os.getpid())]


class Side:
    """Keeps one command running from a thread, until `stop`."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="side", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(_GRACE_SECONDS + 1)

    def _run(self) -> None:
        pause, short_lives = _FIRST_SECONDS, 0
        while not self._stopping.wait(pause):
            started = time.monotonic()
            process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
            while process.poll() is None and not self._stopping.wait(_LOOK_SECONDS):
                pass
            if process.poll() is None:
                _end(process)
                return
            short_lives = short_lives + 1 if time.monotonic() - started < _HEALTHY_SECONDS else 0
            pause = _PAUSES_SECONDS[min(short_lives, len(_PAUSES_SECONDS) - 1)]
            log.error("%s ended (%d); starting it again in %g s", self.command[3], process.returncode, pause)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
