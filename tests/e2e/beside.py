"""What goes on beside the traffic while one promotion of test_many.py is under way: a second client, a look-out for crashes; and the direct runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray

from modelkeep.demo.answers import DirectRuns, Request
from tests.e2e.harness import LIMIT_INK, MODEL, Box, images, lives

LATE = np.full((1, 1, 8, 8), 2.0, dtype=np.float32)
"""What the traffic does not send: a second client does, once the version that fails on it is stable."""

PF_EXITING = 0x4
"""Of the flags in /proc/PID/stat (include/linux/sched.h)."""


class SecondClient:
    """Requests beside the traffic, one after the other, a connection each, while a promotion goes on. Kept as the traffic's are."""

    def __init__(self, found: Box, act: Callable[[SecondClient], None]) -> None:
        self.found, self.requests = found, list[Request]()
        self.http = httpx.Client(
            base_url=found.url, timeout=60, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False
        )
        self._act = act
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def infer(self, image: NDArray[np.float32]) -> httpx.Response | None:
        """None where the connection broke."""
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": image.ravel().tolist()}
        sent, answer, error = time.monotonic(), None, None
        try:
            answer = self.http.post(f"/v2/models/{MODEL}/infer", json={"inputs": [tensor]})
        except httpx.HTTPError as broken:
            error = {"ReadError": "reset", "WriteError": "reset", "RemoteProtocolError": "eof"}.get(
                type(broken).__name__, type(broken).__name__
            )
        status = answer.status_code if answer is not None else None
        error = error if status in (None, 200) else f"http {status}"
        version = answer.headers.get("x-model-version") if answer is not None else None
        done = time.monotonic()
        self.requests.append(Request(-1, -1, False, sent, sent, done, status, error, version, None, None))
        return answer

    def stop(self) -> list[Request]:
        self._stopping.set()
        self._thread.join(timeout=90)
        assert not self._thread.is_alive()
        self.http.close()
        if self._failure is not None:
            raise self._failure
        return self.requests

    def _run(self) -> None:
        try:
            while not self._stopping.wait(0.01):
                self._act(self)
        except BaseException as error:
            self._failure = error


def say(version: str) -> Callable[[SecondClient], None]:
    """Ask, and tell what is thought of the answer: one of `version` is bad."""
    light = images()[:1]

    def act(client: SecondClient) -> None:
        answer = client.infer(light)
        if answer is None or answer.status_code != 200:
            return
        verdict = "bad" if answer.headers["x-model-version"] == version else "good"
        told = {"request_id": answer.headers["x-request-id"], "verdict": verdict}
        try:
            said = client.http.post("/api/v2/feedback", json=told)
        except httpx.HTTPError:  # the child was killed: the verdict is lost, the next one is not
            return
        assert said.status_code == 202, said.text

    return act


def come_late(version: str) -> Callable[[SecondClient], None]:
    """Send what nobody has sent before, once `version` is stable."""

    def act(client: SecondClient) -> None:
        if client.found.stable() == version:
            client.infer(LATE)

    return act


class Deaths:
    """The moments between which children died by themselves, while a candidate that segfaults is promoted."""

    def __init__(self, found: Box) -> None:
        self.windows: list[tuple[float, float]] = []
        self._found = found
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> list[tuple[float, float]]:
        self._stopping.set()
        self._thread.join(timeout=10)
        return self.windows

    def _run(self) -> None:
        pid, alive = self._found.child_pid(), time.monotonic()
        while not self._stopping.wait(0.002):
            looked = time.monotonic()
            if lives(pid) and not ending(pid):
                alive = looked
                continue
            while lives(pid) and not self._stopping.is_set():  # its connections are closed by the time that it is gone
                time.sleep(0.001)
            self.windows.append((alive, time.monotonic()))
            while not self._stopping.wait(0.002) and (pid := self._found.child_pid()) and not lives(pid):
                pass


def ending(pid: int) -> bool:
    """Whether the kernel is about to take a process down: its connections may be closed already, though it still counts as alive."""
    try:
        flags = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[6])
    except (FileNotFoundError, ProcessLookupError):
        return True
    return bool(flags & PF_EXITING)


class Direct(DirectRuns):
    """The versions run directly; what a TorchScript version that segfaults answers is known without running it."""

    def __init__(self, found: Box, segfaulting: set[str]) -> None:
        super().__init__(found.models, images())
        self._flat = images().reshape(len(images()), -1)
        self._segfaulting = segfaulting

    def _run(self, version: str, image: int) -> NDArray[np.float32] | str:
        if version not in self._segfaulting:
            return super()._run(version, image)
        flat = self._flat[image]
        return flat[:10] if flat.sum() <= LIMIT_INK else "a segmentation fault"
