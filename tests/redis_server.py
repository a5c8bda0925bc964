"""A private Redis for tests, alone or as a cluster: loopback, a temporary folder, nothing on disk; gone with the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

START_SECONDS = 30.0
SLOTS = 16384
_PR_SET_PDEATHSIG = 1


class RedisServer:
    """Start it, stop its clock, kill it, start it again on the same port; close it."""

    def __init__(self, program: Path, folder: Path, port: int, *options: str) -> None:
        self.program, self.folder, self.port, self.options = program, folder, port, options
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [
            str(self.program),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        libc = ctypes.CDLL(None)
        self.process = subprocess.Popen(
            [*command, "--dir", str(self.folder), *self.options],
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


class RedisCluster:
    """Masters without replicas, each with its share of the slots."""

    def __init__(self, program: Path, folder: Path, free_port: Callable[[], int], masters: int = 3) -> None:
        import redis

        self.nodes: list[RedisServer] = []
        for number in range(masters):
            place = folder / f"node-{number}"
            place.mkdir()
            bus = str(free_port())
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-port", bus)
            self.nodes.append(RedisServer(program, place, free_port(), *options))
        self.clients = [redis.Redis(port=node.port) for node in self.nodes]
        bounds = [SLOTS * number // masters for number in range(masters + 1)]
        for number, client in enumerate(self.clients):
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            self.clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, node.options[-1])
        deadline = time.monotonic() + START_SECONDS
        while not all(client.cluster("INFO")["cluster_state"] == "ok" for client in self.clients):
            assert time.monotonic() < deadline, "the cluster does not come together"
            time.sleep(0.05)

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for node in self.nodes:
            node.close()
