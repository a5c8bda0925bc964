"""The compose file of a Redis Cluster: by rule, and its own commands with real servers. Docker itself is not started."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from registry.sections import check_redis_url
from tests.redis_server import RedisServer, wait

FILE = Path(__file__).parents[3] / "deployments" / "compose" / "redis-cluster.yaml"
PASSWORD = "open-sesame"
NODES = [f"redis-{number}" for number in range(1, 7)]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text()))


def address(service: dict[str, Any]) -> str:
    return str(service["networks"]["redis"]["ipv4_address"])


def test_three_masters_and_a_replica_of_each_with_a_password_a_bound_and_no_port_for_others(
    document: dict[str, Any],
) -> None:
    services = document["services"]
    assert sorted(services) == ["create", *NODES]
    (subnet,) = document["networks"]["redis"]["ipam"]["config"]
    addresses = [address(services[name]) for name in NODES]
    assert len({*addresses}) == 6
    assert all(ip_address(one) in ip_network(subnet["subnet"]) for one in addresses)
    for name, service in services.items():
        assert re.fullmatch(r"redis:\d+\.\d+-alpine", service["image"]), "a version that is named"
        assert "ports" not in service and "network_mode" not in service
        if name == "create":
            continue
        options = dict(zip(service["command"][1::2], service["command"][2::2], strict=True))
        assert options["--cluster-enabled"] == "yes" and int(options["--cluster-node-timeout"]) <= 5000
        # The marks of invalidations have no time to live: a policy for all keys might push them out.
        assert options["--maxmemory-policy"].startswith("volatile-") and options["--maxmemory"]
        assert options["--requirepass"] == options["--masterauth"] == "${REDIS_PASSWORD:?set a password}"
        assert service["healthcheck"]["test"] and service["restart"] == "unless-stopped"
    create = services["create"]
    assert create["depends_on"] == {name: {"condition": "service_healthy"} for name in NODES}
    script = create["command"][2]
    assert re.findall(r"([\d.]+):6379", script) == addresses and "--cluster-replicas 1 --cluster-yes" in script
    url = re.search(r'redis_url = "(\S+)"', FILE.read_text())
    assert url is not None and check_redis_url(url[1])
    assert set(re.findall(r"@?([\d.]+):6379", url[1])) <= {*addresses}


@pytest.fixture
def nodes(document: dict[str, Any], program: Callable[[str], Path], tmp_path: Path) -> Iterator[list[RedisServer]]:
    """Servers as the file starts them, on ports of this machine."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(2 * len(NODES))]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    started: list[RedisServer] = []
    try:
        for name, port, bus in zip(NODES, ports[::2], ports[1::2], strict=True):
            folder = tmp_path / name
            folder.mkdir()
            words = [
                re.sub(r"\$\{REDIS_PASSWORD.*\}", PASSWORD, word) for word in document["services"][name]["command"]
            ]
            started.append(RedisServer(program(words[0]), folder, port, *words[1:], "--cluster-port", str(bus)))
        yield started
    finally:
        for node in started:
            node.close()


def test_its_own_commands_make_a_cluster_of_real_servers_and_do_nothing_the_second_time(
    document: dict[str, Any], nodes: list[RedisServer], program: Callable[[str], Path]
) -> None:
    folder = program("redis-cli").parent
    shell, option, script = document["services"]["create"]["command"]
    for name, node in zip(NODES, nodes, strict=True):
        at = address(document["services"][name])
        script = script.replace(f"{at}:6379", f"127.0.0.1:{node.port}").replace(
            f"-h {at}", f"-h 127.0.0.1 -p {node.port}"
        )
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "REDISCLI_AUTH": PASSWORD}
    clients = [redis.Redis(port=node.port, password=PASSWORD) for node in nodes]
    try:
        for _ in range(2):
            done = subprocess.run(
                [shell, option, script], env=environment, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            wait("the cluster works", lambda: all(c.cluster("INFO")["cluster_state"] == "ok" for c in clients))
        assert done.stdout == "", "it was there already"
        wait(
            "three masters, three replicas",
            lambda: sorted(c.info("replication")["role"] for c in clients) == ["master"] * 3 + ["slave"] * 3,
        )
        wait(
            "replicas have the password of their masters",
            lambda: all(c.info("replication").get("master_link_status", "up") == "up" for c in clients),
        )
    finally:
        for client in clients:
            client.close()
