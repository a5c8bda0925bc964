"""Everything is lost but a bucket, a key file and the credentials: one command brings it back, and it answers as before."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.backup import throwaway
from tests.cut_off import can_cut, doors
from tests.e2e.harness import MODEL, ROOT, box, free_port
from tests.e2e.round_trip import BUCKET, OTHER_MODEL, Installation, Servers, counted, of_manifest
from tests.fake_s3 import Server as Store
from tests.redis_server import RedisServer
from tests.registry_servers import PASSWORD, starter

COMPONENTS = {
    "registry", "models", "database:shop", "database:ledger", "database:notes", "vectors", "queues", "files:uploads", "config",
}  # fmt: skip


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, program: Callable[[str], Path]) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    mariadb, postgresql = starter("mariadb", program), starter("postgresql", program)
    redis = RedisServer(program("redis-server"), folder, free_port(), "--requirepass", PASSWORD)
    try:
        with Store() as store, throwaway.chroma(folder) as chroma:
            yield Servers(store, mariadb, postgresql, redis, chroma.url)
    finally:
        redis.close()
        postgresql.close()
        mariadb.close()


def test_all_is_lost_and_one_command_brings_all_of_it_back(servers: Servers, tmp_path: Path) -> None:
    with box(tmp_path) as made:
        home = Installation(made, servers, str(tmp_path / "app" / "chroma"))
        home.make()
        made.serve()
        before = home.golden(), home.accounts(), home.uploads()

        with home.written_to():
            taken = home.modelkeep("backup", "--no-prefect", "--reason", "the night before")
        assert taken["state"] == "complete", taken
        assert {one["name"] for one in taken["components"]} == COMPONENTS
        checked = home.modelkeep("backups", "verify", taken["backup_id"], "--no-prefect")
        assert checked["state"] == "verified", checked
        manifest = home.modelkeep("backups", "show", taken["backup_id"])["manifest"]

        drill = home.modelkeep("drill")
        assert drill["state"] == "passed", drill
        assert {one["component"] for one in drill["components"]} == COMPONENTS
        assert all(one["rto_seconds"] is not None and one["unverifiable"] is None for one in drill["components"]), drill
        assert [(one["model"], one["version"], one["outcome"]) for one in drill["served"]["models"]] == [
            (MODEL, "2", "same"), (OTHER_MODEL, "7", "same"),
        ]  # fmt: skip
        assert drill["negative"]["told"], drill

        home.lose()
        plan = home.modelkeep("recover", "--from", BUCKET, "--dry-run")
        assert plan["problems"] == [] and not any(made.home.iterdir()), "a plan changes nothing"
        outcome = home.modelkeep("recover", "--from", BUCKET)
        assert outcome["state"] == "recovered" and set(outcome["restored"]) == COMPONENTS
        is_back(home, manifest)

        known = home.modelkeep("status")["backups"]
        assert known["last"]["backup_id"] == taken["backup_id"]
        assert all(known["components"][name]["verified_age_seconds"] > 0 for name in COMPONENTS), known

        made.serve()
        assert (home.golden(), home.accounts(), home.uploads()) == before
        refused = home.modelkeep("recover", "--from", BUCKET, "--dry-run", code=1)["problems"]
        standing = {name for name in COMPONENTS if any(one.startswith(f"{name}: ") for one in refused)}
        assert standing == COMPONENTS - {"config", "models"}, refused  # models: the very artifacts that would come
        again = home.modelkeep("backup", "--no-prefect")
        assert again["state"] == "complete", "life goes on"


def is_back(home: Installation, manifest: dict[str, Any]) -> None:
    """What the manifest tells of is there, by counts that are ours and not the product's."""
    rows = home.rows()
    assert counted(rows) == of_manifest(manifest)
    for name, tables in rows.items():
        assert tables["debit"] == tables["credit"] != [], f"{name} is of two moments"
        assert [one[1].startswith("öl 🐘 ") for one in tables["orders"]] == [True] * 500
    queues = home.queues()
    assert queues["jobs:debit"] == queues["jobs:credit"] != [] and len(queues["jobs"]) == 200
    assert queues["state"] == {"a": "1", "b": "2"} and queues["plan"] == "gold"
    assert home.redis("GET", "cache:page") is None
    documents = home.documents()
    records = next(one for one in manifest["components"] if one["name"] == "vectors")["facts"]["collections"]
    assert len(documents) == records["prices"]["count"] >= 300
    for number in range(len(documents)):
        text, meta, vector = documents[f"p{number}"]
        assert text in (f"text {number}", "late") and meta == {"n": number}
        assert vector == [number % 17, number % 5, 1.0]
    assert home.head() == manifest["registry"]["audit_head"]["seq"] + 1


# Neither Prefect nor what a recovery does without can be imported; and that this was so is seen by the file.
NO_PREFECT = """
import pathlib, sys
for name in ("prefect", "torch", "onnx"):
    sys.modules[name] = None
pathlib.Path(__file__).with_name("was-read").touch()
"""
KNOCK = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=5)"


def test_without_prefect_registry_and_network_it_comes_back_and_is_read_without_modelkeep(
    servers: Servers, tmp_path: Path
) -> None:
    if not can_cut():
        pytest.skip("for want of: a network of its own for a process (unshare)")
    with box(tmp_path) as made:
        home = Installation(made, servers, servers.chroma)
        home.make()
        with home.written_to():
            taken = home.modelkeep("backup", "--no-prefect")
        assert taken["state"] == "complete", taken
        manifest = home.modelkeep("backups", "show", taken["backup_id"])["manifest"]
        home.lose()

        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(NO_PREFECT)
        path = f"{tmp_path / 'site'}{os.pathsep}{ROOT}"
        with doors(tmp_path / "d", servers.ports) as cut, socket.create_server(("127.0.0.1", 0)) as other:
            for port, opens in ((other.getsockname()[1], False), (servers.mariadb.port, True)):
                knock = subprocess.run(
                    [*cut, sys.executable, "-c", KNOCK, str(port)], stderr=subprocess.DEVNULL, timeout=60
                )
                assert (knock.returncode == 0) == opens, "the network is cut to all but these"
            outcome = home.modelkeep("recover", "--from", BUCKET, before=cut, PYTHONPATH=path)
        assert (tmp_path / "site" / "was-read").exists()
        assert outcome["state"] == "recovered" and set(outcome["restored"]) == COMPONENTS
        is_back(home, manifest)
        read_without_modelkeep(home, taken["backup_id"])


def read_without_modelkeep(home: Installation, backup_id: str) -> None:
    """The bucket as a folder, as any tool that copies buckets gives it, and scripts/read_backup.py with -I."""
    copy = home.folder / "copy"
    prefix = BUCKET.partition("://")[2].partition("/")[2]
    for name, versions in home.servers.store.store.buckets["bucket"].items():
        if versions:
            path = copy / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(versions[-1].data)
    done = subprocess.run(
        [
            sys.executable, "-I", str(ROOT / "scripts" / "read_backup.py"), str(copy / f"{backup_id}.manifest.json"),
            "files:uploads", str(home.folder / "out"),
        ],
        env={"PATH": os.environ["PATH"], "KEY_FILE": str(home.key)}, cwd=home.folder, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    streams = [path.read_bytes() for path in (home.folder / "out").rglob("*") if path.is_file()]
    assert any(bytes(range(256)) * 500 in one for one in streams), json.dumps(done.stdout)
