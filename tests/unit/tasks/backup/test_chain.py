"""A chain of programs has failed when any of its programs has, and it says which and why, without secrets."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.errors import NotFoundError, StorageError
from tasks.backup.chain import Program, ProgramError, find, output, run, until

PYTHON = [sys.executable, "-I", "-S", "-c"]


def python(code: str, **options: object) -> Program:
    return Program([*PYTHON, code], **options)  # type: ignore[arg-type]


CAT = "import sys, shutil; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)"


def test_what_goes_in_comes_out_through_any_number_of_programs() -> None:
    data = [os.urandom(70_000) for _ in range(60)]
    found = b"".join(output(python(CAT), output(python(CAT), iter(data))))
    assert found == b"".join(data)


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_program_that_is_killed_fails_the_chain_wherever_it_stands(place: str) -> None:
    killed = python("import os, signal; os.write(1, b'half'); os.kill(os.getpid(), signal.SIGKILL)")
    chain = output(python(CAT), output(killed)) if place == "first" else output(killed, output(python("print(1)")))
    with pytest.raises(ProgramError, match="killed by SIGKILL") as caught:
        list(chain)
    assert caught.value.status == -signal.SIGKILL


def test_an_exit_code_is_told_with_the_last_words_and_without_the_secret() -> None:
    code = "import sys; sys.stderr.write('x' * 100_000 + 'no way, hunter2, mysql://a:pw@h'); sys.exit(3)"
    with pytest.raises(ProgramError, match="exit code 3") as caught:
        run(python(code, secrets=("hunter2",)))
    assert caught.value.said.endswith("no way, ***, mysql://a:***@h")
    assert len(str(caught.value)) < 20_000


def test_an_error_of_the_feed_passes_through_and_the_program_is_ended() -> None:
    def feed() -> Iterator[bytes]:
        yield b"some"
        raise StorageError("the bucket is gone")

    with pytest.raises(StorageError, match="bucket"):
        run(python(CAT), feed())


def test_a_program_that_stands_still_is_ended() -> None:
    with pytest.raises(ProgramError, match="stood still"):
        run(python("import time; time.sleep(600)", silent_seconds=0.2))


def test_a_program_that_takes_no_more_is_known_by_its_status() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 100_000

    with pytest.raises(ProgramError, match="exit code 4"):
        run(python("import sys; sys.stdin.read(5); sys.exit(4)"), endless())


def test_a_chain_that_is_left_leaves_no_process(tmp_path: Path) -> None:
    code = f"import os, sys, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); print('a', flush=True); time.sleep(600)"
    pieces = output(python(code))
    assert next(pieces) == b"a\n"
    pieces.close()  # type: ignore[attr-defined]
    pid = int((tmp_path / "pid").read_text())
    assert until(lambda: not Path(f"/proc/{pid}").exists(), 30)


def test_a_program_sees_nothing_of_our_environment_but_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    monkeypatch.setenv("MODELKEEP_X", "hunter2")
    said = run(python("import os; print(dict(os.environ))", environment={"PGHOST": "here"}))
    assert b"hunter2" not in said and b"'PGHOST': 'here'" in said


def test_a_missing_program_is_named() -> None:
    with pytest.raises(NotFoundError, match="no-such-dump is not installed"):
        find("no-such-dump")
    with pytest.raises(NotFoundError, match="/nowhere/dump is not installed"):
        run(Program(["/nowhere/dump"]))
