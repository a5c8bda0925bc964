"""The parent of a server: it holds the listening socket and keeps a child alive, so that a crash refuses nobody."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from registry.errors import SettingsError, StorageError, UnavailableError
from registry.settings import Settings
from serving.http.tls import certificates
from serving.process import heaps
from serving.process.pulse import SLACK_SECONDS, Pulse, Stillness

log = logging.getLogger("modelkeep.supervisor")

_BACKLOG = 4096
_BIND_PATIENCE_SECONDS = 3.0
_HEALTHY_SECONDS = 5.0
_LOOK_SECONDS = 0.5
_PAUSES_SECONDS = (0.0, 0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def listen(host: str, port: int) -> socket.socket:
    """The listening socket: systemd's where it hands one over, else a new one. Raises UnavailableError, which says who has the port."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and int(os.environ.get("LISTEN_FDS", "0")) >= 1:
        return socket.socket(fileno=3)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise SettingsError(f"server.host = {host!r}: {error.strerror}; give an address of this machine") from error
    deadline = time.monotonic() + _BIND_PATIENCE_SECONDS
    while True:
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_BACKLOG)
            return listener
        except OSError as error:
            listener.close()
            # The child of a supervisor that was killed needs a moment to drain and let go.
            if error.errno != 98 or time.monotonic() >= deadline:
                who = who_listens(port)
                raise UnavailableError(
                    f"cannot listen on {host}:{port}: {error.strerror}"
                    + (f" ({who} has it)" if who else "")
                    + "; stop that, or choose another with --port"
                ) from error
            time.sleep(0.1)


def who_listens(port: int) -> str | None:
    """Name and id of the process that listens on a port, where this user may see it."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:2] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()}, process {connection.pid}"
    except psutil.Error:
        log.debug("the process on port %d cannot be named", port, exc_info=True)
    return None


def check_exposure(settings: Settings, host: str) -> None:
    """Say in the log what it means to listen where others can reach it."""
    if host in LOOPBACK:
        return
    if settings.security.allow_unauthenticated:
        log.warning(
            "server.host = %r is reachable from other machines, and security.allow_unauthenticated asks nobody for a key: let "
            "something in front authenticate",
            host,
        )
    else:
        log.warning(
            "server.host = %r is reachable from other machines: requests need an API key (modelkeep keys create NAME --role ROLE)%s",
            host,
            ""
            if settings.server.tls_certificate is not None
            else ". They are not encrypted: set server.tls_certificate and server.tls_key, or put a proxy with TLS in front, where the "
            "network is not yours",
        )


class Supervisor:
    """Keeps one child serving on a socket until it is told to stop."""

    def __init__(self, settings: Settings, *, host: str, port: int) -> None:
        check_exposure(settings, host)
        scheme = "http" if certificates(settings.server) is None else "https"
        self.listener = listen(host, port)
        self.host, self.port = host, int(self.listener.getsockname()[1])
        self.address = settings.server.address or f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self.folder = settings.home / "serving" / f"{settings.environment}-{self.port}"
        self.grace_seconds = settings.server.drain_seconds + 5
        self.still_seconds = settings.load_hang_seconds(0) + SLACK_SECONDS
        """A child whose event loop does not turn for so long is killed: something in it holds the interpreter and does not end."""
        self._pulse = Pulse()
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT. Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the server needs a folder for its state, and {self.folder} is none: {error.strerror or error}; set MODELKEEP_HOME "
                "to a folder that can be written"
            ) from error
        _note(self.folder / "supervisor.pid", os.getpid())
        short_lives = 0
        while not self._stopping:
            started = time.monotonic()
            try:
                self._child = self._spawn()
            except OSError as error:  # what it lacks (memory, a process, a descriptor) may be there in a moment, and the socket waits
                ended = f"the server cannot be started ({error})"
            else:
                if self._stopping:  # a signal between the test and the start
                    self._child.terminate()
                ended = f"the server ended ({_how(self._wait(self._child))})"
            if self._stopping:
                break
            lived = time.monotonic() - started
            short_lives = short_lives + 1 if lived < _HEALTHY_SECONDS else 0
            pause = _PAUSES_SECONDS[min(short_lives, len(_PAUSES_SECONDS) - 1)]
            log.error("%s after %.1f s; starting it again in %g s", ended, lived, pause)
            self._pause(pause)
        self.listener.close()
        return 0

    def _spawn(self) -> subprocess.Popen[bytes]:
        descriptor = self.listener.fileno()
        fresh = Pulse()  # may raise: only then the one before goes, else it would be closed a second time
        self._pulse.close()
        self._pulse = fresh
        command = [sys.executable, "-P", "-m", "serving.child", "--fd", str(descriptor), "--parent", str(os.getpid())]
        command += ["--pulse", str(self._pulse.descriptor)]
        child = subprocess.Popen(
            [*command, "--address", self.address, "--folder", str(self.folder)],
            pass_fds=[descriptor, self._pulse.descriptor],
            stdin=subprocess.DEVNULL,
            env=heaps.environment(os.environ),
        )
        _note(self.folder / "child.pid", child.pid)
        return child

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        """Until the child has ended. Once told to stop it has its time to drain, counted from then on."""
        deadline: float | None = None
        stillness = Stillness(self._pulse, child.pid)
        while True:
            if self._stopping and deadline is None:
                deadline = time.monotonic() + self.grace_seconds
            try:
                return child.wait(timeout=_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                if deadline is not None and time.monotonic() >= deadline:
                    log.error("the server did not end within %g s: killed", self.grace_seconds)
                    child.kill()
                    return child.wait()
                if stillness.look() > self.still_seconds:
                    log.error("the server has stood still for %.0f s: killed, to be started again", stillness.seconds)
                    child.kill()
                    return child.wait()

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < deadline:
            time.sleep(min(0.1, seconds))

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)


def _note(path: Path, pid: int) -> None:
    """Keep a process id for whoever looks; in one step, so that nobody reads half of it. A full disk is no reason not to serve."""
    fresh = path.with_suffix(".new")
    try:
        fresh.write_text(str(pid))
        fresh.replace(path)
    except OSError as error:
        log.error("%s could not be written: %s", path, error)


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
