"""A parent sees whether the event loop of its child turns, and counts only time in which it could have."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from registry.settings import Settings
from serving.process.pulse import Pulse, Stillness, is_stopped
from serving.supervisor import Supervisor
from tests.unit.serving.helpers import until


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_beats_are_seen_by_whoever_has_the_descriptor() -> None:
    async def scenario() -> None:
        made = Pulse()
        other = Pulse(os.dup(made.descriptor))
        beating = asyncio.create_task(other.beat())
        await until(lambda: made.beats)
        beating.cancel()
        other.close()
        made.close()

    asyncio.run(scenario())


def _beat(pulse: Pulse) -> None:
    pulse._map[:] = (pulse.beats + 1).to_bytes(8, "little")


def test_stillness_counts_from_the_first_beat_and_ends_with_the_next() -> None:
    pulse, clock = Pulse(), Clock()
    still = Stillness(pulse, os.getpid(), monotonic=clock)
    for _ in range(100):
        clock.now += 1
        assert still.look() == 0, "it has not begun"
    _beat(pulse)
    assert still.look() == 0
    for seconds in (1, 2, 3):
        clock.now += 1
        assert still.look() == seconds
    clock.now += 3600
    assert still.look() <= 5, "the machine slept"
    _beat(pulse)
    assert still.look() == 0
    pulse.close()


def test_a_process_that_was_stopped_does_not_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        pulse, clock = Pulse(), Clock()
        _beat(pulse)
        still = Stillness(pulse, child.pid, monotonic=clock)
        still.look()
        child.send_signal(signal.SIGSTOP)
        while not is_stopped(child.pid):
            os.sched_yield()
        for _ in range(10):
            clock.now += 1
            assert still.look() == 0
        child.send_signal(signal.SIGCONT)
        while is_stopped(child.pid):
            os.sched_yield()
        clock.now += 1
        assert still.look() == 1
        pulse.close()
    finally:
        child.kill()
        child.communicate()
    assert not is_stopped(child.pid)


STANDING_STILL = "import mmap, sys, time; mmap.mmap(int(sys.argv[1]), 8)[0] = 1; time.sleep(600)"


def test_a_child_that_stands_still_is_killed_and_one_that_has_not_begun_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = Supervisor(Settings(home=tmp_path, profile="cpu"), host="127.0.0.1", port=0)
    assert supervisor.still_seconds > 600
    supervisor.still_seconds = 0.2
    descriptor = supervisor._pulse.descriptor
    child = subprocess.Popen([sys.executable, "-c", STANDING_STILL, str(descriptor)], pass_fds=[descriptor])
    try:
        assert supervisor._wait(child) == -signal.SIGKILL
        assert "killed, to be started again" in caplog.text
    finally:
        child.kill()
        child.wait()
        supervisor.listener.close()
