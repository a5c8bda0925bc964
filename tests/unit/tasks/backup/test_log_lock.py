"""Shipment and deletion of logs shut each other out, wait for each other, and leave no lock behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from registry.errors import LockedError, StorageError
from tasks.backup.log_lock import DELETING, DELETION_SECONDS, LOCK, SHIPPING, shipping
from tests.unit.tasks.backup.log_history import run, three_days


def test_a_deletion_waits_for_a_shipment_and_a_shipment_for_a_deletion_and_for_nothing_else(tmp_path: Path) -> None:
    history = three_days()
    for first, second, patience in ((SHIPPING, DELETING, 60), (DELETING, SHIPPING, 0)):
        waits = [0]
        with contextlib.ExitStack() as stack:
            stack.enter_context(shipping(tmp_path, doing=first))

            def sleep(_: float, waits: list[int] = waits, stack: contextlib.ExitStack = stack) -> None:
                waits[0] += 1
                if waits[0] == 2:
                    stack.close()

            with shipping(tmp_path, doing=second, wait_seconds=patience, sleep=sleep):
                assert waits[0] == 2
    with shipping(tmp_path), pytest.raises(LockedError, match="being shipped"), shipping(tmp_path):
        raise AssertionError("two have it")
    times = iter([0.0, 1.0, DELETION_SECONDS])
    with (
        shipping(tmp_path, doing=DELETING),
        pytest.raises(LockedError),
        shipping(tmp_path, monotonic=lambda: next(times), sleep=lambda _: None),
    ):
        raise AssertionError("two have it")
    assert len(run(history, tmp_path).databases[0].removed) == 2


def test_a_process_that_was_killed_leaves_no_lock_behind(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\nfrom tasks.backup.log_lock import DELETING, shipping\n"
        "with shipping(pathlib.Path(sys.argv[1]), doing=DELETING):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(LockedError), shipping(tmp_path, doing=DELETING):
            raise AssertionError("two have it")
        process.kill()
        process.wait()
        with shipping(tmp_path, doing=DELETING):
            assert (tmp_path / LOCK).read_text() == DELETING


def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(StorageError, match="No locks available"), shipping(tmp_path):
        raise AssertionError("it is not locked")
