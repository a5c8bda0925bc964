"""A MariaDB's logs are shipped; what was dropped at a known moment comes back as it was in the second before; what cannot be is told."""

from __future__ import annotations

import datetime as dt
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import clock
from registry.errors import LockedError, NotFoundError
from registry.settings import Settings, build_settings
from tasks.backup import logs, places, prune, recover, recovery, run, ship, ship_mariadb, states
from tasks.backup.keyring import new_key
from tasks.backup.manifest import ManifestError
from tasks.backup.mariadb_access import access, rows
from tasks.backup.repository import open_repository
from tests.registry_servers import PASSWORD, Server, starter

LOGGING = ("--log-bin=binlog", "--server-id=7", "--binlog-format=ROW", "--sync-binlog=0")
TOML = """
[[databases]]
name = "app"
url = "{url}"
[backup]
logs = ["app"]
"""


@pytest.fixture(scope="module")
def logging(program: Callable[[str], Path]) -> Iterator[Server]:
    server = starter("mariadb", program, *LOGGING)
    yield server
    server.close()


class Shop:
    """A database with orders, whose logs are shipped, and a home that backs it up."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.url = server.create(options="CHARACTER SET utf8mb4")
        self.run("CREATE TABLE orders (id INT PRIMARY KEY AUTO_INCREMENT, text VARCHAR(40))")
        self.settings = self.configured(self.url)

    def configured(self, url: str) -> Settings:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        text = TOML.format(url=url)
        (home / "modelkeep.toml").write_text(text)
        key = self.folder / "backup.key"
        if not key.exists():
            new_key(key)
        environ = {
            "MODELKEEP_HOME": str(home), "MODELKEEP_PROFILE": "cpu", "MODELKEEP_BACKUPS": f'["{self.folder}/backups"]',
            "MODELKEEP_BACKUP_KEY_FILE": str(key),
        }  # fmt: skip
        return build_settings(home / "modelkeep.toml", text, environ=environ, cwd=self.folder)

    @property
    def name(self) -> str:
        return access(self.url).database

    def run(self, *statements: str, chosen: bool = True) -> list[tuple[Any, ...]]:
        connection = access(self.url).connect(database=chosen)
        try:
            return [rows(connection, statement) for statement in statements][-1]
        finally:
            connection.close()

    def order(self, *texts: str) -> None:
        for text in texts:
            self.run(f"INSERT INTO orders (text) VALUES ('{text}')")

    def orders(self, url: str | None = None) -> list[str]:
        connection = access(url or self.url).connect()
        try:
            return [text for (text,) in rows(connection, "SELECT text FROM orders ORDER BY id")]
        finally:
            connection.close()

    def server_has(self, url: str) -> list[Any]:
        connection = access(url).connect()
        try:
            return rows(connection, "SHOW TABLES")
        finally:
            connection.close()

    def next_second(self) -> dt.datetime:
        """The beginning of a second of the server in which nothing was committed yet."""
        [(now,)] = self.run("SELECT UTC_TIMESTAMP()")
        deadline = time.monotonic() + 30
        while True:
            [(later,)] = self.run("SELECT UTC_TIMESTAMP()")
            if later > now:
                return later.replace(tzinfo=dt.UTC)
            assert time.monotonic() < deadline, "the server's clock stands still"
            time.sleep(0.02)

    def purge(self, kept: int) -> None:
        """All but so many of its logs. The server waits with that until its engine does not need them any more."""
        deadline = time.monotonic() + 60
        while len(names := [str(row[0]) for row in self.run("SHOW BINARY LOGS")]) > kept:
            assert time.monotonic() < deadline, f"the server keeps {names}"
            self.run(f"PURGE BINARY LOGS TO '{names[-kept]}'")
            time.sleep(0.02)

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

    def aside(self) -> str:
        return self.server.create(options="CHARACTER SET utf8mb4")

    def documents(self) -> list[Path]:
        return sorted((self.folder / "backups/logs/app").glob("*/*.json"))

    def pieces(self) -> list[Path]:
        return sorted((self.folder / "backups/logs/app").glob("*/*.pieces/*"))


@pytest.fixture
def shop(logging: Server, tmp_path: Path) -> Shop:
    return Shop(logging, tmp_path)


def test_a_dropped_table_comes_back_as_it_was_in_the_second_before(shop: Shop) -> None:
    shop.order("before the backup")
    backup_id = shop.back_up()
    first = shop.ship()
    assert first.failed is None and first.gap is None and first.covers_until is not None
    shop.order("after the backup")
    other = shop.aside()
    # Written from elsewhere, about elsewhere, and into elsewhere: only what touches this database counts.
    shop.run(
        f"CREATE TABLE {shop.name}.made_from_afar (id INT PRIMARY KEY)",
        f"INSERT INTO {shop.name}.made_from_afar VALUES (5)",
        chosen=False,
    )
    shop.run(
        f"CREATE TABLE {access(other).database}.orders (id INT)",
        f"INSERT INTO {access(other).database}.orders VALUES (1)",
    )
    shop.run("CREATE EVENT nightly ON SCHEDULE EVERY 1 DAY DO DELETE FROM orders")
    assert shop.ship().failed is None
    shop.order("in a later log", "the last before")
    moment = shop.next_second()
    shop.run("DROP TABLE orders")
    shop.run("CREATE TABLE orders (id INT PRIMARY KEY AUTO_INCREMENT, text VARCHAR(40))")
    shop.order("after the drop")
    last = shop.ship()
    assert last.failed is None and last.gap is None and last.transactions == 5

    aside = shop.aside()
    plan = shop.plan(moment, into=aside)
    [step] = plan.steps
    assert plan.manifest.backup_id == backup_id and plan.problems == ()
    assert step.point is not None and step.point.short is None and len(step.point.logs) >= 2
    assert plan.lost_since == step.point.reaches and dt.datetime.fromisoformat(plan.lost_since) == moment
    assert step.point.text.startswith("binlog.") and not any("logs" in warning for warning in plan.warnings)
    outcome = shop.recover(moment, into=aside)
    assert outcome.state == "recovered", outcome.failed
    point = outcome.restored["database:app"]["point"]
    assert dt.datetime.fromisoformat(point["last_commit"]) < moment and point["stopped_at"]["log"].startswith("binlog.")
    assert shop.orders(aside) == ["before the backup", "after the backup", "in a later log", "the last before"]
    looked = access(aside).connect()
    assert rows(looked, "SELECT id FROM made_from_afar") == [(5,)]
    assert [
        row[0]
        for row in rows(
            looked, f"SELECT status FROM information_schema.events WHERE event_schema = '{access(aside).database}'"
        )
    ] == ["ENABLED"]
    looked.close()
    assert shop.orders() == ["after the drop"]  # what is live was not touched
    kept = b"".join(path.read_bytes() for path in (shop.folder / "backups/logs").rglob("*") if path.is_file())
    assert PASSWORD.encode() not in kept


def test_a_moment_after_the_last_shipped_log_brings_what_was_shipped_and_says_what_is_lost(shop: Shop) -> None:
    shop.back_up()
    shop.order("shipped")
    covers = shop.ship().covers_until
    shop.order("never shipped")
    moment = shop.next_second()
    plan = shop.plan(moment, into=shop.aside())
    assert plan.lost_since == covers
    assert any(f"what was written after {covers} is lost: nothing was shipped since" in one for one in plan.warnings)

    aside = shop.aside()
    assert shop.recover(moment, into=aside).state == "recovered"
    assert shop.orders(aside) == ["shipped"]
    assert shop.ship().logs == shop_logs(shop)[-1:]
    assert shop.ship().logs == ()  # nothing was written since: no log is closed for it, and none is shipped
    [step] = shop.plan(moment, into=shop.aside()).steps
    assert step.point is not None and step.point.short is None


def shop_logs(shop: Shop) -> tuple[str, ...]:
    return tuple(path.name.removesuffix(".json") for path in shop.documents())


def test_a_moment_before_the_first_backup_is_refused(shop: Shop) -> None:
    shop.ship()
    moment = shop.next_second() - dt.timedelta(seconds=30)
    shop.back_up()
    with pytest.raises(NotFoundError, match="no backup that was taken before"):
        shop.plan(moment)


def test_without_a_backup_of_these_logs_it_is_said_that_they_are_of_no_use_yet(shop: Shop) -> None:
    found = shop.ship()
    assert found.failed is None and found.gap is not None and "modelkeep backup --components database:app" in found.gap
    assert ship.exit_code([found]) == 3
    shop.back_up()
    assert shop.ship().gap is None


def test_a_log_that_was_purged_before_it_was_shipped_is_a_gap_until_the_next_backup(shop: Shop) -> None:
    shop.back_up()
    shop.order("shipped")
    covers = shop.ship().covers_until
    shop.order("purged")
    shop.run("FLUSH BINARY LOGS")
    shop.order("after the gap")
    shop.run("FLUSH BINARY LOGS")
    shop.purge(2)
    found = shop.ship()
    assert found.failed is None and found.gap is not None and ship.exit_code([found]) == 3
    assert f"since {covers}" in found.gap and "the server purged what was between" in found.gap
    moment = shop.next_second()
    plan = shop.plan(moment, into=shop.aside())
    assert plan.lost_since == covers and any("the server purged what was between" in one for one in plan.warnings)
    assert shop.ship().gap == found.gap  # it is said again each time
    shop.back_up()
    assert shop.ship().gap is None


def test_an_empty_log_that_was_purged_is_no_gap(shop: Shop) -> None:
    shop.back_up()
    shop.ship()
    shop.run("FLUSH BINARY LOGS", "FLUSH BINARY LOGS")
    shop.purge(1)
    shop.order("still one after the other")
    found = shop.ship()
    assert found.failed is None and found.gap is None and found.transactions == 1


def test_another_server_or_one_that_begins_anew_is_never_taken_for_the_same(shop: Shop) -> None:
    shop.back_up()
    shop.ship()
    shop.order("lost with the first server")
    shop.run("SET GLOBAL server_id = 8")
    try:
        found = shop.ship()
        assert found.gap is not None and "it is another server" in found.gap
        shop.back_up()
        shop.order("shipped")
        assert shop.ship().gap is None
        shop.order("lost with its logs")
        shop.run("RESET MASTER")
        shop.order("in a log of an old name")
        found = shop.ship()
        assert found.gap is not None and "began anew" in found.gap
        plan = shop.plan(shop.next_second(), into=shop.aside())
        assert any("is lost" in one and "began anew" in one for one in plan.warnings)
    finally:
        shop.run("SET GLOBAL server_id = 7")


def test_a_damaged_or_a_missing_shipped_log_is_told_and_nothing_is_restored(shop: Shop) -> None:
    shop.back_up()
    for text in ("first", "second", "third"):
        shop.order(text)
        assert shop.ship().failed is None
    moment = shop.next_second()
    [piece] = (shop.documents()[-2].with_name(shop.documents()[-2].name.removesuffix(".json") + ".pieces")).iterdir()
    good = piece.read_bytes()
    piece.chmod(0o644)
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[: len(good) // 2], b""):
        piece.write_bytes(bad)
        aside = shop.aside()
        outcome = shop.recover(moment, into=aside)
        assert outcome.state == "partial" and "is damaged or incomplete" in outcome.failed["database:app"]
        assert shop.server_has(aside) == []
    piece.write_bytes(good)

    document = shop.documents()[-2]
    document.write_bytes(document.read_bytes().replace(b'"transactions": 1', b'"transactions": 2'))
    aside = shop.aside()
    with pytest.raises(ManifestError, match="signature"):
        shop.plan(moment, into=aside)
    document.unlink()
    plan = shop.plan(moment, into=aside)
    assert any("is lost: a log between" in one for one in plan.warnings)
    assert dt.datetime.fromisoformat(plan.lost_since) < moment


def test_ship_logs_is_killed_at_each_step_and_the_next_run_leaves_nothing_out(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.back_up()
    texts = []
    for step in range(5):
        texts.append(f"before kill {step}")
        shop.order(texts[-1])
        killed_at(shop, step, monkeypatch)
    found = shop.ship()
    assert found.failed is None and found.gap is None
    moment = shop.next_second()
    shop.run("CREATE TABLE users (id INT PRIMARY KEY)", "DROP TABLE orders")
    shop.ship()
    outcome = shop.recover(moment, components=("database:app.orders",))
    assert outcome.state == "recovered", outcome.failed
    assert shop.orders() == texts
    assert shop.run("SHOW TABLES") == [("orders",), ("users",)]  # what else is there was left alone
    assert not (shop.folder / "home" / ship.WORK).exists()


def test_logs_that_no_kept_backup_needs_go_and_a_prune_that_is_killed_at_each_step_leaves_the_way_to_a_moment(
    shop: Shop,
) -> None:
    old = shop.back_up()
    for text in ("one", "two"):
        shop.order(text)
        shop.ship()
    new = shop.back_up()
    shop.order("three")
    moment = shop.next_second()
    shop.order("too late")
    shop.ship()
    aside = shop.aside()
    before = shop.plan(moment, into=aside).steps[0].point
    assert before is not None and before.short is None
    settings = only_the_newest(shop.settings)
    repository = open_repository(settings)
    for backup_id in (old, new):
        facts = {"components": {"database:app": {"outcome": "verified"}}}
        repository.note_state(backup_id, states.VERIFIED, facts)
    first = prune.carry_out(settings, repository, now=clock.now())
    assert first.removed == (old,) and first.logs.removed == {}, "somebody may be restoring it"
    tomorrow = clock.now() + dt.timedelta(days=1.1)
    [logs_shown] = prune.preview(repository, prune.policy_of(settings), tomorrow, dt.timedelta(days=1)).logs.databases
    assert 2 <= len(logs_shown.goes) < logs_shown.count and new in logs_shown.rule
    step = 0
    while pruned_until(settings, step, tomorrow):
        assert step < 50
        assert shop.plan(moment, into=aside).steps[0].point == before
        assert shop.ship().failed is None
        step += 1
    assert step >= 4, "a document and a piece of each of two logs"
    left = shop_logs(shop)
    assert not set(left) & {one.log for one in logs_shown.goes} and set(left) >= {one.log for one in before.logs}
    assert not [path for path in shop.pieces() if path.parent.name.removesuffix(".pieces") not in left]
    [again] = prune.carry_out(settings, open_repository(settings), now=tomorrow).logs.databases
    assert again.goes == ()
    assert shop.recover(moment, into=aside).state == "recovered"
    assert shop.orders(aside) == ["one", "two", "three"]


def only_the_newest(settings: Settings) -> Settings:
    section = {"keep_daily": 0, "keep_weekly": 0, "keep_monthly": 0, "minimum_redundancy": 1, "unverified_days": 0.0}
    return settings.model_copy(update={"backup": settings.backup.model_copy(update=section)})


def pruned_until(settings: Settings, step: int, now: dt.datetime) -> bool:
    """In a child: SIGKILL before the so many-th name below logs/ is deleted. False where there were not so many."""
    child = os.fork()
    if child == 0:
        try:
            count, delete = iter(range(999)), places.DirectoryPlace.delete

            def dying(self: places.DirectoryPlace, name: str) -> bool:
                if name.startswith("logs/") and next(count) == min(step, 1):
                    os.kill(os.getpid(), signal.SIGKILL)
                return delete(self, name)

            places.DirectoryPlace.delete = dying  # type: ignore[method-assign]
            prune.carry_out(settings, open_repository(settings), now=now)
            os._exit(0)
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def killed_at(shop: Shop, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child: SIGKILL while a log is fetched (0), before its pieces (1), its document (2) and the head (3) are put, at the end (4)."""
    child = os.fork()
    if child == 0:
        try:
            count, put = iter(range(1, 9)), logs.Shelf._put

            def dying(self: logs.Shelf, name: str, data: bytes) -> None:
                if next(count) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                put(self, name, data)

            def fetching(*_: Any) -> bytes:
                os.kill(os.getpid(), signal.SIGKILL)
                return b""

            monkeypatch.setattr(logs.Shelf, "_put", dying)
            if step == 0:
                monkeypatch.setattr(ship_mariadb, "run", fetching)
            shop.ship()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.long
