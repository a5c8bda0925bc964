"""What a prune removes is on record at once: a kill, a registry that is away or a full disk leaves no change that nobody knows of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry import clock
from registry.connect import open_database
from registry.errors import StorageError
from registry.schema import AuditEvent
from registry.sections import BackupSection
from registry.settings import Settings
from tasks.backup import garbage, ledger, log_plan, prune, prune_logs, states
from tasks.backup.log_plan import Logs, OfDatabase
from tasks.backup.repository import Repository
from tests.unit.tasks.backup.log_history import DAY, Killed, MariaDB, three_days


def _settings(home: Path) -> Settings:
    keep = BackupSection(keep_daily=0, keep_weekly=0, keep_monthly=0, minimum_redundancy=1, unverified_days=0)
    return Settings(home=home, backups=[str(home / "unused")], backup=keep)


def _history() -> MariaDB:
    """Logs of before all backups, and three backups that are verified: two of them are to go."""
    history = three_days()
    assert isinstance(history, MariaDB)
    history.back_up()
    history.write()
    history.ship()
    for one in history.backups:
        facts = {"components": {"database:app": {"outcome": "verified"}}}
        history.repository.note_state(one.backup_id, states.VERIFIED, facts)
    return history


def _carry_out(settings: Settings, repository: Repository, said: list[str] | None = None) -> prune.Pruned:
    say: Callable[[str], None] = (lambda _: None) if said is None else said.append
    return prune.carry_out(settings, repository, now=clock.now(), say=say)


def _recorded(settings: Settings) -> list[dict[str, Any]]:
    """What the audit chain says of what was removed, oldest first."""
    database = open_database(settings)
    try:
        with database.read() as session:
            events = session.query(AuditEvent).filter(AuditEvent.action == "backup.pruned").order_by(AuditEvent.seq)
            return [dict(json.loads(one.text)["before"]) for one in events]
    finally:
        database.dispose()


def _dying(history: MariaDB, part: str, number: int) -> None:
    """Killed before the so many-th name with this in it is deleted."""
    left = [number]

    def die(name: str) -> None:
        left[0] -= part in name
        if left[0] == 0:
            raise Killed

    history.places[0].before_delete = die


def test_each_backup_and_the_logs_of_each_database_are_on_record_with_rules_and_numbers(tmp_path: Path) -> None:
    history, settings = _history(), _settings(tmp_path)
    found = _carry_out(settings, history.repository)
    assert len(found.removed) == 2
    *backups, logs = _recorded(settings)
    assert [list(one["removed"]) for one in backups] == [[one] for one in found.removed]
    assert all(one["removed"][name] and one["logs"] == {} for one in backups for name in one["removed"])
    first, last = "000001/binlog.000001", "000001/binlog.000002"
    assert logs == {"removed": {}, "logs": {"app": {"count": 2, "first": first, "last": last}}}
    assert found.logs.removed == logs["logs"]
    assert _carry_out(settings, history.repository).removed == () and len(_recorded(settings)) == 3


def test_a_prune_that_is_killed_between_two_backups_has_the_first_on_record(tmp_path: Path) -> None:
    history, settings = _history(), _settings(tmp_path)
    _dying(history, ".manifest.json", 2)
    with pytest.raises(Killed):
        _carry_out(settings, history.repository)
    [event] = _recorded(settings)
    [gone] = event["removed"]
    assert gone not in [one.backup_id for one in history.repository.manifests()]


def test_a_collection_that_fails_or_is_killed_takes_no_record_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, error in enumerate((StorageError("the bucket does not answer"), Killed())):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(garbage, "collect", fail)
        history, settings = _history(), _settings(tmp_path / str(number))
        with pytest.raises(type(error)):
            _carry_out(settings, history.repository)
        assert len(_recorded(settings)) == 2


def test_a_prune_that_is_cut_off_between_two_logs_has_the_first_on_record(tmp_path: Path) -> None:
    history, settings = _history(), _settings(tmp_path)
    _dying(history, "binlog.000002.json", 1)
    with pytest.raises(Killed):
        _carry_out(settings, history.repository)
    assert _recorded(settings)[-1]["logs"]["app"]["count"] == 1


def test_what_a_round_deleted_is_on_record_before_the_next_begins(tmp_path: Path) -> None:
    history, passed, kept = three_days(), [0.0], list[list[str]]()

    def slow(name: str) -> None:
        passed[0] += prune_logs.SECONDS if ".pieces/" in name else 0

    def between(_: float) -> None:
        assert kept == [["000001/binlog.000001"]]

    def record(database: str, removed: Any) -> None:
        assert database == "app"
        kept.append(list(removed))

    history.places[0].before_delete = slow
    found = prune_logs.carry_out(
        history.repository, tmp_path, now=clock.now(), grace=DAY, record=record, monotonic=lambda: passed[0], sleep=between
    )  # fmt: skip
    assert kept == [["000001/binlog.000001"], ["000001/binlog.000002"]] and found.removed["app"]["count"] == 2


def test_what_the_audit_chain_did_not_take_is_told_by_name_and_the_prune_goes_on(tmp_path: Path) -> None:
    history, settings = _history(), _settings(tmp_path)
    (tmp_path / "audit.anchors").write_text("there was a registry\n")
    said: list[str] = []
    found = _carry_out(settings, history.repository, said)
    assert len(found.removed) == 2 and found.logs.removed["app"]["count"] == 2
    told = [one for one in said if "not in the audit chain" in one]
    assert len(told) == 3 and all("is gone" in one for one in told)
    for text in (*found.removed, "logs of app, 2 from 000001/binlog.000001 to 000001/binlog.000002"):
        assert any(text in one for one in told)


def test_a_full_disk_keeps_no_removal_out_of_the_audit_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("backups.json cannot be written: the disk is full")

    monkeypatch.setattr(ledger, "note_removed", full)
    history, settings, said = _history(), _settings(tmp_path), list[str]()
    assert len(_carry_out(settings, history.repository, said).removed) == 2
    assert len(_recorded(settings)) == 3
    assert len([one for one in said if "the disk is full" in one]) == 2


def test_a_summary_tells_each_fault_once() -> None:
    away = "the bucket does not answer"
    refused = {"000001/binlog.000001": "the folder is read-only"}
    of_app = OfDatabase("app", "a rule", 3, goes=(), unreadable="its document is damaged")
    item = log_plan.Item(1, "binlog.000001")
    of_shop = OfDatabase("shop", "a rule", 3, goes=(item,), first=(1, 2), refused=refused, unlocked=refused)
    found = prune.Pruned(
        (), {}, True, kept_by_place={"b": "it is locked"}, unreadable={"c": "cut"}, logs=Logs((of_app, of_shop), away, failed=True)
    )  # fmt: skip
    for text in (away, "its document is damaged", "the folder is read-only", "it is locked", "cut"):
        assert found.summary.count(text) == 1
    assert set(found.troubles) == {"b", "c", "logs of app", "logs of shop", "shipped logs"}
