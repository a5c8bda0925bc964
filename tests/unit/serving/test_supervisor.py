"""The parent of a server lives on where it cannot start a child for a while."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.settings import Settings
from serving import supervisor
from serving.process.pulse import Pulse
from serving.supervisor import Supervisor


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """Its children end at once; the third tells it to stop."""
    found = Supervisor(Settings(home=tmp_path, profile="cpu"), host="127.0.0.1", port=0)
    real, children = subprocess.Popen, list[Any]()

    def start(command: list[str], **options: Any) -> Any:
        children.append(command)
        if len(children) == 3:
            found._stopping = True
        return real([sys.executable, "-c", ""], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)
    found._pulse.close()
    found.listener.close()


def failing(real: Callable[..., Any], times: int, number: int) -> Callable[..., Any]:
    """`real`, but the first times there is not enough of something."""
    left = iter(range(times))

    def call(*values: Any, **options: Any) -> Any:
        if next(left, None) is not None:
            raise OSError(number, os.strerror(number))
        return real(*values, **options)

    return call


def test_where_no_process_can_be_forked_it_is_tried_again(
    parent: Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(subprocess, "Popen", failing(subprocess.Popen, 2, errno.EAGAIN))
    assert parent.run() == 0
    assert caplog.text.count("the server cannot be started ([Errno 11] Resource temporarily unavailable)") == 2
    assert "starting it again in 0.2 s" in caplog.text, "each time the pause grows"
    assert caplog.text.count("the server ended (exit code 0)") == 2


def test_where_no_descriptor_is_left_for_the_pulse_it_is_tried_again_and_the_one_before_is_closed_once(
    parent: Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed = list[int]()
    pulses, real = list[Pulse](), Pulse.close

    def close(pulse: Pulse) -> None:
        closed.append(id(pulse))
        real(pulse)

    monkeypatch.setattr(Pulse, "close", close)

    def made() -> Pulse:
        pulses.append(Pulse())
        return pulses[-1]

    monkeypatch.setattr(supervisor, "Pulse", failing(made, 2, errno.EMFILE))
    assert parent.run() == 0
    assert caplog.text.count("the server cannot be started ([Errno 24] Too many open files)") == 2
    assert len(pulses) == 3 and len(closed) == len(set(closed)), "its number may be another file's by then"
