"""Backups from the command line: taken, listed, checked, killed in the middle, two at once, and never a secret anywhere."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import audit
from tasks.backup.locking import home_lock
from tests.e2e.harness import Box, box, build, wait_for, write_golden

SECRETS = {
    "database password": "qX7marked-database-password",
    "queue password": "qX7marked-queue-password",
    "S3 secret": "qX7marked-s3-secret",
    "API key": "",
    "backup key": "",
}


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Box]:
    """A home with a registry, a SQLite database of the application, a folder and a configuration."""
    with box(tmp_path) as found:
        assert found.database.revision() is not None
        with sqlite3.connect(found.folder / "app.db") as connection:
            connection.execute("CREATE TABLE generations (id INTEGER PRIMARY KEY, prompt TEXT)")
            connection.executemany(
                "INSERT INTO generations (prompt) VALUES (?)", [(f"a cat {n}",) for n in range(2000)]
            )
        connection.close()
        (found.folder / "uploads").mkdir()
        for number in range(50):
            (found.folder / "uploads" / f"{number}.bin").write_bytes(os.urandom(20_000))
        (found.home / "modelkeep.toml").write_text(
            f"""
backups = ["{found.folder}/backups"]
[[databases]]
name = "app"
url = "sqlite:///{found.folder}/app.db"
[[files]]
name = "uploads"
path = "{found.folder}/uploads"
"""
        )
        yield found


@pytest.fixture
def made(bare: Box) -> Box:
    """With a model that is the stable one."""
    path = build(bare.folder / "v1.onnx", seed=1, ballast_mb=3)
    bare.register("1", path, golden=write_golden(bare.folder / "golden.npz", path))
    bare.settle_by_hand("1")
    return bare


def _json(done: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    assert done.returncode == code, done.stderr + done.stdout
    return json.loads(done.stdout)


def _backup(found: Box, *options: str) -> subprocess.CompletedProcess[str]:
    return found.modelkeep("backup", "--no-prefect", "--json", *options, timeout=180)


def test_a_backup_of_everything_is_taken_listed_and_verified(made: Box) -> None:
    taken = _json(_backup(made, "--reason", "first"))
    assert taken["state"] == "complete", taken
    names = [one["name"] for one in taken["components"]]
    assert names == ["registry", "models", "database:app", "files:uploads", "config"]
    assert Path(made.folder / "backups" / f"{taken['backup_id']}.manifest.json").is_file()
    checked = _json(made.modelkeep("backups", "verify", taken["backup_id"], "--no-prefect", "--json", timeout=300))
    assert checked["state"] == "verified", checked
    assert set(checked["components"]) == set(names)
    [listed] = _json(made.modelkeep("backups", "list", "--json"))
    assert (listed["backup_id"], listed["state"], listed["reason"]) == (taken["backup_id"], "verified", "first")


def test_a_wrong_component_a_second_backup_and_a_backup_that_is_not_there_have_their_exit_codes(bare: Box) -> None:
    assert _backup(bare, "--components", "queues").returncode == 2
    assert _backup(bare, "--components", "database:other").returncode == 2
    assert bare.modelkeep("backups", "show", "20200101T000000Z-000000").returncode == 1
    assert bare.modelkeep("backups", "show", "yesterday").returncode == 2
    with home_lock(bare.home, "backup"):
        second = _backup(bare)
    assert (second.returncode, second.stdout) == (4, "")
    assert f"process {os.getpid()} on " in second.stderr


def test_killed_at_any_point_it_leaves_no_half_backup_and_the_next_one_is_whole(bare: Box) -> None:
    backups = bare.folder / "backups"

    def there_or_over(pattern: str, but: set[Path], process: subprocess.Popen[bytes]) -> Callable[[], bool]:
        return lambda: bool(set(backups.glob(pattern)) - but) or process.poll() is not None

    killed = 0
    for pattern in ("intents/*.json", "states/*/*-running.json", "objects/*/*", "*.manifest.json"):
        # Something new to store each time, so that there are objects to wait for.
        (bare.folder / "uploads" / "0.bin").write_bytes(os.urandom(300_000))
        before = set(backups.glob(pattern))
        process = bare.start("killed", "modelkeep", "backup", "--no-prefect")
        wait_for(pattern, there_or_over(pattern, before, process), seconds=120, every=0.0005)
        os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait(timeout=30) == -signal.SIGKILL
    assert killed, "every one had ended before it could be killed"

    done = _json(_backup(bare))
    assert done["state"] == "complete", done
    rows = _json(bare.modelkeep("backups", "list", "--json"))
    assert {row["state"] for row in rows} <= {"complete", "failed"}
    assert list((backups / "intents").glob("*")) == []
    assert list((bare.home / "backup-work").glob("*")) == []
    read = _json(bare.modelkeep("backups", "verify", done["backup_id"], "--no-prefect", "--sample", "1", "--json"))
    assert {one["outcome"] for one in read["components"].values()} == {"sampled"}, read
    with bare.database.read() as session:
        assert audit.verify(session, bare.home / "audit.anchors").faults == []


@pytest.mark.long
def test_killed_at_forty_random_moments_it_leaves_no_half_backup(bare: Box) -> None:
    draw = random.Random(6)
    ended = 0
    for _ in range(40):
        (bare.folder / "uploads" / "0.bin").write_bytes(os.urandom(300_000))
        process = bare.start("killed", "modelkeep", "backup", "--no-prefect")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(0.3, 3.0))
            ended += 1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        bare.forget(process)
    done = _json(_backup(bare))
    assert (done["state"], ended < 40) == ("complete", True)
    rows = _json(bare.modelkeep("backups", "list", "--json"))
    assert {row["state"] for row in rows} <= {"complete", "failed"}
    assert [row["sequence"] for row in rows] == sorted({row["sequence"] for row in rows}, reverse=True)
    for row in rows:
        if row["state"] == "complete":
            read = _json(
                bare.modelkeep("backups", "verify", row["backup_id"], "--no-prefect", "--sample", "1", "--json")
            )
            assert {one["outcome"] for one in read["components"].values()} == {"sampled"}, read
    assert list((bare.home / "backup-work").glob("*")) == []
    with bare.database.read() as session:
        assert audit.verify(session, bare.home / "audit.anchors").faults == []


def test_no_secret_is_in_logs_manifests_states_the_ledger_or_arguments(bare: Box) -> None:
    secrets = dict(SECRETS)
    key = _json(bare.modelkeep("keys", "create", "keeper", "--role", "operate", "--json"))
    secrets["API key"] = key["key"].rpartition("_")[2]
    (bare.folder / "api.key").write_text(key["key"])
    (bare.folder / "api.key").chmod(0o600)
    assert bare.modelkeep("backups", "new-key", str(bare.folder / "backup.key")).returncode == 0
    secrets["backup key"] = (bare.folder / "backup.key").read_text().splitlines()[-1]
    config = bare.home / "modelkeep.toml"
    config.write_text(
        f"""
