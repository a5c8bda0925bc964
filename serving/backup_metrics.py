"""The backups of this installation as metrics: what backups.json under home says, read again when it has changed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from registry import clock, ledger

MOST_COMPONENTS = 100
"""Labels are bounded: the first so many by name."""
_STATES = ("complete", "partial", "failed")


class BackupMetrics:
    """`collect()` gives nothing where no backup was ever taken from this home."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._seen: tuple[int, int, int] | None = None
        self._document: dict[str, Any] | None = None

    def collect(self) -> Iterator[Metric]:
        document = self._read()
        if document is not None:
            yield from _families(document, clock.now())

    def _read(self) -> dict[str, Any] | None:
        try:
            found = ledger.path_of(self._home).stat()
        except OSError:
            self._seen = self._document = None
            return None
        mark = (found.st_mtime_ns, found.st_size, found.st_ino)
        if mark != self._seen:
            self._seen, self._document = mark, ledger.read(self._home)
        return self._document


def _families(document: Mapping[str, Any], now: dt.datetime) -> Iterator[Metric]:
    rows = dict(sorted(_mapping(document.get("components")).items())[:MOST_COMPONENTS])
    verified = GaugeMetricFamily(
        "modelkeep_backup_last_verified_age_seconds",
        "Age of the newest backup that was restored and compared.",
        labels=["component"],
    )
    taken = GaugeMetricFamily(
        "modelkeep_backup_last_age_seconds", "Age of the newest complete backup.", labels=["component"]
    )
    size = GaugeMetricFamily("modelkeep_backup_bytes", "Size of its content.", labels=["component"])
    stored = GaugeMetricFamily(
        "modelkeep_backup_stored_bytes", "What it takes where it is stored.", labels=["component"]
    )
    for name, found in rows.items():
        row = _mapping(found)
        for family, value in (
            (verified, _age(row.get("verified_as_of"), now)),
            (taken, _age(row.get("backed_up_at"), now)),
            (size, _number(row.get("size_bytes"))),
            (stored, _number(row.get("stored_bytes"))),
        ):
            if value is not None:
                family.add_metric([name], value)
    yield from (verified, taken, size, stored)
    last = _mapping(document.get("last"))
    if last.get("state") in _STATES:
        state = GaugeMetricFamily("modelkeep_backup_last_state", "1 for how the last backup ended.", labels=["state"])
        for name in _STATES:
            state.add_metric([name], float(name == last["state"]))
        yield state
    yield from _logs(_mapping(document.get("logs")), now)
    yield from _drill(_mapping(document.get("drill")), now)


def _logs(logs: Mapping[str, Any], now: dt.datetime) -> Iterator[Metric]:
    if not logs:
        return
    age = GaugeMetricFamily(
        "modelkeep_backup_logs_age_seconds",
        "Time since the moment up to which the database's logs are shipped.",
        labels=["database"],
    )
    gap = GaugeMetricFamily(
        "modelkeep_backup_logs_gap",
        "1 where no backup can use the logs that are shipped now: something before them is lost.",
        labels=["database"],
    )
    failed = GaugeMetricFamily(
        "modelkeep_backup_logs_failed", "1 where the last run shipped nothing of it.", labels=["database"]
    )
    for name, found in sorted(logs.items())[:MOST_COMPONENTS]:
        row = _mapping(found)
        # The first is by the clock of the database's server, which may be ahead of ours.
        ages = [value for key in ("covers_until", "shipped_at") if (value := _age(row.get(key), now)) is not None]
        if ages:
            age.add_metric([name], max(ages))
            gap.add_metric([name], float(bool(row.get("gap"))))
        failed.add_metric([name], float(bool(row.get("failed"))))
    yield from (age, gap, failed)


def _drill(drill: Mapping[str, Any], now: dt.datetime) -> Iterator[Metric]:
    if not isinstance(drill.get("passed"), bool):
        return
    yield GaugeMetricFamily("modelkeep_drill_passed", "1 where the last drill passed.", value=float(drill["passed"]))
    age = _age(drill.get("at"), now)
    if age is not None:
        yield GaugeMetricFamily("modelkeep_drill_age_seconds", "Time since the last drill.", value=age)
    rto = GaugeMetricFamily("modelkeep_drill_rto_seconds", "How long recovery took in it.", labels=["component"])
    rpo = GaugeMetricFamily("modelkeep_drill_rpo_seconds", "Age of what it recovered.", labels=["component"])
    for name, row in sorted(_mapping(drill.get("components")).items())[:MOST_COMPONENTS]:
        for family, key in ((rto, "rto_seconds"), (rpo, "rpo_seconds")):
            value = _number(_mapping(row).get(key))
            if value is not None:
                family.add_metric([name], value)
    yield from (rto, rpo)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _age(text: Any, now: dt.datetime) -> float | None:
    if not isinstance(text, str):
        return None
    try:
        return max(0.0, (now - dt.datetime.fromisoformat(text)).total_seconds())
    except (ValueError, TypeError):
        return None
