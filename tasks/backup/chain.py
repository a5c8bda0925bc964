"""Programs in a chain: argument lists, every exit code checked, time-outs, bounded and redacted words of what went wrong."""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from registry.errors import NotFoundError, StorageError, UnavailableError
from registry.redaction import HIDDEN, redact

PIECE_BYTES = 1 << 20
SILENT_SECONDS = 600.0
"""A program that neither takes nor gives a byte for so long is ended. Time that others in the chain need does not count."""
END_SECONDS = 60.0
SAID_BYTES = 8192
_F_SETPIPE_SZ = 1031

LAUNCH = """
import ctypes, os, sys
parent, user, group, number = (int(word) for word in sys.argv[1:5])
if user != os.getuid():
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
ctypes.CDLL(None, use_errno=True).prctl(1, number, 0, 0, 0)
if os.getppid() != parent:
    os._exit(1)
os.execv(sys.argv[5], sys.argv[5:])
"""
"""Run between us and a program: it takes another user where it must, and asks the kernel to end the program with us."""

_PLACES = ("/usr/local/bin", "/usr/bin", "/usr/local/sbin", "/usr/sbin", "/sbin", "/bin")
_KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ")


class ProgramError(UnavailableError):
    """A program of a chain failed. `status` is its exit status (below zero: the signal), `said` the end of what it wrote."""

    def __init__(self, message: str, *, status: int | None, said: str) -> None:
        super().__init__(message)
        self.status, self.said = status, said


@dataclass(frozen=True, slots=True)
class Program:
    """One program of a chain. `secrets` never leave in messages, `environment` is all that it gets beside PATH and language."""

    command: Sequence[str | Path]
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    silent_seconds: float = SILENT_SECONDS
    folder: Path | None = None
    user: tuple[int, int] | None = None
    quiet: Callable[[str], str] = str
    """Takes out of its words what people must not read there: databases quote rows in their complaints."""

    @property
    def name(self) -> str:
        return Path(self.command[0]).name

    def launched(self, *, with_us: int = signal.SIGKILL) -> list[str]:
        """The command as it is started: the program ends by the signal `with_us` when we do."""
        user, group = self.user or (os.getuid(), os.getgid())
        words = [str(word) for word in (os.getpid(), user, group, int(with_us), *self.command)]
        return [sys.executable, "-I", "-S", "-c", LAUNCH, *words]

    def surroundings(self) -> dict[str, str]:
        return {name: os.environ[name] for name in _KEPT if name in os.environ} | dict(self.environment)


def find(*names: str, also: Sequence[Path] = ()) -> Path:
    """The first of the programs that is installed: on the PATH, in `also`, or where systems put them. Raises NotFoundError."""
    for name in names:
        if found := shutil.which(name):
            return Path(found)
    for name in names:
        for folder in (*also, *map(Path, _PLACES)):
            if os.access(folder / name, os.X_OK):
                return folder / name
    raise NotFoundError(
        f"{' or '.join(names)} is not installed: install the package that brings it, or put it on the PATH"
    )


def version(program: Path) -> str:
    """What the program says of its version, in one line."""
    return run(Program([program, "--version"], silent_seconds=END_SECONDS)).decode(errors="replace").strip()


def run(program: Program, feed: Iterable[bytes] | None = None) -> bytes:
    """All that a program prints; for what fits the memory. Raises as `output` does."""
    return b"".join(output(program, feed))


def output(program: Program, feed: Iterable[bytes] | None = None) -> Iterator[bytes]:
    """What the program prints, piece by piece, while it is fed with `feed`, whose errors pass through.

    The last piece comes after the program has ended with status 0. `feed` may be the output of another program: its status is
    then checked as well, and the one that failed first is the one that is told. Left early, the program is killed.
    Raises ProgramError; NotFoundError where the program is not there.
    """
    if not os.access(program.command[0], os.X_OK):
        raise NotFoundError(f"{program.command[0]} is not installed, or may not be run")
    process = subprocess.Popen(
        program.launched(),
        stdin=subprocess.DEVNULL if feed is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=program.surroundings(),
        cwd=program.folder,
        start_new_session=True,
    )
    said: deque[bytes] = deque()
    try:
        yield from _pumped(process, program, feed, said)
        try:
            status = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise _failed(program, None, said, f"did not end within {END_SECONDS:.0f} s of its last output") from None
        if status != 0:
            raise _failed(program, status, said)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(END_SECONDS)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _pumped(
    process: subprocess.Popen[bytes], program: Program, feed: Iterable[bytes] | None, said: deque[bytes]
) -> Iterator[bytes]:
    assert process.stdout is not None and process.stderr is not None
    pieces = iter(feed) if feed is not None else None
    waiting = memoryview(b"")
    with selectors.DefaultSelector() as selector:
        for pipe, events in (
            (process.stdout, selectors.EVENT_READ),
            (process.stderr, selectors.EVENT_READ),
            (process.stdin, selectors.EVENT_WRITE),
        ):
            if pipe is None:
                continue
            os.set_blocking(pipe.fileno(), False)
            with contextlib.suppress(OSError):  # only speed: an unprivileged user has a quota of them
                fcntl.fcntl(pipe.fileno(), _F_SETPIPE_SZ, PIECE_BYTES)
            selector.register(pipe, events)
        while selector.get_map():
            ready = selector.select(program.silent_seconds)
            if not ready:
                raise _failed(program, None, said, f"stood still for {program.silent_seconds:.0f} s and was ended")
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    assert pieces is not None and process.stdin is not None
                    if not waiting:
                        waiting = memoryview(next((piece for piece in pieces if piece), b""))
                    taken = _written(process.stdin.fileno(), waiting) if waiting else None
                    if taken is not None:
                        waiting = waiting[taken:]
                    else:
                        selector.unregister(process.stdin)
                        with contextlib.suppress(BrokenPipeError):
                            process.stdin.close()
                    continue
                piece = os.read(key.fd, PIECE_BYTES)
                if not piece:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    said.append(piece[-SAID_BYTES:])
                    while sum(map(len, said)) > 2 * SAID_BYTES and len(said) > 1:
                        said.popleft()
                else:
                    yield piece


def _written(descriptor: int, waiting: memoryview) -> int | None:
    """How many bytes the program took; None where it takes no more: its status says why."""
    try:
        return os.write(descriptor, waiting[:PIECE_BYTES])
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return None


def _failed(program: Program, status: int | None, said: deque[bytes], how: str = "") -> ProgramError:
    text = program.quiet(clean(b"".join(said)[-SAID_BYTES:].decode(errors="replace"), program.secrets))
    if not how and status is not None:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with exit code {status}"
    words = f"{program.name} {how}" + (f": {' '.join(text.split())}" if text.strip() else "")
    return ProgramError(words, status=status, said=text)


def clean(text: str, secrets: Iterable[str] = ()) -> str:
    """What a program said, without secrets."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, HIDDEN)
    return redact(text)


@contextlib.contextmanager
def private_file(name: str, text: str) -> Iterator[Path]:
    """A file that only we can read, gone at the end: for what programs must know and nobody may see. Raises StorageError."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="modelkeep-access-"))  # 0700
        path = folder / name
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise StorageError(
            f"{tempfile.gettempdir()} takes no file of {len(text)} bytes ({error.strerror}): free some space, or set TMPDIR"
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def until(condition: Callable[[], bool], seconds: float, pause_seconds: float = 0.02) -> bool:
    """Whether the condition became true within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_seconds)
    return True
