"""The backups in /metrics: what backups.json says, and nothing where there is none."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from registry import clock, ledger
from serving.views.backup_metrics import MOST_COMPONENTS, BackupMetrics

NOW = dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC)


class _Only(Collector):
    def __init__(self, metrics: BackupMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Any:
        return self._metrics.collect()

    def describe(self) -> Any:
        return iter(())


def _samples(metrics: BackupMetrics) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    registry.register(_Only(metrics))
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


@pytest.fixture(autouse=True)
def _noon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: NOW)


def _write(home: Path, **fields: Any) -> None:
    def alter(document: dict[str, Any]) -> None:
        document.update(fields)

    ledger.change(home, alter)


def test_a_home_without_backups_has_no_such_metrics(tmp_path: Path) -> None:
    assert _samples(BackupMetrics(tmp_path)) == {}


def test_age_of_the_last_verified_backup_sizes_last_result_and_drill_are_shown(tmp_path: Path) -> None:
    _write(
        tmp_path,
        components={
            "registry": {
                "verified_as_of": clock.text(NOW - dt.timedelta(hours=2)),
                "backed_up_at": clock.text(NOW - dt.timedelta(minutes=1)),
                "size_bytes": 12,
                "stored_bytes": 5,
            },
            "database:app": {"backed_up_at": clock.text(NOW)},
        },
        last={"state": "partial"},
        drill={
            "passed": False,
            "at": clock.text(NOW),
            "components": {"registry": {"rto_seconds": 3, "rpo_seconds": 9.5}},
        },
    )
    found = _samples(BackupMetrics(tmp_path))
    assert found[("modelkeep_backup_last_verified_age_seconds", "registry")] == 7200
    assert ("modelkeep_backup_last_verified_age_seconds", "database:app") not in found
    assert found[("modelkeep_backup_last_age_seconds", "registry")] == 60
    assert found[("modelkeep_backup_bytes", "registry")] == 12
    assert found[("modelkeep_backup_stored_bytes", "registry")] == 5
    assert found[("modelkeep_backup_last_state", "partial")] == 1
    assert found[("modelkeep_backup_last_state", "complete")] == 0
    assert found[("modelkeep_drill_passed", "")] == 0
    assert found[("modelkeep_drill_rto_seconds", "registry")] == 3
    assert found[("modelkeep_drill_rpo_seconds", "registry")] == 9.5


def test_the_age_of_shipped_logs_a_gap_and_a_failure_are_shown_by_database(tmp_path: Path) -> None:
    _write(
        tmp_path,
        logs={
            "app": {"covers_until": clock.text(NOW - dt.timedelta(minutes=4)), "gap": None, "failed": None},
            "shop": {"covers_until": clock.text(NOW - dt.timedelta(hours=2)), "gap": "purged", "failed": "it is away"},
            "new": {"failed": "it is away"},
            "odd": 3,
        },
    )
    found = _samples(BackupMetrics(tmp_path))
    name = "modelkeep_backup_logs_"
    assert found[(f"{name}age_seconds", "app")] == 240 and found[(f"{name}age_seconds", "shop")] == 7200
    assert found[(f"{name}gap", "app")] == 0 and found[(f"{name}gap", "shop")] == 1
    assert [found[(f"{name}failed", one)] for one in ("app", "shop", "new")] == [0, 1, 1]
    assert (f"{name}age_seconds", "new") not in found


def test_a_database_server_whose_clock_is_ahead_hides_no_late_logs(tmp_path: Path) -> None:
    row = {"covers_until": "2026-11-24T12:00:00.000000Z", "shipped_at": "2026-11-21T11:00:00.000000Z", "gap": None}
    _write(tmp_path, logs={"app": row})
    assert _samples(BackupMetrics(tmp_path))[("modelkeep_backup_logs_age_seconds", "app")] == 3600


def test_a_changed_file_is_seen_and_an_unchanged_one_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    real = ledger.read
    _write(tmp_path, components={"models": {"size_bytes": 1}})

    def counted(home: Path) -> Any:
        reads.append(home)
        return real(home)

    monkeypatch.setattr(ledger, "read", counted)
    metrics = BackupMetrics(tmp_path)
    assert _samples(metrics) == _samples(metrics)
    assert len(reads) == 1
    ledger.path_of(tmp_path).unlink()
    assert _samples(metrics) == {}
    _write(tmp_path, components={"models": {"size_bytes": 22}})
    assert _samples(metrics)[("modelkeep_backup_bytes", "models")] == 22


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"format": 99}', '{"format": 1, "components": {"a": 3}, "last": [], "drill": {"passed": "x"}}'],
)
def test_a_file_that_makes_no_sense_breaks_no_scrape(tmp_path: Path, text: str) -> None:
    ledger.path_of(tmp_path).write_text(text)
    assert _samples(BackupMetrics(tmp_path)) == {}


def test_the_number_of_labels_is_bounded(tmp_path: Path) -> None:
    _write(tmp_path, components={f"files:{n:04}": {"size_bytes": n} for n in range(3 * MOST_COMPONENTS)})
    assert len(_samples(BackupMetrics(tmp_path))) == MOST_COMPONENTS
