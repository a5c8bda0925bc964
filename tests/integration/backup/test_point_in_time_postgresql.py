"""A PostgreSQL's log is shipped after a base backup of its cluster; what was dropped at a known moment comes back as it was before."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import clock
from registry.settings import Settings, build_settings
from tasks.backup import logs, prune, recover, recovery, run, ship, ship_postgresql, states
from tasks.backup.keyring import new_key
from tasks.backup.postgresql_access import access
from tasks.backup.repository import open_repository
from tests.registry_servers import PASSWORD, Server, starter

LOGGING = ("-c", "wal_level=replica", "-c", "max_wal_senders=5", "-c", "max_replication_slots=20")
TOML = """
[[databases]]
name = "app"
url = "{url}"
[backup]
logs = ["app"]
"""


@pytest.fixture(scope="module")
def logging(program: Callable[[str], Path]) -> Iterator[Server]:
    server = starter("postgresql", program, *LOGGING)
    yield server
    server.close()


class Shop:
    """A database with orders, in a cluster whose log is shipped, and a home that backs it up."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.url = server.create()
        self.run("CREATE TABLE orders (id SERIAL PRIMARY KEY, text TEXT)")
        home = folder / "home"
        home.mkdir()
        text = TOML.format(url=self.url)
        (home / "modelkeep.toml").write_text(text)
        new_key(folder / "backup.key")
        environ = {
            "MODELKEEP_HOME": str(home), "MODELKEEP_PROFILE": "cpu", "MODELKEEP_BACKUPS": f'["{folder}/backups"]',
            "MODELKEEP_BACKUP_KEY_FILE": str(folder / "backup.key"),
        }  # fmt: skip
        self.settings: Settings = build_settings(home / "modelkeep.toml", text, environ=environ, cwd=folder)

    def run(self, statement: str, url: str | None = None) -> list[tuple[Any, ...]]:
        with contextlib.closing(access(url or self.url).connect()) as connection:
            found = connection.execute(statement.encode())
            return list(found.fetchall()) if found.description else []

    def order(self, *texts: str) -> None:
        for text in texts:
            self.run(f"INSERT INTO orders (text) VALUES ('{text}')")

    def orders(self, url: str | None = None) -> list[str]:
        return [text for (text,) in self.run("SELECT text FROM orders ORDER BY id", url)]

    def now(self) -> dt.datetime:
        """A moment of the server, after which nothing has been committed yet."""
        [(now,)] = self.run("SELECT clock_timestamp()")
        deadline = time.monotonic() + 30
        while self.run("SELECT clock_timestamp()")[0][0] <= now:
            assert time.monotonic() < deadline, "the server's clock stands still"
        assert isinstance(now, dt.datetime)
        return now

    def back_up(self) -> str:
        found = run.back_up(self.settings, run.Request(("database",)))
        assert found.state == "complete", found
        return found.backup_id

    def ship(self) -> ship.Shipment:
        [found] = ship.ship(self.settings)
        return found

    def plan(self, at: dt.datetime, **asked: Any) -> recover.Plan:
        return recovery.prepare(self.settings, recovery.Request(at=at, components=("database:app",), **asked)).plan

    def recover(self, at: dt.datetime, **asked: Any) -> recover.Outcome:
        request = recovery.Request(at=at, **{"components": ("database:app",), **asked})
        return recovery.carry_out(recovery.prepare(self.settings, request), request)


@pytest.fixture
def shop(logging: Server, tmp_path: Path) -> Iterator[Shop]:
    found = Shop(logging, tmp_path)
    yield found
    found.run("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")


def test_a_dropped_table_comes_back_as_it_was_at_the_moment_before(shop: Shop) -> None:
    shop.order("before the backup")
    shop.back_up()
    first = shop.ship()
    assert first.failed is None and first.gap is None and first.logs[0].endswith(".base") and len(first.logs) > 1
    shop.order("after the backup")
    assert shop.ship().failed is None
    shop.order("the last before")
    moment = shop.now()
    shop.run("DROP TABLE orders")
    shop.run("CREATE TABLE orders (id SERIAL PRIMARY KEY, text TEXT)")
    shop.order("after the drop")
    assert shop.ship().failed is None

    aside = shop.server.create()
    plan = shop.plan(moment, into=aside)
    [step] = plan.steps
    assert plan.problems == () and step.point is not None and step.point.short is None
    outcome = shop.recover(moment, into=aside)
    assert outcome.state == "recovered", outcome.failed
    assert shop.orders(aside) == ["before the backup", "after the backup", "the last before"]
    assert shop.orders() == ["after the drop"]  # what is live was not touched

    shop.order("shipped", "never shipped")
    later = shop.now()
    beyond = shop.server.create()
    plan = shop.plan(later, into=beyond)
    assert any("is lost: nothing was shipped since" in one for one in plan.warnings)
    outcome = shop.recover(later, into=beyond)
    assert outcome.state == "recovered", outcome.failed
    assert shop.orders(beyond) == ["after the drop"]
    kept = b"".join(path.read_bytes() for path in (shop.folder / "backups/logs").rglob("*") if path.is_file())
    assert PASSWORD.encode() not in kept