def test_a_user_without_reload_ships_the_log_that_is_being_written(shop: Shop) -> None:
    shop.run(
        f"CREATE OR REPLACE USER 'shipper'@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'",
        "GRANT BINLOG MONITOR, REPLICATION SLAVE ON *.* TO 'shipper'@'127.0.0.1'",
        f"GRANT ALL ON {shop.name}.* TO 'shipper'@'127.0.0.1'",
    )
    shop.back_up()
    shop.settings = shop.configured(shop.url.replace("keeper:", "shipper:"))
    shop.order("one")
    first = shop.ship()
    assert first.failed is None and any("lacks RELOAD" in one for one in first.warnings)
    before = len(shop.pieces())
    shop.order("two")
    second = shop.ship()
    assert second.failed is None and second.gap is None and second.logs == first.logs
    assert len(shop.pieces()) == before  # the longer copy replaced the shorter
    shop.run("FLUSH BINARY LOGS")
    shop.order("three")
    assert len(shop.ship().logs) == 2
    moment = shop.next_second()
    shop.settings = shop.configured(shop.url)
    aside = shop.aside()
    assert shop.recover(moment, into=aside).state == "recovered"
    assert shop.orders(aside) == ["one", "two", "three"]


def test_without_log_bin_it_is_refused_and_recovery_falls_back_to_the_backup(mariadb: Server, tmp_path: Path) -> None:
    shop = Shop(mariadb, tmp_path)
    shop.order("in the backup")
    backup_id = shop.back_up()
    found = shop.ship()
    assert found.failed is not None and "set log_bin" in found.failed and ship.exit_code([found]) == 1
    plan = shop.plan(shop.next_second(), into=shop.aside())
    assert plan.manifest.backup_id == backup_id and plan.steps[0].point is None
    assert any("only the backup of" in one for one in plan.warnings)


def test_two_shipments_at_once_and_a_database_of_another_kind_are_told(shop: Shop) -> None:
    with ship._alone(shop.settings.home), pytest.raises(LockedError, match="already"):
        shop.ship()
    shop.settings = shop.configured(f"sqlite:///{shop.folder}/app.db")
    assert "of MariaDB and PostgreSQL only" in str(shop.ship().failed)


def test_a_place_that_was_away_gets_the_logs_that_it_lacks(shop: Shop) -> None:
    shop.back_up()
    shop.order("one")
    shop.ship()
    second = shop.folder / "second"
    shop.settings = shop.settings.model_copy(update={"backups": [*shop.settings.backups, str(second)]})
    found = shop.ship()
    assert found.failed is None and any("are now in places that lacked them" in one for one in found.warnings)
    there = sorted(path.relative_to(second) for path in (second / "logs").rglob("*.json"))
    first = shop.folder / "backups"
    assert there == sorted(path.relative_to(first) for path in (first / "logs").rglob("*.json"))
    for path in (first / "logs").rglob("*.json"):
        path.unlink()
    [step] = shop.plan(shop.next_second(), into=shop.aside()).steps
    assert step.point is not None and step.point.logs
