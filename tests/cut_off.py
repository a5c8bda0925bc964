"""A process from which nothing can be reached but some ports of this machine: a network of its own, with a door for each of them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000

# Inside: a fresh network whose loopback is brought up; each port is listened on there, and handed to a socket file, which is no
# part of any network. argv: the folder of the socket files, the ports with commas between, the command.
INSIDE = """
import ctypes, fcntl, os, socket, struct, subprocess, sys, threading
folder, ports, command = sys.argv[1], [int(one) for one in sys.argv[2].split(",")], sys.argv[3:]
flags = 0x40000000 | (0 if os.getuid() == 0 else 0x10000000)
if ctypes.CDLL(None, use_errno=True).unshare(flags) != 0:
    raise OSError(ctypes.get_errno(), "unshare")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 0x41))
def copy(one, other):
    try:
        while piece := one.recv(1 << 16):
            other.sendall(piece)
    except OSError:
        pass
    try:
        other.shutdown(socket.SHUT_WR)
    except OSError:
        pass
def serve(door, port):
    while True:
        one, _ = door.accept()
        other = socket.socket(socket.AF_UNIX)
        other.connect(f"{folder}/{port}")
        for pair in ((one, other), (other, one)):
            threading.Thread(target=copy, args=pair, daemon=True).start()
for port in ports:
    door = socket.create_server(("127.0.0.1", port))
    threading.Thread(target=serve, args=(door, port), daemon=True).start()
sys.exit(subprocess.run(command).returncode)
"""


def can_cut() -> bool:
    """Whether this machine lets us make a network of our own."""
    flags = NEW_NETWORK | (0 if os.getuid() == 0 else NEW_USER)
    look = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare({flags}) != 0)"
    return subprocess.run([sys.executable, "-I", "-c", look], check=False, timeout=60).returncode == 0


@contextlib.contextmanager
def doors(folder: Path, ports: Sequence[int]) -> Iterator[list[str]]:
    """The words to put before a command that may reach these ports of loopback and nothing else. `folder` has a short path."""
    folder.mkdir()
    listening = [_Door(folder / str(port), port) for port in ports]
    try:
        yield [sys.executable, "-I", "-c", INSIDE, str(folder), ",".join(map(str, ports))]
    finally:
        for one in listening:
            one.close()


class _Door:
    """Connections of a socket file, handed to a port of this machine."""

    def __init__(self, path: Path, port: int) -> None:
        self.port = port
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                one, _ = self._listener.accept()
                try:
                    other = socket.create_connection(("127.0.0.1", self.port))
                except OSError:
                    one.close()
                    continue
                self._open |= {one, other}
                for pair in ((one, other), (other, one)):
                    threading.Thread(target=_copy, args=pair, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            one.close()


def _copy(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := one.recv(1 << 16):
            other.sendall(piece)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_WR)