def test_a_damaged_or_a_missing_log_is_told_and_nothing_is_restored(shop: Shop) -> None:
    shop.back_up()
    for text in ("one", "two", "three"):
        shop.order(text)
        assert shop.ship().failed is None
    moment = shop.now()
    shop.order("later")
    shop.ship()
    folder = shop.folder / "backups/logs/app/000001"
    document = sorted(folder.glob("*[0-9A-F].json"))[-3]
    [piece] = folder.joinpath(document.name.removesuffix(".json") + ".pieces").iterdir()
    good = piece.read_bytes()
    piece.chmod(0o644)
    piece.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    aside = shop.server.create()
    outcome = shop.recover(moment, into=aside)
    assert "is damaged or incomplete" in outcome.failed["database:app"]
    assert shop.run("SELECT relname FROM pg_class WHERE relname = 'orders'", aside) == []
    piece.write_bytes(good)
    document.unlink()
    plan = shop.plan(moment, into=aside)
    assert any("is lost: a log before" in one for one in plan.warnings)
    assert dt.datetime.fromisoformat(plan.lost_since) < moment


def test_bases_and_logs_that_no_kept_backup_needs_go_and_a_moment_after_the_oldest_comes_back(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.order("one")
    old = shop.back_up()
    first = shop.ship()
    shop.order("two")
    with monkeypatch.context() as patch:
        patch.setattr(ship_postgresql, "BASE_DAYS", 0.0)
        second = shop.ship()
    assert first.logs[0].endswith(".base") and second.logs[0].endswith(".base")
    new = shop.back_up()
    shop.order("three")
    moment = shop.now()
    shop.order("too late")
    shop.ship()
    aside = shop.server.create()
    before = shop.plan(moment, into=aside).steps[0].point
    section = {"keep_daily": 0, "keep_weekly": 0, "keep_monthly": 0, "minimum_redundancy": 1, "unverified_days": 0.0}
    settings = shop.settings.model_copy(update={"backup": shop.settings.backup.model_copy(update=section)})
    repository = open_repository(settings)
    assert prune.carry_out(settings, repository, now=clock.now()).logs.removed == {}, "the old backup needs them"
    for backup_id in (old, new):
        facts = {"components": {"database:app": {"outcome": "verified"}}}
        repository.note_state(backup_id, states.VERIFIED, facts)
    found = prune.carry_out(settings, repository, now=clock.now())
    assert found.removed == (old,) and found.logs.removed == {}, "somebody may be restoring it"
    found = prune.carry_out(settings, repository, now=clock.now() + dt.timedelta(days=1.1))
    assert found.logs.waits is None
    assert found.logs.databases[0].removed[0] == f"000001/{first.logs[0]}"
    left = [log for _, log in logs.Shelf(repository, "app").names()]
    assert left[0] == second.logs[0] and not set(first.logs) & set(left)
    assert shop.plan(moment, into=aside).steps[0].point == before
    assert shop.recover(moment, into=aside).state == "recovered"
    assert shop.orders(aside) == ["one", "two", "three"]


@pytest.mark.long
def test_what_was_removed_before_it_was_shipped_is_told_and_a_new_base_backup_is_taken(shop: Shop) -> None:
    shop.order("before")
    shop.back_up()
    covers = shop.ship().covers_until
    shop.run("SELECT pg_drop_replication_slot('modelkeep_app')")
    shop.order("lost")
    lost = shop.now()
    for number in range(4):
        shop.order(f"filler {number}")
        shop.run("SELECT pg_switch_wal()")
    shop.run("CHECKPOINT")
    found = shop.ship()
    assert found.failed is None and any(f"between {covers} and " in one for one in found.warnings), found
    assert found.logs[0].endswith(".base")
    aside = shop.server.create()
    plan = shop.plan(lost, into=aside)
    assert plan.lost_since == covers and any("removed what follows" in one for one in plan.warnings)
    shop.order("after the gap")
    moment = shop.now()
    shop.run("DROP TABLE orders")
    shop.ship()
    assert shop.recover(moment, components=("database:app.orders",)).state == "recovered"
    assert shop.orders() == ["before", "lost", *(f"filler {number}" for number in range(4)), "after the gap"]


@pytest.mark.long
def test_a_run_that_is_killed_leaves_nothing_out(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.back_up()
    for step in range(1, 4):
        shop.order(f"before kill {step}")
        killed_at(shop, step, monkeypatch)
    found = shop.ship()
    assert found.failed is None, found
    plan = shop.plan(shop.now(), into=shop.server.create())
    [step_] = plan.steps
    assert step_.point is not None and step_.point.logs[0].log.endswith(".base") and len(step_.point.logs) > 1
    assert plan.lost_since == found.covers_until


def killed_at(shop: Shop, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child: SIGKILL before the so many-th thing is put."""
    child = os.fork()
    if child == 0:
        try:
            count, put = iter(range(1, 99)), logs.Shelf._put

            def dying(self: logs.Shelf, name: str, data: bytes) -> None:
                if next(count) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                put(self, name, data)

            monkeypatch.setattr(logs.Shelf, "_put", dying)
            shop.ship()
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
