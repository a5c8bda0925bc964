"""Shipping of logs, as far as it needs no server: what is known of it afterwards."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import ledger as ledger_file
from registry.errors import LockedError, StorageError
from registry.sections import BackupSection, Database
from registry.settings import Settings
from tasks.backup import ledger, ship, ship_mariadb
from tasks.backup.keyring import open_keyring, read_key
from tasks.backup.log_lock import shipping
from tasks.backup.logs import Shelf
from tasks.backup.mariadb_access import Access
from tasks.backup.places import Place
from tasks.backup.repository import Repository
from tests.backup_content import keyed
from tests.unit.tasks.backup.log_history import MariaDB, MemoryPlace


def _settings(home: Path, *logs: str) -> Settings:
    databases = [Database(name=name, url=f"sqlite:///{home}/{name}.db") for name in ("app", "shop")]
    return Settings(
        home=home, backups=[str(home / "backups")], databases=databases, backup=BackupSection(logs=list(logs))
    )


def _failed(home: Path) -> dict[str, str]:
    rows = (ledger_file.read(home) or {}).get("logs", {})
    return {name: str(row["failed"]) for name, row in rows.items()}


def test_where_the_backups_do_not_answer_each_database_counts_as_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise StorageError("the bucket does not answer")

    monkeypatch.setattr(ship, "open_repository", away)
    with pytest.raises(StorageError, match="does not answer"):
        ship.ship(_settings(tmp_path, "app", "shop"))
    assert _failed(tmp_path) == {"app": "the bucket does not answer", "shop": "the bucket does not answer"}


def test_logs_that_are_shipped_no_more_are_forgotten_and_two_shipments_do_not_wait(tmp_path: Path) -> None:
    [found] = ship.ship(_settings(tmp_path, "app"))
    assert found.failed is not None and set(_failed(tmp_path)) == {"app"}
    with shipping(tmp_path), pytest.raises(LockedError):
        ship.ship(_settings(tmp_path, "app"))
    assert ship.ship(_settings(tmp_path)) == [] and _failed(tmp_path) == {}
    known = ledger.summary(tmp_path, ["app"])
    assert known is not None and known["logs"]["app"]["covers_until"] is None


class Bucket(MemoryPlace):
    """`locked`: what was to be locked for longer; `why`: why that fails."""

    def __init__(self, shown: str, why: str | None = None) -> None:
        super().__init__(shown)
        self.why, self.locked = why, list[str]()

    def keep(self, name: str, until: dt.datetime) -> bool:
        self.locked.append(name)
        if self.why is not None:
            raise StorageError(f"{name} could not be locked in {self.shown}: {self.why}")
        return True


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[ship.Shipment]]:
    """Ship `logs` new logs of a MariaDB to these buckets, which have object lock."""
    history = MariaDB()

    def one(buckets: list[Bucket], logs: int = 1, tell: Callable[[str], None] = lambda _: None) -> list[ship.Shipment]:
        places: list[Place] = list(buckets)
        if not (tmp_path / "backup.key").exists():
            keyed(places, tmp_path)
        repository = Repository(places, open_keyring(places, read_key(tmp_path / "backup.key"), create=True))

        def found(_: Access, shelf: Shelf, *__: object) -> ship_mariadb.Found:
            history.repository, history.shelf = repository, shelf
            for _number in range(logs):
                history.write()
                history.ship()
            head = shelf.head()
            assert head is not None
            return ship_mariadb.Found(tuple(shelf.read(*name) for name in shelf.names()[-logs:] if logs), head, ())

        monkeypatch.setattr(ship, "open_repository", lambda *_, **__: repository)
        monkeypatch.setattr(ship_mariadb, "ship", found)
        settings = Settings(
            home=tmp_path,
            databases=[Database(name="app", url="mysql+pymysql://keeper@db/app")],
            backup=BackupSection(logs=["app"], object_lock="compliance"),
        )
        return ship.ship(settings, tell=tell)

    return one


def _keys(bucket: Bucket) -> int:
    return sum(name.startswith("keys/") for name in bucket.locked)


def test_logs_whose_key_could_not_be_locked_for_longer_are_shipped_and_that_is_told(
    shipped: Callable[..., list[ship.Shipment]],
) -> None:
    first, second, said = Bucket("first", "the credentials do not allow it"), Bucket("second"), list[str]()
    [one] = shipped([first, second], tell=said.append)
    assert one.failed is None and one.logs == ("binlog.000001",) and ship.exit_code([one]) == 3
    assert [_keys(bucket) for bucket in (first, second)] == [1, 1], "the other place is asked too"
    assert any("credentials do not allow it" in text for text in one.warnings)
    assert not any("NOT SHIPPED" in line for line in said) and any(
        "credentials do not allow it" in line for line in said
    )
    assert all("000001/binlog.000001" in bucket.logs() for bucket in (first, second))


def test_the_key_is_locked_for_as_long_as_logs_that_are_brought_to_a_place_later(
    shipped: Callable[..., list[ship.Shipment]],
) -> None:
    first, second = Bucket("first"), Bucket("second")
    shipped([first])
    shipped([first], logs=0)
    assert _keys(first) == 1, "nothing was put but the head"
    [one] = shipped([first, second], logs=0)
    assert one.logs == () and second.logs() == ["000001/binlog.000001"] and _keys(second) == 1


def test_a_full_disk_hides_neither_why_nothing_is_shipped_nor_that_logs_are(
    shipped: Callable[..., list[ship.Shipment]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("backups.json cannot be written: the disk is full")

    def away(*_: object, **__: object) -> None:
        raise StorageError("the bucket does not answer")

    monkeypatch.setattr(ledger, "note_shipped", full)
    said: list[str] = []
    [one] = shipped([Bucket("first")], tell=said.append)
    assert one.failed is None and len(one.logs) == 1
    assert (
        sum("the disk is full" in line for line in said)
        == sum("the disk is full" in text for text in one.warnings)
        == 1
    )
    monkeypatch.setattr(ship, "open_repository", away)
    said.clear()
    with pytest.raises(StorageError, match="the bucket does not answer"):
        ship.ship(_settings(tmp_path, "app", "shop"), tell=said.append)
    assert sum("the disk is full" in line for line in said) == 2