api_key_file = "{bare.folder}/api.key"
backup_key_file = "{bare.folder}/backup.key"
redis_url = "redis://:{secrets["queue password"]}@127.0.0.1:1/0"
"""
        + config.read_text()
        + f"""
[[databases]]
name = "away"
url = "mysql+pymysql://app:{secrets["database password"]}@127.0.0.1:1/app"
[queues]
names = ["jobs"]
"""
    )
    bare.extra.update({"AWS_SECRET_ACCESS_KEY": secrets["S3 secret"], "AWS_ACCESS_KEY_ID": "marked"})
    arguments: set[str] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            arguments.update(_arguments())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = _backup(bare, "--components", "database,queues,config")
        backup_id = _json(done, 3)["backup_id"]
        checked = bare.modelkeep("backups", "verify", backup_id, "--no-prefect", timeout=300)
    finally:
        stop.set()
        watcher.join()
    shown = bare.modelkeep("backups", "show", backup_id, "--json")
    trail = bare.modelkeep("audit", "list", "--json")
    manifest = json.loads(shown.stdout)["manifest"]
    assert {one["name"]: one["state"] for one in manifest["components"]}["database:away"] == "failed"
    assert manifest["signature"] is not None
    texts = {
        "backup": done.stdout + done.stderr,
        "verify": checked.stdout + checked.stderr,
        "show": shown.stdout + shown.stderr,
        "audit": trail.stdout + trail.stderr,
        "arguments": "\n".join(arguments),
        **{str(path): path.read_bytes().decode(errors="replace") for path in _written(bare)},
    }
    assert any("tasks.backup.verify" in line for line in arguments), "the watch saw nothing"
    for name, secret in secrets.items():
        assert secret, name
        assert [where for where, text in texts.items() if secret in text] == [], name


def _written(bare: Box) -> list[Path]:
    """All that a backup writes, beside the registry's own file."""
    found = [path for path in (bare.folder / "backups").rglob("*") if path.is_file()]
    return [*found, bare.home / "backups.json", bare.home / "backup.lock", bare.home / "audit.anchors"]


def _arguments() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
