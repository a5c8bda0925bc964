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
NODE_TIMEOUT_MILLISECONDS = 2000
"""Before a node counts as dead. Shorter ones make a busy machine a dead node."""
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

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

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
                return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


class RedisCluster:
    """Masters, each with its share of the slots, and after them so many replicas of each."""

    def __init__(
        self, program: Path, folder: Path, free_port: Callable[[], int], masters: int = 3, replicas: int = 0
    ) -> None:
        import redis

        self.masters = masters
        self.nodes: list[RedisServer] = []
        self.clients: list[redis.Redis] = []
        try:
            self._start(program, folder, free_port, masters * (1 + replicas))
            self._join(masters)
        except BaseException:
            self.close()
            raise

    def _start(self, program: Path, folder: Path, free_port: Callable[[], int], count: int) -> None:
        import redis

        for number in range(count):
            place = folder / f"node-{number}"
            place.mkdir()
            bus = str(free_port())
            options = (
                *("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MILLISECONDS)),
                *("--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0", "--cluster-port", bus),
            )
            self.nodes.append(RedisServer(program, place, free_port(), *options))
            self.clients.append(redis.Redis(port=self.nodes[-1].port, socket_timeout=START_SECONDS))

    def _join(self, masters: int) -> None:
        bounds = [SLOTS * number // masters for number in range(masters + 1)]
        for number, client in enumerate(self.clients):
            if number < masters:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            self.clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, node.options[-1])
        everybody = range(len(self.nodes))
        wait("the nodes know each other", lambda: all(len(self.view(number)) == len(everybody) for number in everybody))
        for number in range(masters, len(self.nodes)):
            master = self.clients[number % masters].execute_command("CLUSTER", "MYID").decode()
            self.clients[number].execute_command("CLUSTER", "REPLICATE", master)
        wait("the cluster comes together", self.whole)

    @property
    def url(self) -> str:
        return self.url_of(0)

    def url_of(self, *numbers: int) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{self.nodes[number].port}" for number in numbers)

    def view(self, number: int) -> dict[int, tuple[bool, bool]]:
        """What a node knows of the nodes by their ports: whether it is a master, whether it is up and linked."""
        found: dict[int, tuple[bool, bool]] = {}
        for address, row in self.clients[number].cluster("NODES").items():
            flags = set(row["flags"].split(","))
            up = row["connected"] and not flags & {"fail", "fail?", "handshake", "noaddr"}
            found[int(address.rpartition(":")[2])] = ("master" in flags, up)
        return found

    def whole(self) -> bool:
        """Whether each node that lives says that all is well: every slot served, every living replica in step."""
        if len(self.masters_now()) != self.masters:
            return False
        living = [number for number, node in enumerate(self.nodes) if node.runs]
        for number in living:
            client, known = self.clients[number], self.view(number)
            if client.cluster("INFO")["cluster_state"] != "ok":
                return False
            if sum(is_master and up for is_master, up in known.values()) != self.masters:
                return False
            if not all(known.get(self.nodes[other].port, (False, False))[1] for other in living):
                return False
            role = client.info("replication")
            if role["role"] == "slave" and role["master_link_status"] != "up":
                return False
        return True

    def masters_now(self) -> list[int]:
        """The numbers of the nodes that live and are masters, by what they say of themselves."""
        living = [number for number, node in enumerate(self.nodes) if node.runs]
        return [number for number in living if self.clients[number].info("replication")["role"] == "master"]

    def revive(self) -> None:
        """Let every node run again. For a thread that stays: a node ends with the thread that started it."""
        for node in self.nodes:
            if node.runs:
                node.signal(signal.SIGCONT)
            else:
                node.start()

    def heal(self) -> None:
        """Every node runs again and all is well: for the next test."""
        self.revive()
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        wait("the cluster is whole again", self.whole)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for node in self.nodes:
            node.close()


def wait(what: str, condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Until a condition of a cluster holds. A node that does not answer yet is asked again."""
    import redis

    deadline = time.monotonic() + seconds
    last: Exception | None = None
    while True:
        try:
            if condition():
                return
        except redis.RedisError as error:  # it starts, or loads what its master sends
            last = error
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s: {what} ({last})"
        time.sleep(0.05)
