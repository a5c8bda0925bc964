"""backups.json: what is known of the backups without asking where they are."""

from __future__ import annotations

import datetime as dt
import threading
from pathlib import Path
from typing import Any

import pytest

from registry import clock
from registry import ledger as document
from registry.errors import StorageError
from tasks.backup import ledger
from tasks.backup.manifest import Component, Manifest


def _manifest(backup_id: str = "20261121T020000Z-000000", state: str = "complete", **sizes: int) -> Manifest:
    made = tuple(
        Component(name, "fake", "complete", f"2026-11-{backup_id[6:8]}T00:00:00.000000Z", "t", size_bytes=size)
        for name, size in (sizes or {"models": 5}).items()
    )
    return Manifest(backup_id, "i", state, "2026-11-21T00:00:00.000000Z", "t", ("all",), made)


def _row(home: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = (document.read(home) or {})["components"][name]
    return found


def test_there_is_nothing_before_the_first_backup(tmp_path: Path) -> None:
    assert document.read(tmp_path) is None
    assert ledger.summary(tmp_path) is None
    assert ledger.expected(tmp_path) == {}


def test_a_backup_of_some_components_leaves_the_rows_of_the_others(tmp_path: Path) -> None:
    ledger.note_backup(tmp_path, _manifest("20261101T000000Z-000000", models=5, registry=7), places={"/b": "stored"})
    ledger.note_backup(tmp_path, _manifest("20261102T000000Z-000000", models=6), places={"/b": "stored"})
    assert ledger.expected(tmp_path) == {"models": 6, "registry": 7}
    assert _row(tmp_path, "registry")["backup_id"] == "20261101T000000Z-000000"


def test_an_older_backup_that_is_verified_later_does_not_hide_a_newer_verified_one(tmp_path: Path) -> None:
    older, newer = _manifest("20261101T000000Z-000000"), _manifest("20261102T000000Z-000000")
    for manifest in (newer, older):
        ledger.note_check(tmp_path, manifest, {"models": {"outcome": "verified"}}, whole=True)
    assert _row(tmp_path, "models")["verified_backup_id"] == newer.backup_id


@pytest.mark.parametrize("how", ["damaged", "pruned"])
def test_a_verified_one_that_is_damaged_or_gone_counts_no_more(tmp_path: Path, how: str) -> None:
    manifest = _manifest()
    ledger.note_check(tmp_path, manifest, {"models": {"outcome": "verified"}}, whole=True)
    if how == "damaged":
        outcome = {"outcome": "failed-verification", "why": "rows"}
        ledger.note_check(tmp_path, manifest, {"models": outcome}, whole=False)
    else:
        ledger.note_removed(tmp_path, [manifest.backup_id])
    assert "verified_as_of" not in _row(tmp_path, "models")


def test_a_sample_verifies_nothing(tmp_path: Path) -> None:
    ledger.note_check(tmp_path, _manifest(), {"models": {"outcome": "verified"}}, whole=False)
    assert "verified_as_of" not in _row(tmp_path, "models")


def test_a_killed_backup_that_is_found_later_does_not_hide_a_newer_one(tmp_path: Path) -> None:
    ledger.note_backup(tmp_path, _manifest("20261102T000000Z-000000"), places={})
    ledger.note_failed(tmp_path, "20261101T000000Z-000000", began_at=None, requested=(), why="killed")
    assert (document.read(tmp_path) or {})["last"]["state"] == "complete"
    ledger.note_failed(tmp_path, "20261103T000000Z-000000", began_at=None, requested=(), why="killed")
    assert (document.read(tmp_path) or {})["last"]["state"] == "failed"


def test_several_writers_lose_nothing_of_each_other(tmp_path: Path) -> None:
    def write(number: int) -> None:
        def alter(found: dict[str, Any]) -> None:
            found.setdefault("drill", {})[str(number)] = True

        document.change(tmp_path, alter)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len((document.read(tmp_path) or {})["drill"]) == 20


def test_a_damaged_file_is_written_anew_and_a_folder_in_its_place_is_told(tmp_path: Path) -> None:
    document.path_of(tmp_path).write_text("{torn")
    ledger.note_backup(tmp_path, _manifest(), places={})
    assert ledger.expected(tmp_path) == {"models": 5}
    document.path_of(tmp_path).unlink()
    document.path_of(tmp_path).mkdir()
    with pytest.raises(StorageError, match=r"backups\.json"):
        ledger.note_backup(tmp_path, _manifest(), places={})


def _shipped(**changed: Any) -> dict[str, Any]:
    at = clock.text(clock.now())
    return {"database": "app", "covers_until": at, "gap": None, "lost": None, "failed": None, **changed}


def test_status_tells_how_far_the_logs_reach_and_whether_that_is_late(tmp_path: Path) -> None:
    assert ledger.summary(tmp_path, ["app"]) == {
        "last": None, "components": {}, "damaged": {}, "drill": None,
        "logs": {"app": {"covers_until": None, "age_seconds": None, "late": True, "gap": None, "lost": None, "failed": None}},
    }  # fmt: skip
    ledger.note_shipped(tmp_path, _shipped(), ["app"])
    known = ledger.summary(tmp_path, ["app"])
    assert known is not None and known["logs"]["app"]["late"] is False and known["logs"]["app"]["age_seconds"] >= 0
    old = clock.now() - dt.timedelta(seconds=ledger.LATE_RUNS * ledger.SHIP_SECONDS + 1)
    ledger.note_shipped(tmp_path, _shipped(covers_until=clock.text(old), gap="a gap"), ["app"])
    known = ledger.summary(tmp_path, ["app"])
    assert known is not None and known["logs"]["app"]["late"] is True and known["logs"]["app"]["gap"] == "a gap"


def test_a_database_server_whose_clock_is_ahead_hides_no_late_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.note_shipped(tmp_path, _shipped(covers_until=clock.text(clock.now() + dt.timedelta(days=3))), ["app"])
    later = clock.now() + dt.timedelta(hours=1)
    monkeypatch.setattr(clock, "now", lambda: later)
    known = ledger.summary(tmp_path, ["app"])
    assert known is not None and known["logs"]["app"]["late"] is True and known["logs"]["app"]["age_seconds"] >= 3599


def test_a_run_that_ships_nothing_keeps_what_is_known_and_says_why(tmp_path: Path) -> None:
    ledger.note_shipped(tmp_path, _shipped(covers_until="2026-11-01T00:00:00.000000Z"), ["app"])
    ledger.note_shipped(tmp_path, _shipped(covers_until=None, failed="the server is away"), ["app"])
    row = (document.read(tmp_path) or {})["logs"]["app"]
    assert row["covers_until"] == "2026-11-01T00:00:00.000000Z" and row["failed"] == "the server is away"


def test_a_database_whose_logs_are_shipped_no_more_is_forgotten(tmp_path: Path) -> None:
    ledger.note_shipped(tmp_path, _shipped(), ["app"])
    ledger.note_shipped(tmp_path, _shipped(database="other"), ["other"])
    assert set((document.read(tmp_path) or {})["logs"]) == {"other"}
    ledger.forget_logs(tmp_path)
    assert "logs" not in (document.read(tmp_path) or {})


def test_logs_are_late_by_the_schedule_that_ships_them() -> None:
    text = (Path(__file__).parents[4] / "prefect.yaml").read_text(encoding="utf-8")
    minutes = int(ledger.SHIP_SECONDS) // 60
    assert f'cron: "*/{minutes} * * * *"' in text.partition("name: ship-logs")[2].partition("- name:")[0]
